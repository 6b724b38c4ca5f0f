package rpc

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

func (a *api) convergence(pipeline string) *clusterpb.GetConvergenceResponse {
	a.t.Helper()
	r, err := a.cluster.GetConvergence(a.ctx(), &clusterpb.GetConvergenceRequest{PipelineId: pipeline})
	noError(a.t, err)
	return r
}

func (a *api) beat(req *sidecarpb.SidecarHeartbeatRequest) {
	a.t.Helper()
	r, err := a.sidecar.Heartbeat(a.ctx(), req)
	noError(a.t, err)
	if !r.GetAcknowledged() {
		a.t.Fatal("not acknowledged")
	}
}

// Goal: a pipeline has converged when all is decided, placed, and applied by
// everyone concerned; whoever has not is named. Method: one sidecar that says what
// it applied, one that only shows it by its next heartbeat.
func TestConvergence(t *testing.T) {
	planned := uint64(0)
	putOff := ""
	a := newAPI(t, func(c *ServerConfig) {
		c.Planned = func() uint64 { return planned }
		c.Held = func(pipeline string) []HeldPipeline {
			if pipeline != putOff {
				return nil
			}
			return []HeldPipeline{{Pipeline: pipeline, Later: 1, Sidecars: []string{"ns/says"}, HeardBy: time.Unix(60, 0)}}
		}
	})
	_, err := a.cluster.GetConvergence(a.ctx(), &clusterpb.GetConvergenceRequest{PipelineId: "p"})
	wantCode(t, err, codes.NotFound)
	a.registerSidecar("ns/says")
	a.registerSidecar("ns/plain")
	a.create(chain("p", "x", "y"))
	if r := a.convergence("p"); r.Converged || len(r.Pending) != 1 || r.Pending[0].StageId != "" {
		t.Fatalf("undecided: %v", r)
	}
	planned = a.node.fsm.Revision()
	if r := a.convergence("p"); r.Converged || len(r.Pending) != 2 || r.Pending[0].StageId != "x-stage" {
		t.Fatalf("not placed: %v", r)
	}
	putOff = "p"
	if r := a.convergence("p"); r.Converged || len(r.Pending) != 3 || r.Pending[0].StageId != "" || !strings.Contains(r.Pending[0].Reason, "before sidecar ns/says has confirmed") {
		t.Fatalf("put off: %v", r)
	}
	putOff = ""
	says := &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/says", AppliedRevision: a.node.fsm.Revision(), AppliedEpoch: a.node.fsm.Epoch()}
	plain := &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/plain"}
	a.beat(says)
	a.beat(plain)
	a.clock.advance(time.Second)
	a.assign("ns/says", "p")
	a.assign("ns/plain", "p")
	laggards := func(want ...string) {
		t.Helper()
		r := a.convergence("p")
		var got []string
		for _, l := range r.Laggards {
			got = append(got, l.SidecarId)
		}
		if len(got) != len(want) || r.Converged != (len(want) == 0) || int(r.Concerned-r.Applied) != len(want) {
			t.Fatalf("%v lag, want %v: %v", got, want, r)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%v lag, want %v", got, want)
			}
		}
	}
	eventually(t, "the change was noted", func() bool { return a.feed.rungUp() >= a.node.fsm.Revision() })
	laggards("ns/plain", "ns/says")
	a.clock.advance(2 * time.Second)
	a.beat(says) // it has not applied the new one yet
	a.beat(plain)
	laggards("ns/plain", "ns/says") // the answer may not have been read
	a.beat(plain)
	laggards("ns/says")
	says.AppliedRevision = a.node.fsm.Revision()
	says.AppliedEpoch++ // of a state that is not this one
	a.beat(says)
	laggards("ns/says")
	says = &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/other"}
	a.registerSidecar("ns/other") // concerns nobody
	a.beat(says)
	laggards("ns/says")

	// Whoever loses it is concerned as well, unless it is gone.
	a.revoke("ns/plain", "p")
	a.revoke("ns/says", "p")
	eventually(t, "the change was noted", func() bool { return a.feed.rungUp() >= a.node.fsm.Revision() })
	r := a.convergence("p")
	if r.Concerned != 2 || r.Applied != 0 {
		t.Fatalf("%v", r)
	}
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: "ns/says", State: commandpb.SidecarState_SIDECAR_STATE_EXPIRED,
	}}})
	if r := a.convergence("p"); r.Concerned != 1 {
		t.Fatalf("an expired sidecar is waited for: %v", r)
	}
}

