package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// TestEveryCallThroughEveryNode makes each kind of write on each node and reads
// it back, linearizably, on every other.
func TestEveryCallThroughEveryNode(t *testing.T) {
	c := NewCluster(t, Options{})
	for i, n := range c.Nodes {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		id := fmt.Sprintf("any/p%d", i)
		must(t, func() error {
			r, err := n.Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: testPipeline(id, "x")})
			return ok(err, r.GetSuccess(), r.GetError())
		})
		must(t, func() error {
			r, err := n.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: id, Partition: 3, Offset: 42})
			return ok(err, r.GetSuccess(), r.GetError())
		})
		must(t, func() error {
			r, err := n.Checkpoints().SaveCheckpoint(ctx, &checkpointpb.SaveCheckpointRequest{
				ServiceId: id, CheckpointId: "c1", Data: []byte("data"),
				SourceOffsets: map[string]*checkpointpb.PartitionOffsets{"s:with:colons": {Offsets: map[uint32]uint64{0: 1, 1: 2}}},
			})
			return ok(err, r.GetSuccess(), "")
		})
		must(t, func() error {
			r, err := n.Checkpoints().ReportWatermark(ctx, &checkpointpb.WatermarkRequest{Watermark: &commonpb.Watermark{SourceId: id, Partition: 0, Position: 9}})
			return ok(err, r.GetAccepted(), r.GetError())
		})
		must(t, func() error {
			r, err := n.Registry().Register(ctx, &registrypb.RegisterRequest{
				Identity: &commonpb.ServiceIdentity{ServiceId: id, Name: "svc", ServiceType: commonpb.ServiceType_SERVICE_TYPE_SINK},
				Endpoint: &commonpb.Endpoint{Host: "::1", Port: 9000},
			})
			return ok(err, r.GetSuccess(), "")
		})
		must(t, func() error {
			r, err := n.Sidecars().RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{
				SidecarId: "any/s" + fmt.Sprint(i), PodName: "s", Namespace: "any", SidecarEndpoint: "10.0.0.1:50053"})
			return ok(err, r.GetSuccess(), r.GetError())
		})
		for _, m := range c.Nodes {
			gp, err := m.Admin().GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: id})
			if err != nil || !gp.Found {
				t.Fatalf("pipeline written on node %d, read on %d: %v %v", n.ID, m.ID, gp, err)
			}
			cp, err := m.Checkpoints().GetCheckpoint(ctx, &checkpointpb.GetCheckpointRequest{ServiceId: id})
			if err != nil || !cp.Found || len(cp.SourceOffsets["s:with:colons"].GetOffsets()) != 2 {
				t.Fatalf("checkpoint written on node %d, read on %d: %v %v", n.ID, m.ID, cp, err)
			}
			off, err := m.Checkpoints().GetSourceOffset(ctx, &checkpointpb.GetOffsetRequest{SourceId: id})
			if err != nil || off.Offsets[3] != 42 {
				t.Fatalf("offset written on node %d, read on %d: %v %v", n.ID, m.ID, off, err)
			}
			wm, err := m.Checkpoints().GetWatermark(ctx, &checkpointpb.GetWatermarkRequest{SourceId: id})
			if err != nil || wm.GlobalWatermark.GetPosition() != 9 {
				t.Fatalf("watermark written on node %d, read on %d: %v %v", n.ID, m.ID, wm, err)
			}
			ep, err := m.Registry().GetServiceEndpoints(ctx, &registrypb.GetServiceEndpointsRequest{ServiceName: "svc"})
			if err != nil || len(ep.Endpoints) != i+1 || ep.Endpoints[0].Endpoint.Host != "::1" {
				t.Fatalf("service written on node %d, read on %d: %v %v", n.ID, m.ID, ep, err)
			}
		}
		cancel()
	}
	c.WaitSameState()
}

