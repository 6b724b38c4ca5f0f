package datadir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DirLock is the right to a data directory. The kernel takes it back when the
// process ends, however it ends, so a lock is never left behind.
type DirLock struct{ f *os.File }

// Lock takes the exclusive lock of dir, for a node or for a tool that changes
// the directory, or returns an error that matches ErrInUse. It never waits.
func Lock(dir string) (*DirLock, error) {
	name := filepath.Join(dir, LockName)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the data directory: %w", err)
	}
	if err := take(f, dir, unix.LOCK_EX); err != nil {
		return nil, err
	}
	// The process id is for people only; what locks is the kernel.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return &DirLock{f}, nil
}

// LockShared keeps nodes and changing tools away from dir while it is read, or
// returns an error that matches ErrInUse. Several readers may hold it at once.
// It writes nothing, so it also works where nothing can be written; without a
// LOCK file no node has ever run on dir, as on a copy, and the log is locked
// instead.
func LockShared(dir string) (*DirLock, error) {
	for _, name := range []string{LockName, WALName, "."} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) && name != "." {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open the lock of the data directory: %w", err)
		}
		if err := take(f, dir, unix.LOCK_SH); err != nil {
			return nil, err
		}
		return &DirLock{f}, nil
	}
	panic("unreachable")
}

// take locks f or closes it.
func take(f *os.File, dir string, how int) error {
	err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		holder := ""
		if raw, readErr := io.ReadAll(io.LimitReader(f, 32)); readErr == nil {
			if pid := strings.TrimSpace(string(raw)); pid != "" {
				holder = " (process " + pid + ")"
			}
		}
		f.Close()
		return fmt.Errorf("%w: %s is locked by another router%s; stop that one or give this one its own --data-dir",
			ErrInUse, dir, holder)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("lock the data directory %s: %w", dir, err)
	}
	return nil
}

// Release gives the right back. To close the file would not be enough: a child that
// this process is just starting has it open until it has become another program.
func (l *DirLock) Release() error {
	return errors.Join(unix.Flock(int(l.f.Fd()), unix.LOCK_UN), l.f.Close())
}
