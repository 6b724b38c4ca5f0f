package rpc

import (
	"testing"
	"time"

	"conveyor.etl/router/control"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// Goal: of a stage that a suspect keeps it is said when that counts as gone: after its
// lease; when so many fell silent that they are held back, from when to when they are let
// go; and when nobody who knows is to be asked, that it may be later.
func TestSilentSidecarIsDue(t *testing.T) {
	n, until, last := 0, time.Time{}, time.Time{}
	a := newAPI(t, func(c *ServerConfig) {
		study := control.NewStudy(control.StudyConfig{State: c.State})
		t.Cleanup(study.Close)
		c.Placement, c.SuspectAfter, c.SidecarTTL = study, 30*time.Second, 45*time.Second
		c.Held = func(string) []HeldPipeline { return nil }
		c.HeldExpiries = func() (int, time.Time, time.Time) { return n, until, last }
	})
	a.offer("ns/one", "x:source")
	a.offer("ns/two", "y:sink")
	a.create(chain("p", "x", "y"))
	a.place()
	res := a.node.must(t, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: "ns/one", State: commandpb.SidecarState_SIDECAR_STATE_SUSPECT,
	}}})
	at := time.UnixMilli(int64(res.TimeMs))
	a.clock.advance(at.Sub(a.clock.Now()))
	due := at.Add(15 * time.Second)
	const keeps = "; it keeps the stage until it counts as gone"
	a.waitsBecause("suspect", "p", 0, keeps+", at about "+clock(due)+" if nothing is heard until then")

	n, until, last = 3, at.Add(time.Minute), at.Add(90*time.Second)
	a.waitsBecause("held", "p", 0, keeps+": too many sidecars fell silent at once, so the 3 that are due are not given up before "+
		clock(until)+", then one after another, the last by "+clock(last)+"; sooner if most come back")
	n = 1
	a.waitsBecause("one held", "p", 0, "so the 1 that is due is not given up before "+clock(until)+"; sooner if most come back")
	n = 2
	a.clock.advance(time.Minute)
	a.waitsBecause("let go", "p", 0, "and the 2 that are due are given up one after another since "+clock(until)+", the last by "+clock(last))
	n = 0
	a.waitsBecause("overdue", "p", 0, keeps+", which is due: a leader that was elected or held up meanwhile gives it time to be heard")

	a.node.setLeader(0, raftnode.ErrNoLeader)
	a.waitsBecause("overdue, and nobody leads", "p", 0, "due since about "+clock(due)+"; why that is put off only the leader knows", MetadataConsistency, "stale")
	a.clock.advance(-time.Minute)
	a.waitsBecause("nobody leads", "p", 0, "at about "+clock(due)+" if nothing is heard until then, and later if the leader, which was not asked", MetadataConsistency, "stale")
}

// Goal: what is said of one and of several is grammar, and several that are silent for
// other reasons are not said to be silent for this one.
func TestSilentInNumbers(t *testing.T) {
	a := newAPI(t)
	suspect := func(id string, ms uint64) *commandpb.Sidecar {
		return &commandpb.Sidecar{SidecarId: id, State: commandpb.SidecarState_SIDECAR_STATE_SUSPECT, StateChangedAtMs: ms}
	}
	expired := func(id string, grace uint64) *commandpb.Sidecar {
		return &commandpb.Sidecar{SidecarId: id, State: commandpb.SidecarState_SIDECAR_STATE_EXPIRED, GraceUntilMs: grace}
	}
	for _, c := range []struct {
		by   []*commandpb.Sidecar
		want string
	}{
		{nil, ""},
		{[]*commandpb.Sidecar{suspect("a", 1000)}, "sidecar a misses heartbeats, noticed at 1970-01-01T00:00:01Z; it keeps the stage until it counts as gone"},
		{[]*commandpb.Sidecar{suspect("a", 3000), suspect("b", 1000)},
			"sidecars a and 1 more miss heartbeats, the last noticed at 1970-01-01T00:00:03Z; they keep the stage until they count as gone"},
		{[]*commandpb.Sidecar{expired("a", 1000), suspect("b", 1), expired("c", 2000)},
			"sidecars a and 1 more have expired again soon after they had come back; they keep the stage until 1970-01-01T00:00:02Z, and longer if they are heard of before; 1 more that runs it is silent, too"},
		{[]*commandpb.Sidecar{expired("a", 0), suspect("b", 1), suspect("c", 1)},
			"sidecar a has expired; the stage is about to be taken from it; 2 more that run it are silent, too"},
	} {
		if got := silentReason(c.by, &leaderWords{s: a.Server, ctx: t.Context()}); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
	handover := func(id string) *commandpb.Handover {
		return &commandpb.Handover{SidecarId: id, Releases: []*commandpb.Release{{StageId: "s", DeadlineMs: 1000}}}
	}
	for want, from := range map[string][]*commandpb.Handover{
		"sidecar a was told to let go of it and has not confirmed that; nobody else is given it before, or before 1970-01-01T00:00:01Z":               {handover("a")},
		"sidecars a and 1 more were told to let go of it and have not confirmed that; nobody else is given it before, or before 1970-01-01T00:00:01Z": {handover("a"), handover("b")},
	} {
		if got := handoverReason(from, "s"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := putOffReason(&clusterpb.HeldPipeline{WaitsFor: []string{"a"}, WaitsForTotal: 1, HeardBy: timestampOrNil(time.Unix(1, 0))}); got !=
		"records could go round between sidecars that have heard of a change and others that have not: nothing more is told before sidecar a has confirmed what was told before, or must have heard of it, which is by 1970-01-01T00:00:01Z" {
		t.Error(got)
	}
	// Without a planner the reasons are simpler, and grammar all the same.
	a.offer("ns/one", "x:source")
	a.offer("ns/lone", "v:sink")
	a.create(chain("p", "x", "y"))
	pending := func(stage int, want string) {
		t.Helper()
		r, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
		noError(t, err)
		if got := r.Status.Placements[stage].PendingReason; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	pending(0, `1 sidecar offers service "x"; the stage has not been placed yet, or its selector's group or labels exclude it`)
	pending(1, `no sidecar offers service "y"; 1 has a single service of the stage's type and may take it`)
	a.offer("ns/two", "x:source")
	a.offer("ns/loner", "v:sink")
	pending(0, `2 sidecars offer service "x"; the stage has not been placed yet, or its selector's group or labels exclude them`)
	pending(1, `no sidecar offers service "y"; 2 have a single service of the stage's type and may take it`)
	a.offer("ns/two")
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: "ns/one", State: commandpb.SidecarState_SIDECAR_STATE_SUSPECT,
	}}})
	pending(0, `the only sidecar that offers service "x" is silent`)
}