// TestCallsWaitOutALeaderChange kills the leader while callers without a
// deadline of their own write through the others: none of them may fail.
func TestCallsWaitOutALeaderChange(t *testing.T) {
	c := NewCluster(t, Options{})
	leader := c.Leader()
	rest := c.Followers(leader)
	type answer struct {
		err  error
		took time.Duration
	}
	answers := make(chan answer, 64)
	start := make(chan struct{})
	for i := range cap(answers) {
		go func() {
			<-start
			n := rest[i%len(rest)]
			begin := time.Now()
			_, err := n.Checkpoints().CommitOffset(context.Background(), &checkpointpb.CommitOffsetRequest{SourceId: "wait", Partition: uint32(i), Offset: 1})
			answers <- answer{err, time.Since(begin)}
		}()
	}
	leader.Kill()
	close(start)
	var longest time.Duration
	for range cap(answers) {
		a := <-answers
		if a.err != nil {
			t.Errorf("a call failed during the leader change: %v", a.err)
		}
		longest = max(longest, a.took)
	}
	t.Logf("longest call %v", longest)
	if longest > 6*time.Second {
		t.Errorf("a caller was stuck for %v", longest)
	}
}

// TestRequestIDMakesARepeatHarmless: the same request id gives the first
// answer, on any node, also after the leader has changed.
func TestRequestIDMakesARepeatHarmless(t *testing.T) {
	c := NewCluster(t, Options{})
	call := func(n *Node) *adminpb.UpdatePipelineResponse {
		t.Helper()
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "conveyor-request-id", "r-1"), 10*time.Second)
		defer cancel()
		r, err := n.Admin().UpdatePipeline(ctx, &adminpb.UpdatePipelineRequest{PipelineId: "dedup/p", Config: testPipeline("dedup/p", "one"), ExpectedVersion: proto.Uint64(0)})
		if err != nil || !r.Success {
			t.Fatalf("node %d: %v %v", n.ID, r, err)
		}
		return r
	}
	first := call(c.Nodes[0])
	if second := call(c.Nodes[1]); second.Version != first.Version {
		t.Fatalf("the repeat got version %d, the first %d", second.Version, first.Version)
	}
	old := c.Leader()
	old.Kill()
	next := c.Leader()
	if third := call(next); third.Version != first.Version {
		t.Fatalf("after a leader change the repeat got version %d, the first %d", third.Version, first.Version)
	}
}

