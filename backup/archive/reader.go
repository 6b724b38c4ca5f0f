package archive

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/klauspost/compress/gzip"

	"conveyor.etl/router/snap"
)

// Limits bound what is accepted from an archive; zero values take the default.
type Limits struct {
	// MaxBytes bounds the files of the image together. Default 64 GiB.
	MaxBytes int64
	// MaxRatio bounds the bytes of the tar per byte of a compressed archive,
	// the first 64 MiB apart. Tables are compressed already, so 1000, the
	// default, is far beyond anything that was ever written.
	MaxRatio int64
	// ReserveBytes is what Extract leaves free on the disk: an archive must
	// not take the room that the log of the node needs. Default 0.
	ReserveBytes int64
}

func (l Limits) withDefaults() Limits {
	if l.MaxBytes <= 0 {
		l.MaxBytes = 64 << 30
	}
	if l.MaxRatio <= 0 {
		l.MaxRatio = 1000
	}
	return l
}

const (
	freeRatioBytes   = 64 << 20
	maxManifestBytes = 16 << 20
	maxZstdWindow    = 8 << 20
	copyBlock        = 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sink takes the files of an image as they come.
type sink interface {
	// accept is called once, before any file, with what is to come.
	accept(h *Header, info *snap.Info, manifest []byte) error
	create(f snap.File) error
	write(p []byte) error
	finish() error
}

// nowhere checks an archive and keeps nothing.
type nowhere struct{}

func (nowhere) accept(*Header, *snap.Info, []byte) error { return nil }
func (nowhere) create(snap.File) error                   { return nil }
func (nowhere) write([]byte) error                       { return nil }
func (nowhere) finish() error                            { return nil }

// Verify reads a whole archive and returns what it holds when every byte is as
// it was written. It reads r to its end.
func Verify(ctx context.Context, r io.Reader, limits Limits) (Header, snap.Info, error) {
	return parse(ctx, r, limits, nowhere{})
}

// ReadHeader returns the header of the archive that r begins with. It reads a
// little further than that, and proves nothing about the rest.
func ReadHeader(ctx context.Context, r io.Reader) (Header, error) {
	p, err := newParser(ctx, r, Limits{}.withDefaults())
	if err != nil {
		return Header{}, err
	}
	defer p.close()
	return p.header()
}

// source notes the errors of the caller's reader: a network that failed is not
// an archive that is damaged.
type source struct {
	ctx context.Context
	in  io.Reader
	n   int64
	err error
}

func (s *source) Read(p []byte) (int, error) {
	if s.err == nil {
		s.err = s.ctx.Err()
	}
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.in.Read(p)
	s.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// parser reads the tar of one archive.
type parser struct {
	src    *source
	in     *bufio.Reader
	tar    io.Reader
	limits Limits
	packed bool
	// frames is the same as tar in an archive of zstd.
	frames *zstdReader
	// close frees the decoder.
	close func()

	sum   *sideHash
	at    int64
	entry string
	mtime int64
}

func newParser(ctx context.Context, r io.Reader, limits Limits) (*parser, error) {
	p := &parser{src: &source{ctx: ctx, in: r}, limits: limits, close: func() {}, sum: newSideHash(sha256.New())}
	p.in = bufio.NewReaderSize(p.src, 64<<10)
	magic, err := p.in.Peek(4)
	if p.src.err != nil {
		return nil, p.sourceError()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: it has only %d bytes", ErrNotArchive, len(magic))
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(p.in)
		if p.src.err != nil {
			return nil, p.sourceError()
		}
		if err != nil {
			return nil, fmt.Errorf("%w: gzip: %w", ErrNotArchive, err)
		}
		// One member: what follows it is noticed as bytes behind the end.
		z.Multistream(false)
		p.tar, p.packed = z, true
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := newZstdReader(p.in)
		if err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		p.tar, p.frames, p.packed, p.close = z, z, true, z.Close
	default:
		p.tar = p.in
	}
	return p, nil
}

func (p *parser) sourceError() error {
	return fmt.Errorf("archive: read: %w", p.src.err)
}

func (p *parser) bad(format string, args ...any) error {
	return &CorruptError{Entry: p.entry, Offset: p.at, Detail: fmt.Sprintf(format, args...)}
}

// full reads the next len(b) bytes of the tar.
func (p *parser) full(b []byte) error {
	n, err := io.ReadFull(p.tar, b)
	p.at += int64(n)
	p.sum.Write(b[:n])
	switch {
	case err == nil:
	case p.src.err != nil:
		return p.sourceError()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return p.bad("it ends here, in the middle")
	default:
		return p.bad("decompress: %v", err)
	}
	// What was read ahead has become nothing so far.
	from := p.src.n
	if p.frames != nil {
		from -= p.frames.queued
	}
	if p.packed && p.at > freeRatioBytes && p.at/p.limits.MaxRatio > from {
		return fmt.Errorf("%w: %d bytes have become %d already, the limit is %d times as many", ErrTooLarge,
			from, p.at, p.limits.MaxRatio)
	}
	return nil
}

// file reads the header of the next entry, which must be called name. A size
// below zero accepts any up to limit.
func (p *parser) file(name string, size, limit int64) (int64, error) {
	p.entry = name
	var b [blockSize]byte
	if err := p.full(b[:]); err != nil {
		return 0, err
	}
	gotName, gotSize, mtime, err := parseBlock(b[:])
	if name == headerName && (err != nil || gotName != headerName) {
		if err == nil {
			err = fmt.Errorf("its first file is %q", clip(gotName))
		}
		return 0, fmt.Errorf("%w: it does not begin with %s: %w", ErrNotArchive, headerName, err)
	}
	if err != nil {
		return 0, p.bad("%v", err)
	}
	if name == headerName {
		p.mtime = mtime
	}
	switch {
	case gotName != name:
		return 0, p.bad("entry %q is found where %q should be", clip(gotName), name)
	case mtime != p.mtime:
		return 0, p.bad("the time of the entry differs from that of the others")
	case size >= 0 && gotSize != size:
		return 0, p.bad("the entry has %d bytes, the manifest says %d", gotSize, size)
	case size < 0 && gotSize > limit:
		return 0, fmt.Errorf("%w: %s has %d bytes, the limit is %d", ErrTooLarge, name, gotSize, limit)
	}
	return gotSize, nil
}

// pad reads what fills size up to whole blocks.
func (p *parser) pad(size int64) error {
	return p.zeroes(padding(size), "the padding behind the entry")
}

func (p *parser) zeroes(n int, what string) error {
	var b [endLen]byte
	if err := p.full(b[:n]); err != nil {
		return err
	}
	if b != [endLen]byte{} {
		return p.bad("%s is not zero", what)
	}
	return nil
}

// small reads an entry that is held in memory.
func (p *parser) small(name string, limit int64) ([]byte, error) {
	size, err := p.file(name, -1, limit)
	if err != nil {
		return nil, err
	}
	// Grown as the bytes come: the size is only a claim so far.
	var content bytes.Buffer
	chunk := make([]byte, min(size, copyBlock))
	for rest := size; rest > 0; {
		n := min(rest, int64(len(chunk)))
		if err := p.full(chunk[:n]); err != nil {
			return nil, err
		}
		content.Write(chunk[:n])
		rest -= n
	}
	return content.Bytes(), p.pad(size)
}

func (p *parser) header() (Header, error) {
	raw, err := p.small(headerName, maxHeaderBytes)
	if err != nil {
		return Header{}, err
	}
	h, err := decodeHeader(raw)
	if err != nil && !errors.Is(err, ErrNewerFormat) {
		err = p.bad("%v", err)
	}
	if err == nil && h.CreatedUnixMsec/1000 != p.mtime {
		err = p.bad("the time of the entry is not that of the backup")
	}
	return h, err
}

func (p *parser) manifest(h *Header) (snap.Info, []byte, error) {
	raw, err := p.small(snap.ManifestName, maxManifestBytes)
	if err != nil {
		return snap.Info{}, nil, err
	}
	info, err := snap.ParseManifest(raw, "in the archive")
	switch {
	case errors.Is(err, snap.ErrNewerFormat):
		return info, nil, fmt.Errorf("%w: %w", ErrNewerFormat, err)
	case errors.Is(err, snap.ErrTooLarge):
		return info, nil, fmt.Errorf("%w: %w", ErrTooLarge, err)
	case err != nil:
		return info, nil, p.bad("%v", err)
	case info.Bytes > p.limits.MaxBytes:
		return info, nil, fmt.Errorf("%w: it holds %d bytes, the limit is %d", ErrTooLarge, info.Bytes, p.limits.MaxBytes)
	}
	if why := h.matches(&info); why != "" {
		return info, nil, p.bad("%s", why)
	}
	for _, f := range info.Files {
		if why := badEntry(f.Name, f.Size); why != "" {
			return info, nil, p.bad("file %q %s", clip(f.Name), why)
		}
	}
	return info, raw, nil
}

func (p *parser) content(f snap.File, to sink, buf []byte) error {
	if _, err := p.file(f.Name, f.Size, 0); err != nil {
		return err
	}
	if err := to.create(f); err != nil {
		return err
	}
	crc := uint32(0)
	for rest := f.Size; rest > 0; {
		n := min(rest, int64(len(buf)))
		if err := p.full(buf[:n]); err != nil {
			return err
		}
		crc = crc32.Update(crc, castagnoli, buf[:n])
		if err := to.write(buf[:n]); err != nil {
			return err
		}
		rest -= n
	}
	if crc != f.CRC {
		return p.bad("checksum %08x, the manifest says %08x", crc, f.CRC)
	}
	if err := p.pad(f.Size); err != nil {
		return err
	}
	return to.finish()
}

// end reads the last entry and makes sure that nothing comes behind it.
func (p *parser) end() error {
	want := fmt.Sprintf("%x\n", p.sum.Sum())
	if _, err := p.file(checksumName, checksumLen, 0); err != nil {
		return err
	}
	got := make([]byte, checksumLen)
	if err := p.full(got); err != nil {
		return err
	}
	if string(got) != want {
		return p.bad("the checksum of the archive is not that of its bytes")
	}
	if err := p.pad(checksumLen); err != nil {
		return err
	}
	p.entry = ""
	if err := p.zeroes(endLen, "the end of the archive"); err != nil {
		return err
	}
	// First inside of the compression, which also makes the decoder compare
	// its own checksum, then outside.
	for _, in := range []io.Reader{p.tar, p.in} {
		n, err := io.ReadFull(in, make([]byte, 1))
		switch {
		case n > 0:
			return p.bad("there is something behind the end")
		case p.src.err != nil:
			return p.sourceError()
		case !errors.Is(err, io.EOF):
			return p.bad("decompress: %v", err)
		}
	}
	return nil
}

func parse(ctx context.Context, r io.Reader, limits Limits, to sink) (Header, snap.Info, error) {
	p, err := newParser(ctx, r, limits.withDefaults())
	if err != nil {
		return Header{}, snap.Info{}, err
	}
	defer p.close()
	h, err := p.header()
	if err != nil {
		return h, snap.Info{}, err
	}
	info, raw, err := p.manifest(&h)
	if err != nil {
		return h, info, err
	}
	if err := to.accept(&h, &info, raw); err != nil {
		return h, info, err
	}
	buf := make([]byte, copyBlock)
	for _, f := range info.Files {
		if err := p.content(f, to, buf); err != nil {
			return h, info, err
		}
	}
	return h, info, p.end()
}
