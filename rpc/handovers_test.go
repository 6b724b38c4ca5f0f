package rpc

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

func (a *api) handovers() (out []string) {
	a.t.Helper()
	v := a.node.fsm.View()
	defer v.Close()
	noError(a.t, v.Handovers(func(h *commandpb.Handover) bool {
		out = append(out, h.SidecarId)
		return true
	}))
	return out
}

// takeAway revokes a pipeline from a sidecar that has to confirm it.
func (a *api) takeAway(sidecar, pipeline, stage string) {
	a.t.Helper()
	cmd := a.assignment(sidecar, pipeline, true)
	for _, c := range cmd.GetApplyAssignments().Changes {
		c.Releases, c.ReleaseTimeoutMs = []string{stage}, 60_000
	}
	a.node.must(a.t, cmd)
	a.noted()
}

// noted waits until the feed has noted what was decided.
func (a *api) noted() {
	a.t.Helper()
	eventually(a.t, "the change was noted", func() bool { return a.feed.rungUp() >= a.node.fsm.Revision() })
}

// Goal: what a sidecar has let go of is reported when its heartbeats say or show
// so, not before, and by no heartbeat about another epoch.
func TestHandoverIsConfirmed(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/says")
	a.registerSidecar("ns/plain")
	a.registerSidecar("ns/other")
	a.create(chain("p", "x", "y"))
	a.assign("ns/says", "p")
	a.assign("ns/other", "p")
	a.assign("ns/plain", "p")
	a.noted()
	says := &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/says", AppliedRevision: a.node.fsm.Revision(), AppliedEpoch: a.node.fsm.Epoch()}
	plain := &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/plain"}
	for range 3 {
		a.beat(says)
		a.beat(plain)
		a.clock.advance(time.Second)
	}
	v := a.node.fsm.View()
	as, err := v.Assignment("ns/says", "p")
	noError(t, err)
	v.Close()
	stage := as.Stages[0].StageId
	a.takeAway("ns/says", "p", stage)
	a.takeAway("ns/plain", "p", stage)
	a.takeAway("ns/other", "p", stage)
	a.noted()
	pending := func(want ...string) {
		t.Helper()
		if got := a.handovers(); !slices.Equal(got, want) {
			t.Fatalf("pending are %v, want %v", got, want)
		}
	}
	r, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
	noError(t, err)
	if pl := r.GetStatus().GetPlacements()[0]; len(pl.GetReleasing()) != 3 || !strings.Contains(pl.GetPendingReason(), "have not confirmed") {
		t.Fatalf("placement %v", pl)
	}
	a.beat(says) // what it had before
	a.beat(plain)
	a.beat(&sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/other", AppliedEpoch: 7, AppliedRevision: a.node.fsm.Revision()})
	pending("ns/other", "ns/plain", "ns/says")
	a.beat(plain) // it has read the answer to the last one
	eventually(t, "the plain one is done", func() bool { return slices.Equal(a.handovers(), []string{"ns/other", "ns/says"}) })
	says.AppliedRevision = a.node.fsm.Revision()
	a.beat(says)
	eventually(t, "the one that says so is done", func() bool { return slices.Equal(a.handovers(), []string{"ns/other"}) })
}

// stageOf returns a stage that a sidecar runs of a pipeline.
func (a *api) stageOf(sidecar, pipeline string) string {
	a.t.Helper()
	v := a.node.fsm.View()
	defer v.Close()
	as, err := v.Assignment(sidecar, pipeline)
	noError(a.t, err)
	return as.Stages[0].StageId
}

// Goal: an answer names no revision of whose changes it does not know, so that a
// sidecar that repeats it confirms nothing it never heard of. Method: the feed of
// changes is held while a handover is decided.
func TestAnswerNamesNoRevisionItDidNotTell(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod")
	a.registerSidecar("ns/other")
	a.create(chain("p", "x", "y"))
	a.assign("ns/pod", "p")
	a.assign("ns/other", "p")
	a.noted()
	beat := func(revision, epoch uint64) *sidecarpb.HeartbeatResponse {
		r, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{
			SidecarId: "ns/pod", AppliedRevision: revision, AppliedEpoch: epoch,
		})
		if err != nil {
			t.Error(err)
		}
		return r
	}
	last, epoch := uint64(0), a.node.fsm.Epoch()
	for range 3 { // of no epoch there is: it confirms nothing, for which the held lock is needed
		last = beat(1, 7).GetRevision()
	}
	if last != a.node.fsm.Revision() {
		t.Errorf("told of revision %d, all up to %d is known", last, a.node.fsm.Revision())
	}
	stage := a.stageOf("ns/pod", "p")
	cmd := a.assignment("ns/other", "p", true)
	cmd.GetApplyAssignments().Changes = append(cmd.GetApplyAssignments().Changes, a.assignment("ns/pod", "p", true).GetApplyAssignments().Changes...)
	for _, c := range cmd.GetApplyAssignments().Changes {
		c.Releases, c.ReleaseTimeoutMs = []string{stage}, 60_000
	}
	a.Server.handovers.mu.Lock()
	a.node.must(t, cmd)
	r, decided := beat(1, 7), a.node.fsm.Revision()
	a.Server.handovers.mu.Unlock()
	if told1(r) == "" && r.GetRevision() >= decided {
		t.Errorf("told of revision %d, which revokes p, without a word of that", decided)
	}
	a.noted()
	if r = beat(r.GetRevision(), epoch); told1(r) != "-p" || r.GetRevision() < decided {
		t.Fatalf("told %q up to %d", told1(r), r.GetRevision())
	}
	if got := a.handovers(); len(got) != 2 {
		t.Fatalf("pending are %v", got)
	}
	beat(r.GetRevision(), epoch)
	eventually(t, "it has let go", func() bool { return slices.Equal(a.handovers(), []string{"ns/other"}) })
}

