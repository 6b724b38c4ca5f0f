package control

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"conveyor.etl/router/router"
)

// sixOnOne is a state in which a runs all of six pipelines, and load is evened every 30 s.
// all is what it takes to run them.
func sixOnOne(t *testing.T) (r *replica, all []string) {
	t.Helper()
	r, all = newReplica(t, router.Options{}), []string{"orders:source", "clean:transform", "lake:sink"}
	r.balance = 30 * time.Second
	r.register("a", all...)
	for i := range 6 {
		r.putPipeline(fmt.Sprint("p", i), threeStages)
	}
	return r, all
}

// share counts the pipelines of which a sidecar runs the source.
func (r *replica) share(pipelines int, sidecar string) (n int) {
	for i := range pipelines {
		if r.runs(fmt.Sprint("p", i), "orders") == sidecar {
			n++
		}
	}
	return n
}

// TestNewcomerGetsItsShare: a sidecar that joins is given its share of what runs well
// elsewhere, each source once the other one has let go of it, to whom it was meant for
// although the leader changes meanwhile; and then all comes to rest.
func TestNewcomerGetsItsShare(t *testing.T) {
	for _, changes := range []bool{false, true} {
		t.Run(fmt.Sprint("leader changes ", changes), func(t *testing.T) {
			r, all := sixOnOne(t)
			r.inBubble(func(t *testing.T, l *Liveness) {
				r.setLeading(true)
				beat(l, time.Minute, "a")
				r.applied("a")
				r.register("b", all...)
				beat(l, 20*time.Second, "a", "b")
				if n := r.share(6, "a"); n != 6 {
					t.Fatalf("a has %d pipelines before the load is evened", n)
				}
				beat(l, 15*time.Second, "a", "b")
				if a, b, waits := r.share(6, "a"), r.share(6, "b"), len(r.handovers()); a != 3 || b != 0 || waits != 3 {
					t.Fatalf("a has %d pipelines and b %d before a has let go; %d handovers", a, b, waits)
				}
				if changes {
					r.setLeading(false)
					pass(time.Second)
					r.setLeading(true)
					beat(l, time.Second, "a", "b")
				}
				r.applied("a")
				beat(l, time.Second, "a", "b")
				if a, b := r.share(6, "a"), r.share(6, "b"); a != 3 || b != 3 {
					t.Fatalf("a has %d pipelines and b %d", a, b)
				}
				plans := r.planned()
				beat(l, 10*time.Minute, "a", "b")
				if r.planned() != plans || len(r.handovers()) > 0 {
					t.Fatalf("it does not come to rest: %d plans more", r.planned()-plans)
				}
				if s, _ := r.placer.Scores(); !changes && s.Evened != 9 {
					t.Fatalf("%d stages were moved for balance, 9 would do", s.Evened)
				}
			})
		})
	}
}

// TestBalanceKeepsToTheBudget: a step that is larger than the budget is carried out when
// that is full, and no other before it is full again.
func TestBalanceKeepsToTheBudget(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.balance, r.budget = 10*time.Second, 2
	all := []string{"orders:source", "clean:transform", "lake:sink"}
	r.register("a", all...)
	for i := range 8 {
		r.putPipeline(fmt.Sprint("p", i), threeStages)
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 5*time.Second, "a")
		r.register("b", all...)
		for minute := range 5 {
			for range 6 {
				beat(l, 10*time.Second, "a", "b")
				r.applied("a")
			}
			beat(l, time.Second, "a", "b")
			if b := r.share(8, "b"); b > minute+1 || b < min(4, minute*2/3) {
				t.Fatalf("b has %d pipelines after %d minutes", b, minute+1)
			}
		}
		beat(l, 5*time.Minute, "a", "b")
		r.applied("a")
		beat(l, time.Minute, "a", "b")
		if b := r.share(8, "b"); b != 4 {
			t.Fatalf("b has %d pipelines in the end", b)
		}
	})
}

// TestBudgetSaysWhen: whoever is refused a move is told a time, and has it after that,
// however often the budget was looked at meanwhile.
func TestBudgetSaysWhen(t *testing.T) {
	const seed = 5
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 10_000 {
		now := time.Unix(1_000_000, 0)
		b := newBudget(1+rnd.IntN(700), now)
		for b.take(1, now) {
		}
		for range rnd.IntN(6) {
			now = now.Add(time.Duration(rnd.Int64N(int64(time.Second) / int64(b.perMinute))))
			b.room(now)
		}
		if b.take(1, now) {
			continue
		}
		wait := b.wait(1)
		if wait <= 0 || !b.take(1, now.Add(wait)) {
			t.Fatalf("%d a minute, %.20f left: told to wait %v", b.perMinute, b.left, wait)
		}
	}
}

