package raftnode

import (
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// Goal: those who wait for a processor when a batch, or a leader's read, is begun take part
// in it. Method: what runs while the loop lets others run makes one more call.
func TestOthersTakePart(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.settle()
	rounds, batches := 0, 0
	var late *asked
	h.loop.yield = func() {
		if rounds++; rounds == 3 {
			late = h.propose("late")
		}
	}
	first := h.propose("first")
	h.turn(false)
	for _, m := range h.tr.take() {
		if m.GetType() == raftpb.MsgApp && m.GetTo() == 2 {
			batches += len(m.GetEntries())
			g.nodes[2].step(m)
		}
	}
	if late == nil || batches != 1 {
		t.Fatalf("%d entries for two commands, after %d rounds", batches, rounds)
	}
	g.settle()
	g.tick()
	first.mustBe(t, true, nil)
	late.mustBe(t, true, nil)

	rounds = 0
	var lateRead *call
	h.loop.yield = func() {
		if rounds++; rounds == 1 {
			lateRead = h.read()
		}
	}
	read := h.read()
	h.turn(false)
	g.settle()
	h.mustRead(read, late.res.Index)
	h.mustRead(lateRead, late.res.Index)
	if h.loop.reads.lastID != 1 {
		t.Fatalf("%d requests for two reads", h.loop.reads.lastID)
	}
}

// Goal: who needs the processors for long holds back neither what raft has to say, nor
// commands for more than a small part of the time. Method: a round in which others run
// takes longer than it may.
func TestBusyProcessorsHoldUpLittle(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.settle()
	h.tr.take()
	rounds, beats := 0, 0
	h.loop.yield = func() {
		rounds++
		for _, m := range h.tr.out {
			if m.GetType() == raftpb.MsgHeartbeat {
				beats++
			}
		}
		for began := time.Now(); time.Since(began) < 10*time.Millisecond; {
			continue // as a compaction does
		}
	}
	h.propose("x")
	h.turn(false)
	g.settle()
	h.propose("y")
	h.turn(false)
	g.settle()
	if rounds != 1 {
		t.Fatalf("others were let come %d times", rounds)
	}
	for range h.Node.cfg.HeartbeatTicks {
		h.tr.take()
		h.loop.crowded = time.Time{}
		p := h.propose("z")
		h.turn(true)
		g.settle()
		p.mustBe(t, true, nil)
	}
	if rounds != 1+h.Node.cfg.HeartbeatTicks || beats == 0 {
		t.Fatalf("of %d rounds none began after heartbeats had left", rounds)
	}
}
