package rpc

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto" // registers the codec to fall back to
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// vtMessage is a protobuf message with generated, reflection-free code.
type vtMessage interface {
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
	UnmarshalVT([]byte) error
}

// frameEncoder is a message that writes its own wire form; it hands over
// buffers that nobody writes to any more.
type frameEncoder interface{ encodeFrame() mem.BufferSlice }

// frameDecoder is a message that reads its own wire form. data is valid only
// until decodeFrame returns.
type frameDecoder interface{ decodeFrame(data []byte) error }

// codec is the wire format of every gRPC server and client of this program:
// protobuf, written by generated code where a message has it and by reflection
// where not. One codec must know both, because gRPC takes one for the whole
// server. Use it by value.
type codec struct{ fallback encoding.CodecV2 }

// NewCodec returns the codec for grpc.ForceServerCodecV2 and
// grpc.ForceCodecV2. Its wire format is that of the standard codec.
func NewCodec() encoding.CodecV2 {
	return codec{fallback: encoding.GetCodecV2(protocodec.Name)}
}

// Name implements encoding.CodecV2. It is the standard name because the wire
// format is: it appears in the content type.
func (codec) Name() string { return protocodec.Name }

// Marshal implements encoding.CodecV2. gRPC frees the buffers once they are on
// the wire, which may be after SendMsg has returned; so they come from gRPC's
// pool, never from a buffer of ours.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch m := v.(type) {
	case frameEncoder:
		return m.encodeFrame(), nil
	case vtMessage:
		size := m.SizeVT()
		if mem.IsBelowBufferPoolingThreshold(size) {
			buf := make([]byte, size)
			if _, err := m.MarshalToSizedBufferVT(buf); err != nil {
				return nil, fmt.Errorf("rpc: encode %T: %w", v, err)
			}
			return mem.BufferSlice{mem.SliceBuffer(buf)}, nil
		}
		pool := buffers
		buf := pool.Get(size)
		if _, err := m.MarshalToSizedBufferVT((*buf)[:size]); err != nil {
			pool.Put(buf)
			return nil, fmt.Errorf("rpc: encode %T: %w", v, err)
		}
		return mem.BufferSlice{mem.NewBuffer(buf, pool)}, nil
	}
	if m, ok := v.(proto.Message); ok {
		// As the fallback does, but with buffers that are not cleared first.
		if size := proto.Size(m); !mem.IsBelowBufferPoolingThreshold(size) {
			buf := buffers.Get(size)
			out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend((*buf)[:0], m)
			if err != nil {
				buffers.Put(buf)
				return nil, fmt.Errorf("rpc: encode %T: %w", v, err)
			}
			*buf = out
			return mem.BufferSlice{mem.NewBuffer(buf, buffers)}, nil
		}
	}
	return c.fallback.Marshal(v)
}

// Unmarshal implements encoding.CodecV2. Generated code copies what it keeps,
// so the contiguous form of data can go back to the pool at once.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch m := v.(type) {
	case bufferDecoder:
		return m.decodeBuffer(data.MaterializeToBuffer(buffers))
	case frameDecoder:
		buf := data.MaterializeToBuffer(buffers)
		defer buf.Free()
		return m.decodeFrame(buf.ReadOnlyData())
	case vtMessage:
		buf := data.MaterializeToBuffer(buffers)
		defer buf.Free()
		if r, ok := v.(interface{ Reset() }); ok {
			r.Reset() // UnmarshalVT merges into what is there
		}
		return m.UnmarshalVT(buf.ReadOnlyData())
	case proto.Message:
		buf := data.MaterializeToBuffer(buffers)
		defer buf.Free()
		return proto.Unmarshal(buf.ReadOnlyData(), m)
	}
	return c.fallback.Unmarshal(data, v)
}
