package raftnode

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// change starts a membership change without a goroutine.
func (h *harness) change(c Change) *call {
	cl := &call{ch: make(chan outcome, 1)}
	h.inbox.pushControl(cl, func(l *loop) { l.changeMembership(c, cl) })
	return cl
}

func (g *group) mustChange(h *harness, c Change) Position {
	g.t.Helper()
	cl := h.change(c)
	for range 20 {
		g.settle()
		if o, ok := cl.poll(); ok {
			if o.err != nil {
				g.t.Fatalf("%v: %v", c, o.err)
			}
			return o.res.Value.(Position)
		}
		g.tick()
	}
	g.t.Fatalf("%v: no answer", c)
	return Position{}
}

func (g *group) mustRefuse(h *harness, c Change, want error) {
	g.t.Helper()
	cl := h.change(c)
	g.settle()
	if o, ok := cl.poll(); !ok || !errors.Is(o.err, want) {
		g.t.Fatalf("%v: %v %v, want %v", c, ok, o.err, want)
	}
}

// A node is added as a learner, brought up by an image, promoted in place of
// another, which is thereby removed, and its address changed.
func TestMembershipGrowsAndReplaces(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	for i := range 5 {
		h.propose(fmt.Sprint(i))
	}
	g.settle()
	g.nodes[4] = newHarness(t, 4, nil) // empty: no voters known
	g.mustRefuse(h, Change{Kind: Promote, ID: 4}, ErrMembershipRefused)
	g.mustRefuse(h, Change{Kind: AddLearner, ID: 4}, ErrMembershipRefused) // no address
	g.mustRefuse(h, Change{Kind: AddLearner, ID: 2, Addr: "x"}, ErrMembershipRefused)
	pos := g.mustChange(h, Change{Kind: AddLearner, ID: 4, Addr: "node-4:1"})
	if fmt.Sprint(pos.ConfState.GetLearners()) != "[4]" || len(pos.Members) != 4 || pos.Members[3].Addr != "node-4:1" {
		t.Fatalf("position %v", pos)
	}
	g.mustRefuse(h, Change{Kind: Promote, ID: 4, Replaces: 3}, ErrMembershipRefused) // has nothing yet
	g.catchUp(4)
	// The learner reads through the leader.
	c := g.nodes[4].read()
	g.settle()
	g.nodes[4].mustRead(c, 2)

	pos = g.mustChange(h, Change{Kind: Promote, ID: 4, Replaces: 3})
	if isJoint(pos.ConfState) || fmt.Sprint(pos.ConfState.GetVoters()) != "[1 2 4]" {
		t.Fatalf("voters %v", pos.ConfState)
	}
	if got := fmt.Sprint(pos.Members[2]); got != fmt.Sprint(Member{ID: 3, Removed: true}) {
		t.Fatalf("of the removed node stays %s", got)
	}
	if got := h.Node.Status().Position; !sameConfState(got.ConfState, pos.ConfState) {
		t.Fatalf("the state holds %v", got.ConfState)
	}
	pos = g.mustChange(h, Change{Kind: UpdateAddr, ID: 4, Addr: "node-4:2"})
	if pos.Members[3].Addr != "node-4:2" {
		t.Fatalf("members %v", pos.Members)
	}
	// Node 4 counts: with 2 gone the group goes on.
	g.drop = func(m *raftpb.Message) bool { return m.GetTo() == 2 || m.GetFrom() == 2 }
	a := h.propose("with the new voter")
	g.settle()
	a.mustBe(t, true, nil)
	// ... and a change that would leave too few alive is refused.
	for range 40 {
		g.tick()
	}
	g.mustRefuse(g.leader(), Change{Kind: Remove, ID: 4}, ErrMembershipRefused)
	g.mustChange(g.leader(), Change{Kind: Remove, ID: 2})
	// Restarted nodes know the configuration of their state, not of the start.
	h.crash(0)
	if fmt.Sprint(h.loop.confState.GetVoters()) != "[1 4]" && len(h.sm.Applied().ConfState.GetVoters()) == 2 {
		t.Fatalf("restarted with %v", h.loop.confState)
	}
}

