package rpc

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/peerpb"
)

// wire encodes v with our codec.
func wire(t testing.TB, v any) []byte {
	t.Helper()
	b, err := NewCodec().Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	return b.Materialize()
}

func unwire(t testing.TB, raw []byte, v any) {
	t.Helper()
	if err := NewCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(raw)}, v); err != nil {
		t.Fatal(err)
	}
}

// Hand-written frames and generated types are the same on the wire, both ways:
// else two versions of this program could not talk.
func TestFramesAreTheProtocol(t *testing.T) {
	for _, size := range []int{0, 1, 127, 128, 20_000, 1 << 20} {
		data := bytes.Repeat([]byte{7}, size)
		m1, m2 := message(raftpb.MsgApp, 1, 2, 3, data...), message(raftpb.MsgHeartbeat, 1, 2, 1<<40)
		var frame peerpb.MessageFrame
		unwire(t, wire(t, &messagesOut{msgs: []*raftpb.Message{m1, m2}}), &frame)
		if len(frame.Messages) != 2 {
			t.Fatalf("%d messages", len(frame.Messages))
		}
		for i, m := range []*raftpb.Message{m1, m2} {
			got := &raftpb.Message{}
			if err := proto.Unmarshal(frame.Messages[i], got); err != nil || !proto.Equal(got, m) {
				t.Fatalf("message %d: %v, %v", i, got, err)
			}
		}
		frame.Hello = Identity{ClusterID: 1, NodeID: 2, PeerAddr: "p", ClientAddr: "c", Version: "v"}.hello(3)
		var in messagesIn
		unwire(t, wire(t, &frame), &in)
		if !proto.Equal(in.hello, frame.Hello) || len(in.msgs) != 2 || !proto.Equal(in.msgs[0], m1) || !proto.Equal(in.msgs[1], m2) {
			t.Fatal("a generated frame was not read back")
		}

		cmd := &commandpb.Command{RequestId: "r", Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: &commandpb.SaveCheckpoint{Data: data}}}
		op := &operation{cmd: cmd, size: cmd.SizeVT(), id: uint64(size) + 1}
		beats := beatBatch{sidecars: []string{"a", "b"}, services: []string{"c"}}
		var req peerpb.ForwardRequest
		unwire(t, wire(t, &commandsOut{ops: []*operation{op, op}, beats: beats}), &req)
		got := &commandpb.Command{}
		if len(req.Commands) != 2 || req.Commands[1].Id != op.id || got.UnmarshalVT(req.Commands[1].Command) != nil ||
			!proto.Equal(got, cmd) || !slices.Equal(req.SidecarBeats, beats.sidecars) || !slices.Equal(req.ServiceBeats, beats.services) {
			t.Fatalf("size %d: the request came as %.200v", size, &req)
		}
		req.Hello = frame.Hello
		var cin commandsIn
		unwire(t, wire(t, &req), &cin)
		if !proto.Equal(cin.hello, req.Hello) || len(cin.commands) != 2 || cin.commands[0].id != op.id ||
			!bytes.Equal(cin.commands[0].command, req.Commands[0].Command) || fmt.Sprintf("%s %s", cin.sidecars, cin.services) != "[a b] [c]" {
			t.Fatal("a generated request was not read back")
		}

		results := []forwardedResult{
			{id: 1, result: &commandpb.Result{Revision: 9, Rejection: &commandpb.Rejection{Reason: string(data)}}, index: 10},
			{id: 2, failure: peerpb.Failure_FAILURE_NOT_LEADER, leader: 3},
			{id: 1 << 50, failure: peerpb.Failure_FAILURE_AMBIGUOUS, message: "why"},
			{id: 4, result: &commandpb.Result{}},
		}
		var resp peerpb.ForwardResponse
		raw := wire(t, &resultsOut{results: results})
		unwire(t, raw, &resp)
		var rin resultsIn
		unwire(t, raw, &rin)
		if len(resp.Results) != len(results) || len(rin.results) != len(results) {
			t.Fatal("results are missing")
		}
		for i, want := range results {
			r := resp.Results[i]
			if r.Id != want.id || r.Failure != want.failure || r.Message != want.message || r.Leader != want.leader || r.Index != want.index {
				t.Errorf("result %d came as %v", i, r)
			}
			back := rin.results[i]
			if back.id != want.id || back.failure != want.failure || back.message != want.message ||
				back.leader != want.leader || back.index != want.index || (back.result == nil) != (want.result == nil) ||
				want.result != nil && !proto.Equal(back.result, want.result) {
				t.Errorf("result %d was read back as %+v", i, back)
			}
		}
	}
}

// The codec writes what the standard one does, for every kind of message, and a
// message that is decoded into twice holds the second only.
func TestCodecIsTheStandardOne(t *testing.T) {
	ours := NewCodec()
	std := ours.(codec).fallback
	messages := []proto.Message{
		&peerpb.FetchImageRequest{Hello: &peerpb.Hello{NodeId: 1}, MinIndex: 7, ImageId: "i"},
		&peerpb.ImageFrame{Data: bytes.Repeat([]byte{1}, 100_000), Last: true},
		&raftpb.Message{Index: new(uint64(7))}, // no generated code
		&peerpb.Hello{},
	}
	for _, m := range messages {
		want, err := std.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ours.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Materialize(), want.Materialize()) {
			t.Errorf("%T differs on the wire", m)
		}
		back := m.ProtoReflect().New().Interface()
		for range 2 {
			if err := ours.Unmarshal(want, back); err != nil {
				t.Fatal(err)
			}
		}
		if !proto.Equal(back, m) {
			t.Errorf("%T was read back as %.100v", m, back)
		}
	}
	if _, err := ours.Marshal(42); err == nil {
		t.Error("encoded a number")
	}
}

// Whatever a peer sends, decoding it fails or succeeds, and what it took for
// itself stays within the frame.
func FuzzFrames(f *testing.F) {
	cmd := onceCommand("p")
	f.Add(wire(f, &messagesOut{msgs: []*raftpb.Message{message(raftpb.MsgApp, 1, 2, 3, 'x')}}))
	f.Add(wire(f, &commandsOut{ops: []*operation{{cmd: cmd, size: cmd.SizeVT(), id: 1}}}))
	f.Add(wire(f, &resultsOut{results: []forwardedResult{{id: 1, result: &commandpb.Result{}}}}))
	f.Add([]byte{0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, data []byte) {
		keep := bytes.Clone(data)
		var m messagesIn
		var c commandsIn
		var r resultsIn
		_ = m.decodeFrame(data)
		_ = c.decodeFrame(data)
		_ = r.decodeFrame(data)
		var i imageIn
		_ = i.decodeBuffer(mem.SliceBuffer(data))
		if len(i.data)+len(i.message) > len(data) {
			t.Error("the parts of an image frame are larger than it")
		}
		if !bytes.Equal(keep, data) {
			t.Error("decoding changed the frame")
		}
		for i := range data {
			data[i] = 0xee // the buffer goes back to the pool
		}
		for _, fc := range c.commands {
			if len(fc.command) > len(keep) {
				t.Error("a command is larger than its frame")
			}
		}
	})
}
