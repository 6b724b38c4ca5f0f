package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const (
	// rawBlock is how much of the tar is made at a time when it is not cut into pieces.
	rawBlock = 256 << 10
	// zstdPiece is how much of the tar is compressed as one frame. It is part of the
	// format as far as offsets are concerned: with another size a download that broke
	// does not go on where it broke. An eighth of it takes a hundredth more room, and
	// no less time.
	zstdPiece = 1 << 20
	// frameSlack is by how much a frame of bytes that cannot be compressed is longer than
	// they are: its header and checksum, and three bytes for each block.
	frameSlack = 1 << 10
	// zstdWindow is how far back a match may lie. Tables are compressed in blocks
	// of a few KiB already and a larger one found next to nothing more.
	zstdWindow = 256 << 10
	// mostWorkers bounds how many pieces are compressed or decompressed side by side,
	// and with it the memory.
	mostWorkers = 4
)

// workers returns how many pieces are worked on at a time when nobody says otherwise:
// one more than there are processors, so that all of these are used while somebody
// waits for the oldest.
func workers() int { return min(runtime.GOMAXPROCS(0), mostWorkers) + 1 }

// packer makes the stream of an archive out of its tar.
type packer interface {
	// next returns what comes next, which is valid until the next call; io.EOF
	// behind the end.
	next() ([]byte, error)
}

// packer returns the packer of c for the tar.
func (c Compression) packer(tar *tarSource) (packer, error) {
	switch c {
	case None:
		return &plainPacker{tar: tar, raw: make([]byte, rawBlock)}, nil
	case Gzip:
		p := &gzipPacker{plainPacker: plainPacker{tar: tar, raw: make([]byte, rawBlock)}}
		var err error
		p.pack, err = gzip.NewWriterLevel(&p.packed, gzip.BestSpeed)
		return p, err
	case Zstd:
		return newZstdPacker(tar)
	}
	return nil, fmt.Errorf("archive: unknown %s", c)
}

// plainPacker passes the tar on as it is.
type plainPacker struct {
	tar *tarSource
	raw []byte
	end bool
}

func (p *plainPacker) next() ([]byte, error) {
	if p.end {
		return nil, io.EOF
	}
	n, err := p.tar.read(p.raw)
	p.end = errors.Is(err, io.EOF)
	if err != nil && !p.end {
		return nil, err
	}
	return p.raw[:n], nil
}

// gzipPacker compresses it as one member of gzip.
type gzipPacker struct {
	plainPacker
	packed bytes.Buffer
	pack   *gzip.Writer
}

func (p *gzipPacker) next() ([]byte, error) {
	raw, err := p.plainPacker.next()
	if err != nil {
		return nil, err
	}
	p.packed.Reset()
	_, err = p.pack.Write(raw)
	if err == nil && p.end {
		err = p.pack.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("archive: compress: %w", err)
	}
	return p.packed.Bytes(), nil
}

// zstdPacker compresses it in pieces, each of them a frame of its own, some side by
// side: one processor alone is what a download would wait for. A frame depends on
// nothing but the bytes of its piece, so the stream is the same however many there are.
//
// Each piece has a goroutine that ends with it and touches nothing else: nothing has to
// be stopped when an archive is given up halfway.
type zstdPacker struct {
	tar *tarSource
	enc *zstd.Encoder
	// limit says how many pieces may be worked on.
	limit func() int
	most  int
	// working are those pieces, the oldest first; last is what next has returned.
	working []*piece
	last    *piece
	spare   pieces
	end     bool
}

// piece is a part of the tar and the frame that it is packed in.
type piece struct {
	plain, packed []byte
	err           error
	done          chan struct{}
}

// room makes room for a piece of n bytes of the tar, and for a frame that is as long.
func (b *piece) room(n int64) {
	// The decoder is quicker with some bytes behind what it writes.
	if n += frameSlack; int64(cap(b.plain)) < n {
		b.plain, b.packed = make([]byte, 0, n), make([]byte, 0, n)
	}
}

// pieces are those that nobody uses.
type pieces []*piece

// get returns one with room for n bytes of the tar.
func (s *pieces) get(n int64) *piece {
	b := new(piece)
	if last := len(*s) - 1; last >= 0 {
		b, *s = (*s)[last], (*s)[:last]
	}
	b.room(n)
	return b
}

func (s *pieces) put(b *piece) { *s = append(*s, b) }

func newZstdPacker(tar *tarSource) (*zstdPacker, error) {
	p := &zstdPacker{tar: tar, most: workers()}
	var err error
	p.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(p.most),
		zstd.WithWindowSize(zstdWindow), zstd.WithEncoderCRC(true), zstd.WithLowerEncoderMem(true))
	return p, err
}

func (p *zstdPacker) next() ([]byte, error) {
	if p.last != nil {
		p.spare.put(p.last)
		p.last = nil
	}
	n := p.most
	if p.limit != nil {
		n = max(1, min(n, p.limit()))
	}
	for !p.end && len(p.working) < n {
		if err := p.begin(); err != nil {
			return nil, err
		}
	}
	if len(p.working) == 0 {
		return nil, io.EOF
	}
	p.last, p.working = p.working[0], p.working[1:]
	<-p.last.done
	return p.last.packed, nil
}

// begin has the next piece compressed.
func (p *zstdPacker) begin() error {
	size := min(zstdPiece, p.tar.size-p.tar.done)
	if size == 0 {
		p.end = true
		return nil
	}
	b := p.spare.get(size)
	n, err := p.tar.read(b.plain[:size])
	p.end = errors.Is(err, io.EOF)
	if err != nil && !p.end {
		return err
	}
	b.plain, b.done = b.plain[:n], make(chan struct{})
	p.working = append(p.working, b)
	go func() {
		defer close(b.done)
		b.packed = p.enc.EncodeAll(b.plain, b.packed[:0])
	}()
	return nil
}
