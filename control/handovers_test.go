package control

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

func (r *replica) drain(id string, timeout time.Duration, leaves bool) {
	r.t.Helper()
	r.do(&commandpb.Command{TimeMs: uint64(time.Now().UnixMilli()), Op: &commandpb.Command_DrainSidecar{
		DrainSidecar: &commandpb.DrainSidecar{SidecarId: id, TimeoutMs: uint64(timeout.Milliseconds()), Leaves: leaves},
	}})
}

// applied says that a sidecar has applied all there is.
func (r *replica) applied(id string) {
	r.t.Helper()
	r.confirmed(id, r.fsm.Revision())
}

// confirmed says that a sidecar has applied all up to a revision.
func (r *replica) confirmed(id string, revision uint64) {
	r.t.Helper()
	r.do(r.confirmation(id, revision))
}

// confirmation is the command that says so.
func (r *replica) confirmation(id string, revision uint64) *commandpb.Command {
	r.t.Helper()
	c := &commandpb.EndHandovers{}
	for _, h := range r.handovers() {
		if h.SidecarId == id {
			c.Ended = append(c.Ended, &commandpb.EndedHandover{
				SidecarId: id, PipelineId: h.PipelineId, Revision: revision, End: commandpb.HandoverEnd_HANDOVER_END_APPLIED,
			})
		}
	}
	return &commandpb.Command{Op: &commandpb.Command_EndHandovers{EndHandovers: c}}
}

func (r *replica) handovers() []*commandpb.Handover {
	r.t.Helper()
	v := r.fsm.View()
	defer v.Close()
	var out []*commandpb.Handover
	if err := v.Handovers(func(h *commandpb.Handover) bool { out = append(out, h); return true }); err != nil {
		r.t.Fatal(err)
	}
	return out
}

// runs lists who runs a stage of a pipeline.
func (r *replica) runs(pipeline, stage string) string {
	r.t.Helper()
	v := r.fsm.View()
	defer v.Close()
	var out []string
	err := v.PipelineAssignments(pipeline, func(a *commandpb.Assignment) bool {
		for _, s := range a.Stages {
			if !a.Revoked && s.StageId == stage && s.RemoteSidecarId == "" {
				out = append(out, a.SidecarId)
			}
		}
		return true
	})
	if err != nil {
		r.t.Fatal(err)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// expect fails unless a stage runs on the sidecars named.
func (r *replica) expect(what, pipeline, stage, want string) {
	r.t.Helper()
	synctest.Wait()
	if got := r.runs(pipeline, stage); got != want {
		r.t.Fatalf("%s: %s runs on %q, want %q; handovers %v", what, stage, got, want, r.handovers())
	}
}

// TestDrainHandsOver: what only one may run is taken from a sidecar that drains,
// and given to another once the first has confirmed it; what several may run moves
// at once. A stage nobody else can run stays.
func TestDrainHandsOver(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source", "clean:transform", "lake:sink", "odd:sink")
	r.putPipeline("p", threeStages)
	r.putPipeline("q", "orders:source -> odd:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, time.Second, "a")
		r.expect("at first", "p", "orders", "a")
		r.register("b", "orders:source", "clean:transform", "lake:sink")
		r.drain("a", 0, false)
		beat(l, 20*time.Second, "a", "b")
		r.expect("before a has confirmed", "p", "orders", "")
		r.expect("shared", "p", "clean", "b")
		r.expect("shared", "p", "lake", "b")
		r.expect("what nobody else can run", "q", "odd", "a")
		if s := l.c.Submit.(*replica).handovers(); len(s) == 0 {
			t.Fatal("nothing is waited for")
		}
		r.applied("a")
		beat(l, time.Second, "a", "b")
		r.expect("after a has confirmed", "p", "orders", "b")
		if got := r.table(); !contains(got, "p b: orders=127.0.0.1:9001 clean=127.0.0.1:9002 lake=127.0.0.1:9003 (all stages here)") {
			t.Fatalf("tables:\n%s", got)
		}
	})
}

// TestDrainWaitsNoLonger: a sidecar that confirms nothing is waited for as long as
// its drain says, or the usual time; one that expires, no longer.
func TestDrainWaitsNoLonger(t *testing.T) {
	for _, c := range []struct {
		deadline time.Duration
		silent   bool
		wait     time.Duration
	}{{0, false, 45 * time.Second}, {20 * time.Second, false, 20 * time.Second}, {10 * time.Minute, true, 45 * time.Second}} {
		t.Run(fmt.Sprint(c.deadline, c.silent), func(t *testing.T) {
			r := newReplica(t, router.Options{})
			r.register("a", "orders:source")
			r.register("k", "lake:sink")
			r.putPipeline("p", "orders:source -> lake:sink")
			r.inBubble(func(t *testing.T, l *Liveness) {
				r.setLeading(true)
				beat(l, time.Second, "a", "k")
				r.register("b", "orders:source")
				alive := []string{"b", "k"}
				if !c.silent {
					alive = append(alive, "a")
				}
				r.drain("a", c.deadline, false)
				beat(l, c.wait-3*time.Second, alive...)
				r.expect("just before", "p", "orders", "")
				beat(l, 6*time.Second, alive...)
				r.expect("just after", "p", "orders", "b")
			})
		})
	}
}

// TestDrainWhenTheClockWasSet: a sidecar has what its drain says, whatever the leader's
// time of day was set to after the drain.
func TestDrainWhenTheClockWasSet(t *testing.T) {
	for _, jump := range []time.Duration{-30 * time.Minute, 30 * time.Minute} {
		t.Run(jump.String(), func(t *testing.T) {
			r := newReplica(t, router.Options{})
			r.jump = jump
			r.register("a", "orders:source")
			r.register("k", "lake:sink")
			r.inBubble(func(t *testing.T, l *Liveness) {
				r.assign("p", "orders:source -> lake:sink")
				r.register("b", "orders:source")
				r.drain("a", 20*time.Second, false)
				r.setLeading(true)
				beat(l, 17*time.Second, "a", "b", "k")
				r.expect("just before", "p", "orders", "")
				beat(l, 6*time.Second, "a", "b", "k")
				r.expect("just after", "p", "orders", "b")
			})
		})
	}
}

// assign declares a pipeline and hands it out.
func (r *replica) assign(id, text string) {
	r.t.Helper()
	r.putPipeline(id, text)
	v := r.fsm.View()
	in, err := ReadInput(v)
	if err := errors.Join(err, v.Close()); err != nil {
		r.t.Fatal(err)
	}
	r.do(&commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{Changes: Plan(in)}}})
}

