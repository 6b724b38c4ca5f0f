package archive

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// largeContent is more than some pieces, in files whose ends lie anywhere in them.
func largeContent(rng *rand.Rand) content {
	c := content{"CURRENT": "MANIFEST-000001"}
	for i := range 4 {
		b := make([]byte, 2*zstdPiece+rng.IntN(zstdPiece))
		for i := range b {
			b[i] = 'a' + byte(rng.IntN(7))
		}
		c[fmt.Sprintf("%06d.sst", i)] = string(b)
	}
	return c
}

// What zstd makes of an archive is the same however many pieces are worked on at a time,
// from wherever it is read, and any program that reads zstd reads it.
func TestFramesAreOneStream(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	img := newImage(t, largeContent(rng))
	plain := pack(t, img, None, 0)
	whole := pack(t, img, Zstd, 0)
	if n := bytes.Count(whole, []byte{0x28, 0xb5, 0x2f, 0xfd}); n < len(plain)/zstdPiece {
		t.Fatalf("%d bytes have become %d frames", len(plain), n)
	}
	z, err := zstd.NewReader(bytes.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("decompressed to %d bytes (%v), the tar has %d", len(got), err, len(plain))
	}
	limits := map[string]func() int{
		"one":    func() int { return 1 },
		"two":    func() int { return 2 },
		"any":    func() int { return rng.IntN(2 * mostWorkers) },
		"absurd": func() int { return -1 },
	}
	for name, limit := range limits {
		at := rng.Int64N(int64(len(whole)))
		a, err := NewArchive(context.Background(), img, testHeader(), Zstd, at)
		if err != nil {
			t.Fatal(err)
		}
		a.Limit(limit)
		got, err := io.ReadAll(a)
		if err != nil || !bytes.Equal(got, whole[at:]) {
			t.Errorf("limit %s: from %d on, %d bytes (%v) differ from the %d of the whole stream", name, at, len(got), err, len(whole)-int(at))
		}
		if a.RawDone() != a.RawSize() {
			t.Errorf("limit %s: %d of %d bytes were read", name, a.RawDone(), a.RawSize())
		}
		_ = a.Close()
	}
	h, _, err := Verify(context.Background(), bytes.NewReader(whole), Limits{})
	if err != nil || h.Revision != testHeader().Revision {
		t.Fatal(err)
	}
}

// No more of an image, or of an archive, is read ahead than some pieces, whoever stops
// reading.
func TestReadAheadIsBounded(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	img := newImage(t, largeContent(rng))
	a, err := NewArchive(context.Background(), img, testHeader(), Zstd, 0)
	if err != nil {
		t.Fatal(err)
	}
	a.Limit(func() int { return 2 })
	if _, err := io.ReadFull(a, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if a.RawDone() > 2*zstdPiece {
		t.Errorf("%d bytes were read for the first ten", a.RawDone())
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	whole := pack(t, img, Zstd, 0)
	in := bytes.NewReader(whole)
	if _, err := ReadHeader(context.Background(), in); err != nil {
		t.Fatal(err)
	}
	if read := len(whole) - in.Len(); read > zstdPiece {
		t.Errorf("%d bytes were read for the header", read)
	}
}

// Frames are what they were written as, in their order, and there is nothing between and
// behind them.
func TestFramesThatWereMovedAbout(t *testing.T) {
	img := newImage(t, testContent)
	frames := framesOf(t, pack(t, img, None, 0), 777)
	if h, got, err := extract(bytes.Join(frames, nil), Limits{}); err != nil || !same(h, got) {
		t.Fatalf("as they were: %v", err)
	}
	skipped := []byte{0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 'h', 'i'}
	// As a stream, of which the frame does not say that it is empty.
	emptyStream := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x38, 1, 0, 0}
	cases := map[string][][]byte{}
	for i := range frames {
		at := func(what string) string { return fmt.Sprintf("%s %d of %d", what, i, len(frames)) }
		cases[at("without frame")] = slices.Delete(slices.Clone(frames), i, i+1)
		cases[at("twice frame")] = slices.Insert(slices.Clone(frames), i, frames[i])
		if i > 0 && i < len(frames)-1 { // the last two are zeroes, which end a tar
			swapped := slices.Clone(frames)
			swapped[i-1], swapped[i] = swapped[i], swapped[i-1]
			cases[at("swapped with the one before frame")] = swapped
		}
	}
	for i := range len(frames) + 1 {
		at := func(what string) string { return fmt.Sprintf("%s before frame %d of %d", what, i, len(frames)) }
		cases[at("an empty frame")] = slices.Insert(slices.Clone(frames), i, frameOf(t, nil))
		cases[at("an empty stream")] = slices.Insert(slices.Clone(frames), i, emptyStream)
		cases[at("a frame to be skipped")] = slices.Insert(slices.Clone(frames), i, skipped)
		cases[at("a zero")] = slices.Insert(slices.Clone(frames), i, []byte{0})
		cases[at("half a frame")] = slices.Insert(slices.Clone(frames), i, frames[0][:20])
		cases[at("another file")] = slices.Insert(slices.Clone(frames), i, frameOf(t, []byte("hello")))
	}
	for name, c := range cases {
		_, _, err := extract(bytes.Join(c, nil), Limits{})
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotArchive) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Nothing is returned from behind a frame that is damaged, however far reading ahead has
// come: not from one that is decompressed as a stream either.
func TestNothingBehindDamage(t *testing.T) {
	short := func(b byte) []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 1, 1<<3 | 1, 0, 0, b} }
	lie := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 2, 1<<3 | 1, 0, 0, 'x'} // two bytes, it says
	stream := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x38, 1<<3 | 1, 0, 0, 'y'}
	for before := range 2 * mostWorkers {
		var raw, want []byte
		for i := range before {
			want = append(want, 'a'+byte(i))
			raw = append(raw, short('a'+byte(i))...)
		}
		for _, behind := range [][]byte{short('z'), stream, append(short('z'), stream...)} {
			z, err := newZstdReader(bufio.NewReader(bytes.NewReader(slices.Concat(raw, lie, behind))))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(z); err == nil || !bytes.Equal(got, want) {
				t.Errorf("%q (%v) of frames whose one behind %q is damaged", got, err, want)
			}
			z.Close()
		}
	}
}

