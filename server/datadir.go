package server

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// makeDataDir creates dir and what is missing above it, durably: a directory
// whose name was never synced into its parent is gone after a power failure,
// with every synced file in it, and the node would begin anew under its old id.
func makeDataDir(dir string) error {
	parent := filepath.Dir(dir)
	if st, err := os.Stat(dir); err == nil && st.IsDir() {
		// An earlier start may have been killed before it synced the name. One
		// that may not be opened for that, as above a mounted volume, is not of
		// our making.
		_ = syncDir(parent)
		return nil
	}
	if parent != dir {
		if err := makeDataDir(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

// emptyOrGone reports whether dir holds nothing. A log directory whose files
// were removed is as lost as one that is gone: wal.Open would begin a new log in
// it.
func emptyOrGone(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return len(entries) == 0, err
}
