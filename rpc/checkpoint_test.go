package rpc

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

func offsetOp(source string, partition uint32, offset uint64) *clusterpb.CommitOp {
	return &clusterpb.CommitOp{Op: &clusterpb.CommitOp_Offset{Offset: &clusterpb.OffsetCommit{
		SourceId: source, Partition: partition, Offset: offset,
	}}}
}

// Goal: offsets keep their timestamps, answer by partition, never go back
// unless forced, and an offset that would is refused in the reply.
func TestSourceOffsets(t *testing.T) {
	a := newAPI(t)
	ts := &timestamppb.Timestamp{Seconds: 1_700_000_000, Nanos: 123_456_789}
	for p := range uint32(3) {
		resp, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{
			SourceId: "kafka:events", Partition: p, Offset: uint64(100 + p), Timestamp: ts,
		})
		noError(t, err)
		if !resp.Success || resp.CurrentOffset != uint64(100+p) || resp.Revision == 0 {
			t.Fatal(resp)
		}
	}
	all, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "kafka:events"})
	noError(t, err)
	if len(all.Offsets) != 3 || all.Offsets[2] != 102 || !proto.Equal(all.Timestamps[1], ts) {
		t.Fatal(all)
	}
	one, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "kafka:events", Partition: proto.Uint32(0)})
	noError(t, err)
	if len(one.Offsets) != 1 || one.Offsets[0] != 100 || !proto.Equal(one.Timestamps[0], ts) {
		t.Fatal(one)
	}
	none, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "kafka", Partition: proto.Uint32(0)})
	noError(t, err)
	if len(none.Offsets) != 0 {
		t.Fatalf("another source: %v", none)
	}
	back, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "kafka:events", Offset: 50})
	noError(t, err)
	if back.Success || back.Error == "" || back.CurrentOffset != 100 {
		t.Fatal(back)
	}
	forced, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "kafka:events", Offset: 50, Force: true})
	noError(t, err)
	if !forced.Success || forced.CurrentOffset != 50 {
		t.Fatal(forced)
	}
}

// Goal: the global watermark is the minimum over the source's partitions.
func TestWatermarks(t *testing.T) {
	a := newAPI(t)
	report := func(source string, partition uint32, position uint64) *checkpointpb.WatermarkResponse {
		t.Helper()
		resp, err := a.checkpoint.ReportWatermark(a.ctx(), &checkpointpb.WatermarkRequest{Watermark: &commonpb.Watermark{
			SourceId: source, Partition: partition, Position: position,
			Timestamp: &timestamppb.Timestamp{Seconds: int64(position), Nanos: 5},
		}})
		noError(t, err)
		return resp
	}
	report("src", 0, 100)
	got := report("src", 1, 40)
	if !got.Accepted || got.CurrentGlobalWatermark.GetPosition() != 40 {
		t.Fatal(got)
	}
	report("src-2", 0, 1) // a source whose name begins the same
	got = report("src", 1, 300)
	if got.CurrentGlobalWatermark.GetPosition() != 100 {
		t.Fatal(got)
	}
	got = report("src", 1, 10)
	if got.Accepted || got.Error == "" || got.CurrentGlobalWatermark.GetPosition() != 100 {
		t.Fatalf("going back: %v", got)
	}
	all, err := a.checkpoint.GetWatermark(a.ctx(), &checkpointpb.GetWatermarkRequest{SourceId: "src"})
	noError(t, err)
	if len(all.Watermarks) != 2 || all.Watermarks[1].Position != 300 || all.Watermarks[1].Timestamp.GetNanos() != 5 {
		t.Fatal(all)
	}
	one, err := a.checkpoint.GetWatermark(a.ctx(), &checkpointpb.GetWatermarkRequest{SourceId: "src", Partition: proto.Uint32(1)})
	noError(t, err)
	if len(one.Watermarks) != 1 || one.GlobalWatermark.GetPosition() != 100 {
		t.Fatal(one)
	}
}

// Goal: a checkpoint keeps every partition of every source, names with colons
// included, and the newest one wins.
func TestCheckpoints(t *testing.T) {
	a := newAPI(t)
	none, err := a.checkpoint.GetCheckpoint(a.ctx(), &checkpointpb.GetCheckpointRequest{ServiceId: "svc"})
	noError(t, err)
	if none.Found {
		t.Fatal(none)
	}
	offsets := map[string]*checkpointpb.PartitionOffsets{
		"a:b": {Offsets: map[uint32]uint64{0: 1, 1: 2, 7: 3}}, "c": {Offsets: map[uint32]uint64{0: 9}},
	}
	saved, err := a.checkpoint.SaveCheckpoint(a.ctx(), &checkpointpb.SaveCheckpointRequest{
		ServiceId: "svc", Data: []byte("state"), SourceOffsets: offsets,
	})
	noError(t, err)
	if !saved.Success || saved.CheckpointId == "" || !saved.CreatedAt.AsTime().Equal(a.clock.Now()) {
		t.Fatal(saved)
	}
	got, err := a.checkpoint.GetCheckpoint(a.ctx(), &checkpointpb.GetCheckpointRequest{ServiceId: "svc"})
	noError(t, err)
	want := &checkpointpb.GetCheckpointResponse{
		Found: true, CheckpointId: saved.CheckpointId, Data: []byte("state"), SourceOffsets: offsets,
		CreatedAt: saved.CreatedAt, Revision: saved.Revision,
	}
	if !proto.Equal(got, want) {
		t.Fatalf("%v\nwant %v", got, want)
	}
	_, err = a.checkpoint.SaveCheckpoint(a.ctx(), &checkpointpb.SaveCheckpointRequest{ServiceId: "svc", CheckpointId: "cp-2"})
	noError(t, err)
	got, err = a.checkpoint.GetCheckpoint(a.ctx(), &checkpointpb.GetCheckpointRequest{ServiceId: "svc"})
	noError(t, err)
	if got.CheckpointId != "cp-2" || len(got.Data) != 0 || len(got.SourceOffsets) != 0 {
		t.Fatal(got)
	}
}