// Goal: on a stream a heartbeat that says so ends a handover, and one that says
// nothing does not: it does not show that the answer before was read.
func TestStreamConfirmsHandover(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod")
	a.create(chain("p", "x", "y"))
	a.assign("ns/pod", "p")
	a.noted()
	c := a.streamBeats()
	c.introduce(1, "ns/pod")
	v := a.node.fsm.View()
	as, err := v.Assignment("ns/pod", "p")
	noError(t, err)
	v.Close()
	a.takeAway("ns/pod", "p", as.Stages[0].StageId)
	c.answer(1) // the revocation
	before := a.beats.count("ns/pod", "")
	c.alive(1)
	c.alive(1)
	a.touched("ns/pod", before+2)
	if got := a.handovers(); len(got) != 1 {
		t.Fatalf("pending are %v", got)
	}
	c.send(full(1, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", AppliedRevision: a.node.fsm.Revision(), AppliedEpoch: a.node.fsm.Epoch()}))
	eventually(t, "it is done", func() bool { return len(a.handovers()) == 0 })
}

// Goal: a drain is recorded once, shown everywhere, and taken back; bad ones are
// refused.
func TestDrainAPI(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/a")
	_, err := a.cluster.DrainSidecar(a.ctx(), &clusterpb.DrainSidecarRequest{SidecarId: "ns/none"})
	wantCode(t, err, codes.NotFound)
	_, err = a.cluster.DrainSidecar(a.ctx(), &clusterpb.DrainSidecarRequest{SidecarId: ""})
	wantCode(t, err, codes.InvalidArgument)
	_, err = a.cluster.DrainSidecar(a.ctx(), &clusterpb.DrainSidecarRequest{SidecarId: "ns/a", DeadlineMs: 1 << 40})
	wantCode(t, err, codes.InvalidArgument)
	_, err = a.cluster.UndrainSidecar(a.ctx(), &clusterpb.UndrainSidecarRequest{SidecarId: "ns/none"})
	wantCode(t, err, codes.NotFound)
	d, err := a.cluster.DrainSidecar(a.ctx(), &clusterpb.DrainSidecarRequest{SidecarId: "ns/a", DeadlineMs: 1000})
	noError(t, err)
	if s := d.GetSidecar(); !s.GetDraining() || s.GetLeaves() || s.GetDrainDeadline() == nil || s.GetDrainSince() == nil {
		t.Fatalf("drained: %v", s)
	}
	u, err := a.cluster.UndrainSidecar(a.ctx(), &clusterpb.UndrainSidecarRequest{SidecarId: "ns/a"})
	noError(t, err)
	if s := u.GetSidecar(); s.GetDraining() || s.GetDrainDeadline() != nil || s.GetDrainSince() != nil || !u.GetWasDraining() {
		t.Fatalf("undrained: %v", s)
	}
	g, err := a.cluster.DeregisterSidecar(a.ctx(), &clusterpb.DeregisterSidecarRequest{SidecarId: "ns/a", Graceful: true})
	noError(t, err)
	l, err := a.cluster.ListSidecars(a.ctx(), &clusterpb.ListSidecarsRequest{})
	noError(t, err)
	if s := l.GetSidecars()[0]; !g.GetDraining() || !g.GetExisted() || !s.GetLeaves() || s.GetDrainDeadline() == nil {
		t.Fatalf("deregistered gracefully: %v, %v", g, s)
	}
}

// Goal: where a sidecar runs is taken from its labels; a capacity that is none is
// warned of and counts as one.
func TestPlacementLabels(t *testing.T) {
	a := newAPI(t)
	register := func(labels map[string]string) (*sidecarpb.RegisterSidecarResponse, *clusterpb.SidecarInfo) {
		t.Helper()
		r, err := a.sidecar.RegisterSidecar(a.ctx(), &sidecarpb.RegisterSidecarRequest{
			SidecarId: "ns/a", PodName: "a", Namespace: "ns", SidecarEndpoint: "10.0.0.1:1", Labels: labels,
		})
		noError(t, err)
		s, err := a.cluster.GetSidecar(a.ctx(), &clusterpb.GetSidecarRequest{SidecarId: "ns/a"})
		noError(t, err)
		return r, s.GetSidecar()
	}
	r, s := register(map[string]string{router.LabelZone: "z1", router.LabelNode: "n1", router.LabelCapacity: "8", "team": "x"})
	if len(r.GetWarnings()) != 0 || s.GetZone() != "z1" || s.GetNode() != "n1" || s.GetCapacity() != 8 {
		t.Fatalf("%v, %v", r, s)
	}
	r, s = register(map[string]string{router.LabelCapacity: "lots"})
	if len(r.GetWarnings()) != 1 || s.GetZone() != "" || s.GetCapacity() != 1 {
		t.Fatalf("%v, %v", r, s)
	}
	_, err := a.sidecar.RegisterSidecar(a.ctx(), &sidecarpb.RegisterSidecarRequest{
		SidecarId: "ns/a", PodName: "a", Namespace: "ns", SidecarEndpoint: "10.0.0.1:1", Labels: map[string]string{"": "x"},
	})
	wantCode(t, err, codes.InvalidArgument)
}

// Goal: what a sidecar said once on its stream is not lost, neither when it cannot
// be recorded at first nor when it comes before the node has noted the handover.
func TestStreamedConfirmationIsNotLost(t *testing.T) {
	prepare := func(t *testing.T) (*api, *beatClient, string) {
		a := newAPI(t)
		a.registerSidecar("ns/pod")
		a.create(chain("p", "x", "y"))
		a.assign("ns/pod", "p")
		a.noted()
		c := a.streamBeats()
		c.introduce(1, "ns/pod")
		return a, c, a.stageOf("ns/pod", "p")
	}
	t.Run("not recorded at first", func(t *testing.T) {
		a, c, stage := prepare(t)
		a.takeAway("ns/pod", "p", stage)
		c.answer(1)
		a.node.holdAll()
		c.send(full(1, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", AppliedRevision: a.node.fsm.Revision(), AppliedEpoch: a.node.fsm.Epoch()}))
		eventually(t, "the report is under way", func() bool { return a.node.heldCount() == 1 })
		a.node.setLeader(1, raftnode.ErrAmbiguous)
		a.node.release() // it fails
		a.node.setLeader(1, nil)
		eventually(t, "it is done", func() bool { return len(a.handovers()) == 0 })
	})
	for name, note := range map[string]func(a *api, h *commandpb.Handover) error{
		"said before it was noted": func(a *api, h *commandpb.Handover) error { a.feed.onHandover(nil, h); return nil },
		"said before the state was read anew": func(a *api, _ *commandpb.Handover) error {
			v := a.node.fsm.View()
			return errors.Join(a.feed.onLoad(v), v.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, c, stage := prepare(t)
			before := a.node.fsm.Revision()
			a.takeAway("ns/pod", "p", stage)
			c.answer(1)
			v := a.node.fsm.View()
			var h *commandpb.Handover
			noError(t, v.Handovers(func(x *commandpb.Handover) bool { h = x; return true }))
			noError(t, v.Close())
			a.Server.handovers.changed(h, nil) // as it was before it was noted
			c.send(full(1, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", AppliedRevision: a.node.fsm.Revision(), AppliedEpoch: a.node.fsm.Epoch()}))
			eventually(t, "it was heard", func() bool { revision, _ := a.entryOf("ns/pod").upTo(); return revision > before })
			noError(t, note(a, h))
			eventually(t, "it is done", func() bool { return len(a.handovers()) == 0 })
		})
	}
}
