package control

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
)

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
			r := newReplica(t, router.Options{})
			r.balance = 30 * time.Second
			all := []string{"orders:source", "clean:transform", "lake:sink"}
			r.register("a", all...)
			for i := range 6 {
				r.putPipeline(fmt.Sprint("p", i), threeStages)
			}
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

// TestEvensAsAWholeOrNotAtAll: what runs well is not moved when a part of the move would
// have to wait for tables to be forgotten.
func TestEvensAsAWholeOrNotAtAll(t *testing.T) {
	p := NewPlacer(PlacerConfig{MovesPerMinute: 4})
	now := time.Now()
	p.budget = newBudget(4, now)
	st := placement.Step{Urgency: placement.Even, Moves: 3}
	if p.evens(st, Held{Later: 1}, now) {
		t.Error("a part waits")
	}
	if !p.evens(st, Held{}, now) {
		t.Error("nothing is in its way, and what was not moved costs nothing")
	}
	if p.evens(st, Held{}, now) {
		t.Error("beyond the budget")
	}
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