// Goal: a member that lost its partition cannot overlook that its commit was
// refused; one that still holds it commits.
func TestGroupOffsetsAreFenced(t *testing.T) {
	a := newAPI(t)
	for _, id := range []string{"m1", "m2"} {
		_, err := a.registry.Register(a.ctx(), registration(id, "reader"))
		noError(t, err)
	}
	one, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "m1", GroupId: "g", PartitionCount: 2})
	noError(t, err)
	commit := func(service string, generation uint64, partition uint32, offset uint64) (*checkpointpb.CommitGroupOffsetResponse, error) {
		return a.checkpoint.CommitGroupOffset(a.ctx(), &checkpointpb.CommitGroupOffsetRequest{
			GroupId: "g", SourceId: "src", Partition: partition, Offset: offset, ServiceId: service, Generation: &generation,
		})
	}
	for p := range uint32(2) {
		resp, err := commit("m1", one.Generation, p, 10)
		noError(t, err)
		if !resp.Success || resp.CurrentOffset != 10 {
			t.Fatal(resp)
		}
	}
	two, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "m2", GroupId: "g"})
	noError(t, err)
	if len(two.AssignedPartitions) != 1 {
		t.Fatal(two)
	}
	lost := two.AssignedPartitions[0]
	_, err = commit("m1", one.Generation, lost, 20)
	wantCode(t, err, codes.Aborted)
	resp, err := commit("m2", two.Generation, lost, 20)
	noError(t, err)
	if !resp.Success {
		t.Fatal(resp)
	}
	resp, err = commit("m2", two.Generation, lost, 5)
	noError(t, err)
	if resp.Success || resp.CurrentOffset != 20 || resp.Error == "" {
		t.Fatalf("going back: %v", resp)
	}
	got, err := a.checkpoint.GetGroupOffsets(a.ctx(), &checkpointpb.GetGroupOffsetsRequest{GroupId: "g"})
	noError(t, err)
	if got.SourceOffsets["src"].GetOffsets()[lost] != 20 || len(got.SourceOffsets["src"].GetOffsets()) != 2 {
		t.Fatal(got)
	}
	got, err = a.checkpoint.GetGroupOffsets(a.ctx(), &checkpointpb.GetGroupOffsetsRequest{GroupId: "g", SourceId: proto.String("other")})
	noError(t, err)
	if len(got.SourceOffsets) != 0 {
		t.Fatal(got)
	}
}

// Goal: a pipeline's checkpoints, offsets and watermarks are those of its own
// stages, and of nobody else.
func TestPipelineCheckpoints(t *testing.T) {
	a := newAPI(t)
	a.create(chain("ns/orders", "kafka-events", "filter", "warehouse"))
	a.create(chain("ns/other", "files", "archive"))
	_, err := a.registry.Register(a.ctx(), registration("filter-pod-7", "Filter"))
	noError(t, err)
	for _, id := range []string{"filter-pod-7", "warehouse", "archive"} {
		_, err := a.checkpoint.SaveCheckpoint(a.ctx(), &checkpointpb.SaveCheckpointRequest{ServiceId: id, CheckpointId: "cp", Data: []byte(id)})
		noError(t, err)
	}
	for _, src := range []string{"kafka-events", "files"} {
		_, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: src, Partition: 4, Offset: 77})
		noError(t, err)
		_, err = a.checkpoint.ReportWatermark(a.ctx(), &checkpointpb.WatermarkRequest{Watermark: &commonpb.Watermark{SourceId: src, Position: 7}})
		noError(t, err)
	}
	got, err := a.checkpoint.GetPipelineCheckpoints(a.ctx(), &checkpointpb.GetPipelineCheckpointsRequest{PipelineId: "ns/orders"})
	noError(t, err)
	if len(got.ServiceCheckpoints) != 2 || got.ServiceCheckpoints[0].ServiceId != "filter-pod-7" || got.ServiceCheckpoints[1].ServiceId != "warehouse" {
		t.Fatal(got.ServiceCheckpoints)
	}
	if len(got.SourceOffsets) != 1 || got.SourceOffsets["kafka-events"].GetOffsets()[4] != 77 {
		t.Fatal(got.SourceOffsets)
	}
	if len(got.Watermarks) != 1 || got.Watermarks[0].SourceId != "kafka-events" {
		t.Fatal(got.Watermarks)
	}
	_, err = a.checkpoint.GetPipelineCheckpoints(a.ctx(), &checkpointpb.GetPipelineCheckpointsRequest{PipelineId: "ns/none"})
	wantCode(t, err, codes.NotFound)
}
