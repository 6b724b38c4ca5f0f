package rpc

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
)

func (a *api) commitStream() clusterpb.Commits_CommitClient {
	a.t.Helper()
	stream, err := a.commits.Commit(a.ctx())
	noError(a.t, err)
	return stream
}

// collect receives until n results are there.
func collect(t *testing.T, stream clusterpb.Commits_CommitClient, n int) map[uint64]*clusterpb.CommitResult {
	t.Helper()
	out := make(map[uint64]*clusterpb.CommitResult)
	for len(out) < n {
		resp, err := stream.Recv()
		noError(t, err)
		for _, r := range resp.Results {
			if out[r.Id] != nil {
				t.Fatalf("batch %d was answered twice", r.Id)
			}
			out[r.Id] = r
		}
	}
	return out
}

// Goal: a batch of every kind of operation is applied whole.
func TestCommitBatch(t *testing.T) {
	a := newAPI(t)
	stream := a.commitStream()
	ts := &timestamppb.Timestamp{Seconds: 99, Nanos: 7}
	noError(t, stream.Send(&clusterpb.CommitRequest{Id: 1, Ops: []*clusterpb.CommitOp{
		{Op: &clusterpb.CommitOp_Offset{Offset: &clusterpb.OffsetCommit{SourceId: "s", Partition: 1, Offset: 10, Timestamp: ts}}},
		{Op: &clusterpb.CommitOp_Watermark{Watermark: &clusterpb.WatermarkCommit{Watermark: &commonpb.Watermark{SourceId: "s", Position: 20, Timestamp: ts}}}},
		{Op: &clusterpb.CommitOp_GroupOffset{GroupOffset: &clusterpb.GroupOffsetCommit{GroupId: "g", SourceId: "s", Partition: 2, Offset: 30}}},
		{Op: &clusterpb.CommitOp_Checkpoint{Checkpoint: &clusterpb.CheckpointCommit{ServiceId: "svc", CheckpointId: "cp", Data: []byte("d")}}},
	}}))
	r := collect(t, stream, 1)[1]
	if r.Outcome != clusterpb.Outcome_OUTCOME_DONE || r.Revision == 0 || r.Code != 0 {
		t.Fatal(r)
	}
	off, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	noError(t, err)
	if off.Offsets[1] != 10 || !proto.Equal(off.Timestamps[1], ts) {
		t.Fatal(off)
	}
	wm, err := a.checkpoint.GetWatermark(a.ctx(), &checkpointpb.GetWatermarkRequest{SourceId: "s"})
	noError(t, err)
	if wm.GlobalWatermark.GetPosition() != 20 {
		t.Fatal(wm)
	}
	group, err := a.checkpoint.GetGroupOffsets(a.ctx(), &checkpointpb.GetGroupOffsetsRequest{GroupId: "g"})
	noError(t, err)
	if group.SourceOffsets["s"].GetOffsets()[2] != 30 {
		t.Fatal(group)
	}
	cp, err := a.checkpoint.GetCheckpoint(a.ctx(), &checkpointpb.GetCheckpointRequest{ServiceId: "svc"})
	noError(t, err)
	if string(cp.Data) != "d" {
		t.Fatal(cp)
	}
}

