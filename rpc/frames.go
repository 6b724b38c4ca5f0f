package rpc

import (
	"fmt"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/peerpb"
)

// The types of this file are the hot messages of peer.proto, written and read
// by hand: their wire form is exactly that of the generated types (the tests
// hold them together), but what they carry goes between the frame and its
// origin without a copy in between.

// Field numbers of peer.proto.
const (
	frameHello    = protowire.Number(1) // MessageFrame.hello, ForwardRequest.hello
	frameMessages = protowire.Number(2) // MessageFrame.messages

	requestCommands = protowire.Number(2) // ForwardRequest.commands
	requestSidecars = protowire.Number(4) // ForwardRequest.sidecar_beats
	requestServices = protowire.Number(5) // ForwardRequest.service_beats
	commandID       = protowire.Number(1) // ForwardedCommand.id
	commandBytes    = protowire.Number(2) // ForwardedCommand.command

	responseResults = protowire.Number(1) // ForwardResponse.results
	responseHello   = protowire.Number(2) // ForwardResponse.hello
	resultID        = protowire.Number(1) // ForwardedResult.id
	resultBytes     = protowire.Number(2) // ForwardedResult.result
	resultFailure   = protowire.Number(3) // ForwardedResult.failure
	resultMessage   = protowire.Number(4) // ForwardedResult.message
	resultLeader    = protowire.Number(5) // ForwardedResult.leader
	resultIndex     = protowire.Number(6) // ForwardedResult.index
)

// newFrame returns a buffer of gRPC's pool with length 0 and room for size
// bytes, and seal turns it into what gRPC sends and then frees.
func newFrame(size int) *[]byte {
	buf := buffers.Get(size)
	*buf = (*buf)[:0]
	return buf
}

func seal(buf *[]byte) mem.BufferSlice {
	return mem.BufferSlice{mem.NewBuffer(buf, buffers)}
}

// messagesOut is a MessageFrame to send.
type messagesOut struct{ msgs []*raftpb.Message }

func (f *messagesOut) encodeFrame() mem.BufferSlice {
	size := 0
	for _, m := range f.msgs {
		size += protowire.SizeTag(frameMessages) + protowire.SizeBytes(proto.Size(m))
	}
	buf := newFrame(size)
	b := *buf
	for _, m := range f.msgs {
		b = protowire.AppendTag(b, frameMessages, protowire.BytesType)
		// Size leaves the sizes of all parts in the message; several senders do
		// so at once for shared entries, which protobuf permits (the fields are
		// atomic and all write the same values).
		b = protowire.AppendVarint(b, uint64(proto.Size(m)))
		// The error is about strings that are not UTF-8; the message has none.
		b, _ = proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, m)
	}
	*buf = b
	return seal(buf)
}

// messagesIn is a received MessageFrame. A message is decoded anew each time:
// raft keeps it.
type messagesIn struct {
	hello *peerpb.Hello
	msgs  []*raftpb.Message
}

func (f *messagesIn) decodeFrame(data []byte) error {
	f.hello, f.msgs = nil, nil
	return eachField(data, func(num protowire.Number, value []byte, _ uint64) error {
		switch num {
		case frameHello:
			f.hello = &peerpb.Hello{}
			return f.hello.UnmarshalVT(value)
		case frameMessages:
			m := &raftpb.Message{}
			if err := proto.Unmarshal(value, m); err != nil {
				return err
			}
			f.msgs = append(f.msgs, m)
		}
		return nil
	})
}

// commandsOut is a ForwardRequest to send. The sizes of the commands are those
// of SizeVT and were taken when the operations were queued.
type commandsOut struct {
	ops   []*operation
	beats beatBatch
}

// beatBatch is a batch of heartbeats: the ids of those that were heard of.
// Numbers that both ends agree on instead of ids were tried: they save the
// leader's look-up and cost the follower one, so no processor time is saved
// (BenchmarkBeatBatch), and 30 bytes a heartbeat are 200 kB/s of a fleet of
// 100,000.
type beatBatch struct{ sidecars, services []string }

func (b beatBatch) len() int { return len(b.sidecars) + len(b.services) }

