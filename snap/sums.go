package snap

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// SumCache remembers the checksums of tables, so that an image of a state whose
// tables were written through Summing, received, warmed or imaged before reads none
// of them. Stores that image the same state may share one. Its methods are safe for
// concurrent use.
//
// A table is known by its inode: every image links to the same one as the live
// database. Names do not matter, and files without an inode (in memory) are
// read every time.
//
// Should the file system give an inode away again within one clock tick, to a
// table of the same size, then the image gets a checksum that its bytes do not
// have: whoever reads the image refuses it. No damage goes unnoticed.
type SumCache struct {
	mu   sync.Mutex
	pass uint64
	sums map[fileIdentity]*cachedSum
}

// keepPasses is how many passes over a directory a checksum is kept unused.
// Images are made and tables are warmed by turns, and not all of them see the
// same tables.
const keepPasses = 8

// fileIdentity is what no two tables share. The time of the last change guards
// against an inode that was given away again.
type fileIdentity struct {
	dev, ino     uint64
	size         int64
	modified, ns int64
}

type cachedSum struct {
	crc  uint32
	used uint64 // pass
	// durable: the content was synced after it was written.
	durable bool
}

// NewSumCache returns an empty cache.
func NewSumCache() *SumCache { return &SumCache{sums: map[fileIdentity]*cachedSum{}} }

// immutable reports whether a file of this name never changes once it is
// complete. Those are the tables of the state machine's database; manifests and
// the like grow in place.
func immutable(name string) bool {
	return strings.HasSuffix(name, ".sst") || strings.HasSuffix(name, ".blob")
}

// identify returns what st tells of a file; ok is false where it has no inode.
func identify(st vfs.FileInfo) (id fileIdentity, ok bool) {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Ino == 0 {
		return fileIdentity{}, false
	}
	return fileIdentity{
		dev: uint64(sys.Dev), ino: sys.Ino, size: st.Size(),
		modified: st.ModTime().Unix(), ns: int64(st.ModTime().Nanosecond()),
	}, true
}

// links returns how many names the file has, of which st tells.
func links(st vfs.FileInfo) uint64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return uint64(sys.Nlink)
	}
	return 0
}

// begin starts a pass and forgets what the last ones did not need.
func (c *SumCache) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pass++
	for id, s := range c.sums {
		if s.used+keepPasses < c.pass {
			delete(c.sums, id)
		}
	}
}

// get returns what is known of a table: its checksum, and whether its content is
// known to be durable.
func (c *SumCache) get(id fileIdentity) (crc uint32, durable, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.sums[id]
	if s == nil {
		return 0, false, false
	}
	s.used = c.pass
	return s.crc, s.durable, true
}

func (c *SumCache) put(id fileIdentity, crc uint32, durable bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sums[id] = &cachedSum{crc: crc, used: c.pass, durable: durable}
}

// forget drops what is known of a table.
func (c *SumCache) forget(id fileIdentity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sums, id)
}

// settled notes that a table was synced.
func (c *SumCache) settled(id fileIdentity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.sums[id]; s != nil {
		s.durable = true
	}
}

// sum returns size and checksum of f, from the cache when name is that of a
// table which was seen before. read is how many bytes had to be read.
func (c *SumCache) sum(ctx context.Context, f vfs.File, name string, limit int64, buf []byte) (file File, read int64, err error) {
	st, err := f.Stat()
	if err != nil {
		return File{}, 0, err
	}
	id, known := identify(st)
	known = known && immutable(name)
	if known {
		if crc, _, ok := c.get(id); ok {
			return File{Size: id.size, CRC: crc}, 0, nil
		}
	}
	if file.Size, file.CRC, err = checksum(ctx, f, limit, buf); err != nil {
		return File{}, file.Size, err
	}
	if !known || file.Size != id.size {
		return file, file.Size, nil
	}
	// A table that is still being written has grown by now, or its time has
	// moved.
	if st, err = f.Stat(); err != nil {
		return File{}, file.Size, err
	}
	if again, ok := identify(st); ok && again == id {
		c.put(id, file.CRC, false)
	}
	return file, file.Size, nil
}

// Warm reads the tables in dir, the directory of a live database, whose
// checksums are not known yet, at the pace of limit (nil: none), so that the next
// Create has little to read. It returns how many bytes it has read. It may run
// beside everything else, blocks while it reads, and ends early when ctx is done.
// Tables that vanish meanwhile are left out. While an image is received it reads
// nothing, or no more: what comes takes the place of the tables, and is known then.
func (s *Store) Warm(ctx context.Context, dir string, limit *RateLimit) (int64, error) {
	if s.receiving() {
		// Before the pass begins: one that looks at nothing would bring all that is
		// known nearer to being forgotten.
		return 0, nil
	}
	names, err := s.fs.List(dir)
	if err != nil {
		return 0, fmt.Errorf("snap: warm: list %s: %w", dir, err)
	}
	s.opts.Sums.begin()
	total := int64(0)
	buf := make([]byte, readBlock)
	for _, name := range names {
		if !immutable(name) {
			continue
		}
		read, err := s.warmFile(ctx, s.fs.PathJoin(dir, name), name, limit, buf)
		total += read
		if errors.Is(err, errReceiving) {
			return total, nil
		}
		if err != nil && !isNotExist(err) {
			return total, fmt.Errorf("snap: warm: read %s: %w", s.fs.PathJoin(dir, name), err)
		}
	}
	return total, nil
}

func (s *Store) warmFile(ctx context.Context, path, name string, limit *RateLimit, buf []byte) (int64, error) {
	// A stat is cheaper than to open a file in vain.
	st, err := s.fs.Stat(path)
	if err != nil {
		return 0, err
	}
	id, ok := identify(st)
	if !ok {
		return 0, nil
	}
	if _, _, ok := s.opts.Sums.get(id); ok {
		return 0, nil
	}
	f, err := s.fs.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	_, read, err := s.opts.Sums.sum(ctx, warmedFile{f, s, ctx, limit}, name, id.size, buf)
	return read, err
}

var errReceiving = errors.New("snap: an image is being received")

// warmedFile is read at the pace of a limit, until an image is received.
type warmedFile struct {
	vfs.File
	store *Store
	ctx   context.Context
	limit *RateLimit
}

func (f warmedFile) Read(p []byte) (int, error) {
	if f.store.receiving() {
		return 0, errReceiving
	}
	if f.limit != nil {
		if err := f.limit.Wait(f.ctx, len(p)); err != nil {
			return 0, err
		}
	}
	return f.File.Read(p)
}
