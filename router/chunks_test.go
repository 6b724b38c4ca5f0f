package router

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/klauspost/compress/s2"
)

// TestChunksHoldTheRecords in order and within bounds, a large record has one of
// its own, and whoever goes on with the n-th makes the same ones.
func TestChunksHoldTheRecords(t *testing.T) {
	r := randomness(t)
	type record struct{ k, v []byte }
	var records []record
	for i := range 300 {
		v := make([]byte, r.Intn(20_000))
		r.Read(v)
		if i == 150 {
			v = make([]byte, 3*chunkBytes)
		}
		records = append(records, record{fmt.Appendf(nil, "p%04d", i), v})
	}
	cut := func(skip uint64) (out []Chunk) {
		w := NewChunkWriter(skip, func(c Chunk) error {
			out = append(out, c)
			return nil
		})
		for _, x := range records {
			noError(t, w.Add(x.k, x.v))
		}
		chunks, n, err := w.Finish()
		noError(t, err)
		if n != uint64(len(records)) || chunks != uint64(len(out))+skip {
			t.Fatalf("%d chunks with %d records", chunks, n)
		}
		return out
	}
	all := cut(0)
	i := 0
	for n, c := range all {
		size, from := 0, i
		noError(t, ReadChunk(c.Data, func(k, v []byte) error {
			if !bytes.Equal(k, records[i].k) || !bytes.Equal(v, records[i].v) {
				t.Fatalf("record %d is another one", i)
			}
			size += len(k) + len(v)
			i++
			return nil
		}))
		if c.Sequence != uint64(n) || c.Records != uint64(i-from) || size > chunkBytes && c.Records > 1 {
			t.Fatalf("chunk %d: sequence %d, %d records (%d), %d bytes", n, c.Sequence, c.Records, i-from, size)
		}
	}
	if i != len(records) {
		t.Fatalf("%d records came back, want %d", i, len(records))
	}
	rest := cut(2)
	if rest[0].Sequence != 2 || rest[0].Records != all[2].Records || !bytes.Equal(rest[0].Data, all[2].Data) {
		t.Fatal("the third chunk is another one")
	}
	stop := errors.New("stop")
	if err := ReadChunk(all[0].Data, func(_, _ []byte) error { return stop }); !errors.Is(err, stop) {
		t.Fatalf("got %v", err)
	}
}

// TestHugeRecordIsRefused where it is cut, and a chunk that asks for too much
// memory where it is read.
func TestHugeRecordIsRefused(t *testing.T) {
	w := NewChunkWriter(0, func(Chunk) error { return nil })
	noError(t, w.Add([]byte("p"), make([]byte, maxPlainBytes+1)))
	if _, _, err := w.Finish(); err == nil {
		t.Fatal("a record that cannot be restored was cut")
	}

	bomb := s2.Encode(nil, make([]byte, 4*maxPlainBytes))
	if err := ReadChunk(bomb, func(_, _ []byte) error { return nil }); !errors.Is(err, ErrBadChunk) {
		t.Fatalf("got %v, want ErrBadChunk", err)
	}
}

// FuzzReadChunk: what is no chunk is refused, and nothing worse.
func FuzzReadChunk(f *testing.F) {

	f.Add(s2.Encode(nil, []byte("\x01p\x00")))
	f.Add(s2.Encode(nil, []byte("\x01p\x09")))
	f.Add([]byte("x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := ReadChunk(data, func(_, _ []byte) error { return nil }); err != nil && !errors.Is(err, ErrBadChunk) {
			t.Fatal(err)
		}
	})
}
