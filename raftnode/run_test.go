package raftnode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// Under load a learner joins by an image, is promoted, and the leader is
// removed; every acknowledged command is on every member.
func TestGrowAndShrinkWhileRunning(t *testing.T) {
	small := func(c *Config) {
		c.TailBytes, c.TrailingBytes = 20*kib, 10*kib
		c.Logger = nil
	}
	nw, ps := startCluster(t, small, 1, 2, 3)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Second)
	defer cancel()
	waitLeader(t, ps...)

	var mu sync.Mutex
	acked := map[string]bool{}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	all := append([]*process(nil), ps...)
	var started atomic.Pointer[[]*process]
	started.Store(&all)
	for c := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("%d-%d-%0100d", c, i, i)
				for _, p := range *started.Load() {
					if !p.n.Leadership().Leading {
						continue
					}
					if _, err := p.n.Propose(ctx, []byte(name)); err == nil {
						mu.Lock()
						acked[name] = true
						mu.Unlock()
					}
				}
			}
		}()
	}
	change := func(c Change) Position {
		t.Helper()
		for {
			p := waitLeader(t, *started.Load()...)
			pos, err := p.n.ChangeMembership(ctx, c)
			if err == nil {
				return pos
			}
			// It may have been made by an attempt whose outcome nobody knows, and be
			// refused since.
			pos = p.n.Status().Position
			if m, known := pos.Member(c.ID); errors.Is(err, ErrMembershipRefused) &&
				(c.Kind == AddLearner && known && !m.Removed ||
					c.Kind == Promote && slices.Contains(pos.ConfState.GetVoters(), c.ID) ||
					c.Kind == Remove && known && m.Removed) {
				return pos
			}
			if ctx.Err() != nil || !NotDone(err) && !errors.Is(err, ErrAmbiguous) && !errors.Is(err, ErrTransferFailed) {
				t.Fatalf("%v: %v", c, err)
			}
			// Refused for now: the learner is behind, or leadership moved.
			select {
			case <-p.n.Changed():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	change(Change{Kind: AddLearner, ID: 4, Addr: "node-4:1"})
	p4 := newProcess(t, 4, nw, Position{ConfState: &raftpb.ConfState{}}, small)
	grown := append(append([]*process(nil), all...), p4)
	started.Store(&grown)
	change(Change{Kind: Promote, ID: 4})
	leader := waitLeader(t, grown...)
	pos := change(Change{Kind: Remove, ID: leader.id})
	if inConfState(pos.ConfState, leader.id) {
		t.Fatalf("node %d is still in %v", leader.id, pos.ConfState)
	}
	close(stop)
	wg.Wait()

	var members []*process
	for _, p := range grown {
		if p != leader {
			members = append(members, p)
		}
	}
	index, err := waitLeader(t, members...).n.ReadIndex(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(acked) == 0 {
		t.Fatal("nothing was acknowledged")
	}
	for _, p := range members {
		if err := p.n.WaitApplied(ctx, index); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, c := range p.mem().commands() {
			seen[c] = true
		}
		for c := range acked {
			if !seen[c] {
				t.Fatalf("node %d lacks %s", p.id, c[:20])
			}
		}
	}
}

// When a node stops, everyone who waits is told, and what is told is true of
// what was proposed.
func TestStopAnswersEveryone(t *testing.T) {
	nw, ps := startCluster(t, nil, 1, 2, 3)
	leader := waitLeader(t, ps...)
	for _, p := range ps {
		if p != leader {
			nw.isolate(p.id, true) // nothing commits any more
		}
	}
	nw.isolate(leader.id, true)
	results := make(chan error, 8)
	// The node may lose leadership meanwhile; whoever got in must be answered.
	for i := range 3 {
		leader.n.ProposeFunc(fmt.Append(nil, i), func(_ Result, err error) { results <- err })
	}
	go func() {
		_, err := leader.n.ReadIndex(context.Background())
		results <- err
	}()
	go func() { results <- leader.n.WaitApplied(context.Background(), 1<<40) }()
	leader.stop()
	for range 5 {
		if err := <-results; err == nil {
			t.Fatal("told of success")
		}
	}
	if _, err := leader.n.Propose(context.Background(), []byte("x")); !errors.Is(err, ErrStopping) {
		t.Fatalf("after the stop: %v", err)
	}
	if err := leader.n.Run(context.Background()); err == nil {
		t.Fatal("a second Run")
	}
}

// A caller that has waited long enough for a read index leaves, and harms nobody
// who asks after it.
func TestReaderLeaves(t *testing.T) {
	nw, ps := startCluster(t, nil, 1, 2, 3)
	alone := waitLeader(t, ps...)
	nw.isolate(alone.id, true)
	up := make(chan time.Time)
	left := make(chan error)
	go func() {
		_, err := alone.n.ReadIndexUntil(t.Context(), up)
		left <- err
	}()
	select {
	case up <- time.Time{}: // it waits
		if err := <-left; !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("it left with %v", err)
		}
	case err := <-left:
		t.Fatalf("a leader without followers answered a read: %v", err)
	}
	nw.isolate(alone.id, false)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, p := range ps {
		for {
			_, err := p.n.ReadIndexUntil(ctx, nil)
			if err == nil {
				break
			}
			if !errors.Is(err, ErrNoLeader) {
				t.Fatalf("node %d: %v", p.id, err)
			}
		}
	}
}

// hookedLog lets a test into Append.
type hookedLog struct {
	*memLog
	hook func(ents []*raftpb.Entry) error
}

func (l *hookedLog) Append(hs *raftpb.HardState, ents []*raftpb.Entry, sync bool) error {
	if err := l.hook(ents); err != nil {
		return err
	}
	return l.memLog.Append(hs, ents, sync)
}

func runHooked(t *testing.T, hook func([]*raftpb.Entry) error, tune func(*Config)) (*Node, chan error) {
	t.Helper()
	fs := vfs.NewMem()
	images, err := snap.OpenStore(fs, "images", snap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pos := bootPosition(1)
	cfg := Config{ID: 1}
	if tune != nil {
		tune(&cfg)
	}
	n, err := New(cfg, newMemMachine(fs, pos), &hookedLog{newMemLog(pos), hook}, wal.Recovered{}, images, &outTransport{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- n.Run(context.Background()) }()
	return n, done
}

// A failed write ends the node with the reason, and its callers with the truth.
func TestFailedAppendEndsRun(t *testing.T) {
	boom := errors.New("disk on fire")
	n, done := runHooked(t, func(ents []*raftpb.Entry) error {
		// Not before the command: else the node ends before it is asked.
		if slices.ContainsFunc(ents, func(e *raftpb.Entry) bool { return len(e.GetData()) > 0 }) {
			return boom
		}
		return nil
	}, nil)
	for changed := n.Changed(); !n.Leadership().Leading; changed = n.Changed() {
		<-changed
	}
	if _, err := n.Propose(context.Background(), []byte("x")); !errors.Is(err, ErrAmbiguous) {
		t.Fatalf("the caller was told %v", err)
	}
	if err := <-done; !errors.Is(err, boom) {
		t.Fatalf("Run returned %v", err)
	}
}

// A write that never returns ends the node too: Run does not wait for it.
func TestHungAppendEndsRun(t *testing.T) {
	var hang atomic.Bool
	release := make(chan struct{})
	n, done := runHooked(t, func([]*raftpb.Entry) error {
		if hang.Load() {
			<-release
		}
		return nil
	}, func(c *Config) {
		// Long enough for the writes before, of a process that is kept from running.
		c.StallTransfer, c.StallFail = 20*time.Millisecond, time.Second
	})
	for changed := n.Changed(); !n.Leadership().Leading; changed = n.Changed() {
		<-changed
	}
	hang.Store(true)
	if _, err := n.Propose(context.Background(), []byte("x")); !errors.Is(err, ErrAmbiguous) {
		t.Fatalf("the caller was told %v", err)
	}
	if err := <-done; !errors.Is(err, ErrDiskStalled) {
		t.Fatalf("Run returned %v", err)
	}
	close(release)
}

// Messages no peer may send are refused before raft sees them.
func TestStepRefusesForgedMessages(t *testing.T) {
	h := newHarness(t, 1, nil, 1, 2, 3)
	id := func(v uint64) *uint64 { return &v }
	for _, m := range []*raftpb.Message{
		nil,
		{Type: raftpb.MsgHeartbeat.Enum(), From: id(2), To: id(3)},
		{Type: raftpb.MsgHeartbeat.Enum(), From: id(1), To: id(1)},
		{Type: raftpb.MsgHeartbeat.Enum(), To: id(1)},
		{Type: raftpb.MsgProp.Enum(), From: id(2), To: id(1)},
		{Type: raftpb.MsgHup.Enum(), From: id(2), To: id(1)},
		{Type: raftpb.MsgStorageApplyResp.Enum(), From: id(1<<64 - 2), To: id(1)},
		{Type: raftpb.MsgStorageAppendResp.Enum(), From: id(1<<64 - 1), To: id(1)},
	} {
		if err := h.Node.Step(context.Background(), []*raftpb.Message{m}); err == nil {
			t.Errorf("%v was taken", m)
		}
	}
	if h.inboxWaits() {
		t.Fatal("a forged message reached the inbox")
	}
}

// A peer that sends faster than the loop takes is cut at its budget, and only
// its bulk: small messages still pass.
func TestPeerBudget(t *testing.T) {
	dropped := 0
	h := newHarness(t, 1, func(c *Config) {
		c.MaxPeerInboxBytes = 10*mib + 1
		c.Events.MessagesDropped = func(_ uint64, n int) { dropped += n }
	}, 1, 2, 3)
	bulk := func(from uint64) *raftpb.Message {
		return &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: &from, To: new(uint64(1)), Term: new(uint64(1)),
			Entries: []*raftpb.Entry{entry(2, 1, string(make([]byte, 4*mib)))}}
	}
	for range 5 {
		h.step(bulk(2))
	}
	h.step(bulk(3))
	h.step(&raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(1))})
	if dropped != 3 || len(h.inbox.in.peers) != 4 {
		t.Fatalf("%d dropped, %d waiting", dropped, len(h.inbox.in.peers))
	}
}

// Status is complete and makes sense.
func TestStatus(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	h.propose("x")
	g.settle()
	for range 10 {
		g.tick()
	}
	st := h.Node.Status()
	if st.ID != 1 || st.Role != RoleLeader || st.Leader != 1 || st.Term != h.loop.term || st.Commit != st.Applied ||
		st.Applied != st.LastIndex || st.FirstIndex != 2 || st.LogBytes == 0 || len(st.Peers) != 3 || st.Syncs == 0 ||
		len(st.Position.Members) != 3 || st.WaitingProposals != 0 {
		t.Fatalf("%+v", st)
	}
	for i, p := range st.Peers {
		if p.ID != uint64(i+1) || p.Match != st.LastIndex || p.State != "replicate" {
			t.Fatalf("peer %+v", p)
		}
	}
	st = g.nodes[2].Node.Status()
	if st.Role != RoleFollower || st.Leader != 1 || len(st.Peers) != 0 || st.Applied != h.Applied() {
		t.Fatalf("%+v", st)
	}
}
