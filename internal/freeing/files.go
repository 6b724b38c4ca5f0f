package freeing

import (
	"io/fs"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// FS returns fsys, which is that of the operating system, with one difference: what is
// removed is removed by r.
func (r *Reaper) FS(fsys vfs.FS) vfs.FS { return &files{fsys, r} }

// files is used by its address: Pebble compares file systems.
type files struct {
	vfs.FS
	r *Reaper
}

// Unwrap returns the file system below.
func (s *files) Unwrap() vfs.FS { return s.FS }

// Remove implements vfs.FS.
func (s *files) Remove(name string) error {
	return s.r.remove([]string{name}, func() error { return s.FS.Remove(name) })
}

// RemoveAll implements vfs.FS.
func (s *files) RemoveAll(name string) error {
	var names []string
	// What cannot be read is for RemoveAll to tell of.
	_ = filepath.WalkDir(name, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			names = append(names, path)
		}
		return nil
	})
	return s.r.remove(names, func() error { return s.FS.RemoveAll(name) })
}
