package rpc

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/control"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// whyIdle returns why a stage waits, as its pipeline's status and its explanation have
// it; it fails when these differ.
func (a *api) whyIdle(pipeline string, stage int, metadata ...string) string {
	a.t.Helper()
	r, err := a.admin.GetPipeline(a.with(metadata...), &adminpb.GetPipelineRequest{PipelineId: pipeline})
	noError(a.t, err)
	l, err := a.admin.ListPipelines(a.with(metadata...), &adminpb.ListPipelinesRequest{IncludeDisabled: true})
	noError(a.t, err)
	e, err := a.cluster.ExplainPipeline(a.with(metadata...), &clusterpb.ExplainPipelineRequest{PipelineId: pipeline})
	noError(a.t, err)
	explained, shown := e.Stages[stage], r.Status.Placements[stage]
	listed := l.Statuses[0].Placements[stage]
	if explained.PendingReason != shown.PendingReason || explained.SilentReason != shown.SilentReason || listed.PendingReason != shown.PendingReason {
		a.t.Fatalf("explained as %q, shown as %q, listed as %q; silent: %q, %q", explained.PendingReason, shown.PendingReason, listed.PendingReason, explained.SilentReason, shown.SilentReason)
	}
	return shown.PendingReason + shown.SilentReason
}

func (a *api) waitsBecause(what, pipeline string, stage int, want string, metadata ...string) {
	a.t.Helper()
	got := a.whyIdle(pipeline, stage, metadata...)
	if !strings.Contains(got, want) || (want == "") != (got == "") {
		a.t.Fatalf("%s: it waits because %q, want %q", what, got, want)
	}
}

// Goal: a stage that has a place and waits all the same is said to wait for what the
// leader holds it back for, and until when, by the leader and by any other node; and a
// node that cannot ask does not guess.
func TestHeldBackIsTold(t *testing.T) {
	planned, held := uint64(0), []HeldPipeline(nil)
	leading := func(c *ServerConfig) {
		study := control.NewStudy(control.StudyConfig{State: c.State})
		t.Cleanup(study.Close)
		c.Placement, c.Planned = study, func() uint64 { return planned }
	}
	leader := newAPI(t, leading, func(c *ServerConfig) {
		c.Held = func(pipeline string) (out []HeldPipeline) {
			for _, h := range held {
				if pipeline == "" || h.Pipeline == pipeline {
					out = append(out, h)
				}
			}
			return out
		}
		c.HeldExpiries = func() (int, time.Time, time.Time) { return 3, time.Unix(90, 0), time.Unix(100, 0) }
	})
	addr := leader.serveTCP()
	node := newOneNode(t)
	node.id, node.members = 2, []raftnode.Member{{ID: 1, Addr: "n1:1"}, {ID: 2, Addr: "n2:1"}}
	follower := serveAPI(t, node, leading, func(c *ServerConfig) {
		c.NodeID, c.Planned = 2, func() uint64 { return 0 }
		c.ClientAddr = func(id uint64) string { return map[uint64]string{1: addr}[id] }
	})
	for _, a := range []*api{leader, follower} {
		a.offer("ns/one", "x:source")
		a.offer("ns/two", "y:sink")
		a.create(chain("p", "x", "y"))
	}
	both := func(what, want string) {
		t.Helper()
		leader.waitsBecause(what+", on the leader", "p", 1, want)
		follower.waitsBecause(what+", elsewhere", "p", 1, want)
	}
	both("before any plan", "has not made a plan yet")
	planned = 1
	both("before it is planned", "where the stages of version 1 run is not decided yet")
	planned = leader.node.fsm.Revision() + 100
	both("nothing is held", "about to be assigned")
	held = []HeldPipeline{
		{Pipeline: "o", Later: 1, Stages: []string{"y-stage"}, Sidecars: []string{"ns/other"}, HeardBy: time.Unix(30, 0)},
		{Pipeline: "p", Later: 1, Stages: []string{"y-stage"}, Sidecars: []string{"ns/one", "ns/two"}, HeardBy: time.Unix(60, 0)},
	}
	both("held", "nothing more is told before sidecars ns/one and 1 more have confirmed what was told before, or must have heard of it, which is by 1970-01-01T00:01:00Z")
	leader.waitsBecause("another stage", "p", 0, "about to be assigned")
	r, err := follower.cluster.GetPlacementHolds(follower.ctx(), &clusterpb.GetPlacementHoldsRequest{})
	noError(t, err)
	if len(r.Pipelines) != 2 || r.Cut || r.PlannedRevision != planned || r.ExpiriesHeld != 3 || r.ExpiriesHeldUntil.AsTime().Unix() != 90 || r.Pipelines[0].WaitsForTotal != 1 {
		t.Fatal(r)
	}
	_, err = follower.cluster.GetPlacementHolds(follower.ctx(), &clusterpb.GetPlacementHoldsRequest{PipelineId: strings.Repeat("x", 1<<12)})
	wantCode(t, err, codes.InvalidArgument)

	// What would have to be asked for is left out.
	const less = "a sidecar can take it; whether that is held back for now, and until when, only the leader knows"
	follower.waitsBecause("a stale read", "p", 1, less, MetadataConsistency, "stale")
	leader.waitsBecause("a stale read of the leader", "p", 1, "nothing more is told before", MetadataConsistency, "stale")
	follower.node.setLeader(0, raftnode.ErrNoLeader)
	follower.waitsBecause("nobody leads", "p", 1, less, MetadataConsistency, "stale")
}

