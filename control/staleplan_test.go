package control

import (
	"context"
	"slices"
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
