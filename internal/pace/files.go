package pace

import "github.com/cockroachdb/pebble/v2/vfs"

// Times returns how long the writing of files of a category rests, in times of what it
// worked; 0 for not at all, nil for a category that never does. What it returns is called
// from whatever goroutine writes.
type Times func(vfs.DiskWriteCategory) func() float64

// Files returns fsys with one addition: who creates a file and writes it rests in
// between. Pebble writes a table block by block, as it makes the blocks, so this sets the
// pace of all of a flush and of a compaction.
func (p *Pace) Files(fsys vfs.FS, times Times) vfs.FS {
	return &pacedFS{FS: fsys, p: p, times: times}
}

// pacedFS is used by its address: Pebble compares file systems.
type pacedFS struct {
	vfs.FS
	p     *Pace
	times Times
}

// Unwrap returns the file system below.
func (s *pacedFS) Unwrap() vfs.FS { return s.FS }

func (s *pacedFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, category)
	times := s.times(category)
	if err != nil || times == nil {
		return f, err
	}
	return &pacedFile{File: f, work: s.p.Begin(), times: times}, nil
}

// pacedFile is a file that is written from its beginning to its end.
type pacedFile struct {
	vfs.File
	work  *Work
	times func() float64
}

func (f *pacedFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	if err == nil {
		f.work.Rest(f.times)
	}
	return n, err
}
