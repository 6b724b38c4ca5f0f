package rpc

import (
	"math/bits"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/experimental"
)

// buffers is where messages are encoded and received.
var buffers = &bufferPool{}

// Sizes of pooled buffers are powers of two: from gRPC's smallest to what holds a
// message of peers. The chunks of images and archives, a little over 256 KiB, have
// a size that fits.
const (
	leastBufferBits = 8
	mostBufferBits  = 23
)

// bufferPool is a mem.BufferPool that hands buffers out as they are. gRPC's own
// clears each of them, up to its capacity, though every byte that is used is
// written first: for the chunk of an image that was a megabyte, twice, and a tenth
// of what a transfer costs.
type bufferPool struct {
	sizes [mostBufferBits - leastBufferBits + 1]sync.Pool
}

// Get implements mem.BufferPool.
func (p *bufferPool) Get(length int) *[]byte {
	n := max(bits.Len(uint(max(length, 1)-1)), leastBufferBits)
	if n > mostBufferBits {
		b := make([]byte, length)
		return &b
	}
	if b, ok := p.sizes[n-leastBufferBits].Get().(*[]byte); ok {
		*b = (*b)[:length]
		return b
	}
	b := make([]byte, length, 1<<n)
	return &b
}

// Put implements mem.BufferPool.
func (p *bufferPool) Put(b *[]byte) {
	// What fits is a size less, unless the capacity is a size.
	n := bits.Len(uint(cap(*b))) - 1
	if n < leastBufferBits || n > mostBufferBits {
		return
	}
	p.sizes[n-leastBufferBits].Put(b)
}

// dialBuffers and serveBuffers make a connection use buffers for what it reads.
func dialBuffers() grpc.DialOption    { return experimental.WithBufferPool(buffers) }
func serveBuffers() grpc.ServerOption { return experimental.BufferPool(buffers) }
