package snap

import (
	"hash/crc32"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Summing returns fsys with one addition: the checksums of tables written through
// it are computed while they are written and kept in c, so that an image of the
// database they belong to reads none of them. To read each table again, when the
// image is made, costs as much as the state is large after every compaction, and
// takes damage that came in between for what was meant.
//
// A table counts once it was synced as a whole and closed; what fails is left
// out, and read when its time comes.
func (c *SumCache) Summing(fsys vfs.FS) vfs.FS { return summingFS{FS: fsys, sums: c} }

type summingFS struct {
	vfs.FS
	sums *SumCache
}

// Unwrap returns the file system below.
func (s summingFS) Unwrap() vfs.FS { return s.FS }

func (s summingFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, category)
	if err != nil || !immutable(name) {
		return f, err
	}
	return &summingFile{File: f, sums: s.sums}, nil
}

// Remove forgets a table with its last name: without images being made, nothing
// else would.
func (s summingFS) Remove(name string) error {
	var id fileIdentity
	last := false
	if immutable(name) {
		if st, err := s.FS.Stat(name); err == nil {
			id, last = identify(st)
			last = last && links(st) <= 1
		}
	}
	err := s.FS.Remove(name)
	if err == nil && last {
		s.sums.forget(id)
	}
	return err
}

// summingFile is a table that is being written, from its beginning to its end.
type summingFile struct {
	vfs.File
	sums *SumCache
	// size and crc are of what was written. Writes come one at a time.
	size int64
	crc  uint32
	// durable is size at the last sync.
	durable int64
	// strange is set when something happened that the checksum does not follow.
	// Preallocate may come from elsewhere than Write.
	strange atomic.Bool
}

func (f *summingFile) Write(p []byte) (int, error) {
	// Before the write: it may scribble over p.
	crc := crc32.Update(f.crc, castagnoli, p)
	n, err := f.File.Write(p)
	if err != nil || n != len(p) {
		f.strange.Store(true)
		return n, err
	}
	f.crc, f.size = crc, f.size+int64(n)
	return n, nil
}

func (f *summingFile) WriteAt(p []byte, off int64) (int, error) {
	f.strange.Store(true)
	return f.File.WriteAt(p, off)
}

func (f *summingFile) Sync() error { return f.synced(f.File.Sync()) }

func (f *summingFile) SyncData() error { return f.synced(f.File.SyncData()) }

func (f *summingFile) synced(err error) error {
	if err != nil {
		f.strange.Store(true)
		return err
	}
	f.durable = f.size
	return nil
}

// SyncTo is what Pebble calls while a table grows. Even a full sync of it leaves
// open what becomes of the metadata, so it does not count as durable.
func (f *summingFile) SyncTo(length int64) (bool, error) {
	full, err := f.File.SyncTo(length)
	if err != nil {
		f.strange.Store(true)
	}
	return full, err
}

// Close ends the table and hands its checksum over.
func (f *summingFile) Close() error {
	var id fileIdentity
	known := false
	if !f.strange.Load() && f.durable == f.size {
		if st, err := f.Stat(); err == nil {
			// Preallocation that was not cut off makes it another file.
			if id, known = identify(st); known {
				known = id.size == f.size
			}
		}
	}
	if err := f.File.Close(); err != nil {
		return err
	}
	if known {
		f.sums.put(id, f.crc, true)
	}
	return nil
}
