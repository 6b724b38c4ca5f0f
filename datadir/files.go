package datadir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The names in a data directory.
const (
	IdentityName = "IDENTITY"
	LockName     = "LOCK"
	WALName      = "wal"
	StateName    = "state"
	ImagesName   = "images"
	BackupsName  = "backups"
	// lostFound is what some file systems put into their root, which may be the
	// data directory.
	lostFound = "lost+found"
)

// Make creates dir and what is missing above it, durably: a directory whose
// name was never synced into its parent is gone after a power failure, with
// every synced file in it, and the node would begin anew under its old id.
func Make(dir string) error {
	parent := filepath.Dir(dir)
	if st, err := os.Stat(dir); err == nil && st.IsDir() {
		// An earlier start may have been killed before it synced the name. One
		// that may not be opened for that, as above a mounted volume, is not of
		// our making.
		_ = SyncDir(parent)
		return nil
	}
	if parent != dir {
		if err := Make(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return SyncDir(parent)
}

// EmptyOrGone reports whether dir holds nothing. A log directory whose files
// were removed is as lost as one that is gone: opening it would begin a new log
// in it.
func EmptyOrGone(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return len(entries) == 0, err
}

// Foreign returns a name in dir that a new data directory must not hold, ""
// when there is none. The lock and leftovers of an interrupted beginning do not
// count.
func Foreign(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("read the data directory: %w", err)
	}
	for _, e := range entries {
		switch e.Name() {
		case LockName, IdentityName + tmpSuffix, lostFound, nextName:
		default:
			return e.Name(), nil
		}
	}
	return "", nil
}

const tmpSuffix = ".tmp"

// WriteFile puts raw into the file name, whole or not at all, durably.
func WriteFile(name string, raw []byte) error {
	tmp := name + tmpSuffix
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, name); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(name))
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// FreeBytes returns how many bytes an ordinary user may still write into the
// file system of dir.
func FreeBytes(dir string) (uint64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, fmt.Errorf("ask for the free space of %s: %w", dir, err)
	}
	return s.Bavail * uint64(s.Bsize), nil
}

// Size returns the bytes of all files below dir; 0 when it is not there.
func Size(dir string) (uint64, error) {
	var total uint64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			total += uint64(info.Size())
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("measure %s: %w", dir, err)
	}
	return total, nil
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