// cut splits off the first n.
func (b beatBatch) cut(n int) (head, rest beatBatch) {
	i := min(n, len(b.sidecars))
	j := min(n-i, len(b.services))
	return beatBatch{b.sidecars[:i], b.services[:j]}, beatBatch{b.sidecars[i:], b.services[j:]}
}

func (f *commandsOut) encodeFrame() mem.BufferSlice {
	size := 0
	for _, op := range f.ops {
		size += protowire.SizeTag(requestCommands) + protowire.SizeBytes(commandSize(op))
	}
	for _, ids := range [][]string{f.beats.sidecars, f.beats.services} {
		for _, id := range ids {
			size += protowire.SizeTag(requestSidecars) + protowire.SizeBytes(len(id))
		}
	}
	buf := newFrame(size)
	b := *buf
	for _, op := range f.ops {
		b = protowire.AppendTag(b, requestCommands, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(commandSize(op)))
		b = protowire.AppendTag(b, commandID, protowire.VarintType)
		b = protowire.AppendVarint(b, op.id)
		b = protowire.AppendTag(b, commandBytes, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(op.size))
		b = appendSized(b, op.cmd, op.size)
	}
	for _, id := range f.beats.sidecars {
		b = protowire.AppendTag(b, requestSidecars, protowire.BytesType)
		b = protowire.AppendString(b, id)
	}
	for _, id := range f.beats.services {
		b = protowire.AppendTag(b, requestServices, protowire.BytesType)
		b = protowire.AppendString(b, id)
	}
	*buf = b
	return seal(buf)
}

func commandSize(op *operation) int {
	return protowire.SizeTag(commandID) + protowire.SizeVarint(op.id) +
		protowire.SizeTag(commandBytes) + protowire.SizeBytes(op.size)
}

// appendSized appends the wire form of m, which has size bytes. The callers
// made room for it.
func appendSized(b []byte, m interface {
	MarshalToSizedBufferVT([]byte) (int, error)
}, size int) []byte {
	at := len(b)
	if cap(b)-at < size {
		grown := make([]byte, at, at+size)
		copy(grown, b)
		b = grown
	}
	b = b[:at+size]
	// Generated code fails only for messages of other generators inside.
	_, _ = m.MarshalToSizedBufferVT(b[at:])
	return b
}

// forwardedCommand is one command of a received ForwardRequest.
type forwardedCommand struct {
	id      uint64
	command []byte // part of commandsIn.data
}

// commandsIn is a received ForwardRequest. Decoding again overwrites it.
type commandsIn struct {
	hello    *peerpb.Hello
	commands []forwardedCommand
	// sidecars and services were heard of; the ids are parts of data.
	sidecars, services [][]byte
	data               []byte
}

func (f *commandsIn) decodeFrame(data []byte) error {
	f.hello, f.commands = nil, f.commands[:0]
	f.sidecars, f.services = f.sidecars[:0], f.services[:0]
	// One copy of the whole frame instead of one per command: data goes back to
	// the pool.
	f.data = append(f.data[:0], data...)
	return eachField(f.data, func(num protowire.Number, value []byte, _ uint64) error {
		switch num {
		case frameHello:
			f.hello = &peerpb.Hello{}
			return f.hello.UnmarshalVT(value)
		case requestCommands:
			var c forwardedCommand
			err := eachField(value, func(num protowire.Number, value []byte, n uint64) error {
				switch num {
				case commandID:
					c.id = n
				case commandBytes:
					c.command = value
				}
				return nil
			})
			f.commands = append(f.commands, c)
			return err
		case requestSidecars:
			f.sidecars = append(f.sidecars, value)
		case requestServices:
			f.services = append(f.services, value)
		}
		return nil
	})
}

// forwardedResult is one ForwardedResult, to send or received.
type forwardedResult struct {
	id      uint64
	result  *commandpb.Result
	failure peerpb.Failure
	message string
	leader  uint64
	index   uint64
}