// Frames may be cut in any other way, and say how long they are or not, as other
// programs and older versions of this one make them.
func TestFramesOfOthers(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	img := newImage(t, testContent)
	plain := pack(t, img, None, 0)
	// Unsized: a stream whose blocks come one by one.
	unsized := func(b []byte) []byte {
		var out bytes.Buffer
		z, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		for piece := range slices.Chunk(b, 100) {
			_, err := z.Write(piece)
			if err := errors.Join(err, z.Flush()); err != nil {
				t.Fatal(err)
			}
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	for range 20 {
		var raw []byte
		for rest := plain; len(rest) > 0; {
			n := min(len(rest), 1+rng.IntN(3000))
			if rng.IntN(3) == 0 {
				raw = append(raw, unsized(rest[:n])...)
			} else {
				raw = append(raw, frameOf(t, rest[:n])...)
			}
			rest = rest[n:]
		}
		if h, got, err := extract(raw, Limits{}); err != nil || !same(h, got) {
			t.Fatal(err)
		}
	}
	// One that says its size and is longer than that: a block for every byte.
	tiny := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0}
	tiny = append(tiny, byte(len(plain)), byte(len(plain)>>8), byte(len(plain)>>16), byte(len(plain)>>24))
	for i, b := range plain {
		head := byte(1 << 3)
		if i == len(plain)-1 {
			head |= 1
		}
		tiny = append(tiny, head, 0, 0, b)
	}
	if h, got, err := extract(tiny, Limits{}); err != nil || !same(h, got) {
		t.Fatal(err)
	}
	// Larger than what is decompressed at once.
	large := newImage(t, largeContent(rng))
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	all := pack(t, large, None, 0)
	cut := 2*zstdPiece + rng.IntN(zstdPiece)
	raw := z.EncodeAll(all[cut:], z.EncodeAll(all[:cut], nil))
	if _, _, err := Verify(context.Background(), bytes.NewReader(raw), Limits{}); err != nil {
		t.Fatal(err)
	}
}

// What a frame says about its size is not believed: neither when it holds more, nor when
// it holds less.
func TestFramesThatLie(t *testing.T) {
	img := newImage(t, testContent)
	plain := pack(t, img, None, 0)
	for _, d := range []int{-1000, -1, 1, 1000, 1 << 19} {
		n := len(plain) + d
		lie := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}
		size := len(plain)<<3 | 1
		lie = append(lie, byte(size), byte(size>>8), byte(size>>16))
		if _, _, err := extract(append(lie, plain...), Limits{}); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotArchive) {
			t.Errorf("%d bytes instead of %d: %v", n, len(plain), err)
		}
	}
}

// Many tiny frames do not each take a decoder of their own: a megabyte of them took
// minutes and gigabytes.
func TestManyTinyStreams(t *testing.T) {
	const n = 1000
	stream := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x38, 1<<3 | 1, 0, 0, 'y'}
	z, err := newZstdReader(bufio.NewReader(bytes.NewReader(bytes.Repeat(stream, n))))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	got, err := io.Copy(io.Discard, z)
	runtime.ReadMemStats(&after)
	if err != nil || got != n {
		t.Fatalf("%d bytes, %v", got, err)
	}
	if each := (after.TotalAlloc - before.TotalAlloc) / n; each > 16<<10 {
		t.Errorf("%d bytes of memory for each", each)
	}
}

// What was read ahead of a bomb does not count for it.
func TestBombBesideRandomBytes(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	noise := make([]byte, 2*zstdPiece)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	// The zeroes end just behind what may grow as it likes, and the noise comes next.
	zeroes := make([]byte, freeRatioBytes+zstdPiece)
	raw := bytes.Join(append(framesOf(t, zeroes, zstdPiece), framesOf(t, noise, zstdPiece)...), nil)
	p, err := newParser(context.Background(), bytes.NewReader(raw), Limits{MaxRatio: 100}.withDefaults())
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	buf := make([]byte, zstdPiece/4)
	for err == nil {
		err = p.full(buf)
	}
	if !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
}
