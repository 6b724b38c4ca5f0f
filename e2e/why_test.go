package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// TestWhyOnEveryNode asks each node of a cluster what would come of a pipeline and of
// a loss, then applies the pipeline: all say the same, it comes as they said, and
// asking has changed nothing.
func TestWhyOnEveryNode(t *testing.T) {
	c := NewCluster(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for _, id := range []string{"any/one", "any/two"} {
		must(t, func() error {
			r, err := c.Nodes[0].Sidecars().RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{
				SidecarId: id, PodName: id[4:], Namespace: "any", SidecarEndpoint: "10.0.0.1:50053",
				LocalServices: []*sidecarpb.LocalService{
					{ServiceName: "in", ServiceType: sidecarpb.ServiceType_SERVICE_TYPE_SOURCE, LocalEndpoint: "127.0.0.1:9001"},
					{ServiceName: "out", ServiceType: sidecarpb.ServiceType_SERVICE_TYPE_SINK, LocalEndpoint: "127.0.0.1:9002"},
				}})
			return ok(err, r.GetSuccess(), r.GetError())
		})
	}
	stage := func(id string, kind adminpb.StageType) *adminpb.Stage {
		return &adminpb.Stage{Id: id, Name: id, StageType: kind, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{ServiceName: id}}
	}
	p := &adminpb.PipelineConfig{Id: "any/p", Name: "p", Enabled: true,
		Stages: []*adminpb.Stage{stage("in", adminpb.StageType_STAGE_TYPE_SOURCE), stage("out", adminpb.StageType_STAGE_TYPE_SINK)},
		Edges:  []*adminpb.Edge{{FromStage: "in", ToStage: "out"}}}
	state := func() (revision uint64, hash string) {
		t.Helper()
		c.WaitSameState()
		h, err := c.Nodes[0].Cluster().GetStateHash(ctx, &clusterpb.GetStateHashRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return h.Revision, fmt.Sprintf("%x", h.Hash)
	}
	revision, hash := state()
	for _, n := range c.Nodes {
		r, err := n.Cluster().PlanPipelines(ctx, &clusterpb.PlanPipelinesRequest{Pipelines: []*adminpb.PipelineConfig{p}})
		if err != nil || r.Outlook.GetMoves() != 2 || r.Outlook.GetLeastMoves() != 2 || r.Outlook.GetWaitingTotal() != 0 {
			t.Fatalf("node %d: %v %v", n.ID, r, err)
		}
	}
	if r, h := state(); r != revision || h != hash {
		t.Fatalf("a dry run changed the state from %s at %d to %s at %d", hash, revision, h, r)
	}
	must(t, func() error {
		r, err := c.Nodes[1].Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: p})
		return ok(err, r.GetSuccess(), r.GetError())
	})
	for _, n := range c.Nodes {
		var runs []string
		eventually(t, 30*time.Second, "the stages run", func(ctx context.Context) error {
			r, err := n.Cluster().ExplainPipeline(ctx, &clusterpb.ExplainPipelineRequest{PipelineId: "any/p"})
			if err != nil {
				return err
			}
			runs = r.Stages[0].SidecarIds
			if len(runs) != 1 || !slices.Equal(runs, r.Stages[1].SidecarIds) {
				return fmt.Errorf("node %d: %v", n.ID, r)
			}
			return nil
		})
		r, err := n.Cluster().WhatIf(ctx, &clusterpb.WhatIfRequest{LoseSidecars: runs})
		if err != nil || r.Outlook.GetMoves() != 2 || r.Outlook.GetWaitingTotal() != 0 {
			t.Fatalf("node %d: %v %v", n.ID, r, err)
		}
		q, err := n.Cluster().GetPlacementQuality(ctx, &clusterpb.GetPlacementQualityRequest{PipelineId: "any/p"})
		if err != nil || q.Quality.GetLocalEdgeShare() != 1 || q.LastPlan.GetMoves() != 2 || q.LastPlan.GetLeastMoves() != 2 {
			t.Fatalf("node %d: %v %v", n.ID, q, err)
		}
	}
	m, err := c.Leader().Admin().GetMetrics(ctx, &adminpb.GetMetricsRequest{MetricNames: []string{
		"placement_last_moves", "placement_last_least_moves", "placement_local_edge_share", "placement_load_max_over_mean"}})
	if err != nil || m.Metrics["placement_last_moves"] != 2 || m.Metrics["placement_last_least_moves"] != 2 ||
		m.Metrics["placement_local_edge_share"] != 1 || m.Metrics["placement_load_max_over_mean"] < 1 {
		t.Fatalf("%v %v", m, err)
	}
}