// TestHandoverSurvivesTheLeader: the next leader waits as well, not shorter, and
// gives the stage to somebody once the old sidecar has confirmed.
func TestHandoverSurvivesTheLeader(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source -> lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, time.Second, "a", "k")
		r.register("b", "orders:source")
		r.drain("a", 0, false)
		beat(l, 10*time.Second, "a", "b", "k")
		r.expect("under the first leader", "p", "orders", "")
		for range 3 {
			r.setLeading(false)
			pass(time.Second)
			r.setLeading(true)
			beat(l, 10*time.Second, "a", "b", "k")
			r.expect("under the next leader", "p", "orders", "")
		}
		// What a leader of before decided does nothing any more.
		old := r.Leadership().Term - 1
		res, err := r.apply(&commandpb.Command{ExpectedTerm: &old, Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{}}})
		if err != nil || res.GetRejection() == nil {
			t.Fatalf("a leader of before: %v, %v", res, err)
		}
		r.applied("a")
		beat(l, time.Second, "a", "b", "k")
		r.expect("in the end", "p", "orders", "b")
	})
}

// TestLeaving: a sidecar that leaves is removed once it has let go of everything it
// had, or at the deadline; not if it registers again, or is undrained.
func TestLeaving(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "clean:transform")
	r.register("c", "other:sink")
	r.register("k", "lake:sink")
	r.register("o", "orders:source")
	r.putPipeline("p", threeStages)
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "c", "k", "o"}
		r.setLeading(true)
		beat(l, time.Second, all...)
		r.register("b", "clean:transform")
		there := func(id string) bool {
			v := r.fsm.View()
			defer v.Close()
			s, err := v.Sidecar(id)
			if err != nil {
				t.Fatal(err)
			}
			return s != nil
		}
		r.drain("c", time.Minute, true) // runs nothing
		r.drain("a", time.Minute, true)
		beat(l, time.Second, all...)
		r.expect("its stage", "p", "clean", "b")
		if there("c") || !there("a") {
			t.Fatalf("c is there: %v, a is there: %v", there("c"), there("a"))
		}
		r.applied("a")
		beat(l, time.Second, all...)
		if there("a") {
			t.Fatal("a has let go of everything and is still there")
		}
		r.drain("o", 30*time.Second, true) // nobody else can
		r.drain("k", 30*time.Second, true)
		r.register("k", "lake:sink")
		beat(l, 28*time.Second, all...)
		if !there("o") {
			t.Fatal("o was removed before its deadline")
		}
		beat(l, 4*time.Second, all...)
		if there("o") || !there("k") {
			t.Fatalf("o is there: %v, k is there: %v", there("o"), there("k"))
		}
	})
}

