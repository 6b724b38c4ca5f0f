package control

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// beforeAPlan lets fn happen right before the next plan is replicated.
func (r *replica) beforeAPlan(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	plans := r.plans
	var hook func()
	hook = func() {
		r.mu.Lock()
		if r.plans == plans {
			r.before = hook // something else was submitted
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		fn()
	}
	r.before = hook
}

// owners follows who runs a stage, revision by revision, until the returned
// function is called; that returns what it has seen.
func (r *replica) owners(pipeline, stage string) func() [][]string {
	sub, err := r.fsm.Hub().Subscribe(r.fsm.Revision(), router.TableAssignments)
	if err != nil {
		r.t.Fatal(err)
	}
	return func() [][]string {
		defer sub.Close()
		on := map[string]bool{}
		var out [][]string
		now, cancel := context.WithCancel(context.Background())
		cancel()
		for {
			changes, _, err := sub.Next(now)
			if err != nil {
				return out
			}
			for i, c := range changes {
				a, _ := c.Next.(*commandpb.Assignment)
				if a.GetPipelineId() == pipeline {
					on[a.SidecarId] = slices.ContainsFunc(a.Stages, func(s *commandpb.StageAssignment) bool {
						return s.StageId == stage && s.RemoteSidecarId == ""
					})
				}
				if i+1 < len(changes) && changes[i+1].Revision == c.Revision {
					continue
				}
				var by []string
				for id, runs := range on {
					if runs {
						by = append(by, id)
					}
				}
				slices.Sort(by)
				out = append(out, by)
			}
		}
	}
}

// TestPodBackWhileItsStageMoves: a pod registers anew at the moment at which its
// stage is given to another one. Goal: at no revision do both have it. The plan was
// made for a registration that is not in force any more, so what it takes from the
// one is void; then what it gives to the other has to be, too.
func TestPodBackWhileItsStageMoves(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source -> lake:sink")
	seen := r.owners("p", "orders")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 20*time.Second, "a", "k")
		r.register("b", "orders:source")
		r.beforeAPlan(func() {
			s := newModel().putSidecar("a", "orders:source")
			s.Endpoint = "elsewhere:1"
			r.do(&commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: s}}})
		})
		beat(l, 60*time.Second, "b", "k")
		if got := r.state("a"); got != "alive" && got != "suspect" {
			t.Fatalf("a is %s", got)
		}
		for _, by := range seen() {
			if len(by) > 1 {
				t.Errorf("at one revision the source runs on %v", by)
			}
		}
	})
}

// TestPlanOfAnEarlierTerm: what the placement of a leader decided does nothing when
// it reaches the log of the one that took its place: that one has made plans of its
// own since, of which the earlier one knew nothing.
func TestPlanOfAnEarlierTerm(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("k", "lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		pass(time.Second)
		r.beforeAPlan(func() { // another node leads, and is not noticed yet
			r.mu.Lock()
			defer r.mu.Unlock()
			r.lead.Term++
		})
		r.putPipeline("p", "orders:source -> lake:sink")
		pass(100 * time.Millisecond)
		synctest.Wait()
		if got := r.table(); got != "nothing is assigned\n" {
			t.Fatalf("a plan of an earlier term was carried out:\n%s", got)
		}
		r.setLeading(true)
		pass(time.Second)
		synctest.Wait()
		if got := r.table(); !contains(got, "p a: orders=127.0.0.1:9001 lake@k") {
			t.Fatalf("the next leader made no plan:\n%s", got)
		}
	})
}

// owned fails when a stage has another owner than want, counting who has yet to let
// go of it.
func (r *replica) owned(what, pipeline, stage, want string) {
	r.t.Helper()
	synctest.Wait()
	by := strings.Fields(r.runs(pipeline, stage))
	for _, h := range r.handovers() {
		if h.PipelineId == pipeline && slices.ContainsFunc(h.Releases, func(s *commandpb.Release) bool { return s.StageId == stage && !s.Shared }) {
			by = append(by, h.SidecarId)
		}
	}
	slices.Sort(by)
	if got := strings.Join(by, " "); got != want {
		r.t.Fatalf("%s: %s is owned by %q, want %q\n%s", what, stage, got, want, r.table())
	}
}

// TestSidecarAliveAgainWhileItsSourceMoves: a sidecar is heard of again, with the
// registration it had, between the plan that gives its source to another one and its
// execution. It was expired when that was planned, so the plan does not mean to wait
// for it. Goal: at no revision does a source have two owners.
func TestSidecarAliveAgainWhileItsSourceMoves(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source -> lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 20*time.Second, "a", "k")
		r.register("b", "orders:source")
		back := false
		r.beforeAPlan(func() {
			if got := r.state("a"); got != "expired" {
				t.Errorf("a is %s when its stage moves", got)
			}
			r.do(&commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
				SidecarId: "a", ExpectedGeneration: 1, State: commandpb.SidecarState_SIDECAR_STATE_ALIVE,
			}}})
			back = true
		})
		r.check = func() { r.oneOwnerEach(0) }
		for i := 0; i < 120 && !back; i++ {
			beat(l, time.Second, "b", "k")
			synctest.Wait()
		}
		if !back {
			t.Fatal("the stage of a has not moved")
		}
		beat(l, 2*time.Second, "a", "b", "k")
		r.owned("a is alive again", "p", "orders", "a")
	})
}

// TestSourceTakenOutAndPutBack: a source is taken out of a pipeline and put back
// before the one that ran it has confirmed that it does not any more. It still has a
// table of the pipeline, for another source. Goal: nobody else begins until then.
func TestSourceTakenOutAndPutBack(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source", "bills:source")
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source -> lake:sink\nbills:source -> lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "k"}
		r.setLeading(true)
		beat(l, 2*time.Second, "a", "k")
		r.register("b", "orders:source")
		beat(l, 2*time.Second, all...)
		r.putPipeline("p", "bills:source -> lake:sink")
		beat(l, time.Second, all...)
		r.expect("after the first change", "p", "bills", "a")
		r.owned("taken out", "p", "orders", "a")
		// a cannot have it back: it has no such service any more.
		r.register("a", "bills:source")
		r.putPipeline("p", "bills:source -> lake:sink\norders:source -> lake:sink")
		beat(l, time.Second, all...)
		r.owned("put back", "p", "orders", "a")
		r.applied("a")
		beat(l, time.Second, all...)
		r.owned("once a has confirmed", "p", "orders", "b")
	})
}
