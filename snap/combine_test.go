package snap

import (
	"hash/crc32"
	"testing"
)

// Goal: the combined checksum is the one of the whole, however it is cut.
func FuzzCombine(f *testing.F) {
	f.Add([]byte(nil), uint(0))
	f.Add([]byte("a"), uint(0))
	f.Add([]byte("the state of a cluster"), uint(7))
	f.Add(make([]byte, 300), uint(299))
	f.Fuzz(func(t *testing.T, whole []byte, cut uint) {
		a, b := whole[:min(cut, uint(len(whole)))], whole[min(cut, uint(len(whole))):]
		got := combine(crc32.Checksum(a, castagnoli), crc32.Checksum(b, castagnoli), int64(len(b)))
		if want := crc32.Checksum(whole, castagnoli); got != want {
			t.Fatalf("%d and %d bytes: %08x, the whole has %08x", len(a), len(b), got, want)
		}
	})
}

// Lengths of which nobody has the bytes at hand: 2^40 zeroes, made by doubling.
func TestCombineLong(t *testing.T) {
	size, crc := int64(1), crc32.Checksum([]byte{0}, castagnoli)
	for size < 1<<40 {
		crc, size = combine(crc, crc, size), 2*size
		if size == 1<<20 {
			if want := crc32.Checksum(make([]byte, size), castagnoli); crc != want {
				t.Fatalf("%d zeroes: %08x, want %08x", size, crc, want)
			}
		}
	}
	// Cut elsewhere, it must be the same.
	third := combine(crc32.Checksum(make([]byte, 1000), castagnoli), rest(t, size-1000), size-1000)
	if third != crc {
		t.Fatalf("cut in the middle %08x, cut after 1000 bytes %08x", crc, third)
	}
}

// rest returns the checksum of n zeroes from those of powers of two.
func rest(t *testing.T, n int64) uint32 {
	t.Helper()
	out, size, crc := uint32(0), int64(1), crc32.Checksum([]byte{0}, castagnoli)
	for ; n > 0; n >>= 1 {
		if n&1 != 0 {
			out = combine(out, crc, size)
		}
		crc, size = combine(crc, crc, size), 2*size
	}
	return out
}

func BenchmarkCombine(b *testing.B) {
	for b.Loop() {
		combine(1, 2, 256<<10)
	}
}
