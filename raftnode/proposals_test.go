package raftnode

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// What the entry applied at (j, u) says about a batch put at (i, t), as derived
// in the comment on proposals.
func TestProposalsObserve(t *testing.T) {
	type pos struct{ index, term uint64 }
	for _, tc := range []struct {
		batch, applied pos
		mine, lost     bool
	}{
		{pos{10, 3}, pos{10, 3}, true, false},
		{pos{10, 3}, pos{10, 4}, false, true},
		{pos{10, 3}, pos{10, 2}, false, true}, // an older entry won the place
		{pos{10, 3}, pos{9, 3}, false, false},
		{pos{10, 3}, pos{9, 2}, false, false},
		{pos{10, 3}, pos{9, 4}, false, true}, // terms never go down behind it
		{pos{10, 3}, pos{11, 3}, false, false},
	} {
		p := &proposals{release: func(*batch) {}}
		b := &batch{index: tc.batch.index, term: tc.batch.term}
		p.add(b)
		mine, lost := p.observe(tc.applied.index, tc.applied.term)
		if (mine == b) != tc.mine || (len(lost) == 1) != tc.lost {
			t.Errorf("batch %v, applied %v: mine %v, lost %v", tc.batch, tc.applied, mine == b, lost)
		}
	}
}

func TestProposalsOvertaken(t *testing.T) {
	type pos struct{ index, term uint64 }
	for _, tc := range []struct {
		batch, snap   pos
		lost, unknown bool
	}{
		{pos{10, 3}, pos{20, 4}, false, true},
		{pos{10, 3}, pos{10, 3}, false, true}, // inside, but its result is not known here
		{pos{10, 5}, pos{20, 4}, true, false}, // a term newer than all inside
		{pos{30, 3}, pos{20, 4}, true, false}, // behind it terms are at least 4
		{pos{30, 4}, pos{20, 4}, false, false},
		{pos{30, 5}, pos{20, 4}, false, false},
	} {
		p := &proposals{release: func(*batch) {}}
		p.add(&batch{index: tc.batch.index, term: tc.batch.term})
		lost, unknown := p.overtaken(tc.snap.index, tc.snap.term)
		if (len(lost) == 1) != tc.lost || (len(unknown) == 1) != tc.unknown {
			t.Errorf("batch %v, snapshot %v: lost %v, unknown %v", tc.batch, tc.snap, len(lost), len(unknown))
		}
		if want := !tc.lost && !tc.unknown; (p.n.Load() == 1) != want {
			t.Errorf("batch %v, snapshot %v: still pending: %v", tc.batch, tc.snap, !want)
		}
	}
}

// isolateLeader proposes cmd on leader 1 so that its entry reaches those in
// reach only, and cuts the leader off.
func cutAfterPropose(g *group, cmd string, reach ...uint64) *asked {
	h := g.nodes[1]
	a := h.propose(cmd)
	h.turn(false)
	h.appendStep()
	for _, m := range h.tr.take() {
		for _, id := range reach {
			if m.GetTo() == id {
				g.nodes[id].step(m)
				g.nodes[id].settle()
				g.nodes[id].tr.take() // its answer is lost
			}
		}
	}
	g.drop = func(m *raftpb.Message) bool { return m.GetFrom() == 1 || m.GetTo() == 1 }
	return a
}

// The leader is cut off after its entry reached a follower. That one wins the
// next election and commits the entry: the caller, who waited through the loss
// of leadership, gets its result.
func TestProposalCommittedByNextLeader(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	g.elect(1)
	a := cutAfterPropose(g, "x", 2)
	g.elect(2)
	for range 40 {
		g.tick()
	}
	if g.nodes[1].loop.leading() {
		t.Fatal("the cut off node still leads")
	}
	a.mustBe(t, false, nil)
	g.drop = nil
	for range 20 {
		g.tick()
	}
	a.mustBe(t, true, nil)
	if a.res.Value != 1 {
		t.Fatalf("result %v", a.res)
	}
}

// The same, but the entry reached nobody: the next leader's entry takes its
// place, and the caller is told that it will never take effect.
func TestProposalOverwritten(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	g.elect(1)
	a := cutAfterPropose(g, "x")
	h2 := g.elect(2)
	b := h2.propose("y")
	g.settle()
	b.mustBe(t, true, nil)
	g.drop = nil
	for range 40 {
		g.tick()
	}
	a.mustBe(t, true, ErrOverwritten)
	if !NotDone(a.err) {
		t.Fatal("not told as definite")
	}
	for _, id := range g.ids() {
		if got := fmt.Sprint(g.nodes[id].sm.commands()); got != "[y]" {
			t.Fatalf("node %d applied %s", id, got)
		}
	}
}

