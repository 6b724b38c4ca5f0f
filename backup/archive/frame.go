package archive

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
)

const zstdMagic = 0xFD2FB528

// zstdFrame passes on exactly one frame of its source, which begin has begun to read,
// and ends behind it. A decoder would read on into whatever follows: further frames, or
// one that is to be skipped and could hold anything.
type zstdFrame struct {
	in *bufio.Reader
	// head is the part of the structure that was read and not passed on.
	head []byte
	buf  [32]byte
	// size is how long it says that its content is, below zero when it does not.
	size int64
	// rest is what remains of the block.
	rest     int64
	last     bool
	checksum bool
	// ended: the whole frame was passed on.
	ended bool
	err   error
}

// errFrame: the structure of the frame is impossible.
var errFrame = errors.New("the zstd frame is malformed")

// Read implements io.Reader.
func (f *zstdFrame) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	for f.err == nil {
		switch {
		case len(f.head) > 0:
			n := copy(p, f.head)
			f.head = f.head[n:]
			return n, nil
		case f.rest > 0:
			n, err := f.in.Read(p[:min(f.rest, int64(len(p)))])
			f.rest -= int64(n)
			f.err = unexpected(err)
			if n > 0 {
				return n, nil
			}
		default:
			f.err = f.next()
		}
	}
	return 0, f.err
}

// next reads the next piece of the structure.
func (f *zstdFrame) next() error {
	switch {
	case !f.last:
		if err := f.take(3); err != nil {
			return err
		}
		h := uint32(f.head[0]) | uint32(f.head[1])<<8 | uint32(f.head[2])<<16
		f.last = h&1 != 0
		f.rest = int64(h >> 3)
		switch h >> 1 & 3 {
		case 1: // one byte, repeated
			f.rest = 1
		case 3:
			return errFrame
		}
		return nil
	case f.checksum:
		f.checksum = false
		return f.take(4)
	}
	f.ended = true
	return io.EOF
}

// begin reads the header of the frame.
func (f *zstdFrame) begin() error {
	if err := f.take(5); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(f.head) != zstdMagic {
		return errFrame
	}
	d := f.head[4]
	single := d>>5&1 != 0
	f.checksum = d>>2&1 != 0
	sizeLen := []int{0, 2, 4, 8}[d>>6]
	if single && sizeLen == 0 {
		sizeLen = 1
	}
	n := []int{0, 1, 2, 4}[d&3] + sizeLen
	if !single {
		n++ // the window
	}
	_, err := io.ReadFull(f.in, f.buf[5:5+n])
	f.head = f.buf[:5+n]
	// The size comes last, and two bytes of it count from 256 on.
	var size [8]byte
	copy(size[:], f.head[5+n-sizeLen:])
	f.size = int64(binary.LittleEndian.Uint64(size[:]))
	switch sizeLen {
	case 0:
		f.size = -1
	case 2:
		f.size += 256
	}
	return unexpected(err)
}

// take reads the next n bytes, which are to be passed on.
func (f *zstdFrame) take(n int) error {
	f.head = f.buf[:n]
	_, err := io.ReadFull(f.in, f.head)
	return unexpected(err)
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