// Goal: how long changes take to be applied is counted, from the commit here to
// the word of the sidecar.
func TestAppliedDelay(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod")
	a.create(chain("p", "x", "y"))
	beat := &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", AppliedRevision: 1, AppliedEpoch: a.node.fsm.Epoch()}
	a.beat(beat)
	a.assign("ns/pod", "p")
	eventually(t, "the change was noted", func() bool { return a.feed.rungUp() >= a.node.fsm.Revision() })
	a.clock.advance(3 * time.Second)
	a.beat(beat)
	count := func() (n, within2, within5 float64) {
		m := make(map[string]float64)
		a.told.delay.metrics("d", m)
		return m["d_count"], m[`d_bucket{le="2"}`], m[`d_bucket{le="5"}`]
	}
	if n, _, _ := count(); n != 0 {
		t.Fatalf("%v changes were counted as applied", n)
	}
	beat.AppliedRevision = a.node.fsm.Revision()
	a.beat(beat)
	a.beat(beat)
	if n, two, five := count(); n != 1 || two != 0 || five != 1 {
		t.Fatalf("%v changes applied, %v within 2 s, %v within 5 s; it took 3", n, two, five)
	}
}

// Goal: behind a restore, what a sidecar that sends nothing back was told is still
// recognized as what was decided, though generations are told with the epoch in them.
func TestAppliedInAnotherEpoch(t *testing.T) {
	for _, epoch := range []uint64{0, 1, 7} {
		table := newToldSidecars(10, time.Hour, time.Hour)
		a := &commandpb.Assignment{SidecarId: "s", PipelineId: "p", Generation: 5, ModRevision: 9}
		e := table.first("s", time.Unix(1, 0))
		e.pipelines = map[string]toldPipeline{"p": {generation: router.Ordered(epoch, 5), telling: 1}}
		e.tellings, e.confirmed = 1, 1
		if !table.hasApplied(a, epoch) {
			t.Errorf("epoch %d: it is not known to have applied what it was told", epoch)
		}
		if table.hasApplied(a, epoch+1) {
			t.Errorf("what was told in epoch %d counts in the next one", epoch)
		}
	}
}

// Goal: a sidecar that says it has applied what this cluster has never decided, of a
// cluster it was in before or by a fault of its own, is told so and keeps its lease;
// its word does not count, and does not stand in the way of what it says later.
func TestAppliedOfTheFuture(t *testing.T) {
	for _, c := range []struct {
		name            string
		revision, epoch uint64
	}{
		{"revision", 1 << 40, 0}, {"the largest", 1<<64 - 1, 0}, {"epoch", 1, 7}, {"both", 1<<64 - 1, 1<<64 - 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAPI(t, func(c *ServerConfig) { c.Planned = func() uint64 { return 1 << 40 } })
			a.registerSidecar("ns/pod", "x")
			a.create(chain("p", "x", "y"))
			a.assign("ns/pod", "p")
			says := func(revision, epoch uint64) *sidecarpb.HeartbeatResponse {
				t.Helper()
				r, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", AppliedRevision: revision, AppliedEpoch: epoch})
				noError(t, err)
				if !r.Acknowledged || a.beats.count("ns/pod", "") == 0 {
					t.Fatalf("it loses its lease: %v", r)
				}
				return r
			}
			for range 3 {
				if r := says(c.revision, c.epoch); !strings.Contains(r.Reason, "does not exist in this cluster") {
					t.Fatalf("the answer does not tell: %v", r)
				}
			}
			if r := a.convergence("p"); r.Applied != 0 {
				t.Fatalf("it counts: %v", r)
			}
			if r := says(a.node.fsm.Revision(), 0); r.Reason != "" {
				t.Fatal(r)
			}
			if r := a.convergence("p"); r.Applied != 1 {
				t.Fatalf("what it says now does not count: %v", r)
			}
		})
	}
}
