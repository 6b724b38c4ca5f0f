package raftnode

import (
	"errors"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

func (h *harness) mustRead(c *call, min uint64) {
	h.t.Helper()
	o, ok := c.poll()
	if !ok || o.err != nil || o.res.Index < min {
		h.t.Fatalf("read: %v %+v, want an index of at least %d", ok, o, min)
	}
	if h.Applied() < o.res.Index {
		h.t.Fatalf("read at %d was released with %d applied", o.res.Index, h.Applied())
	}
}

// One request is in flight for all that wait; who comes later waits for the
// next, because the index may be older than the call.
func TestReadsShareOneRequest(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	asks := func() (n int) {
		for _, m := range g.nodes[2].tr.out {
			if m.GetType() == raftpb.MsgReadIndex {
				n++
			}
		}
		return n
	}
	f := g.nodes[2]
	f.tr.take()
	a, b := f.read(), f.read()
	f.turn(false)
	late := f.read()
	f.turn(false)
	if n := asks(); n != 1 {
		t.Fatalf("%d requests for two readers", n)
	}
	p := h.propose("x")
	g.settle()
	p.mustBe(t, true, nil)
	f.mustRead(a, 1)
	f.mustRead(b, 1)
	f.mustRead(late, p.res.Index)
}

// A read is released only when the state has reached its index.
func TestReadWaitsForApply(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	h.propose("x")
	for range 10 {
		// Everything but node 1's applier runs.
		h.turn(false)
		h.appendStep()
		g.nodes[2].settle()
		g.nodes[3].settle()
		g.deliver()
	}
	c := h.read()
	for range 10 {
		h.turn(false)
		h.appendStep()
		g.nodes[2].settle()
		g.nodes[3].settle()
		g.deliver()
	}
	if o, ok := c.poll(); ok {
		t.Fatalf("released before apply: %+v", o)
	}
	h.settle()
	h.mustRead(c, 3)
}

// A lost request is asked again, and a read survives a change of leader.
func TestReadRetriesAndSurvivesLeaderChange(t *testing.T) {
	g := newGroup(t, func(c *Config) { c.ReadTimeout = time.Minute }, 1, 2, 3)
	g.elect(1)
	g.tick()
	f := g.nodes[3]
	g.drop = func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgReadIndex }
	c := f.read()
	g.settle()
	g.drop = nil
	for range 60 {
		g.tick()
	}
	f.mustRead(c, 1)

	g.drop = func(m *raftpb.Message) bool { return m.GetTo() == 1 || m.GetFrom() == 1 }
	c = f.read()
	g.settle()
	h2 := g.elect(2)
	p := h2.propose("x")
	g.settle()
	p.mustBe(t, true, nil)
	for range 10 {
		g.tick()
	}
	f.mustRead(c, 2)
}

// Nobody answers: the caller is told after the bound.
func TestReadTimesOut(t *testing.T) {
	h := newHarness(t, 1, func(c *Config) { c.ReadTimeout = time.Second }, 1, 2, 3)
	c := h.read()
	for range 99 {
		h.turn(true)
	}
	if o, ok := c.poll(); ok {
		t.Fatalf("told early: %+v", o)
	}
	for range 5 {
		h.turn(true)
	}
	if o, ok := c.poll(); !ok || !errors.Is(o.err, ErrNoLeader) {
		t.Fatalf("%v %+v", ok, o)
	}
}

// After a restart the commit index of a lone voter may be older than what it
// acknowledged. A read, its own or a learner's, must not be answered from it.
func TestLoneLeaderCommitsBeforeReading(t *testing.T) {
	h := newHarness(t, 1, nil, 1)
	h.campaign()
	h.settle()
	a := h.propose("acknowledged")
	h.settle()
	a.mustBe(t, true, nil)
	h.crash(0)
	if got := h.loop.commit; got >= a.res.Index {
		t.Fatalf("the commit index on disk is %d; the test needs it below %d", got, a.res.Index)
	}
	// Elected, but its first entry not yet durable.
	h.campaign()
	h.turn(false)
	for range 3 {
		if h.loop.leading() {
			break
		}
		h.appendStep()
		h.turn(false)
	}
	if !h.loop.leading() || h.loop.termCommitted() {
		h.t.Fatal("the test needs a leader without a commit")
	}
	c := h.read()
	h.turn(false)
	h.turn(false)
	if o, ok := c.poll(); ok {
		t.Fatalf("answered before anything was committed: %+v", o)
	}
	h.step(&raftpb.Message{Type: raftpb.MsgReadIndex.Enum(), From: new(uint64(9)), To: new(uint64(1)),
		Entries: []*raftpb.Entry{{Data: []byte("ctx")}}})
	h.turn(false)
	for _, m := range h.tr.take() {
		if m.GetType() == raftpb.MsgReadIndexResp {
			t.Fatalf("a peer's read was answered: %v", m)
		}
	}
	h.settle()
	h.mustRead(c, a.res.Index)
	found := false
	for _, m := range h.tr.take() {
		if m.GetType() == raftpb.MsgReadIndexResp {
			found = true
			if m.GetIndex() < a.res.Index {
				t.Fatalf("a peer's read got %d, acknowledged was %d", m.GetIndex(), a.res.Index)
			}
		}
	}
	if !found {
		t.Fatal("the peer's read was forgotten")
	}
}