// TestFlapping: a sidecar that expires again soon after it came back moves nothing
// for a while; when it stays away its stages move. Stages nobody else can run are
// its own as soon as it is back.
func TestFlapping(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "clean:transform", "lake:sink")
	r.register("o", "orders:source")
	r.putPipeline("p", threeStages)
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, time.Second, "a", "o")
		beat(l, 50*time.Second, "o")
		r.expect("expired", "p", "clean", "")
		beat(l, time.Second, "a", "o")
		r.expect("back", "p", "clean", "a")
		r.register("b", "clean:transform", "lake:sink")
		beat(l, 50*time.Second, "b", "o")
		if got := r.state("a"); got != "expired" {
			t.Fatalf("a is %s", got)
		}
		r.expect("expired again", "p", "clean", "a")
		beat(l, time.Second, "a", "b", "o")
		r.expect("back again", "p", "clean", "a")
		beat(l, 90*time.Second, "b", "o")
		r.expect("in its grace", "p", "clean", "a")
		beat(l, 30*time.Second, "b", "o")
		r.expect("after its grace", "p", "clean", "b")
		// Coming back, or registering again, moves nothing either.
		before := r.table()
		beat(l, time.Second, "a", "b", "o")
		r.register("a", "clean:transform", "lake:sink")
		beat(l, time.Second, "a", "b", "o")
		if got := r.table(); got != before {
			t.Fatalf("tables:\n%sbefore:\n%s", got, before)
		}
	})
}

// TestBudget: moves within the budget go, one that is larger than all of it goes
// when it is full, and others wait as long as they have to.
func TestBudget(t *testing.T) {
	now := time.Unix(0, 0)
	b := newBudget(60, now)
	if !b.take(40, now) || !b.take(20, now) || b.take(1, now) {
		t.Fatal("60 moves at once, and no more")
	}
	if got := b.wait(10); got != 10*time.Second {
		t.Fatalf("10 moves in %v, want 10 s", got)
	}
	now = now.Add(10 * time.Second)
	if !b.take(10, now) || b.take(1, now) {
		t.Fatal("10 moves after 10 s, and no more")
	}
	if got := b.wait(1000); got != time.Minute {
		t.Fatalf("more than a minute's worth in %v, want a minute", got)
	}
	now = now.Add(time.Hour)
	if !b.take(1000, now) || b.take(1, now.Add(time.Minute)) {
		t.Fatal("a large step goes when the budget is full, and is paid for")
	}
	if unbound := newBudget(0, now); !unbound.take(1<<30, now) {
		t.Fatal("no bound")
	}
}

// TestLabels: where a sidecar runs is what it says, else what its services say; a
// capacity that is none counts as one.
func TestLabels(t *testing.T) {
	m := newModel()
	s := m.putSidecar("a", "x:sink")
	services := []*commandpb.Service{
		{ServiceId: "1", SidecarId: "a", Name: "x", Labels: map[string]string{router.LabelZone: "z1", router.LabelCapacity: "many"}},
		{ServiceId: "2", SidecarId: "a", Name: "y", Labels: map[string]string{router.LabelZone: "z2", router.LabelNode: "n2", router.LabelCapacity: "7"}},
	}
	slices.Reverse(services)
	if got := sidecarOf(s, services); got.Zone != "z1" || got.Node != "n2" || got.Capacity != 7 {
		t.Fatalf("from its services: %+v", got)
	}
	s.Zone, s.Capacity = "own", 1<<31
	if got := sidecarOf(s, services); got.Zone != "own" || got.Capacity != router.MaxCapacity {
		t.Fatalf("its own: %+v", got)
	}
	for _, text := range []string{"", "0", "-1", "10001", "1.5", "99999999999999999999", " 1"} {
		if n, ok := router.Capacity(text); ok {
			t.Fatalf("%q is the capacity %d", text, n)
		}
	}
}

