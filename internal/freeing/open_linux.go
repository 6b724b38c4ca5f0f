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
	n, ok := spare(f)
	if !ok || unix.Fstat(int(f.Fd()), &st) != nil || !large(&st) {
		f.Close()
		return nil, 0
	}
	return &claim{f, st.Size}, n
}

// spare returns how many bytes of the disk of f are free; false where a removed file that
// is open is not what it is here. Network file systems give it another name in its
// directory, which cannot be removed then, and one that lies over another does not see who
// uses the file below.
func spare(f *os.File) (int64, bool) {
	var disk unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &disk) != nil {
		return 0, false
	}
	switch disk.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC:
	default:
		return 0, false
	}
	if block := uint64(disk.Frsize); disk.Frsize > 0 && disk.Bavail < math.MaxInt64/block {
		return int64(disk.Bavail * block), true
	}
	return 0, false
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

// stillAlone reports whether nobody has opened it since, who had found its name before it
// was removed.
func stillAlone(f *os.File) bool {
	lease, err := unix.FcntlInt(f.Fd(), unix.F_GETLEASE, 0)
	return err == nil && lease == unix.F_WRLCK
}