// sent counts the messages between the nodes by kind, as they are delivered. What drop
// says of them is still done.
func (g *group) sent() map[raftpb.MessageType]int {
	n := map[raftpb.MessageType]int{}
	drop := g.drop
	g.drop = func(m *raftpb.Message) bool {
		n[m.GetType()]++
		return drop != nil && drop(m)
	}
	return n
}

// Where the asker and the leader are a majority the question is the proof: a read
// through a follower of three takes one message each way.
func TestFollowersQuestionIsProofEnough(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	p := h.propose("x")
	g.settle()
	p.mustBe(t, true, nil)
	sent := g.sent()
	c := g.nodes[2].read()
	g.settle()
	g.nodes[2].mustRead(c, p.res.Index)
	if sent[raftpb.MsgReadIndex] != 1 || sent[raftpb.MsgReadIndexResp] != 1 || sent[raftpb.MsgHeartbeat] != 0 {
		t.Errorf("a read through a follower took %v", sent)
	}
	// Nobody else has to be there for it.
	g.drop = func(m *raftpb.Message) bool { return m.GetTo() == 3 || m.GetFrom() == 3 }
	c = g.nodes[2].read()
	g.settle()
	g.nodes[2].mustRead(c, p.res.Index)
}

// A question proves nothing when it comes of a node that does not count, of too few, or
// of another term: then the others are asked.
func TestFollowersQuestionIsNoProof(t *testing.T) {
	t.Run("five", func(t *testing.T) {
		g := newGroup(t, nil, 1, 2, 3, 4, 5)
		g.elect(1)
		g.drop = func(m *raftpb.Message) bool { return m.GetTo() > 2 || m.GetFrom() > 2 }
		c := g.nodes[2].read()
		g.settle()
		if o, ok := c.poll(); ok {
			t.Errorf("two of five answered a read: %+v", o)
		}
	})
	t.Run("learner", func(t *testing.T) {
		g := newGroup(t, nil, 1, 2, 3)
		h := g.elect(1)
		g.nodes[4] = newHarness(t, 4, nil)
		g.mustChange(h, Change{Kind: AddLearner, ID: 4, Addr: "4"})
		g.drop = func(m *raftpb.Message) bool { return m.GetTo() == 2 || m.GetTo() == 3 }
		h.step(&raftpb.Message{Type: raftpb.MsgReadIndex.Enum(), From: new(uint64(4)), To: new(uint64(1)),
			Term: new(h.loop.term), Entries: []*raftpb.Entry{{Data: []byte("ctx")}}})
		sent := g.sent()
		g.settle()
		if sent[raftpb.MsgReadIndexResp] != 0 {
			t.Error("a learner's question was proof enough")
		}
	})
	t.Run("other terms", func(t *testing.T) {
		g := newGroup(t, nil, 1, 2, 3)
		h := g.elect(1)
		for _, term := range []uint64{0, h.loop.term - 1, h.loop.term + 1} {
			g.drop = func(m *raftpb.Message) bool { return m.GetTo() != 1 && m.GetType() == raftpb.MsgHeartbeat }
			h.step(&raftpb.Message{Type: raftpb.MsgReadIndex.Enum(), From: new(uint64(2)), To: new(uint64(1)),
				Term: new(term), Entries: []*raftpb.Entry{{Data: []byte("ctx")}}})
			sent := g.sent()
			g.settle()
			if sent[raftpb.MsgReadIndexResp] != 0 {
				t.Errorf("term %d: the question was proof enough for a leader of term %d", term, h.loop.term)
			}
			if sent[raftpb.MsgHeartbeat] == 0 {
				t.Errorf("term %d: nobody was asked", term)
			}
		}
	})
}