// TestHeldMoves: moves that nothing forces wait for the budget and are counted; what
// serves a stage does not wait.
func TestHeldMoves(t *testing.T) {
	p := NewPlacer(PlacerConfig{MovesPerMinute: 2})
	p.budget = newBudget(2, time.Now())
	m := &mirror{engine: placement.NewEngine(placement.View{})}
	step := func(id string, u placement.Urgency) placement.Step {
		return placement.Step{Pipeline: id, Urgency: u, Moves: 2, Changes: []placement.Change{{Sidecar: "s"}}}
	}
	var info PlanInfo
	w := newWaits(m)
	got := p.now(m, []placement.Step{
		step("a", placement.Serve), step("b", placement.Evacuate), step("c", placement.Rearrange), step("d", placement.Rearrange), step("e", placement.Rearrange),
	}, w, &info, 0)
	var ids []string
	for _, c := range got {
		ids = append(ids, c.PipelineId)
	}
	if strings.Join(ids, "") != "abc" || info.Held != 4 {
		t.Fatalf("changed %v, held %d; want a, b and c, and 4", ids, info.Held)
	}
	if left := time.Until(w.more); left < 50*time.Second || left > time.Minute {
		t.Fatalf("the next look in %v, want nearly a minute", left)
	}
}

// TestRearrangementsAreHeld: two pipelines get an edge that makes records go round
// where their stages run, so that a stage of each has to move away from a sidecar
// that could go on running it. The budget has room for one. The other one stays as it
// is, without another command, until there is room; what is new is served
// meanwhile.
func TestRearrangementsAreHeld(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.budget = 1
	r.register("a", "orders:source", "lake:sink")
	r.register("b", "clean:transform")
	for _, id := range []string{"p", "q"} {
		r.putPipeline(id, "orders:source -> clean:transform\norders -> lake:sink")
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "c"}
		r.setLeading(true)
		beat(l, 2*time.Second, "a", "b")
		r.register("c", "lake:sink")
		beat(l, 2*time.Minute, all...)
		r.expect("at first", "p", "lake", "a")
		r.expect("at first", "q", "lake", "a")
		r.putPipeline("p", threeStages)
		beat(l, time.Second, all...)
		r.expect("within the budget", "p", "lake", "c")
		r.putPipeline("q", threeStages)
		beat(l, time.Second, all...)
		plans := r.planned()
		beat(l, 50*time.Second, all...)
		r.expect("beyond the budget", "q", "lake", "a")
		if got := r.planned(); got != plans {
			t.Fatalf("%d plans while a move is held", got-plans)
		}
		if got := r.placer.Stats().Held; got != 1 {
			t.Fatalf("%d moves are held, want 1", got)
		}
		r.putPipeline("z", "lake:sink") // nobody has to wait to be served
		beat(l, time.Second, all...)
		if got := r.runs("z", "lake"); got == "" {
			t.Fatal("a new pipeline waits for the budget")
		}
		r.expect("beyond the budget", "q", "lake", "a")
		beat(l, 15*time.Second, all...)
		r.expect("a minute later", "q", "lake", "c")
		before, plans := r.table(), r.planned()
		beat(l, 5*time.Minute, all...)
		if r.table() != before || r.planned() != plans || r.placer.Stats().Held != 0 {
			t.Fatalf("it does not come to rest: %d plans more\n%s", r.planned()-plans, r.table())
		}
	})
}

// TestOneOwner: whatever happens to sidecars and pipelines, in whatever order they
// confirm, no revision has more owners of an entry stage than may be, counting those
// who have yet to let go of it; and once all have confirmed, everything that can run
// runs, and nothing changes any more.
func TestOneOwner(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { oneOwner(t, seed) })
	}
}

