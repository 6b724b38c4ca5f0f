package placement

import (
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// settle plans and carries out until nothing is left to do.
func (m *model) settle() {
	m.carryOut(m.engine.Plan())
	m.engine.Plan()
}

// TestRebalanceHolds: voluntary moves keep within their budget, leave tables that are
// sound, take no edge out of its pod, place no less, never raise the highest load and come to
// an end, and no plan takes them back. What is not carried out is forgotten.
func TestRebalanceHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		m.settle()
		for range rapid.IntRange(1, 4).Draw(t, "events") {
			disturb(t, m, true)
			m.settle()
		}
		most := rapid.IntRange(1, 8).Draw(t, "budget")
		before := m.engine.Measure()
		for turn, empty := 0, 0; ; turn++ {
			if turn == 100 {
				t.Fatalf("moves come to no end")
			}
			p := m.engine.Rebalance(most)
			other := NewEngine(m.shuffled(rapid.Uint64().Draw(t, "shuffle")))
			other.Plan()
			afresh := NewEngine(m.view())
			afresh.Plan()
			if a, b := afresh.Rebalance(most), other.Rebalance(most); !reflect.DeepEqual(a, b) {
				t.Fatalf("the order of the view changes the moves:\n%+v\n%+v", a, b)
			}
			moves := 0
			for _, s := range p.Steps {
				moves += s.Moves
				if s.Urgency != Balance || s.Moves == 0 {
					t.Fatalf("a step of %d moves is to %s", s.Moves, s.Urgency)
				}
			}
			if moves > most || moves != p.Quality.Moves {
				t.Fatalf("%d moves, counted as %d, at most %d are allowed", moves, p.Quality.Moves, most)
			}
			if rapid.IntRange(0, 3).Draw(t, "forget") == 0 {
				if more := m.engine.Plan(); len(more.Steps) > 0 {
					t.Fatalf("moves that were not made are planned: %+v", more.Steps)
				}
				continue
			}
			m.carryOut(p)
			m.check(t)
			if more := m.engine.Plan(); len(more.Steps) > 0 {
				t.Fatalf("a plan changes what was moved: %+v", more.Steps)
			}
			if more := Compute(m.view()); len(more.Steps) > 0 {
				t.Fatalf("a plan of the whole view changes what was moved: %+v", more.Steps)
			}
			q := m.engine.Measure()
			if q.Placed < before.Placed || q.InPod < before.InPod || q.Highest > before.Highest {
				t.Fatalf("moved from %+v to %+v", before, q)
			}
			before = q
			if empty++; len(p.Steps) > 0 {
				empty = 0
			} else if empty == 2 {
				return
			}
		}
	})
}

// TestRebalanceAfterGrowth: a fleet that has doubled uses its new half, whole pods
// at a time, until no sidecar has more than a stage above the mean, in hardly more moves than half of what there is.
func TestRebalanceAfterGrowth(t *testing.T) {
	v := bigView(fleetSize{sidecars: 1200, pipelines: 120, parallelism: 10})
	grown := v.Sidecars
	v.Sidecars = grown[:600]
	carryOut(&v, Compute(v))
	v.Sidecars = grown
	e := NewEngine(v)
	e.Plan()
	before := e.Measure()
	total := 0
	for empty := 0; empty < 10; {
		p := e.Rebalance(100)
		if empty++; len(p.Steps) > 0 {
			empty = 0
		}
		total += p.Quality.Moves
		for _, a := range decided(p) {
			e.PutAssignment(a)
		}
		if more := e.Plan(); len(more.Steps) > 0 {
			t.Fatalf("a plan changes what was moved: %+v", more.Steps[0])
		}
	}
	after := e.Measure()
	t.Logf("%d of %d instances moved; before %+v, after %+v", total, after.Placed, before, after)
	if after.Highest > after.Mean+1 || after.InPod < before.InPod || total > after.Placed*52/100 {
		t.Fatalf("%d of %d instances moved, the highest load by the mean was %.2f and is %.2f", total, after.Placed, before.MaxOverMean(), after.MaxOverMean())
	}
}
