package router

import "github.com/cockroachdb/pebble/v2/vfs"

// largeWrite is the size of the pieces in which tables are written. Pebble hands over
// each block by itself, 8 KiB of it, and a system call for each, and for the kernel as
// many small pieces of its cache, are a sixth of what a flush costs.
const largeWrite = 128 << 10

// largeWritesFS gathers what is written into the files of flushes and compactions. Pebble
// compares file systems, so it is used by its address.
type largeWritesFS struct{ vfs.FS }

// Unwrap returns the file system below.
func (s *largeWritesFS) Unwrap() vfs.FS { return s.FS }

func (s *largeWritesFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, category)
	if err != nil {
		return nil, err
	}
	switch category {
	case flushCategory, compactionCategory, rewriteCategory:
		return &largeWritesFile{File: f, gathered: make([]byte, 0, largeWrite)}, nil
	}
	return f, nil
}

// largeWritesFile is a file that is written by one goroutine, from its beginning to its end.
type largeWritesFile struct {
	vfs.File
	gathered []byte
	// failure is of a write that was answered before it was made: every later call
	// fails with it, or the file would be taken for complete. The file is closed then.
	failure error
}

// Write implements vfs.File. What it took is on its way with the next sync, or with Close.
func (f *largeWritesFile) Write(p []byte) (int, error) {
	taken := 0
	for f.failure == nil && taken < len(p) {
		n := min(len(p)-taken, cap(f.gathered)-len(f.gathered))
		f.gathered = append(f.gathered, p[taken:taken+n]...)
		taken += n
		if len(f.gathered) == cap(f.gathered) {
			_ = f.hand()
		}
	}
	if f.failure != nil {
		return 0, f.failure
	}
	return taken, nil
}

// hand hands on what was gathered. If that fails it closes the file: Pebble syncs what it
// gives up before it closes it, and does not close what it cannot sync, so a file that
// was removed would hold its space on a disk that is full until it is collected.
func (f *largeWritesFile) hand() error {
	if f.failure == nil && len(f.gathered) > 0 {
		if _, f.failure = f.File.Write(f.gathered); f.failure != nil {
			_ = f.File.Close() // nothing in it counts
		}
		f.gathered = f.gathered[:0]
	}
	return f.failure
}

// Sync implements vfs.File.
func (f *largeWritesFile) Sync() error {
	if err := f.hand(); err != nil {
		return err
	}
	return f.File.Sync()
}

// SyncData implements vfs.File.
func (f *largeWritesFile) SyncData() error {
	if err := f.hand(); err != nil {
		return err
	}
	return f.File.SyncData()
}

// SyncTo implements vfs.File.
func (f *largeWritesFile) SyncTo(length int64) (bool, error) {
	if err := f.hand(); err != nil {
		return false, err
	}
	return f.File.SyncTo(length)
}

// Close implements vfs.File. The file is closed in any case.
func (f *largeWritesFile) Close() error {
	if err := f.hand(); err != nil {
		return err
	}
	return f.File.Close()
}
