package placement

import (
	"fmt"
	"testing"
)

// sizes counts what is known by name: names, wants, nodes and zones.
func (e *Engine) sizes() [4]int {
	return [4]int{len(e.nameID), len(e.wantID), len(e.nodeID), len(e.zoneID)}
}

// slots counts what there is room for, in use or not.
func (e *Engine) slots() [7]int {
	return [7]int{len(e.names), len(e.wants), len(e.nodes), len(e.zones), len(e.profiles), len(e.pipes), len(e.hosts)}
}

// TestChurnLeavesNothing: services, labels, nodes, zones, sidecars and pipelines
// that come and go under ever new names take no more room than those there are at
// a time.
func TestChurnLeavesNothing(t *testing.T) {
	m := newModel()
	m.putSidecar(&Sidecar{ID: "stays", Endpoint: "stays:1", Generation: 1, Zone: "home", Node: "n", Offers: parseOffers(t, []string{"orders:source", "lake:sink"})})
	m.putPipeline(parsePipeline(t, "stays", "orders:source -> lake:sink"))
	m.carryOut(m.engine.Plan())
	before := m.engine.sizes()
	var slots [7]int
	for round := range 200 {
		// A release: new names, on new nodes; the one before goes afterwards.
		service := func(r int) string { return fmt.Sprintf("clean-v%d", r) }
		id := func(r, i int) string { return fmt.Sprintf("pod-%d-%d", r, i) }
		for i := range 3 {
			m.putSidecar(&Sidecar{
				ID: id(round, i), Endpoint: "x:1", Generation: 1, Zone: fmt.Sprintf("zone-%d", round), Node: fmt.Sprintf("node-%d-%d", round, i),
				Offers: parseOffers(t, []string{"orders:source", service(round) + ":transform@release=" + fmt.Sprint(round), "lake:sink"}),
			})
		}
		p := parsePipeline(t, "rolls", fmt.Sprintf("orders:source -> clean=%s:transform*2 -> odd=unknown-%d:transform -> lake:sink", service(round), round))
		p.Stages[1].Labels = map[string]string{"release": fmt.Sprint(round)}
		m.putPipeline(p)
		m.carryOut(m.engine.Plan())
		m.check(t)
		if round > 0 {
			for i := range 3 {
				m.removeSidecar(id(round-1, i))
			}
		}
		m.putPipeline(parsePipeline(t, fmt.Sprintf("once-%d", round), "orders:source -> lake:sink"))
		m.carryOut(m.engine.Plan())
		m.removePipeline(fmt.Sprintf("once-%d", round))
		m.carryOut(m.engine.Plan())
		for k, a := range m.assignments { // the state machine forgets them after a while
			if a.Revoked {
				delete(m.assignments, k)
				m.engine.RemoveAssignment(a.Sidecar, a.Pipeline)
			}
		}
		m.carryOut(m.engine.Plan())
		switch {
		case round == 10:
			slots = m.engine.slots()
		case round > 10 && m.engine.slots() != slots:
			t.Fatalf("round %d: room for %v names, wants, nodes, zones, profiles, pipelines and sidecars, it was %v", round, m.engine.slots(), slots)
		}
		if round == 199 {
			for i := range 3 {
				m.removeSidecar(id(round, i))
			}
		}
	}
	m.removePipeline("rolls")
	m.carryOut(m.engine.Plan())
	if after := m.engine.sizes(); after != before {
		t.Fatalf("%v names, wants, nodes and zones are left of %v", after, before)
	}
	if more := Compute(m.view()); len(more.Steps) > 0 {
		t.Fatalf("a plan of the whole view changes more: %+v", more)
	}
}
