package freeing

import (
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// open opens the file at path if it is to be freed in steps when this name of it is
// removed, and returns how many bytes of its disk are free.
func open(path string) (*claim, int64) {
	var st unix.Stat_t
	// Most are small, or have another name.
	if err := unix.Lstat(path, &st); err != nil || !large(&st) {
		return nil, 0
	}
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0
	}
	var disk unix.Statfs_t
	if unix.Fstat(int(f.Fd()), &st) != nil || !large(&st) || unix.Fstatfs(int(f.Fd()), &disk) != nil {
		f.Close()
		return nil, 0
	}
	spare := uint64(math.MaxInt64)
	if n := disk.Bavail; n < spare/uint64(disk.Bsize) {
		spare = n * uint64(disk.Bsize)
	}
	return &claim{f, st.Size}, int64(spare)
}

func large(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1 && st.Size >= least
}

// nameless reports whether nobody can open the file of f any more.
func nameless(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink == 0
}

// alone reports whether nobody else has the file of f open, who would read zeros of what is
// cut: only then it can be leased.
func alone(f *os.File) bool {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	return err == nil
}
