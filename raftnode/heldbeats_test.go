package raftnode

import (
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// questions counts the heartbeats that ask a node whether it still follows, by whom
// they are for. What drop says of them is still done.
func (g *group) questions() map[uint64]int {
	n := map[uint64]int{}
	drop := g.drop
	g.drop = func(m *raftpb.Message) bool {
		if m.GetType() == raftpb.MsgHeartbeat && len(m.GetContext()) > 0 {
			n[m.GetTo()]++
		}
		return drop != nil && drop(m)
	}
	return n
}

// crowd makes n rounds of reads at h, one after the other within a tick, which must
// all be answered, and a tick follows.
func (g *group) crowd(h *harness, n int) {
	h.t.Helper()
	for range n {
		c := h.read()
		g.settle()
		h.mustRead(c, 0)
	}
	g.tick()
}

// With many reads the leader asks as many followers as it needs. The others hear of
// it every tick, so that none of them thinks that it is gone.
func TestCrowdedRoundsAskFewFollowers(t *testing.T) {
	for _, size := range []uint64{3, 5} {
		ids := []uint64{1, 2, 3, 4, 5}[:size]
		g := newGroup(t, nil, ids...)
		h := g.elect(1)
		g.tick()
		g.crowd(h, 10) // it learns who is swift
		asked := g.questions()
		const ticks, each = 100, 10
		for range ticks {
			g.crowd(h, each)
		}
		often := 0
		for _, id := range ids[1:] {
			switch n := asked[id]; {
			case n >= ticks*each:
				often++
			case n > 2*ticks || n < ticks/2:
				t.Errorf("of %d nodes, number %d was asked %d times in %d ticks of %d rounds", size, id, n, ticks, each)
			}
		}
		if often != int(size/2) {
			t.Errorf("of %d nodes %d are asked every time: %v", size, often, asked)
		}
		if !h.loop.leading() || h.loop.term != g.nodes[2].loop.term {
			t.Errorf("of %d nodes another one leads now", size)
		}
	}
}

// A read now and then asks everybody.
func TestSparseReadsAskAll(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.crowd(h, 10)
	g.tick()
	asked := g.questions()
	for range 20 {
		g.crowd(h, 1)
	}
	if asked[2] != 20 || asked[3] != 20 {
		t.Errorf("20 reads asked %v", asked)
	}
}

// When who is asked falls silent, its part is another's after a tick.
func TestCrowdedRoundsOutliveTheAskedFollower(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	g.crowd(h, 10)
	if len(h.loop.beats.swift) != 1 {
		t.Fatalf("%v are asked", h.loop.beats.swift)
	}
	gone := h.loop.beats.swift[0]
	g.drop = func(m *raftpb.Message) bool { return m.GetTo() == gone || m.GetFrom() == gone }
	c := h.read()
	g.settle()
	if _, ok := c.poll(); ok {
		t.Fatal("nobody was asked, and the read was answered")
	}
	g.tick()
	h.mustRead(c, 0)
	g.crowd(h, 10) // all of them without a tick
}

// A change of members in the middle of a round: whether the one asked is removed, or does
// not answer, the others are asked with the next tick.
func TestCrowdedReadOutlivesAChangeOfMembers(t *testing.T) {
	for name, change := range map[string]func(swift uint64) Change{
		"removed": func(swift uint64) Change { return Change{Kind: Remove, ID: swift} },
		"another": func(uint64) Change { return Change{Kind: AddLearner, ID: 9, Addr: "x:1"} },
	} {
		for _, size := range []uint64{3, 5} {
			g := newGroup(t, nil, []uint64{1, 2, 3, 4, 5}[:size]...)
			h := g.elect(1)
			g.tick()
			g.crowd(h, 10)
			gone := h.loop.beats.swift[0]
			cl := h.change(change(gone))
			g.drop = func(m *raftpb.Message) bool {
				return m.GetType() == raftpb.MsgHeartbeat && m.GetTo() == gone && len(m.GetContext()) > 0
			}
			c := h.read()
			g.settle()
			if o, ok := cl.poll(); !ok || o.err != nil {
				t.Fatalf("%s, %d nodes: %v %v", name, size, ok, o.err)
			}
			g.tick()
			h.mustRead(c, 0)
		}
	}
}

// What a follower said in an earlier term makes it none to ask.
func TestCrowdedReadsIgnoreOldAnswers(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	g.crowd(h, 10)
	swift := h.loop.beats.swift[0]
	other := 2 + 3 - swift
	var question *raftpb.Message
	g.drop = func(m *raftpb.Message) bool {
		if m.GetType() == raftpb.MsgHeartbeat && m.GetTo() == swift && len(m.GetContext()) > 0 {
			question = m
		}
		return question != nil
	}
	h.read()
	g.settle()
	h.step(&raftpb.Message{Type: raftpb.MsgHeartbeatResp.Enum(), From: &other, To: &h.id, Term: new(h.loop.term - 1), Context: question.GetContext()})
	g.settle()
	if now := h.loop.beats.swift; len(now) != 1 || now[0] != swift {
		t.Errorf("%v is asked instead of %d, by an answer of an earlier term", now, swift)
	}
}

// A change of members, or of the leader, begins anew: who is asked may not count any
// more.
func TestCrowdedRoundsFollowTheMembership(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	g.crowd(h, 10)
	gone := h.loop.beats.swift[0]
	g.mustChange(h, Change{Kind: Remove, ID: gone})
	c := h.read()
	g.settle()
	h.mustRead(c, 0)
	g.crowd(h, 10)

	other := g.nodes[2+3-gone]
	g.elect(other.cfg.ID)
	if b := &h.loop.beats; len(b.swift)+len(b.msgs) != 0 {
		t.Errorf("a node that leads no more keeps %+v", b)
	}
	g.tick()
	g.crowd(other, 10)
	g.crowd(h, 3) // through the new leader
}
