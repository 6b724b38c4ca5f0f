package raftnode

import (
	"fmt"
	"testing"
)

// A single node elects itself, packs waiting commands into one entry, answers
// in order and reads what it acknowledged.
func TestSingleNodeInline(t *testing.T) {
	h := newHarness(t, 1, nil, 1)
	h.campaign()
	h.settle()
	if !h.Leadership().Leading {
		t.Fatal("not leading")
	}
	first := h.propose("a")
	h.turn(false) // proposed, in flight
	var rest []*asked
	for i := range 10 {
		rest = append(rest, h.propose(fmt.Sprint(i)))
	}
	h.turn(false)
	if n := h.props.n.Load(); n != 1 {
		t.Fatalf("%d batches in flight, want 1", n)
	}
	h.settle()
	first.mustBe(t, true, nil)
	for i, a := range rest {
		a.mustBe(t, true, nil)
		if a.res.Index != first.res.Index+1 || a.res.Value != i+2 {
			t.Fatalf("command %d: %+v", i, a.res)
		}
	}
	c := h.read()
	h.settle()
	o, ok := c.poll()
	if !ok || o.err != nil || o.res.Index < rest[9].res.Index {
		t.Fatalf("read: %+v %v", o, ok)
	}
	if w, b := h.inbox.gauges(); w != 0 || b != 0 {
		t.Fatalf("admission not released: %d, %d bytes", w, b)
	}
	// A crash loses nothing that was acknowledged.
	h.crash(0)
	h.campaign()
	c = h.read()
	h.settle()
	if o, ok := c.poll(); !ok || o.err != nil || len(h.sm.commands()) != 11 {
		t.Fatalf("after a crash: read %+v %v, %d commands", o, ok, len(h.sm.commands()))
	}
}

// Three nodes replicate, and another leader takes over.
func TestThreeNodesInline(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	a := h.propose("x")
	g.settle()
	a.mustBe(t, true, nil)
	g.tick()
	h2 := g.elect(2)
	b := h2.propose("y")
	g.settle()
	b.mustBe(t, true, nil)
	for range 10 {
		g.tick()
	}
	for _, id := range g.ids() {
		if got := fmt.Sprint(g.nodes[id].sm.commands()); got != "[x y]" {
			t.Fatalf("node %d applied %s", id, got)
		}
	}
	// A follower reads through the leader.
	c := g.nodes[3].read()
	g.settle()
	if o, ok := c.poll(); !ok || o.err != nil || o.res.Index < b.res.Index {
		t.Fatalf("read on a follower: %+v %v", o, ok)
	}
}
