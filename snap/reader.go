package snap

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sort"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Chunk is a piece of an image's stream.
type Chunk struct {
	// Offset is where Data starts in the stream.
	Offset int64
	// Data is never empty and belongs to the holder of the chunk.
	Data []byte
	// CRC is the crc32c (Castagnoli) of Data.
	CRC uint32
	// Last marks the chunk that ends the stream.
	Last bool
}

// Reader reads one image as a flat stream: the manifest, then the files in the
// order of the manifest, without gaps or separators. While it is open, the
// image stays on disk. Its methods are safe for concurrent use.
type Reader struct {
	fs       vfs.FS
	dir      string
	maxChunk int
	// release undoes the pin; nil for a directory that is in no store.
	release  func() error
	info     *Info
	manifest []byte
	// starts holds the stream offset of every file.
	starts []int64

	mu     sync.Mutex
	closed bool
	// open is the file read last, openIndex its index in info.Files.
	open      vfs.File
	openIndex int
	// sum is the checksum of the first sumPos bytes of file sumIndex, which
	// is -1 when that file was not read from its beginning.
	sum      uint32
	sumIndex int
	sumPos   int64
}

// Open opens image id for reading and pins it until Reader.Close.
func (s *Store) Open(id string) (*Reader, error) {
	img, err := s.pin(id)
	if err != nil {
		return nil, err
	}
	// Read again what OpenStore read: the disk may have rotted since.
	info, raw, err := loadManifest(s.fs, s.Dir(id), id, &s.opts)
	if err != nil {
		return nil, errors.Join(err, s.unpin(id, img))
	}
	r := newReader(s.fs, s.Dir(id), info, raw, &s.opts)
	r.release = func() error { return s.unpin(id, img) }
	return r, nil
}

// OpenDir opens the image in dir, which may have any name and belong to no
// store. Nothing keeps the files in place: the caller must.
func OpenDir(fsys vfs.FS, dir string) (*Reader, error) {
	info, raw, err := inspect(fsys, dir)
	if err != nil {
		return nil, err
	}
	return newReader(fsys, dir, info, raw, new(Options).EnsureDefaults()), nil
}

func newReader(fsys vfs.FS, dir string, info *Info, raw []byte, o *Options) *Reader {
	r := &Reader{
		fs:       fsys,
		dir:      dir,
		maxChunk: o.MaxChunkBytes,
		info:     info,
		manifest: raw,
		starts:   make([]int64, len(info.Files)),
		sumIndex: -1,
	}
	at := int64(len(raw))
	for i, f := range info.Files {
		r.starts[i] = at
		at += f.Size
	}
	return r
}

// Info describes the image.
func (r *Reader) Info() Info { return *r.info }

// Size returns the length of the stream in bytes.
func (r *Reader) Size() int64 { return r.info.Size }

// Dir returns the directory of the image, which stays in place and unchanged
// until Close. It is for reading only.
func (r *Reader) Dir() string { return r.dir }

// ReadChunk returns the chunk at offset with at most max bytes; max is brought
// into the range 1 to Options.MaxChunkBytes, 0 means the latter. It returns
// io.EOF when offset is the end of the stream. Any offset may be asked for, in
// any order.
//
// Files that are read from beginning to end in order are checked against the
// manifest on the way: ErrCorrupt then means that this copy is damaged and the
// image must be made anew. The receiver checks everything in any case.
func (r *Reader) ReadChunk(offset int64, max int) (Chunk, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	size := r.info.Size
	if err := r.admitLocked(offset); err != nil {
		return Chunk{}, err
	}
	if max <= 0 || max > r.maxChunk {
		max = r.maxChunk
	}
	return r.chunkLocked(make([]byte, min(int64(max), size-offset)), offset)
}

// ReadChunkInto is ReadChunk with at most len(buf) bytes, which are read into buf:
// they are those of the chunk until buf is used again.
func (r *Reader) ReadChunkInto(buf []byte, offset int64) (Chunk, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.admitLocked(offset); err != nil {
		return Chunk{}, err
	}
	n := min(int64(len(buf)), int64(r.maxChunk), r.info.Size-offset)
	return r.chunkLocked(buf[:n], offset)
}