func oneOwner(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	r := newReplica(t, router.Options{})
	sidecars := []string{"a", "b", "c", "d", "e"}
	services := []string{"orders:source", "bills:source", "clean:transform", "lake:sink"}
	register := func(id string) {
		var has []string
		for _, s := range services {
			if rnd.IntN(3) > 0 {
				has = append(has, s)
			}
		}
		r.register(id, has...)
	}
	texts := []string{"orders:source -> clean:transform -> lake:sink", "orders:source*2 -> lake:sink", "bills:source -> clean:transform\nbills -> lake:sink",
		"orders:source -> lake:sink\nbills:source -> lake"}
	for _, id := range sidecars {
		register(id)
	}
	for i, text := range texts {
		r.putPipeline(fmt.Sprint("p", i), text)
	}
	r.balance = time.Duration(seed%3) * 5 * time.Second
	r.check = func() { r.oneOwnerEach(seed) }
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		alive := slices.Clone(sidecars)
		for range 60 {
			id := sidecars[rnd.IntN(len(sidecars))]
			switch rnd.IntN(9) {
			case 0, 1:
				r.drain(id, time.Duration(rnd.IntN(2))*20*time.Second, false)
			case 2, 3:
				r.do(&commandpb.Command{Op: &commandpb.Command_UndrainSidecar{UndrainSidecar: &commandpb.UndrainSidecar{SidecarId: id}}})
			case 4:
				register(id)
			case 5:
				if i := slices.Index(alive, id); i >= 0 {
					alive = slices.Delete(alive, i, i+1)
				} else {
					alive = append(alive, id)
				}
			case 6:
				n := rnd.IntN(len(texts))
				r.putPipeline(fmt.Sprint("p", n), texts[rnd.IntN(len(texts))])
			case 7:
				r.do(&commandpb.Command{Op: &commandpb.Command_SetPipelineEnabled{SetPipelineEnabled: &commandpb.SetPipelineEnabled{
					PipelineId: fmt.Sprint("p", rnd.IntN(len(texts))), Enabled: rnd.IntN(2) == 0,
				}}})
			case 8:
				r.setLeading(false)
				r.setLeading(true)
			}
			beat(l, time.Duration(rnd.IntN(20))*time.Second, alive...)
			if rnd.IntN(2) == 0 {
				r.applied(sidecars[rnd.IntN(len(sidecars))])
			}
		}
		for _, id := range sidecars {
			r.do(&commandpb.Command{Op: &commandpb.Command_UndrainSidecar{UndrainSidecar: &commandpb.UndrainSidecar{SidecarId: id}}})
			r.register(id, services...)
		}
		for i := range texts {
			r.do(&commandpb.Command{Op: &commandpb.Command_SetPipelineEnabled{SetPipelineEnabled: &commandpb.SetPipelineEnabled{PipelineId: fmt.Sprint("p", i), Enabled: true}}})
		}
		for range 10 {
			beat(l, time.Second, sidecars...)
			for _, id := range sidecars {
				r.applied(id)
			}
		}
		for range 15 { // those that had expired have stayed for long enough to get their share
			beat(l, time.Minute, sidecars...)
			for _, id := range sidecars {
				r.applied(id)
			}
		}
		before, plans := r.table(), r.planned()
		beat(l, 3*time.Minute, sidecars...)
		if r.table() != before || r.planned() != plans || len(r.handovers()) > 0 {
			t.Fatalf("it does not come to rest: %d plans more, handovers %v\n%s", r.planned()-plans, r.handovers(), r.table())
		}
		for i := range texts {
			v := r.fsm.View()
			p, err := v.Pipeline(fmt.Sprint("p", i))
			if err := errors.Join(err, v.Close()); err != nil {
				t.Fatal(err)
			}
			for _, st := range p.Spec.Stages {
				if got := len(strings.Fields(r.runs(p.Spec.Id, st.Id))); got != int(max(1, st.Parallelism)) {
					t.Fatalf("%s of %s runs on %d sidecars:\n%s", st.Id, p.Spec.Id, got, before)
				}
			}
		}
	})
}

// oneOwnerEach checks the owners of every entry stage as they are now.
func (r *replica) oneOwnerEach(seed uint64) {
	v := r.fsm.View()
	defer v.Close()
	in, err := ReadInput(v)
	if err != nil {
		r.t.Fatal(err)
	}
	lives := make(map[string]bool)
	for _, s := range in.Sidecars {
		// One in grace keeps what it has.
		lives[s.SidecarId] = s.State != commandpb.SidecarState_SIDECAR_STATE_EXPIRED || s.GraceUntilMs > 0
	}
	limits := make(map[[2]string]int)
	for _, p := range in.Pipelines {
		for _, s := range p.Spec.Stages {
			if s.Type == commandpb.StageType_STAGE_TYPE_SOURCE {
				limits[[2]string{p.Spec.Id, s.Id}] = int(max(1, s.Parallelism))
			}
		}
	}
	owners := make(map[[2]string][]string)
	own := func(pipeline, stage, sidecar string) {
		if lives[sidecar] {
			k := [2]string{pipeline, stage}
			owners[k] = append(owners[k], sidecar)
		}
	}
	for _, a := range in.Assignments {
		for _, s := range a.Stages {
			if !a.Revoked && s.RemoteSidecarId == "" {
				own(a.PipelineId, s.StageId, a.SidecarId)
			}
		}
	}
	for _, h := range in.Handovers {
		for _, s := range h.Releases {
			if !s.Shared {
				own(h.PipelineId, s.StageId, h.SidecarId)
			}
		}
	}
	for k, by := range owners {
		slices.Sort(by)
		if n := limits[k]; n > 0 && len(by) > max(n, r.most[k]) {
			r.t.Errorf("seed %d: at revision %d %v has the owners %v, %d may be", seed, v.Revision(), k, by, n)
		}
	}
	// A pipeline that asks for fewer than before has more until it is planned; a
	// sidecar that comes back may be one too many, fenced, until it is told.
	r.most = make(map[[2]string]int)
	for k, by := range owners {
		r.most[k] = len(by)
	}
}