// One change at a time: the second is refused for certain, and nothing of it
// happens.
func TestMembershipOneAtATime(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.settle()
	a := h.change(Change{Kind: AddLearner, ID: 4, Addr: "a"})
	b := h.change(Change{Kind: AddLearner, ID: 5, Addr: "b"})
	g.settle()
	if o, ok := a.poll(); !ok || o.err != nil {
		t.Fatalf("first: %v %v", ok, o.err)
	}
	if o, ok := b.poll(); !ok || !errors.Is(o.err, ErrMembershipPending) {
		t.Fatalf("second: %v %v", ok, o.err)
	}
	if cs := h.sm.Applied().ConfState; fmt.Sprint(cs.GetLearners()) != "[4]" {
		t.Fatalf("learners %v", cs.GetLearners())
	}
}

// Commands go on while a change is on its way.
func TestCommandsDuringMembershipChange(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	a := h.change(Change{Kind: AddLearner, ID: 4, Addr: "a"})
	h.turn(false)
	p := h.propose("x")
	h.turn(false)
	if h.props.inFlight(h.loop.term) != 1 || h.props.n.Load() != 2 {
		t.Fatal("the command waits behind the change")
	}
	g.settle()
	p.mustBe(t, true, nil)
	if o, ok := a.poll(); !ok || o.err != nil {
		t.Fatal(ok, o.err)
	}
}

// A removed leader hands over first; a removed node's own answers do no harm.
func TestRemovedNodeSettles(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.mustChange(h, Change{Kind: Remove, ID: 3})
	cl := h.change(Change{Kind: Remove, ID: 1}) // past the front door, as when leadership just came
	for range 60 {
		g.tick()
	}
	if o, ok := cl.poll(); !ok || o.err != nil {
		t.Fatalf("%v %v", ok, o.err)
	}
	if h.loop.leading() {
		t.Fatal("a removed node leads")
	}
	for range 60 {
		g.tick()
	}
	if lead := g.leader(); lead == nil || lead.id != 2 {
		t.Fatalf("leader %v", lead)
	}
}

// A snapshot switches raft's configuration while an older change is still to be
// applied: the change must not reach raft, and the state must get the
// configuration of its own position.
func TestMembershipChangeBehindSnapshot(t *testing.T) {
	h := newHarness(t, 1, nil, 1, 2, 3)
	cc, err := Change{Kind: AddLearner, ID: 4, Addr: "a"}.confChange()
	if err != nil {
		t.Fatal(err)
	}
	data, err := proto.Marshal(cc)
	if err != nil {
		t.Fatal(err)
	}
	e := entry(2, 2, "")
	e.Type, e.Data = raftpb.EntryConfChangeV2.Enum(), data
	// Raft has restored a snapshot at 10 in which 4 is a voter already.
	h.loop.restored = 10
	h.loop.confState = &raftpb.ConfState{Voters: []uint64{1, 2, 3, 4}}
	before := raft.DescribeConfState(h.loop.confState)
	h.applyQ.push(applyItem{msg: &raftpb.Message{Type: raftpb.MsgStorageApply.Enum(), Entries: []*raftpb.Entry{e}}})
	h.applyStep()
	if got := h.sm.Applied(); got.Index != 2 || fmt.Sprint(got.ConfState.GetLearners()) != "[4]" || len(got.ConfState.GetVoters()) != 3 {
		t.Fatalf("the state is at %v", got)
	}
	if after := raft.DescribeConfState(h.loop.confState); after != before {
		t.Fatalf("raft went from %s to %s", before, after)
	}
}

// A change that makes no sense where it is applied is refused there by every
// node alike, and raft, which would panic, does not hear of it.
func TestSenselessChangeIsRefusedAtApply(t *testing.T) {
	h := newHarness(t, 1, nil, 1)
	data, err := proto.Marshal(&raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{
		{Type: raftpb.ConfChangeRemoveNode.Enum(), NodeId: new(uint64(1))}}})
	if err != nil {
		t.Fatal(err)
	}
	e := entry(2, 2, "")
	e.Type, e.Data = raftpb.EntryConfChangeV2.Enum(), data
	h.applyQ.push(applyItem{msg: &raftpb.Message{Type: raftpb.MsgStorageApply.Enum(), Entries: []*raftpb.Entry{e}}})
	h.applyStep()
	if got := h.sm.Applied(); got.Index != 2 || fmt.Sprint(got.ConfState.GetVoters()) != "[1]" {
		t.Fatalf("the state is at %v", got)
	}
}

