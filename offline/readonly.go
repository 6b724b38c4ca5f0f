package offline

import (
	"fmt"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// readOnly is a file system on which nothing can be changed. Pebble is opened on
// it, so that looking at a state leaves no trace even if Pebble meant to: it
// takes a lock by truncating a file, and tidies up when it can. The lock of the
// data directory stands in for Pebble's.
type readOnly struct{ vfs.FS }

func refuse(op, name string) error {
	return &os.PathError{Op: op, Path: name, Err: fmt.Errorf("the directory is only read: %w", os.ErrPermission)}
}

// Create implements vfs.FS.
func (readOnly) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, refuse("create", name)
}

// Link implements vfs.FS.
func (readOnly) Link(_, name string) error { return refuse("link", name) }

// OpenReadWrite implements vfs.FS.
func (readOnly) OpenReadWrite(name string, _ vfs.DiskWriteCategory, _ ...vfs.OpenOption) (vfs.File, error) {
	return nil, refuse("open", name)
}

// Remove implements vfs.FS.
func (readOnly) Remove(name string) error { return refuse("remove", name) }

// RemoveAll implements vfs.FS.
func (readOnly) RemoveAll(name string) error { return refuse("remove", name) }

// Rename implements vfs.FS.
func (readOnly) Rename(_, name string) error { return refuse("rename", name) }

// ReuseForWrite implements vfs.FS.
func (readOnly) ReuseForWrite(_, name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, refuse("reuse", name)
}

// MkdirAll implements vfs.FS. What is there need not be made.
func (r readOnly) MkdirAll(name string, _ os.FileMode) error {
	if st, err := r.Stat(name); err == nil && st.IsDir() {
		return nil
	}
	return refuse("mkdir", name)
}

// Lock implements vfs.FS.
func (readOnly) Lock(string) (io.Closer, error) { return noLock{}, nil }

// Unwrap implements vfs.FS.
func (r readOnly) Unwrap() vfs.FS { return r.FS }

type noLock struct{}

func (noLock) Close() error { return nil }