// Goal: each outcome is told apart: done, refused with nothing applied, not
// done, unknown.
func TestCommitOutcomes(t *testing.T) {
	a := newAPI(t)
	stream := a.commitStream()
	noError(t, stream.Send(&clusterpb.CommitRequest{Id: 1, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, 100)}}))
	collect(t, stream, 1)
	noError(t, stream.Send(&clusterpb.CommitRequest{Id: 2, Ops: []*clusterpb.CommitOp{offsetOp("s", 1, 5), offsetOp("s", 0, 50)}}))
	r := collect(t, stream, 1)[2]
	if r.Outcome != clusterpb.Outcome_OUTCOME_REFUSED || r.FailedOp != 1 || codes.Code(r.Code) != codes.FailedPrecondition || r.Message == "" {
		t.Fatal(r)
	}
	off, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	noError(t, err)
	if len(off.Offsets) != 1 {
		t.Fatalf("a part of a refused batch was applied: %v", off)
	}
	bad := map[string]*clusterpb.CommitRequest{
		"empty":         {},
		"no operation":  {Ops: []*clusterpb.CommitOp{offsetOp("s", 0, 200), {}}},
		"bad source":    {Ops: []*clusterpb.CommitOp{offsetOp("", 0, 200)}},
		"too many":      {Ops: slices.Repeat([]*clusterpb.CommitOp{offsetOp("s", 0, 200)}, MaxBatchOps+1)},
		"request id":    {RequestId: strings.Repeat("r", 200), Ops: []*clusterpb.CommitOp{offsetOp("s", 0, 200)}},
		"no watermark":  {Ops: []*clusterpb.CommitOp{{Op: &clusterpb.CommitOp_Watermark{Watermark: &clusterpb.WatermarkCommit{}}}}},
		"big":           {Ops: []*clusterpb.CommitOp{{Op: &clusterpb.CommitOp_Checkpoint{Checkpoint: &clusterpb.CheckpointCommit{ServiceId: "s", Data: make([]byte, MaxCheckpointBytes+1)}}}}},
		"bad timestamp": {Ops: []*clusterpb.CommitOp{{Op: &clusterpb.CommitOp_Offset{Offset: &clusterpb.OffsetCommit{SourceId: "s", Timestamp: &timestamppb.Timestamp{Nanos: -1}}}}}},
	}
	before := a.node.entryCount()
	for name, req := range bad {
		req.Id = 3
		noError(t, stream.Send(req))
		r := collect(t, stream, 1)[3]
		if r.Outcome != clusterpb.Outcome_OUTCOME_NOT_DONE || codes.Code(r.Code) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, r)
		}
	}
	if a.node.entryCount() != before {
		t.Fatal("a malformed batch reached the log")
	}
	for err, want := range map[error]clusterpb.Outcome{
		raftnode.ErrNoLeader:  clusterpb.Outcome_OUTCOME_NOT_DONE,
		raftnode.ErrBusy:      clusterpb.Outcome_OUTCOME_NOT_DONE,
		raftnode.ErrAmbiguous: clusterpb.Outcome_OUTCOME_UNKNOWN,
		errors.New("a bug"):   clusterpb.Outcome_OUTCOME_UNKNOWN,
	} {
		a.node.setLeader(1, err)
		noError(t, stream.Send(&clusterpb.CommitRequest{Id: 4, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, 200)}}))
		if r := collect(t, stream, 1)[4]; r.Outcome != want || r.Code == 0 {
			t.Errorf("%v: %v", err, r)
		}
	}
}

// Goal: a repeated request id answers the first outcome.
func TestCommitRequestID(t *testing.T) {
	a := newAPI(t)
	stream := a.commitStream()
	send := func(id uint64, request string, offset uint64) *clusterpb.CommitResult {
		t.Helper()
		noError(t, stream.Send(&clusterpb.CommitRequest{Id: id, RequestId: request, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, offset)}}))
		return collect(t, stream, 1)[id]
	}
	first := send(1, "x", 10)
	send(2, "y", 20)
	again := send(3, "x", 10)
	if again.Outcome != clusterpb.Outcome_OUTCOME_DONE || again.Revision != first.Revision {
		t.Fatalf("%v, first %v", again, first)
	}
}

// Goal: batches are proposed in the order sent and all answered, many per
// message, each once, also after the client has closed its side.
func TestCommitOrderAndEnd(t *testing.T) {
	a := newAPI(t)
	stream := a.commitStream()
	const n = 500
	a.node.holdAll()
	for i := range uint64(n) {
		noError(t, stream.Send(&clusterpb.CommitRequest{Id: i, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, i+1)}}))
	}
	noError(t, stream.CloseSend())
	eventually(t, "all are proposed", func() bool { return a.node.heldCount() == n })
	a.node.release()
	messages := 0
	got := make(map[uint64]*clusterpb.CommitResult)
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		noError(t, err)
		messages++
		for _, r := range resp.Results {
			if got[r.Id] != nil {
				t.Fatal("answered twice")
			}
			// Offsets only rise: one out of order would have been refused.
			if r.Outcome != clusterpb.Outcome_OUTCOME_DONE {
				t.Fatal(r)
			}
			got[r.Id] = r
		}
	}
	if len(got) != n {
		t.Fatalf("%d answers", len(got))
	}
	for i := range uint64(n - 1) {
		if got[i].Revision >= got[i+1].Revision {
			t.Fatalf("batch %d was applied at %d, the next at %d", i, got[i].Revision, got[i+1].Revision)
		}
	}
	if messages >= n {
		t.Errorf("%d messages for %d answers", messages, n)
	}
}

