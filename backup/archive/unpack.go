package archive

import (
	"bufio"
	"bytes"
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"
)

// zstdReader decompresses an archive that is made of frames, in their order, and ends
// with its source. Frames of the size that this package writes are decompressed some
// side by side; a longer one, or one that does not say how long it is, as other programs
// and older versions write them, is decompressed as a stream while nothing else is.
//
// Between frames may be nothing else, not even a frame that is to be skipped and could
// hold anything, and none may be empty: an archive has no place for what nobody reads.
type zstdReader struct {
	in  *bufio.Reader
	dec *zstd.Decoder
	// working are frames that are being decompressed, the oldest first; queued is how
	// many bytes of the source they have. Behind them comes long, then err.
	working []*piece
	queued  int64
	long    *longFrame
	err     error
	// streams decompresses long, one after the other: made anew for each of many tiny
	// frames, it would take a thousand times as long as they take to send.
	streams *zstd.Decoder
	// plain is what is left of last.
	plain []byte
	last  *piece
	spare pieces
	// ahead is how many frames may be worked on. It begins with one: who wants to
	// know the header of an archive should not read megabytes of it.
	ahead, most int
}

func newZstdReader(in *bufio.Reader) (*zstdReader, error) {
	r := &zstdReader{in: in, most: workers()}
	var err error
	r.dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(r.most), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecodeAllCapLimit(true))
	return r, err
}

// Read implements io.Reader.
func (r *zstdReader) Read(p []byte) (int, error) {
	for len(p) > 0 {
		switch {
		case len(r.plain) > 0:
			n := copy(p, r.plain)
			r.plain = r.plain[n:]
			return n, nil
		case len(r.working) == 0 && r.long != nil:
			n, err := r.long.Read(p)
			if err != nil {
				r.drop()
			}
			if err != nil && !errors.Is(err, io.EOF) {
				r.err = err
			}
			if n > 0 {
				return n, nil
			}
		default:
			r.fill()
			if len(r.working) > 0 {
				r.take()
			} else if r.long == nil {
				return 0, r.err
			}
		}
	}
	return 0, nil
}

// fill begins to decompress what comes next.
func (r *zstdReader) fill() {
	if r.last != nil {
		r.spare.put(r.last)
		r.last = nil
	}
	r.ahead = min(r.ahead+1, r.most)
	for r.err == nil && r.long == nil && len(r.working) < r.ahead {
		r.err = r.begin()
	}
}

// take waits for the oldest of the frames that are being decompressed.
func (r *zstdReader) take() {
	b := r.working[0]
	r.working = r.working[1:]
	r.queued -= int64(len(b.packed))
	<-b.done
	if r.last, r.plain = b, b.plain; b.err != nil {
		r.plain, r.err = nil, b.err
		r.drop() // or Read would go on behind what is missing
	}
}

// begin has the next frame decompressed.
func (r *zstdReader) begin() error {
	if _, err := r.in.Peek(1); err != nil {
		return err // the end, for the most part
	}
	f := &zstdFrame{in: r.in}
	if err := f.begin(); err != nil {
		return err
	}
	if f.size == 0 {
		return errFrame
	}
	if f.size < 0 || f.size > zstdPiece {
		return r.stream(f, nil)
	}
	b := r.spare.get(f.size)
	b.packed = b.packed[:cap(b.packed)]
	n, err := io.ReadFull(f, b.packed)
	switch {
	case err == nil:
		// Longer than what it holds, as one may be whose blocks are tiny.
		return r.stream(f, b.packed)
	case !f.ended:
		return err
	}
	b.packed, b.err, b.done = b.packed[:n], nil, make(chan struct{})
	r.working = append(r.working, b)
	r.queued += int64(n)
	go func() {
		defer close(b.done)
		b.plain, b.err = r.dec.DecodeAll(b.packed, b.plain[:0])
	}()
	return nil
}

// stream has f read as a stream, of which head was read already.
func (r *zstdReader) stream(f *zstdFrame, head []byte) (err error) {
	in := io.MultiReader(bytes.NewReader(head), f)
	if r.streams != nil {
		err = r.streams.Reset(in)
	} else {
		// With one at a time nothing is read or decompressed beside the caller.
		r.streams, err = zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow))
	}
	if err != nil {
		return err
	}
	r.long = &longFrame{z: r.streams}
	return nil
}

// drop gives up what was begun, and waits until nothing is being decompressed.
func (r *zstdReader) drop() {
	for _, b := range r.working {
		<-b.done
	}
	r.working, r.queued, r.long = nil, 0, nil
}

// Close frees the decoders.
func (r *zstdReader) Close() {
	r.drop() // the decoder must not be closed under those who use it
	r.dec.Close()
	if r.streams != nil {
		r.streams.Close()
	}
}

// longFrame is a frame that is decompressed as a stream.
type longFrame struct {
	z    *zstd.Decoder
	some bool
}

func (f *longFrame) Read(p []byte) (int, error) {
	n, err := f.z.Read(p)
	f.some = f.some || n > 0
	if errors.Is(err, io.EOF) && !f.some {
		err = errFrame
	}
	return n, err
}
