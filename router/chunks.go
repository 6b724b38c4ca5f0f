package router

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
	"github.com/klauspost/compress/s2"
)

// A chunk is a run of records in the order of their keys, each as the length of
// the key, the key, the length of the value and the value, compressed with S2 as a
// whole: the backup is packed once and unpacked on every node, in the time of
// clients that wait, and is gone from the disk afterwards; zstd makes them smaller
// and takes several times as long. Apply keeps chunks as they are and does not look
// into them.

const (
	// chunkBytes is where a chunk is ended, before compression. One record that
	// is larger has a chunk of its own.
	chunkBytes = 1 << 20
	// maxPlainBytes bounds what a chunk may grow to when it is read: a few bytes
	// can ask for all the memory there is.
	maxPlainBytes = 64 << 20
)

// Chunk is a part of a backup, as StageRestore takes it.
type Chunk struct {
	Sequence uint64 // from zero
	Data     []byte
	Records  uint64
}

// ChunkWriter gathers records into chunks. It is for one goroutine.
type ChunkWriter struct {
	skip     uint64
	limit    int // of the bytes in a chunk
	yield    func(Chunk) error
	plain    []byte
	records  uint64
	sequence uint64
	total    uint64
}

// NewChunkWriter returns a writer that hands each chunk to yield, which keeps it.
// The first skip chunks are not made: where chunks end follows from the records
// alone, so that whoever takes over a stage goes on with the next one.
func NewChunkWriter(skip uint64, yield func(Chunk) error) *ChunkWriter {
	return &ChunkWriter{skip: skip, limit: chunkBytes, yield: yield}
}

// Add appends a record; keys must ascend. It fails with what yield returns, or
// when the record is too large for a command.
func (w *ChunkWriter) Add(k, v []byte) error {
	size := len(k) + len(v) + 2*binary.MaxVarintLen32
	if w.records > 0 && len(w.plain)+size > w.limit {
		if err := w.end(); err != nil {
			return err
		}
	}
	w.plain = appendRecord(w.plain, k, v)
	w.records++
	w.total++
	return nil
}

func (w *ChunkWriter) end() error {
	c := Chunk{Sequence: w.sequence, Records: w.records}
	w.sequence++
	plain := w.plain
	w.plain, w.records = w.plain[:0], 0
	if c.Sequence < w.skip {
		return nil
	}
	if len(plain) <= maxPlainBytes {
		c.Data = s2.Encode(nil, plain)
	}
	if len(plain) > maxPlainBytes || len(c.Data) > maxChunkBytes {
		return fmt.Errorf("router: a record of %d bytes (%d compressed) is too large to be restored, at most %d (%d) are possible; nothing was changed",
			len(plain), len(c.Data), maxPlainBytes, maxChunkBytes)
	}
	return w.yield(c)
}

// Finish hands out what is left and returns how many chunks and records there
// are, those skipped included.
func (w *ChunkWriter) Finish() (chunks, records uint64, err error) {
	if w.records > 0 {
		err = w.end()
	}
	return w.sequence, w.total, err
}

// ReadChunk calls fn for each record of a chunk; k and v are valid during the
// call. It fails with ErrBadChunk, or with what fn returns.
func ReadChunk(data []byte, fn func(k, v []byte) error) error {
	_, err := readChunk(data, nil, fn)
	return err
}

// readChunk is ReadChunk with a buffer to unpack into, which it returns, or a
// larger one.
func readChunk(data, buf []byte, fn func(k, v []byte) error) ([]byte, error) {
	n, err := s2.DecodedLen(data)
	if err == nil && n > maxPlainBytes {
		err = fmt.Errorf("it would grow to %d bytes, at most %d are allowed", n, maxPlainBytes)
	}
	if err == nil {
		buf, err = s2.Decode(buf[:cap(buf)], data)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: a chunk of %d bytes: %w", ErrBadChunk, len(data), err)
	}
	return buf, eachRecord(buf, fn)
}

// eachRecord calls fn for each of the records in plain, which are as
// appendRecord writes them. It fails with ErrBadChunk, or with what fn returns.
func eachRecord(plain []byte, fn func(k, v []byte) error) error {
	blob := func() ([]byte, bool) {
		n, w := binary.Uvarint(plain)
		if w <= 0 || n > uint64(len(plain)-w) {
			return nil, false
		}
		b := plain[w : w+int(n)]
		plain = plain[w+int(n):]
		return b, true
	}
	for len(plain) > 0 {
		k, ok := blob()
		v, ok2 := []byte(nil), false
		if ok {
			v, ok2 = blob()
		}
		if !ok2 {
			return fmt.Errorf("%w: a record ends behind its chunk", ErrBadChunk)
		}
		if err := fn(k, v); err != nil {
			return err
		}
	}
	return nil
}

// Chunks cuts the content of the view into chunks, in order, without the first
// skip, and returns how many chunks and records there are in all. It reads the
// whole state.
func (v *View) Chunks(ctx context.Context, skip uint64, yield func(Chunk) error) (chunks, records uint64, err error) {
	return v.chunksTo(ctx, NewChunkWriter(skip, yield))
}

func (v *View) chunksTo(ctx context.Context, w *ChunkWriter) (chunks, records uint64, err error) {
	err = v.read(func(r pebble.Reader) error { return scanData(ctx, r, w.Add) })
	if err != nil {
		return 0, 0, err
	}
	return w.Finish()
}

// chunkOrder checks that records come ascending and belong to the content.
type chunkOrder struct{ last []byte }

func (o *chunkOrder) check(k []byte) error {
	switch {
	case !isData(k):
		return fmt.Errorf("%w: the key %q is of no table of a backup", ErrBadChunk, k)
	case o.last != nil && bytes.Compare(k, o.last) <= 0:
		return fmt.Errorf("%w: the key %q comes after %q", ErrBadChunk, k, o.last)
	}
	o.last = append(o.last[:0], k...)
	return nil
}