// A node that hears of nothing gives up after the bound, and only then.
func TestProposalUndecidedExpires(t *testing.T) {
	g := newGroup(t, func(c *Config) { c.AmbiguousAfter = time.Second }, 1, 2, 3)
	g.elect(1)
	a := cutAfterPropose(g, "x")
	h := g.nodes[1]
	for range 40 {
		h.turn(true)
		h.settle()
	}
	if h.loop.leading() {
		t.Fatal("still leading")
	}
	for range 80 {
		h.turn(true)
	}
	a.mustBe(t, false, nil)
	for range 40 {
		h.turn(true)
	}
	a.mustBe(t, true, ErrAmbiguous)
	if NotDone(a.err) {
		t.Fatal("told as definite")
	}
}

// What was waiting and never proposed is refused for certain when the node stops
// leading; what waits when it stops running likewise, what was proposed is not.
func TestProposalsWhenLeadershipOrNodeEnds(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	inFlight := h.propose("a")
	h.turn(false)
	waiting := h.propose("b")
	// A higher term ends the leadership.
	h.step(&raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(99))})
	h.turn(false)
	var nl *NotLeaderError
	if waiting.done != 1 || !errors.As(waiting.err, &nl) || nl.Leader != 2 || nl.Addr != "node-2:1" || nl.Term != 99 {
		t.Fatalf("refused with %v", waiting.err)
	}
	inFlight.mustBe(t, false, nil)
	refused := h.propose("c")
	if refused.done != 1 || !errors.As(refused.err, &nl) {
		t.Fatalf("refused with %v", refused.err)
	}
	h.resolve()
	inFlight.mustBe(t, true, ErrAmbiguous)
	after := h.propose("d")
	after.mustBe(t, true, ErrStopping)
	if _, err := h.ReadIndex(context.Background()); !errors.Is(err, ErrStopping) {
		t.Fatalf("read after the end: %v", err)
	}
}

func TestNotDone(t *testing.T) {
	for _, err := range []error{ErrNoLeader, ErrStopping, ErrBusy, ErrTooLarge, ErrOverwritten,
		ErrMembershipPending, ErrMembershipRefused, &NotLeaderError{Leader: 1}, fmt.Errorf("x: %w", ErrBusy)} {
		if !NotDone(err) {
			t.Errorf("%v is not told as definite", err)
		}
	}
	for _, err := range []error{nil, ErrAmbiguous, ErrTransferFailed, context.Canceled} {
		if NotDone(err) {
			t.Errorf("%v is told as definite", err)
		}
	}
}

// Admission is bounded by count and by bytes, and room comes back.
func TestAdmission(t *testing.T) {
	h := newHarness(t, 1, func(c *Config) {
		c.MaxWaiting = 3
		c.MaxCommandBytes = 100
		c.MaxWaitingBytes = 150
	}, 1)
	h.campaign()
	h.settle()
	h.propose(string(make([]byte, 101))).mustBe(t, true, ErrTooLarge)
	a := h.propose(string(make([]byte, 100)))
	h.propose(string(make([]byte, 51))).mustBe(t, true, ErrBusy)
	b, c := h.propose("b"), h.propose("c")
	h.propose("d").mustBe(t, true, ErrBusy)
	h.settle()
	a.mustBe(t, true, nil)
	b.mustBe(t, true, nil)
	c.mustBe(t, true, nil)
	d := h.propose(string(make([]byte, 100)))
	h.settle()
	d.mustBe(t, true, nil)
}

// Commands that wait are packed up to the cap of an entry, in order, each in
// exactly one entry; a larger command gets its own.
func TestPacking(t *testing.T) {
	h := newHarness(t, 1, func(c *Config) { c.MaxBatchBytes = 100; c.MaxBatchesInFlight = 2 }, 1)
	h.campaign()
	h.settle()
	var all []*asked
	want := ""
	for i := range 20 {
		s := fmt.Sprintf("%030d", i)
		if i == 7 {
			s = fmt.Sprintf("%0300d", i)
		}
		want += s
		all = append(all, h.propose(s))
	}
	h.turn(false)
	if n := h.props.n.Load(); n != 2 {
		t.Fatalf("%d batches in flight, want 2", n)
	}
	h.settle()
	got := ""
	for _, c := range h.sm.commands() {
		got += c
	}
	if got != want {
		t.Fatal("commands lost, repeated or reordered")
	}
	entries := map[uint64]int{}
	for i, a := range all {
		a.mustBe(t, true, nil)
		if a.res.Value != i+1 {
			t.Fatalf("command %d: %v", i, a.res)
		}
		entries[a.res.Index]++
	}
	if entries[all[7].res.Index] != 1 || entries[all[0].res.Index] != 2 {
		t.Fatalf("packed as %v", entries)
	}
}