// Goal: a stream has a bounded number of batches in flight; the rest wait on the
// client's side and get through afterwards.
func TestCommitInflightIsBounded(t *testing.T) {
	const bound = 16
	a := newAPI(t, func(c *ServerConfig) { c.MaxInflightBatches = bound })
	a.node.holdAll()
	stream := a.commitStream()
	const n = 200
	var sent sync.WaitGroup
	sent.Go(func() {
		for i := range uint64(n) {
			if err := stream.Send(&clusterpb.CommitRequest{Id: i, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, i+1)}}); err != nil {
				t.Error(err)
			}
		}
	})
	eventually(t, "the bound is reached", func() bool { return a.node.heldCount() == bound })
	sent.Wait() // everything sent fits into the windows of the connection
	if held := a.node.heldCount(); held != bound {
		t.Fatalf("%d in flight, the bound is %d", held, bound)
	}
	a.node.release()
	collect(t, stream, n)
	noError(t, stream.CloseSend())
}

// Goal: when the node stops, what is in flight is answered, then the stream ends
// with UNAVAILABLE.
func TestCommitShutdown(t *testing.T) {
	a := newAPI(t)
	a.node.holdAll()
	stream := a.commitStream()
	for i := range uint64(3) {
		noError(t, stream.Send(&clusterpb.CommitRequest{Id: i, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, i+1)}}))
	}
	eventually(t, "proposed", func() bool { return a.node.heldCount() == 3 })
	done := make(chan struct{})
	go func() { a.Shutdown(context.Background()); close(done) }()
	eventually(t, "the server stops", func() bool { return a.run.Err() != nil })
	a.node.release()
	collect(t, stream, 3)
	_, err := stream.Recv()
	wantCode(t, err, codes.Unavailable)
	<-done
}

// Goal: a client that goes away in the middle leaves nothing behind, and what it
// had in flight is still applied.
func TestCommitClientGone(t *testing.T) {
	a := newAPI(t)
	a.node.holdAll()
	ctx, cancel := context.WithCancel(a.ctx())
	stream, err := a.commits.Commit(ctx)
	noError(t, err)
	noError(t, stream.Send(&clusterpb.CommitRequest{Id: 1, Ops: []*clusterpb.CommitOp{offsetOp("s", 0, 1)}}))
	eventually(t, "proposed", func() bool { return a.node.heldCount() == 1 })
	cancel()
	_, err = stream.Recv()
	wantCode(t, err, codes.Canceled)
	a.node.release()
	off, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	noError(t, err)
	if off.Offsets[0] != 1 {
		t.Fatal(off)
	}
}

// Goal: the pooled command equals one made from fresh messages, whatever was in
// the pool before.
func TestCommandBuffer(t *testing.T) {
	ops := [][]*clusterpb.CommitOp{
		{offsetOp("a", 1, 2)},
		{offsetOp("a", 1, 2), {Op: &clusterpb.CommitOp_Checkpoint{Checkpoint: &clusterpb.CheckpointCommit{ServiceId: "s", CheckpointId: "c", Data: []byte("x")}}}},
		{{Op: &clusterpb.CommitOp_GroupOffset{GroupOffset: &clusterpb.GroupOffsetCommit{GroupId: "g", SourceId: "s", Offset: 4, ServiceId: "m", Generation: proto.Uint64(3), Force: true}}}},
		{{Op: &clusterpb.CommitOp_GroupOffset{GroupOffset: &clusterpb.GroupOffsetCommit{GroupId: "g", SourceId: "s"}}}},
		{{Op: &clusterpb.CommitOp_Watermark{Watermark: &clusterpb.WatermarkCommit{Force: true, Watermark: &commonpb.Watermark{SourceId: "w", Partition: 1, Position: 9, Timestamp: &timestamppb.Timestamp{Seconds: 4}}}}}},
		{{Op: &clusterpb.CommitOp_Watermark{Watermark: &clusterpb.WatermarkCommit{Watermark: &commonpb.Watermark{SourceId: "w"}}}}, offsetOp("a", 0, 0), offsetOp("b", 0, 1)},
		{offsetOp("z", 0, 0)},
	}
	var used commandBuffer
	for i, batch := range ops {
		var fresh commandBuffer
		want := proto.Clone(fresh.fill(batch, "r", 5)).(*commandpb.Command)
		got := used.fill(batch, "r", 5)
		if !proto.Equal(got, want) {
			t.Fatalf("batch %d: %v\nwant %v", i, got, want)
		}
		b, err := got.MarshalVT()
		noError(t, err)
		var back commandpb.Command
		noError(t, back.UnmarshalVT(b))
		if !proto.Equal(&back, want) {
			t.Fatalf("batch %d does not survive the log: %v", i, &back)
		}
	}
}
