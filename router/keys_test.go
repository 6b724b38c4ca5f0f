package router

import (
	"bytes"
	"cmp"
	"strings"
	"testing"
)

// FuzzKeys: keys decode to what they were made of, and sort like it, whatever
// the ids hold.
func FuzzKeys(f *testing.F) {
	f.Add("a", "b", uint32(1), "a\x00", "b", uint32(2))
	f.Add("a\x00\x01", "", uint32(1), "a", "\x00\xff", uint32(1<<31))
	f.Add("", "", uint32(0), "\xff", "\x00", uint32(1))
	f.Fuzz(func(t *testing.T, a1, b1 string, n1 uint32, a2, b2 string, n2 uint32) {
		if a, b, err := decodePair(key(nil).pair('x', a1, b1)); err != nil || a != a1 || b != b1 {
			t.Fatalf("pair(%q, %q) came back as %q, %q, %v", a1, b1, a, b, err)
		}
		if a, n, err := decodePartition(key(nil).partition('x', a1, n1)); err != nil || a != a1 || n != n1 {
			t.Fatalf("partition(%q, %d) came back as %q, %d, %v", a1, n1, a, n, err)
		}
		if a, b, n, err := decodeGroupOffset(key(nil).groupOffset(a1, b1, n1)); err != nil || a != a1 || b != b1 || n != n1 {
			t.Fatalf("groupOffset(%q, %q, %d) came back as %q, %q, %d, %v", a1, b1, n1, a, b, n, err)
		}
		want := cmp.Or(strings.Compare(a1, a2), strings.Compare(b1, b2))
		if got := bytes.Compare(key(nil).pair('x', a1, b1), key(nil).pair('x', a2, b2)); got != want {
			t.Fatalf("pairs (%q, %q) and (%q, %q) compare as %d, want %d", a1, b1, a2, b2, got, want)
		}
		want = cmp.Or(want, cmp.Compare(n1, n2))
		if got := bytes.Compare(key(nil).groupOffset(a1, b1, n1), key(nil).groupOffset(a2, b2, n2)); got != want {
			t.Fatalf("group offsets compare as %d, want %d", got, want)
		}
		// A scan over one id must not reach another's keys.
		if a1 != a2 && bytes.HasPrefix(key(nil).pair('x', a2, b2), key(nil).group('x', a1)) {
			t.Fatalf("keys of %q lie below %q", a2, a1)
		}
	})
}

// FuzzDecodeKeys: damaged keys are errors, not panics.
func FuzzDecodeKeys(f *testing.F) {
	f.Add([]byte("xa\x00\x01b"))
	f.Fuzz(func(t *testing.T, k []byte) {
		_, _, _ = decodePair(k)
		_, _, _ = decodePartition(k)
		_, _, _, _ = decodeGroupOffset(k)
		_, _ = decodePosition(k)
	})
}
