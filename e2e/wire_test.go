package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// TestBadRequests sends what no client should send, through a follower. Goal: a
// clear status each time, nothing changed, every node up and serving. Method: a
// table of calls with the code and words a person needs to see; then the revision
// of the state is that from before, and a good call works.
func TestBadRequests(t *testing.T) {
	c := NewCluster(t, Options{})
	n := c.Followers(c.Leader())[0]
	c.WaitSameState()
	before := statusOf(t, n).Revision
	const good = codes.OK // an answer that says no, not a failed call

	stage := func(id string, typ adminpb.StageType) *adminpb.Stage {
		return &adminpb.Stage{Id: id, Name: id, StageType: typ, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{ServiceName: id}}
	}
	edge := func(from, to string) *adminpb.Edge { return &adminpb.Edge{FromStage: from, ToStage: to} }
	const source, transform, sink = adminpb.StageType_STAGE_TYPE_SOURCE, adminpb.StageType_STAGE_TYPE_TRANSFORM, adminpb.StageType_STAGE_TYPE_SINK
	create := func(id string, stages []*adminpb.Stage, edges ...*adminpb.Edge) func(ctx context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			r, err := n.Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: &adminpb.PipelineConfig{Id: id, Name: id, Stages: stages, Edges: edges}})
			if r.GetSuccess() {
				return "accepted", nil
			}
			return r.GetError() + " " + strings.Join(r.GetViolations(), " "), err
		}
	}
	save := func(id string, data int) func(ctx context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			r, err := n.Checkpoints().SaveCheckpoint(ctx, &checkpointpb.SaveCheckpointRequest{ServiceId: id, Data: make([]byte, data)})
			return accepted(r.GetSuccess()), err
		}
	}
	offset := func(source string) func(ctx context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			r, err := n.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: source, Offset: 1})
			return accepted(r.GetSuccess()) + r.GetError(), err
		}
	}
	long := strings.Repeat("x", 300)

	for _, tc := range []struct {
		name  string
		call  func(ctx context.Context) (string, error)
		code  codes.Code
		texts []string
	}{
		{"message of 5 MiB", save("big", 5<<20), codes.ResourceExhausted, []string{"4194304"}},
		{"checkpoint of 2 MiB", save("big", 2<<20), codes.InvalidArgument, []string{"data", "2097152 bytes", "the limit is 1048576"}},
		{"checkpoint without id", save("", 1), codes.InvalidArgument, []string{"service_id"}},
		{"id of 300 bytes", save(long, 1), codes.InvalidArgument, []string{"service_id", "300"}},
		{"source of 300 bytes", offset(long), codes.InvalidArgument, []string{"source_id", "300"}},
		{"control character in an id", offset("a\x07b"), codes.InvalidArgument, []string{"source_id"}},
		{"newline in an id", offset("a\nb"), codes.InvalidArgument, []string{"source_id"}},
		{"pipeline without anything", func(ctx context.Context) (string, error) {
			_, err := n.Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{})
			return "", err
		}, codes.InvalidArgument, []string{"config"}},
		{"pipeline id of 300 bytes", create(long, nil), codes.InvalidArgument, []string{"config.id", "300"}},
		{"all faults of a graph at once", create("bad/graph",
			[]*adminpb.Stage{stage("in", source), stage("a", transform), stage("b", transform), stage("alone", transform), stage("out", sink), stage("out", sink)},
			edge("in", "out"), edge("a", "b"), edge("b", "a"), edge("in", "nowhere"),
		), good, []string{"DuplicateStage", `"out"`, "CycleDetected", "MissingStage", `"nowhere"`, "Disconnected", `"alone"`}},
		{"pipeline without a stage", create("bad/empty", nil), good, []string{"NoStages"}},
		{"pipeline of no known kind of stage", create("bad/kind", []*adminpb.Stage{stage("x", 77)}), good, []string{"UnknownStageType", "77"}},
		{"enable an unknown pipeline", func(ctx context.Context) (string, error) {
			r, err := n.Admin().EnablePipeline(ctx, &adminpb.EnablePipelineRequest{PipelineId: "no/such"})
			return accepted(r.GetSuccess()) + r.GetError(), err
		}, good, []string{"no/such"}},
		{"heartbeat of an unknown sidecar", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "no/such"})
			return accepted(r.GetAcknowledged()), err
		}, good, nil},
		{"sidecar with a useless endpoint", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{SidecarId: "s", SidecarEndpoint: "nowhere"})
			return accepted(r.GetSuccess()), err
		}, codes.InvalidArgument, []string{"sidecar_endpoint", `"nowhere" is not host:port`}},
		{"service without identity", func(ctx context.Context) (string, error) {
			r, err := n.Registry().Register(ctx, &registrypb.RegisterRequest{Endpoint: &commonpb.Endpoint{Host: "h", Port: 1}})
			return accepted(r.GetSuccess()), err
		}, codes.InvalidArgument, []string{"identity"}},
		{"port out of range", func(ctx context.Context) (string, error) {
			r, err := n.Registry().Register(ctx, &registrypb.RegisterRequest{
				Identity: &commonpb.ServiceIdentity{ServiceId: "x", Name: "x"}, Endpoint: &commonpb.Endpoint{Host: "h", Port: 70000}})
			return accepted(r.GetSuccess()), err
		}, codes.InvalidArgument, []string{"endpoint.port", "70000"}},
		{"watermark of nothing", func(ctx context.Context) (string, error) {
			r, err := n.Checkpoints().ReportWatermark(ctx, &checkpointpb.WatermarkRequest{})
			return accepted(r.GetAccepted()), err
		}, codes.InvalidArgument, []string{"watermark"}},
		{"request id of 300 bytes", func(ctx context.Context) (string, error) {
			return offset("ok")(metadata.AppendToOutgoingContext(ctx, "conveyor-request-id", long))
		}, codes.InvalidArgument, []string{"conveyor-request-id"}},
		{"leadership to an unknown node", func(ctx context.Context) (string, error) {
			_, err := n.Cluster().TransferLeader(ctx, &clusterpb.TransferLeaderRequest{NodeId: 99})
			return "", err
		}, codes.NotFound, []string{"node 99 is no member"}},
		{"a method that does not exist", func(ctx context.Context) (string, error) {
			return "", n.Conn().Invoke(ctx, strings.TrimSuffix(adminpb.RouterAdmin_GetPipeline_FullMethodName, "GetPipeline")+"Explode", &adminpb.GetPipelineRequest{}, &adminpb.GetPipelineResponse{})
		}, codes.Unimplemented, []string{"Explode"}},
		{"bytes that are no message", func(ctx context.Context) (string, error) {
			return "", n.Conn().Invoke(ctx, checkpointpb.CheckpointService_CommitOffset_FullMethodName, []byte{0xff, 0xff, 0xff}, &checkpointpb.CommitOffsetResponse{},
				grpc.ForceCodec(rawCodec{}))
		}, codes.Internal, nil},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		text, err := tc.call(ctx)
		cancel()
		if status.Code(err) != tc.code {
			t.Errorf("%s: answered %v %q, want %v", tc.name, err, text, tc.code)
			continue
		}
		if strings.HasPrefix(text, "accepted") {
			t.Errorf("%s: accepted", tc.name)
		}
		text += " " + status.Convert(err).Message()
		for _, want := range tc.texts {
			if !strings.Contains(text, want) {
				t.Errorf("%s: the answer does not say %q: %s", tc.name, want, text)
			}
		}
	}
	for _, m := range c.Nodes {
		if m.exitedItself() {
			t.Fatalf("node %d ended", m.ID)
		}
	}
	c.WaitSameState()
	if after := statusOf(t, n).Revision; after != before {
		t.Errorf("refused requests changed the state: revision %d became %d", before, after)
	}
	if _, known := writeOffset(t, n, "good", 1); known != Done {
		t.Error("a good call fails after the bad ones")
	}
}

func accepted(ok bool) string {
	if ok {
		return "accepted"
	}
	return "refused "
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (rawCodec) Unmarshal([]byte, any) error   { return nil }
func (rawCodec) Name() string                  { return "proto" }