// TestFlappingSidecarDrawsNothing: a sidecar that comes and goes is not given a share each
// time it is back; one that has stayed for long enough is.
func TestFlappingSidecarDrawsNothing(t *testing.T) {
	r, all := sixOnOne(t)
	r.inBubble(func(t *testing.T, l *Liveness) {
		turn := func(d time.Duration, ids ...string) {
			for end := time.Now().Add(d); time.Now().Before(end); {
				beat(l, 10*time.Second, ids...)
				for _, id := range ids {
					r.applied(id)
				}
			}
		}
		r.setLeading(true)
		turn(time.Minute, "a")
		r.register("b", all...)
		turn(time.Minute, "a", "b")
		if n := r.share(6, "b"); n != 3 {
			t.Fatalf("b has %d pipelines as it is new", n)
		}
		for range 4 {
			turn(3*time.Minute, "a")
			if n := r.share(6, "a"); n != 6 {
				t.Fatalf("a has %d pipelines while b is gone", n)
			}
			turn(2*time.Minute, "a", "b")
			if n := r.share(6, "b"); n != 0 {
				t.Fatalf("b is back for a while and draws %d pipelines", n)
			}
		}
		turn(12*time.Minute, "a", "b")
		if n := r.share(6, "b"); n != 3 {
			t.Fatalf("b has %d pipelines after it has stayed", n)
		}
	})
}

// TestBalanceIsLast: what moves for the sake of a pipeline's edges and waits for the
// budget is not kept waiting by what could be evened.
func TestBalanceIsLast(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.balance, r.budget = 10*time.Second, 1
	r.register("a", "orders:source", "lake:sink", "odd:sink")
	r.register("b", "clean:transform")
	for _, id := range []string{"p", "q"} {
		r.putPipeline(id, "orders:source -> clean:transform\norders -> lake:sink")
	}
	for i := range 12 {
		r.putPipeline(fmt.Sprint("odd", i), "odd:sink")
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "c", "d"}
		r.setLeading(true)
		beat(l, 2*time.Second, "a", "b")
		r.register("c", "lake:sink")
		r.register("d", "odd:sink")
		beat(l, time.Minute, all...)
		r.putPipeline("p", threeStages)
		r.putPipeline("q", threeStages)
		beat(l, 130*time.Second, all...)
		r.expect("in time", "p", "lake", "c")
		r.expect("in time", "q", "lake", "c")
	})
}

// TestBalanceLeavesHandoversAlone: nothing more of a pipeline moves while one has yet to
// let go of a part of it.
func TestBalanceLeavesHandoversAlone(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.balance = 5 * time.Second
	r.register("a", "orders:source")
	r.register("c", "lake:sink")
	for i := range 4 {
		r.putPipeline(fmt.Sprint("p", i), "orders:source -> lake:sink")
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 2*time.Second, "a", "c")
		r.register("b", "orders:source")
		beat(l, 6*time.Second, "a", "b", "c")
		moving := make(map[string]bool)
		for _, h := range r.handovers() {
			moving[h.PipelineId] = true
		}
		if len(moving) != 2 {
			t.Fatalf("a has to let go of sources of %d pipelines, want 2", len(moving))
		}
		r.register("d", "lake:sink") // the sinks could be evened, too
		beat(l, 10*time.Second, "a", "b", "c", "d")
		for i := range 4 {
			id := fmt.Sprint("p", i)
			if on := r.runs(id, "lake"); moving[id] && on != "c" {
				t.Errorf("the sink of %s moves to %q while its source is being handed over", id, on)
			}
		}
		r.applied("a")
		r.applied("c")
		beat(l, 10*time.Second, "a", "b", "c", "d")
		r.applied("c")
		beat(l, 10*time.Second, "a", "b", "c", "d")
		sinks := 0
		for i := range 4 {
			if r.runs(fmt.Sprint("p", i), "lake") == "d" {
				sinks++
			}
		}
		if sinks != 2 {
			t.Errorf("d has %d sinks in the end", sinks)
		}
	})
}

// TestStaleMoveIsMadeAgain: a move that the state has overtaken is not counted, and comes
// with the next look.
func TestStaleMoveIsMadeAgain(t *testing.T) {
	r, all := sixOnOne(t)
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, time.Minute, "a")
		r.applied("a")
		r.register("b", all...)
		beat(l, 20*time.Second, "a", "b")
		r.beforeAPlan(func() { r.register("b", append(all, "odd:sink")...) })
		beat(l, 15*time.Second, "a", "b")
		if s, _ := r.placer.Scores(); s.Evened != 0 || r.share(6, "a") != 6 {
			t.Errorf("%d stages count as moved, a has %d pipelines", s.Evened, r.share(6, "a"))
		}
		beat(l, 30*time.Second, "a", "b")
		r.applied("a")
		beat(l, time.Second, "a", "b")
		if s, _ := r.placer.Scores(); s.Evened != 9 || r.share(6, "b") != 3 {
			t.Errorf("%d stages count as moved, b has %d pipelines", s.Evened, r.share(6, "b"))
		}
	})
}