// Raft refuses more uncommitted bytes: a definite answer, and room comes back
// when entries are applied.
func TestUncommittedLimit(t *testing.T) {
	h := newHarness(t, 1, func(c *Config) { c.MaxUncommittedBytes = 200; c.MaxBatchesInFlight = 10 }, 1)
	h.campaign()
	h.settle()
	a := h.propose(string(make([]byte, 150)))
	h.turn(false)
	b := h.propose(string(make([]byte, 150)))
	h.turn(false)
	b.mustBe(t, true, ErrBusy)
	h.settle()
	a.mustBe(t, true, nil)
	c := h.propose(string(make([]byte, 150)))
	h.settle()
	c.mustBe(t, true, nil)
}

// A command that waits when its leader learns, in the same turn, that another one
// was elected is told so and may go there: it does not hear that the node is busy,
// which is an answer for the client.
func TestCommandsOfALeaderThatIsNoMore(t *testing.T) {
	h := newHarness(t, 1, nil, 1)
	h.campaign()
	h.settle()
	term := h.Leadership().Term + 1
	a, b := h.propose("a"), h.propose(string(make([]byte, 2<<20))) // of an entry of its own
	h.step(&raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: &term, Commit: new(uint64)})
	h.turn(false)
	var notLeader *NotLeaderError
	for _, c := range []*asked{a, b} {
		if c.done != 1 || !errors.As(c.err, &notLeader) || notLeader.Leader != 2 {
			t.Errorf("told %d times, %v", c.done, c.err)
		}
	}
}

// The bulk of a restore or of checkpoints leaves half of the room to the commands
// of everybody else, and gets its own back.
func TestBulkLeavesRoom(t *testing.T) {
	h := newHarness(t, 1, func(c *Config) { c.MaxWaitingBytes = 8 << 20 }, 1)
	h.campaign()
	h.settle()
	bulk := string(make([]byte, 1<<20))
	var taken []*asked
	for range 4 {
		taken = append(taken, h.propose(bulk))
	}
	for range 10 {
		h.propose(bulk).mustBe(t, true, ErrBusy)
	}
	for range 1000 {
		taken = append(taken, h.propose(string(make([]byte, 1<<10))))
	}
	h.settle()
	for _, a := range taken {
		a.mustBe(t, true, nil)
	}
	again := h.propose(bulk)
	h.settle()
	again.mustBe(t, true, nil)
}

// A caller that leaves does not disturb the others, and learns that the outcome
// is open.
func TestProposeContextEnds(t *testing.T) {
	h := newHarness(t, 1, nil, 1)
	h.campaign()
	h.settle()
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error)
	go func() {
		_, err := h.Propose(ctx, []byte("left"))
		got <- err
	}()
	for !h.inbox.hasProposals() {
		runtime.Gosched()
	}
	cancel()
	if err := <-got; !errors.Is(err, ErrAmbiguous) || !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	a := h.propose("stays")
	h.settle()
	a.mustBe(t, true, nil)
	if a.res.Value != 2 {
		t.Fatalf("the command of a caller that left was not applied: %v", a.res)
	}
	if _, err := h.Propose(ctx, []byte("never")); !errors.Is(err, context.Canceled) || errors.Is(err, ErrAmbiguous) {
		t.Fatalf("got %v", err)
	}
	h.settle()
	if n := len(h.sm.commands()); n != 2 {
		t.Fatalf("%d commands", n)
	}
}

func FuzzDecodeEnvelope(f *testing.F) {
	good := beginEnvelope(nil)
	setEnvelopeID(good, 77)
	good = appendCommand(appendCommand(appendCommand(good, []byte("one")), nil), []byte("three"))
	f.Add(good)
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		id, cmds, err := decodeEnvelope(data, nil)
		if err != nil {
			return
		}
		again := beginEnvelope(nil)
		setEnvelopeID(again, id)
		for _, c := range cmds {
			again = appendCommand(again, c)
		}
		id2, cmds2, err := decodeEnvelope(again, nil)
		if err != nil || id2 != id || len(cmds2) != len(cmds) {
			t.Fatalf("%v: %d commands became %d", err, len(cmds), len(cmds2))
		}
		for i := range cmds {
			if string(cmds[i]) != string(cmds2[i]) {
				t.Fatalf("command %d changed", i)
			}
		}
	})
}
