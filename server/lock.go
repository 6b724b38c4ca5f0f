package server

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const lockName = "LOCK"

// dirLock is the exclusive right to a data directory. The kernel takes it back
// when the process ends, however it ends, so a lock is never left behind.
type dirLock struct{ f *os.File }

// lockDir takes the lock of dir or returns an error that matches ErrInUse.
func lockDir(dir string) (*dirLock, error) {
	name := filepath.Join(dir, lockName)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the data directory: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		holder := ""
		if raw, readErr := io.ReadAll(io.LimitReader(f, 32)); readErr == nil {
			if pid := strings.TrimSpace(string(raw)); pid != "" {
				holder = " (process " + pid + ")"
			}
		}
		f.Close()
		return nil, fmt.Errorf("%w: %s is locked by another router%s; stop that one or give this one its own --data-dir",
			ErrInUse, dir, holder)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the data directory %s: %w", dir, err)
	}
	// The process id is for people only; what locks is the kernel.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return &dirLock{f}, nil
}

func (l *dirLock) release() error { return l.f.Close() }