// TestHeldBackOnEveryNode turns a pipeline round between two sidecars that say nothing of
// what they have applied: the second is told once the first must have heard. Goal: every
// node says so, of the stage that runs nowhere until then, with the sidecar and the time,
// and says the same in the status and in the explanation; also once another node leads.
func TestHeldBackOnEveryNode(t *testing.T) {
	c := NewCluster(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	service := func(name string, kind sidecarpb.ServiceType) *sidecarpb.LocalService {
		return &sidecarpb.LocalService{ServiceName: name, ServiceType: kind, LocalEndpoint: "127.0.0.1:9001"}
	}
	for id, names := range map[string][2]string{"any/a": {"here", "near"}, "any/b": {"there", "far"}} {
		must(t, func() error {
			r, err := c.Nodes[0].Sidecars().RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{
				SidecarId: id, PodName: id[4:], Namespace: "any", SidecarEndpoint: "10.0.0.1:50053",
				LocalServices: []*sidecarpb.LocalService{
					service(names[0], sidecarpb.ServiceType_SERVICE_TYPE_SOURCE), service(names[1], sidecarpb.ServiceType_SERVICE_TYPE_SINK),
				}})
			return ok(err, r.GetSuccess(), r.GetError())
		})
	}
	put := func(from, to string) {
		t.Helper()
		stage := func(id string, kind adminpb.StageType) *adminpb.Stage {
			return &adminpb.Stage{Id: id, Name: id, StageType: kind, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{ServiceName: id}}
		}
		must(t, func() error {
			r, err := c.Nodes[1].Admin().UpdatePipeline(ctx, &adminpb.UpdatePipelineRequest{PipelineId: "any/p", Config: &adminpb.PipelineConfig{
				Id: "any/p", Name: "p", Enabled: true,
				Stages: []*adminpb.Stage{stage(from, adminpb.StageType_STAGE_TYPE_SOURCE), stage(to, adminpb.StageType_STAGE_TYPE_SINK)},
				Edges:  []*adminpb.Edge{{FromStage: from, ToStage: to}},
			}})
			return ok(err, r.GetSuccess(), r.GetError())
		})
	}
	why := func(ctx context.Context, n *Node) (*adminpb.StagePlacement, error) {
		r, err := n.Admin().GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: "any/p"})
		if err != nil {
			return nil, err
		}
		e, err := n.Cluster().ExplainPipeline(ctx, &clusterpb.ExplainPipelineRequest{PipelineId: "any/p"})
		if err != nil {
			return nil, err
		}
		p := r.Status.Placements[0]
		if got := e.Stages[0]; got.PendingReason != p.PendingReason || len(got.SidecarIds) != len(p.SidecarIds) {
			return nil, fmt.Errorf("node %d explains it with %v and shows %v", n.ID, got, p)
		}
		return p, nil
	}
	put("here", "far")
	eventually(t, 30*time.Second, "it runs", func(ctx context.Context) error {
		p, err := why(ctx, c.Nodes[0])
		return ok(err, len(p.GetSidecarIds()) == 1, fmt.Sprint(p))
	})
	begin := time.Now()
	put("there", "near")
	told := func(n *Node) {
		t.Helper()
		eventually(t, 20*time.Second, "every node says what it waits for", func(ctx context.Context) error {
			p, err := why(ctx, n)
			if err != nil {
				return err
			}
			const text = "nothing more is told before sidecar any/a has confirmed what was told before, or must have heard of it, which is by "
			_, by, found := strings.Cut(p.PendingReason, text)
			at, err := time.Parse(time.RFC3339, by)
			if !found || err != nil || at.Before(begin.Add(40*time.Second)) || at.After(time.Now().Add(46*time.Second)) {
				return fmt.Errorf("node %d: %v", n.ID, p)
			}
			return nil
		})
	}
	for _, n := range c.Nodes {
		told(n)
	}
	c.Leader().Kill()
	for _, n := range c.running() {
		told(n)
	}
	p, err := c.running()[0].Admin().GetPipeline(metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale"), &adminpb.GetPipelineRequest{PipelineId: "any/p"})
	if err != nil || p.Status.Placements[0].PendingReason == "about to be assigned" {
		t.Fatalf("%v %v", p, err)
	}
}
