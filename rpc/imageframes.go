package rpc

import (
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"conveyor.etl/router/rpc/peerpb"
)

// Field numbers of peerpb.ImageFrame.
const (
	imageOffset  = protowire.Number(4)
	imageData    = protowire.Number(5)
	imageCRC     = protowire.Number(6)
	imageLast    = protowire.Number(7)
	imageMessage = protowire.Number(8)
)

// imageOut is an ImageFrame to send whose data is in a buffer of the pool. It goes
// out from there: an image is copied often enough on its way as it is, and its
// copying is most of what it takes from the clients of a busy node.
type imageOut struct {
	peerpb.ImageFrame // without its data
	// data belongs to the frame until it was sent, which is after SendMsg has
	// returned; nil for none.
	data *[]byte
}

func (f *imageOut) encodeFrame() mem.BufferSlice {
	size := f.SizeVT()
	n := 0
	if f.data != nil {
		n = len(*f.data)
	}
	buf := newFrame(size + protowire.SizeTag(imageData) + protowire.SizeVarint(uint64(n)))
	b := (*buf)[:size]
	// The fields are those of this package: there is nothing that could not be encoded.
	if _, err := f.MarshalToSizedBufferVT(b); err != nil {
		panic("rpc: encode an image frame: " + err.Error())
	}
	if n == 0 {
		*buf = b
		return seal(buf)
	}
	b = protowire.AppendTag(b, imageData, protowire.BytesType)
	*buf = protowire.AppendVarint(b, uint64(n))
	return append(seal(buf), mem.NewBuffer(f.data, buffers))
}

// bufferDecoder is a message that keeps the buffer it is read from.
type bufferDecoder interface{ decodeBuffer(b mem.Buffer) error }

// imageIn is a received ImageFrame after the first one. Its data and its message are
// in the buffer it came in, and theirs until the next one is received, or free is called.
type imageIn struct {
	offset        int64
	data, message []byte
	crc           uint32
	last          bool
	buf           mem.Buffer
}

// decodeBuffer takes b, also when it fails. A field of a wrong type is read as none: what
// such a frame lacks then is noticed by who stores it, by offset, checksum and size.
func (f *imageIn) decodeBuffer(b mem.Buffer) error {
	f.free()
	f.buf = b
	return eachField(b.ReadOnlyData(), func(num protowire.Number, value []byte, n uint64) error {
		switch num {
		case imageOffset:
			f.offset = int64(n)
		case imageData:
			f.data = value
		case imageCRC:
			f.crc = uint32(n)
		case imageLast:
			f.last = n != 0
		case imageMessage:
			f.message = value
		}
		return nil
	})
}

// free gives the buffer back and empties the frame.
func (f *imageIn) free() {
	if f.buf != nil {
		f.buf.Free()
	}
	*f = imageIn{}
}