// admitLocked returns why no chunk can be read at offset, io.EOF at the end.
func (r *Reader) admitLocked(offset int64) error {
	size := r.info.Size
	switch {
	case r.closed:
		return fmt.Errorf("%w: reader of image %s", ErrClosed, r.info.ID)
	case offset == size:
		return io.EOF
	case offset < 0 || offset > size:
		return fmt.Errorf("%w: offset %d is outside of image %s, which has %d bytes",
			ErrOutOfOrder, offset, r.info.ID, size)
	}
	return nil
}

// chunkLocked reads the chunk at offset into data.
func (r *Reader) chunkLocked(data []byte, offset int64) (Chunk, error) {
	if err := r.fillLocked(data, offset); err != nil {
		return Chunk{}, err
	}
	return Chunk{
		Offset: offset,
		Data:   data,
		CRC:    crc32.Checksum(data, castagnoli),
		Last:   offset+int64(len(data)) == r.info.Size,
	}, nil
}

// ReadAt implements io.ReaderAt on the stream of the image. It is ReadChunk for
// callers with a buffer of their own: no checksum of the piece, but the files
// are checked in the same way.
func (r *Reader) ReadAt(p []byte, offset int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	size := r.info.Size
	switch {
	case r.closed:
		return 0, fmt.Errorf("%w: reader of image %s", ErrClosed, r.info.ID)
	case offset < 0:
		return 0, fmt.Errorf("%w: offset %d of image %s", ErrOutOfOrder, offset, r.info.ID)
	case offset >= size:
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), size-offset))
	if err := r.fillLocked(p[:n], offset); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// fillLocked fills p from the stream at offset; the stream is long enough.
func (r *Reader) fillLocked(p []byte, offset int64) error {
	if offset < int64(len(r.manifest)) {
		n := copy(p, r.manifest[offset:])
		p, offset = p[n:], offset+int64(n)
	}
	// The last file that starts at or before offset. Of empty files, several
	// start there; the last of them is the one with the bytes.
	i := sort.Search(len(r.starts), func(i int) bool { return r.starts[i] > offset }) - 1
	for ; len(p) > 0; i++ {
		f := r.info.Files[i]
		pos := offset - r.starts[i]
		n := min(int64(len(p)), f.Size-pos)
		if err := r.readFileLocked(i, p[:n], pos); err != nil {
			return err
		}
		p, offset = p[n:], offset+n
	}
	return nil
}

func (r *Reader) readFileLocked(i int, p []byte, pos int64) error {
	if len(p) == 0 {
		return nil
	}
	f := r.info.Files[i]
	path := r.fs.PathJoin(r.Dir(), f.Name)
	if r.open == nil || r.openIndex != i {
		if err := r.closeFileLocked(); err != nil {
			return err
		}
		file, err := r.fs.Open(path)
		if err != nil {
			return fmt.Errorf("snap: open %s: %w", path, err)
		}
		r.open, r.openIndex = file, i
	}
	n, err := r.open.ReadAt(p, pos)
	if n < len(p) {
		if errors.Is(err, io.EOF) {
			return &CorruptError{Image: r.info.ID, File: f.Name, Detail: fmt.Sprintf(
				"it ends after %d bytes, the manifest says %d", pos+int64(n), f.Size)}
		}
		return fmt.Errorf("snap: read %s: %w", path, err)
	}
	return r.sumLocked(i, p, pos)
}

// sumLocked continues the checksum of file i when p is what comes next in it.
func (r *Reader) sumLocked(i int, p []byte, pos int64) error {
	switch {
	case pos == 0:
		r.sum, r.sumIndex, r.sumPos = 0, i, 0
	case i != r.sumIndex || pos != r.sumPos:
		r.sumIndex = -1
		return nil
	}
	f := r.info.Files[i]
	r.sum = crc32.Update(r.sum, castagnoli, p)
	r.sumPos += int64(len(p))
	if r.sumPos == f.Size && r.sum != f.CRC {
		return &CorruptError{Image: r.info.ID, File: f.Name, Detail: fmt.Sprintf(
			"checksum %08x, the manifest says %08x", r.sum, f.CRC)}
	}
	return nil
}

func (r *Reader) closeFileLocked() error {
	if r.open == nil {
		return nil
	}
	err := r.open.Close()
	r.open = nil
	if err != nil {
		return fmt.Errorf("snap: close a file of image %s: %w", r.info.ID, err)
	}
	return nil
}

// Close unpins the image and carries out a deletion that waited for that; an
// error can come from either. Calling it again does nothing.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	err := r.closeFileLocked()
	if r.release != nil {
		err = errors.Join(err, r.release())
	}
	return err
}
