package rpc

import "testing"

func TestBuffersHaveTheLengthAskedFor(t *testing.T) {
	p := &bufferPool{}
	for _, n := range []int{0, 1, 255, 256, 257, 4096, 256<<10 + 30, 1 << mostBufferBits, 1<<mostBufferBits + 1} {
		for range 3 {
			b := p.Get(n)
			if len(*b) != n {
				t.Fatalf("a buffer of %d bytes was asked for, it has %d", n, len(*b))
			}
			// gRPC gives back prefixes.
			*b = (*b)[:n/2]
			p.Put(b)
		}
	}
}

func TestABufferIsNoSmallerThanItsSize(t *testing.T) {
	p := &bufferPool{}
	odd := make([]byte, 0, 1000) // not of the pool: 512 is what it is good for
	p.Put(&odd)
	tiny := make([]byte, 0, 10)
	p.Put(&tiny)
	for _, n := range []int{200, 500, 600, 1000} {
		if b := p.Get(n); len(*b) != n {
			t.Fatalf("a buffer of %d bytes was asked for, it has %d", n, len(*b))
		}
	}
}