// TestExistingSidecarGetsItsStages plays a sidecar as they exist in the field
// (register once, heartbeat, nothing else) and an operator, through leader
// changes.
func TestExistingSidecarGetsItsStages(t *testing.T) {
	c := NewCluster(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	register := func(n *Node, id string, services ...string) {
		t.Helper()
		req := &sidecarpb.RegisterSidecarRequest{SidecarId: id, PodName: id, Namespace: "default", SidecarEndpoint: "10.0.0.1:50053"}
		for i, s := range services {
			name, typ, _ := strings.Cut(s, "=")
			req.LocalServices = append(req.LocalServices, &sidecarpb.LocalService{
				ServiceName: name, LocalEndpoint: fmt.Sprintf("127.0.0.1:%d", 9000+i),
				ServiceType: sidecarpb.ServiceType(sidecarpb.ServiceType_value["SERVICE_TYPE_"+typ])})
		}
		r, err := n.Sidecars().RegisterSidecar(ctx, req)
		if err := ok(err, r.GetSuccess(), r.GetError()); err != nil {
			t.Fatal(err)
		}
	}
	register(c.Nodes[0], "default/a", "kafkaevents=SOURCE", "filteractive=TRANSFORM")
	register(c.Nodes[1], "default/b", "s3archive=SINK")

	apply := &adminpb.CreatePipelineRequest{Config: &adminpb.PipelineConfig{
		Id: "default/orders", Name: "orders", Enabled: true,
		Stages: []*adminpb.Stage{
			{Id: "orders-source", Name: "kafka-events", StageType: adminpb.StageType_STAGE_TYPE_SOURCE, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{ServiceName: "kafka-events"}},
			{Id: "orders-transform-0", Name: "filter-active", StageType: adminpb.StageType_STAGE_TYPE_TRANSFORM, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{ServiceName: "filter-active"}},
			{Id: "orders-sink", Name: "s3-archive", StageType: adminpb.StageType_STAGE_TYPE_SINK, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{ServiceName: "s3-archive"}},
		},
		Edges: []*adminpb.Edge{{FromStage: "orders-source", ToStage: "orders-transform-0"}, {FromStage: "orders-transform-0", ToStage: "orders-sink"}},
	}}
	r, err := c.Nodes[2].Admin().CreatePipeline(ctx, apply)
	if err := ok(err, r.GetSuccess(), r.GetError()); err != nil {
		t.Fatal(err)
	}
	e, err := c.Nodes[2].Admin().EnablePipeline(ctx, &adminpb.EnablePipelineRequest{PipelineId: "default/orders"})
	if err := ok(err, e.GetSuccess(), e.GetError()); err != nil {
		t.Fatal(err)
	}

	table := newRoutes()
	want := []string{"orders-sink@default/b", "orders-source@local", "orders-transform-0@local"}
	expect := func(n *Node, want []string) {
		t.Helper()
		eventually(t, 30*time.Second, fmt.Sprintf("sidecar a on node %d runs %v", n.ID, want), func(ctx context.Context) error {
			table.beat(ctx, t, n, "default/a")
			if got := table.of("default/orders"); !slices.Equal(got, want) {
				return fmt.Errorf("it runs %v", got)
			}
			return nil
		})
	}
	expect(c.Nodes[0], want)
	leader := c.Leader()
	leader.Kill()
	// The sidecar's connection moves to a node that has never told it anything.
	expect(c.Followers(leader)[0], want)
	eventually(t, 20*time.Second, "the pipeline is disabled", func(ctx context.Context) error {
		d, err := c.Followers(leader)[1].Admin().DisablePipeline(ctx, &adminpb.DisablePipelineRequest{PipelineId: "default/orders", Drain: true})
		return ok(err, d.GetSuccess(), d.GetError())
	})
	expect(c.Followers(leader)[1], nil)
	leader.Start()
	c.WaitServing(leader)
	c.WaitSameState()
}

// TestGracefulStop: SIGTERM on the leader moves leadership first and ends with
// status 0; the others go on.
func TestGracefulStop(t *testing.T) {
	c := NewCluster(t, Options{})
	for range 3 {
		leader := c.Leader()
		leader.Stop()
		if _, known := writeOffset(t, c.Followers(leader)[0], "graceful", 1); known != Done {
			t.Fatal("no write within a second of a graceful stop of the leader")
		}
		leader.Start()
		c.WaitServing(leader)
	}
}

// TestLostStateDirectoryIsRebuilt removes the state, but not the log, of a
// stopped node: it fetches an image from a peer while the cluster serves.
func TestLostStateDirectoryIsRebuilt(t *testing.T) {
	c := NewCluster(t, Options{})
	for i := range 50 {
		writeOffset(t, c.Nodes[0], fmt.Sprintf("s%d", i), 1)
	}
	victim := c.Followers(c.Leader())[0]
	victim.Stop()
	if err := os.RemoveAll(filepath.Join(victim.DataDir, "state")); err != nil {
		t.Fatal(err)
	}
	if _, known := writeOffset(t, c.Leader(c.running()...), "while-down", 5); known != Done {
		t.Fatal("the cluster stopped serving with one node down")
	}
	victim.Start()
	c.WaitServing(victim)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if out, known := readOffset(ctx, victim, "while-down", 0); known != Done || out.(OffsetOut).Current != 5 {
		t.Fatalf("the rebuilt node reads %+v", out)
	}
	c.WaitSameState()
}

// routes is the routing table of a sidecar as it exists in the field: an assign
// command replaces the stages of its pipeline, a revoke drops the pipeline.
type routes struct {
	byPipeline map[string][]string
}

func newRoutes() *routes { return &routes{byPipeline: map[string][]string{}} }

func (r *routes) beat(ctx context.Context, t *testing.T, n *Node, id string) {
	t.Helper()
	res, err := n.Sidecars().Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: id})
	if err != nil || !res.Acknowledged {
		return // an existing sidecar logs it and goes on
	}
	for _, cmd := range res.Commands {
		switch x := cmd.Command.(type) {
		case *sidecarpb.SidecarCommand_Assign:
			var stages []string
			for _, s := range x.Assign.Stages {
				if rs := s.GetRemoteSidecar(); rs != nil {
					stages = append(stages, s.StageId+"@"+rs.SidecarId)
				} else {
					stages = append(stages, s.StageId+"@local")
				}
			}
			slices.Sort(stages)
			r.byPipeline[x.Assign.PipelineId] = stages
		case *sidecarpb.SidecarCommand_Revoke:
			delete(r.byPipeline, x.Revoke.PipelineId)
		}
	}
}

func (r *routes) of(pipeline string) []string { return r.byPipeline[pipeline] }

func must(t *testing.T, f func() error) {
	t.Helper()
	if err := f(); err != nil {
		t.Fatal(err)
	}
}