// While leadership is being handed over, commands wait instead of failing; when
// it has moved they are refused for certain, when the attempt fails they go on.
func TestTransfer(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	cl := &call{ch: make(chan outcome, 1)}
	h.inbox.pushControl(cl, func(l *loop) { l.transfer(0, cl) })
	g.drop = func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgTimeoutNow }
	g.settle()
	if o, ok := cl.poll(); !ok || o.err != nil || o.res.Index == 1 {
		t.Fatal(ok, o)
	}
	a := h.propose("waits")
	g.settle()
	a.mustBe(t, false, nil)
	for range 20 {
		g.tick()
	}
	a.mustBe(t, true, nil) // given up: this node goes on leading
	g.drop = nil

	h.inbox.pushControl(cl, func(l *loop) { l.transfer(3, cl) })
	h.turn(false)
	b := h.propose("refused")
	for range 40 {
		g.tick()
	}
	if !g.nodes[3].loop.leading() {
		t.Fatal("node 3 does not lead")
	}
	if b.done != 1 || !NotDone(b.err) {
		t.Fatalf("%d %v", b.done, b.err)
	}
	cl = &call{ch: make(chan outcome, 1)}
	g.nodes[3].inbox.pushControl(cl, func(l *loop) { l.transfer(9, cl) })
	g.settle()
	if o, ok := cl.poll(); !ok || !errors.Is(o.err, ErrTransferFailed) {
		t.Fatal(ok, o)
	}
}

// A leader whose disk hangs hands over, and gives up in the end; until then it
// keeps its followers.
func TestDiskStall(t *testing.T) {
	g := newGroup(t, func(c *Config) { c.StallTransfer, c.StallFail = 300*time.Millisecond, 3*time.Second }, 1, 2, 3)
	h := g.elect(1)
	g.tick()
	stalls := 0
	h.Node.cfg.Events.DiskStalled = func(time.Duration) { stalls++ }
	h.propose("x")
	moved := false
	var failure error
	for range 400 {
		for _, id := range g.ids() {
			n := g.nodes[id]
			n.clock.advance(n.Node.cfg.TickInterval)
			if err := n.loop.turn(true); err != nil {
				failure = err
			}
			if id != 1 { // node 1 never appends
				n.settle()
			}
		}
		g.deliver()
		moved = moved || g.nodes[2].loop.leading() || g.nodes[3].loop.leading()
		if failure != nil {
			break
		}
	}
	if !moved {
		t.Fatal("leadership stayed with the stalled node")
	}
	if stalls != 1 {
		t.Fatalf("%d events", stalls)
	}
	if !errors.Is(failure, ErrDiskStalled) {
		t.Fatalf("the node did not give up: %v", failure)
	}
}

// A process that stood still did not hear its disk, which is no reason to give it
// up: it does when the disk stays silent afterwards.
func TestPauseIsNoDiskStall(t *testing.T) {
	g := newGroup(t, func(c *Config) { c.StallTransfer, c.StallFail = 300*time.Millisecond, 3*time.Second }, 1, 2, 3)
	h := g.elect(1)
	h.propose("x")
	h.turn(true) // the append waits from here on
	h.clock.advance(time.Hour)
	if err := h.loop.turn(true); err != nil {
		t.Fatalf("after an hour away: %v", err)
	}
	for range 3 * time.Second / h.Node.cfg.TickInterval {
		h.clock.advance(h.Node.cfg.TickInterval)
		if err := h.loop.turn(true); err != nil {
			if !errors.Is(err, ErrDiskStalled) {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("the disk stayed silent for three seconds and nobody noticed")
}

// A tick is one tick, however long the process was away.
func TestTicksAreNotReplayed(t *testing.T) {
	h := newHarness(t, 1, nil, 1, 2, 3)
	h.turn(true)
	h.clock.advance(time.Hour)
	h.turn(true)
	h.settle()
	if msgs := h.tr.take(); len(msgs) != 0 {
		t.Fatalf("an hour away made the node campaign at once: %v", msgs)
	}
	if lag := h.loop.tickLag; lag < 59*time.Minute {
		t.Fatalf("tick lag %v", lag)
	}
}
