package rpc

import (
	"bytes"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/rpc/peerpb"
)

// pooled returns a buffer of the pool that holds data.
func pooled(data []byte) *[]byte {
	buf := buffers.Get(len(data))
	copy(*buf, data)
	return buf
}

// Frames of images are those of the protocol, both ways.
func TestImageFramesAreTheProtocol(t *testing.T) {
	var in imageIn
	defer in.free()
	for _, size := range []int{0, 1, 127, 128, 300, 20_000, 256 << 10, 300_000} {
		want := &peerpb.ImageFrame{Offset: int64(size) << 20, Crc: uint32(size) * 77, Last: size%2 == 1,
			Data: bytes.Repeat([]byte{byte(size + 7)}, size)}
		if want.Last {
			want.Message = []byte("the message")
		}
		out := &imageOut{ImageFrame: peerpb.ImageFrame{Offset: want.Offset, Crc: want.Crc, Last: want.Last, Message: want.Message}}
		if size > 0 {
			out.data = pooled(want.Data)
		}
		var got peerpb.ImageFrame
		unwire(t, wire(t, out), &got)
		if !bytes.Equal(got.Data, want.Data) {
			t.Fatalf("%d bytes came as %d others", size, len(got.Data))
		}
		if !proto.Equal(&got, want) {
			t.Fatalf("size %d came as %.200v", size, &got)
		}
		// Into the same one each time: nothing of the frame before is left.
		unwire(t, wire(t, want), &in)
		if in.offset != want.Offset || in.crc != want.Crc || in.last != want.Last ||
			!bytes.Equal(in.data, want.Data) || !bytes.Equal(in.message, want.Message) {
			t.Fatalf("size %d was read back as offset %d, crc %d, last %t, %d bytes, message %q",
				size, in.offset, in.crc, in.last, len(in.data), in.message)
		}
	}
}

// What a frame carries is nobody else's until gRPC has let go of it, or until the
// next one is received.
func TestImageFramesKeepTheirBuffers(t *testing.T) {
	const size = 200_000
	taken := func(data []byte) bool {
		// More than were ever given back here: one of them would be that buffer.
		for range 8 {
			if b := buffers.Get(size); &(*b)[0] == &data[0] {
				return true
			}
		}
		return false
	}
	data := pooled(make([]byte, size))
	out, err := NewCodec().Marshal(&imageOut{data: data})
	if err != nil {
		t.Fatal(err)
	}
	if taken(*data) {
		t.Error("the data of a frame was given away before the frame was sent")
	}
	whole := pooled(out.Materialize())
	out.Free()
	var in imageIn
	if err := NewCodec().Unmarshal(mem.BufferSlice{mem.NewBuffer(whole, buffers)}, &in); err != nil {
		t.Fatal(err)
	}
	if len(in.data) != size {
		t.Fatalf("%d bytes came of %d", len(in.data), size)
	}
	if taken(*whole) {
		t.Error("the data of a received frame was given away before the next one")
	}
	in.free()
	if in.data != nil {
		t.Error("a frame has data after its buffer was given back")
	}
}
