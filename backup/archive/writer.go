package archive

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"conveyor.etl/router/snap"
)

// Image is what an archive is made of; a *snap.Reader is one.
type Image interface {
	Info() snap.Info
	// ReadAt reads the stream of the image: its manifest, then its files.
	ReadAt(p []byte, offset int64) (int, error)
}

// Archive is the stream of one archive. It is an io.Reader for one caller at a
// time.
type Archive struct {
	ctx  context.Context
	tar  tarSource
	pack packer
	// out is what was made and not yet read.
	out  []byte
	skip int64
	// at is the offset of the next byte that Read returns.
	at  int64
	err error
}

// NewArchive returns the archive of img, from byte offset of its stream on. The
// image must stay open until the last Read; the caller closes both.
//
// An offset costs nearly as much as reading up to it: the stream is made from
// its beginning. Nothing is read before the first Read, which then also says
// when the offset lies behind the end (ErrOffset). ctx ends a Read early.
func NewArchive(ctx context.Context, img Image, h Header, c Compression, offset int64) (*Archive, error) {
	if offset < 0 {
		return nil, fmt.Errorf("%w: %d", ErrOffset, offset)
	}
	info := img.Info()
	h.Format = FormatVersion
	if why := h.matches(&info); why != "" {
		return nil, fmt.Errorf("archive: %s", why)
	}
	head, err := h.encode()
	if err != nil {
		return nil, err
	}
	for _, f := range info.Files {
		if why := badEntry(f.Name, f.Size); why != "" {
			return nil, fmt.Errorf("archive: file %q of image %s %s", clip(f.Name), info.ID, why)
		}
	}
	a := &Archive{ctx: ctx, skip: offset, at: offset}
	if a.pack, err = c.packer(&a.tar); err != nil {
		return nil, err
	}
	a.tar = tarSource{
		img:   img,
		info:  &info,
		mtime: h.CreatedUnixMsec / 1000,
		sum:   newSideHash(sha256.New()),
		index: -1,
		size:  tarSize(&info, len(head)),
	}
	a.tar.pending = append(a.tar.pending, block(headerName, int64(len(head)), a.tar.mtime)...)
	a.tar.pending = append(a.tar.pending, head...)
	a.tar.pad = padding(int64(len(head)))
	return a, nil
}

// badEntry says why a file cannot be in an archive, or "".
func badEntry(name string, size int64) string {
	switch {
	case name == headerName || name == checksumName:
		return "has a name that archives use themselves"
	case len(name) > maxNameLen:
		return fmt.Sprintf("has a name of %d bytes, the limit is %d", len(name), maxNameLen)
	case size > maxFileSize:
		return fmt.Sprintf("has %d bytes, the limit is %d", size, int64(maxFileSize))
	}
	return ""
}

func tarSize(info *snap.Info, head int) int64 {
	whole := func(n int64) int64 { return blockSize + n + int64(padding(n)) }
	size := whole(int64(head)) + whole(info.Size-info.Bytes) + whole(checksumLen) + endLen
	for _, f := range info.Files {
		size += whole(f.Size)
	}
	return size
}

// Limit has fewer pieces compressed side by side: n, which is asked now and again by
// whoever reads, says how many may be; less than one is one. Without it, they are one more
// than there are processors, and five at most. The stream is the same in any case. Limit
// is called before the first Read, and matters to zstd alone.
func (a *Archive) Limit(n func() int) {
	if p, ok := a.pack.(*zstdPacker); ok {
		p.limit = n
	}
}

// RawSize returns the bytes of the whole archive before compression.
func (a *Archive) RawSize() int64 { return a.tar.size }

// RawDone returns how many of those were read so far, for progress.
func (a *Archive) RawDone() int64 { return a.tar.done }

// Offset returns the place in the stream of the byte that Read returns next.
func (a *Archive) Offset() int64 { return a.at }

// Read implements io.Reader. An error that matches snap.ErrCorrupt means that
// the image is damaged on this disk; the stream is of no use then.
func (a *Archive) Read(p []byte) (int, error) {
	for len(a.out) == 0 && a.err == nil {
		a.err = a.fill()
	}
	n := copy(p, a.out)
	a.out = a.out[n:]
	a.at += int64(n)
	if n > 0 || len(p) == 0 {
		return n, nil
	}
	return 0, a.err
}

// fill makes the next piece of the stream.
func (a *Archive) fill() error {
	if err := a.ctx.Err(); err != nil {
		return err
	}
	out, err := a.pack.next()
	if errors.Is(err, io.EOF) && a.skip > 0 {
		return fmt.Errorf("%w: %d, the archive has %d bytes", ErrOffset, a.at, a.at-a.skip)
	}
	if err != nil {
		return err
	}
	drop := min(a.skip, int64(len(out)))
	a.out, a.skip = out[drop:], a.skip-drop
	return nil
}

// Close ends the stream. It does not close the image.
func (a *Archive) Close() error {
	if !errors.Is(a.err, ErrClosed) {
		a.out, a.pack = nil, nil
		a.err = ErrClosed
	}
	return nil
}

// tarSource makes the tar.
type tarSource struct {
	img   Image
	info  *snap.Info
	mtime int64
	size  int64
	done  int64
	// sum is over every byte that read has returned before the last entry.
	sum    *sideHash
	summed bool

	// pending comes next, then rest bytes of the image from offset from, then
	// pad zeroes, then entry index+1: the manifest is -1, its files follow.
	pending []byte
	from    int64
	rest    int64
	pad     int
	index   int
}

// read fills p unless the tar ends.
func (t *tarSource) read(p []byte) (n int, err error) {
	for n < len(p) {
		start := n
		switch {
		case len(t.pending) > 0:
			n += copy(p[n:], t.pending)
			t.pending = t.pending[n-start:]
		case t.rest > 0:
			n += int(min(t.rest, int64(len(p)-n)))
			if _, err := t.img.ReadAt(p[start:n], t.from); err != nil {
				return start, fmt.Errorf("archive: %w", err)
			}
			t.from += int64(n - start)
			t.rest -= int64(n - start)
		case t.pad > 0:
			n += min(t.pad, len(p)-n)
			clear(p[start:n])
			t.pad -= n - start
		case t.summed:
			return n, io.EOF
		default:
			t.next()
			continue
		}
		t.done += int64(n - start)
		if !t.summed {
			t.sum.Write(p[start:n])
		}
	}
	return n, nil
}

// next begins the next entry.
func (t *tarSource) next() {
	switch {
	case t.index < 0:
		t.rest = t.info.Size - t.info.Bytes
		t.pending = block(snap.ManifestName, t.rest, t.mtime)
	case t.index < len(t.info.Files):
		f := t.info.Files[t.index]
		t.rest = f.Size
		t.pending = block(f.Name, f.Size, t.mtime)
	default:
		t.summed = true
		t.pending = fmt.Appendf(block(checksumName, checksumLen, t.mtime), "%x\n", t.sum.Sum())
		t.pad = padding(checksumLen) + endLen
	}
	t.pad += padding(t.rest)
	t.index++
}