// Goal: of a stage that cannot be placed it is the obstacle that is told, and a handover
// beside it; not that it is given to somebody then.
func TestHandoverOfWhatNobodyCanRun(t *testing.T) {
	a := newStudiedAPI(t)
	a.offer("ns/one", "x:source")
	a.offer("ns/two", "y:sink")
	a.create(chain("p", "x", "y"))
	a.place()
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{
		Handovers: true, Changes: []*commandpb.AssignmentChange{{
			SidecarId: "ns/one", PipelineId: "p", SidecarGeneration: 1, Revoke: true, Releases: []string{"x-stage"}, ReleaseTimeoutMs: 60_000,
		}},
	}}})
	a.waitsBecause("it has a place", "p", 0, "sidecar ns/one was told to let go of it and has not confirmed that; nobody else is given it before, or before ")
	a.offer("ns/one", "z:source", "v:source") // one alone would stand in
	a.waitsBecause("it has none", "p", 0, `no sidecar offers source service "x"; also, sidecar ns/one was told to let go`)
}

// Goal: of a stage that only silent sidecars run it is said that these keep it, and
// until when.
func TestSilentSidecarsKeepIt(t *testing.T) {
	a := newStudiedAPI(t)
	a.offer("ns/one", "x:source")
	a.offer("ns/two", "y:sink")
	a.create(chain("p", "x", "y"))
	a.place()
	a.waitsBecause("it runs", "p", 0, "")
	is := func(state commandpb.SidecarState) (at time.Time) {
		t.Helper()
		a.clock.advance(time.Second)
		res := a.node.must(t, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
			SidecarId: "ns/one", State: state, GraceMs: 60_000,
		}}})
		return time.UnixMilli(int64(res.TimeMs))
	}
	at := is(commandpb.SidecarState_SIDECAR_STATE_SUSPECT)
	a.waitsBecause("suspect", "p", 0, "sidecar ns/one misses heartbeats, noticed at "+clock(at))
	is(commandpb.SidecarState_SIDECAR_STATE_EXPIRED)
	is(commandpb.SidecarState_SIDECAR_STATE_ALIVE)
	at = is(commandpb.SidecarState_SIDECAR_STATE_EXPIRED)
	a.waitsBecause("in its grace", "p", 0, "it keeps the stage until "+clock(at.Add(time.Minute)))
	r, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
	noError(t, err)
	if p := r.Status.Placements[0]; len(p.Silent) != 1 || p.Silent[0] != "ns/one" || len(r.Status.Placements[1].Silent) != 0 {
		t.Fatal(r.Status)
	}
}
