package placement

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// heldTables plays sidecars that may hold a table for some plans after it was
// replaced.
type heldTables struct {
	m      *model
	round  int
	tables map[[2]string][]heldTable // pipeline, sidecar
}

type heldTable struct {
	a     *Assignment
	until int // round
}

// plan makes a plan and carries out what of it may be told now. It returns how many
// changes there were, told or not.
func (h *heldTables) plan(t fataler) (changes int) {
	h.round++
	for k, tables := range h.tables {
		h.tables[k] = slices.DeleteFunc(tables, func(x heldTable) bool { return x.until <= h.round })
	}
	for _, st := range h.m.engine.Plan().Steps {
		changes += len(st.Changes)
		now, later, by := h.m.engine.Postpone(st, h.older(st.Pipeline))
		h.waitsFor(t, st, now, by)
		if later == 0 != !h.m.engine.goesRound(st, h.m.engine.pipeID[st.Pipeline], h.older(st.Pipeline)) {
			t.Fatalf("%d changes are put off, and all tables together say otherwise", later)
		}
		if len(now.Changes)+later != len(st.Changes) {
			t.Fatalf("of %d changes %d are told and %d put off", len(st.Changes), len(now.Changes), later)
		}
		for i := range now.Changes {
			if a := h.m.engine.Recorded(st.Pipeline, now.Changes[i].Sidecar); a != nil {
				k := [2]string{st.Pipeline, a.Sidecar}
				h.tables[k] = append(h.tables[k], heldTable{a, h.round + 2})
			}
		}
		h.m.carryOut(Plan{Steps: []Step{now}})
		if way := h.circle(st.Pipeline); way != nil {
			t.Fatalf("records of %s may go round: %v\n%+v", st.Pipeline, way, now)
		}
	}
	return changes
}

// waitsFor fails when changes are put off for a sidecar that need not hear of anything:
// it neither holds an older table nor is told to replace one.
func (h *heldTables) waitsFor(t fataler, st, now Step, by []string) {
	if len(by) == 0 && len(now.Changes) < len(st.Changes) {
		t.Fatalf("changes are put off for nobody: %+v", st)
	}
	for _, id := range by {
		_, told := now.change(id)
		if !told && len(h.older(st.Pipeline)(id)) == 0 || told && len(h.older(st.Pipeline)(id)) == 0 && h.m.engine.Recorded(st.Pipeline, id) == nil {
			t.Fatalf("changes are put off for %s, which has nothing to hear of", id)
		}
	}
}

func (h *heldTables) older(pipeline string) func(string) []*Assignment {
	return func(sidecar string) (out []*Assignment) {
		for _, x := range h.tables[[2]string{pipeline, sidecar}] {
			out = append(out, x.a)
		}
		return out
	}
}

// circle finds a way round along any tables that sidecars may hold.
func (h *heldTables) circle(pipeline string) []string {
	any := newModel()
	add := func(k [2]string, a *Assignment) {
		if any.assignments[k] == nil {
			any.assignments[k] = &Assignment{Pipeline: k[0], Sidecar: k[1]}
		}
		any.assignments[k].Stages = append(any.assignments[k].Stages, a.Stages...)
	}
	for k, a := range h.m.assignments {
		if !a.Revoked {
			add(k, a)
		}
	}
	for k, tables := range h.tables {
		for _, x := range tables {
			add(k, x.a)
		}
	}
	return any.circle(pipeline)
}

// TestPostpone: whatever happens to a cluster, records go round by no combination of
// tables that its sidecars may hold, and once nothing happens any more everything that
// was put off is told.
func TestPostpone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := &heldTables{m: drawModel(t, true), tables: make(map[[2]string][]heldTable)}
		for range rapid.IntRange(1, 6).Draw(t, "events") {
			for range rapid.IntRange(1, 3).Draw(t, "plans") {
				h.plan(t)
			}
			disturb(t, h.m, true)
		}
		for n := 0; h.plan(t) > 0; n++ {
			if n == 30 {
				t.Fatalf("it does not come to an end")
			}
		}
		h.m.check(t)
	})
}

// TestPostponeTurnsRound: the example of Postpone.
func TestPostponeTurnsRound(t *testing.T) {
	m := newModel()
	m.putSidecar(&Sidecar{ID: "a", Endpoint: "a:1", Generation: 1, Offers: parseOffers(t, []string{"here:source", "near:sink"})})
	m.putSidecar(&Sidecar{ID: "b", Endpoint: "b:1", Generation: 1, Offers: parseOffers(t, []string{"there:source", "far:sink"})})
	m.putPipeline(parsePipeline(t, "p", "here:source -> far:sink"))
	h := &heldTables{m: m, tables: make(map[[2]string][]heldTable)}
	h.plan(t)
	m.putPipeline(parsePipeline(t, "p", "there:source -> near:sink"))
	for _, st := range m.engine.Plan().Steps {
		if _, _, by := m.engine.Postpone(st, h.older("p")); !slices.Equal(by, []string{"a"}) {
			t.Fatalf("it waits for %v, and not for a", by)
		}
	}
	h.plan(t)
	if r := m.runs("p"); len(r["near"]) != 1 || len(r["there"]) != 0 {
		t.Fatalf("told at once is %v", r)
	}
	h.plan(t)
	h.plan(t)
	if r := m.runs("p"); len(r["there"]) != 1 {
		t.Fatalf("told in the end is %v", r)
	}
}
