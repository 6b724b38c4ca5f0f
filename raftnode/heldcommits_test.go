package raftnode

import (
	"fmt"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// news counts the messages that tell a follower of a commit and of nothing else. What
// drop says of them is still done.
func (g *group) news() map[uint64]int {
	n := map[uint64]int{}
	drop := g.drop
	g.drop = func(m *raftpb.Message) bool {
		if m.GetType() == raftpb.MsgApp && len(m.GetEntries()) == 0 {
			n[m.GetTo()]++
		}
		return drop != nil && drop(m)
	}
	return n
}

// stream has n commands committed one after the other, and no tick.
func (g *group) stream(h *harness, n int) {
	h.t.Helper()
	for i := range n {
		p := h.propose(fmt.Sprint("x", i))
		g.settle()
		p.mustBe(h.t, true, nil)
	}
}

// A lone commit is told at once; of those that follow each other the next one tells,
// and of the last a tick.
func TestNewsOfCommitsTravelsWithTheNext(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	g.tick()
	told := g.news()
	g.stream(h, 1)
	if told[2] != 1 || told[3] != 1 {
		t.Fatalf("of a lone commit %v messages told", told)
	}
	g.stream(h, 100)
	if told[2] > 10 || told[3] > 10 {
		t.Errorf("of 100 commits in a tick %v messages told", told)
	}
	f := g.nodes[2]
	if f.Applied() < h.Applied()-1 {
		t.Errorf("the follower has applied %d, the leader %d", f.Applied(), h.Applied())
	}
	g.tick()
	if f.Applied() != h.Applied() {
		t.Errorf("a tick later the follower has applied %d, the leader %d", f.Applied(), h.Applied())
	}
	// Not in the tick after that, but in the next one.
	g.tick()
	g.tick()
	clear(told)
	g.stream(h, 1)
	if told[2] != 1 || told[3] != 1 {
		t.Errorf("of a lone commit after many %v messages told", told)
	}
}

// A follower's read is not kept waiting for news that are held, nor by a question
// that is.
func TestFollowerReadBringsTheNews(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	g.crowd(h, 10)
	f := g.nodes[2+3-h.loop.beats.swift[0]] // who is not asked, and so hears nothing of the rounds either
	g.stream(h, 20)
	if f.Applied() == h.Applied() {
		t.Fatal("the test needs a follower to which the news were not told")
	}
	c := f.read()
	g.settle()
	f.mustRead(c, h.Applied())
}