func (r *forwardedResult) bodySize() int {
	size := protowire.SizeTag(resultID) + protowire.SizeVarint(r.id)
	if r.result != nil {
		size += protowire.SizeTag(resultBytes) + protowire.SizeBytes(r.result.SizeVT())
	}
	if r.failure != 0 {
		size += protowire.SizeTag(resultFailure) + protowire.SizeVarint(uint64(r.failure))
	}
	if r.message != "" {
		size += protowire.SizeTag(resultMessage) + protowire.SizeBytes(len(r.message))
	}
	if r.leader != 0 {
		size += protowire.SizeTag(resultLeader) + protowire.SizeVarint(r.leader)
	}
	if r.index != 0 {
		size += protowire.SizeTag(resultIndex) + protowire.SizeVarint(r.index)
	}
	return size
}

// resultsOut is a ForwardResponse to send.
type resultsOut struct{ results []forwardedResult }

func (f *resultsOut) encodeFrame() mem.BufferSlice {
	size := 0
	for i := range f.results {
		size += protowire.SizeTag(responseResults) + protowire.SizeBytes(f.results[i].bodySize())
	}
	buf := newFrame(size)
	b := *buf
	for i := range f.results {
		r := &f.results[i]
		b = protowire.AppendTag(b, responseResults, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(r.bodySize()))
		b = protowire.AppendTag(b, resultID, protowire.VarintType)
		b = protowire.AppendVarint(b, r.id)
		if r.result != nil {
			n := r.result.SizeVT()
			b = protowire.AppendTag(b, resultBytes, protowire.BytesType)
			b = protowire.AppendVarint(b, uint64(n))
			b = appendSized(b, r.result, n)
		}
		if r.failure != 0 {
			b = protowire.AppendTag(b, resultFailure, protowire.VarintType)
			b = protowire.AppendVarint(b, uint64(r.failure))
		}
		if r.message != "" {
			b = protowire.AppendTag(b, resultMessage, protowire.BytesType)
			b = protowire.AppendString(b, r.message)
		}
		if r.leader != 0 {
			b = protowire.AppendTag(b, resultLeader, protowire.VarintType)
			b = protowire.AppendVarint(b, r.leader)
		}
		if r.index != 0 {
			b = protowire.AppendTag(b, resultIndex, protowire.VarintType)
			b = protowire.AppendVarint(b, r.index)
		}
	}
	*buf = b
	return seal(buf)
}

// resultsIn is a received ForwardResponse. Decoding again overwrites the slice,
// not the results, which belong to the callers.
type resultsIn struct {
	hello   *peerpb.Hello
	results []forwardedResult
}

func (f *resultsIn) decodeFrame(data []byte) error {
	f.hello, f.results = nil, f.results[:0]
	return eachField(data, func(num protowire.Number, value []byte, _ uint64) error {
		switch num {
		case responseHello:
			f.hello = &peerpb.Hello{}
			return f.hello.UnmarshalVT(value)
		case responseResults:
			var r forwardedResult
			err := eachField(value, func(num protowire.Number, value []byte, n uint64) error {
				switch num {
				case resultID:
					r.id = n
				case resultBytes:
					r.result = &commandpb.Result{}
					return r.result.UnmarshalVT(value)
				case resultFailure:
					r.failure = peerpb.Failure(n)
				case resultMessage:
					r.message = string(value)
				case resultLeader:
					r.leader = n
				case resultIndex:
					r.index = n
				}
				return nil
			})
			f.results = append(f.results, r)
			return err
		}
		return nil
	})
}

// eachField calls fn for every field of a protobuf message: value is set for
// length-delimited fields and is part of data, n for varints. Fields of other
// types, and those fn does not know, belong to newer versions and are skipped.
func eachField(data []byte, fn func(num protowire.Number, value []byte, n uint64) error) error {
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrMalformed, protowire.ParseError(n))
		}
		data = data[n:]
		var value []byte
		var number uint64
		switch typ {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(data)
		case protowire.VarintType:
			number, n = protowire.ConsumeVarint(data)
		default:
			if n = protowire.ConsumeFieldValue(num, typ, data); n >= 0 {
				data = data[n:]
				continue
			}
		}
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrMalformed, protowire.ParseError(n))
		}
		data = data[n:]
		if err := fn(num, value, number); err != nil {
			return err
		}
	}
	return nil
}
