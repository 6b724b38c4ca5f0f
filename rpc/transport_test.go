package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
)

// Everything that is sent arrives, in the order of its class, while three nodes
// talk to each other at once.
func TestMessagesArriveInOrder(t *testing.T) {
	checkLeaks(t)
	a, b, c := newStation(t, 1, nil), newStation(t, 2, nil), newStation(t, 3, nil)
	introduce(a, b, c)
	const n = 2000
	for i := uint64(1); i <= n; i++ {
		for _, from := range []*station{a, b, c} {
			var msgs []*raftpb.Message
			for to := uint64(1); to <= 3; to++ {
				if to != from.id.NodeID {
					msgs = append(msgs,
						message(raftpb.MsgApp, from.id.NodeID, to, i, []byte(fmt.Sprint(i))...),
						message(raftpb.MsgHeartbeat, from.id.NodeID, to, i))
				}
			}
			from.transport.Send(msgs)
		}
	}
	for _, s := range []*station{a, b, c} {
		for _, typ := range []raftpb.MessageType{raftpb.MsgApp, raftpb.MsgHeartbeat} {
			until(t, &s.node.event, "all messages", func() bool { return len(s.node.received(typ)) == 2*n })
			next := map[uint64]uint64{}
			for _, m := range s.node.received(typ) {
				next[m.GetFrom()]++
				if m.GetIndex() != next[m.GetFrom()] {
					t.Fatalf("node %d: %v %d from node %d came as number %d",
						s.id.NodeID, typ, m.GetIndex(), m.GetFrom(), next[m.GetFrom()])
				}
				if typ == raftpb.MsgApp && string(m.Entries[0].Data) != fmt.Sprint(m.GetIndex()) {
					t.Fatalf("message %d carries %q", m.GetIndex(), m.Entries[0].Data)
				}
			}
		}
	}
	if got := a.transport.ClientAddr(2); got != "client-2:1" {
		t.Errorf("client address of node 2: %q", got)
	}
}

// A receiver that is stuck with log entries still gets heartbeats: otherwise
// every large append would risk an election.
func TestHeartbeatsPassStuckEntries(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	release := make(chan struct{})
	defer close(release)
	b.node.step = func(ctx context.Context, msgs []*raftpb.Message) error {
		if msgs[0].GetType() == raftpb.MsgApp {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
		return nil
	}
	introduce(a, b)
	for i := uint64(1); i <= 50; i++ {
		a.transport.Send([]*raftpb.Message{message(raftpb.MsgApp, 1, 2, i, make([]byte, 1<<20)...)})
	}
	for i := uint64(1); i <= 10; i++ {
		a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 1, 2, i)})
	}
	until(t, &b.node.event, "heartbeats", func() bool { return len(b.node.received(raftpb.MsgHeartbeat)) == 10 })
	if n := len(b.node.received(raftpb.MsgApp)); n != 0 {
		t.Errorf("%d appends got through a stuck receiver", n)
	}
}

// When the peer does not read, Send neither blocks nor takes memory without
// bound: what does not fit is dropped, counted and reported.
func TestSlowPeerIsBounded(t *testing.T) {
	checkLeaks(t)
	const limit = 4 << 20
	a := newStation(t, 1, func(o *TransportOptions) { o.QueueBytes = limit })
	b := newStation(t, 2, nil)
	release := make(chan struct{})
	b.node.step = func(ctx context.Context, _ []*raftpb.Message) error {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return nil
	}
	introduce(a, b)
	const n, size = 200, 256 << 10
	for i := uint64(1); i <= n; i++ {
		a.transport.Send([]*raftpb.Message{message(raftpb.MsgApp, 1, 2, i, make([]byte, size)...)})
		if q := a.transport.Stats()[0].QueuedBytes; q > limit {
			t.Fatalf("%d bytes are queued, the limit is %d", q, limit)
		}
	}
	until(t, &a.node.event, "a report", func() bool { return a.node.reports(2) > 0 })
	dropped := a.transport.Stats()[0].Dropped
	if dropped == 0 {
		t.Fatal("nothing was dropped")
	}
	close(release)
	until(t, &b.node.event, "the rest", func() bool {
		return uint64(len(b.node.received(raftpb.MsgApp))) == n-dropped
	})
	if d := a.transport.Stats()[0].Dropped; d != dropped {
		t.Errorf("%d messages were dropped, then %d", dropped, d)
	}
}

// A broken connection is reported, made anew, and used again; what arrives is in
// order with gaps at most.
func TestBrokenStreamsRecover(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	introduce(a, b)
	var index uint64
	sendUntilReceived := func() {
		t.Helper()
		before := len(b.node.received(raftpb.MsgApp))
		until(t, &b.node.event, "a message after a break", func() bool {
			index++
			a.transport.Send([]*raftpb.Message{message(raftpb.MsgApp, 1, 2, index, 'x')})
			if len(b.node.received(raftpb.MsgApp)) > before {
				return true
			}
			b.node.event.fire() // try again at once
			return false
		})
	}
	sendUntilReceived()
	connected := func() {
		t.Helper()
		until(t, &a.log.event, "a connection", func() bool { return a.transport.Stats()[0].Connected })
	}
	for range 10 {
		connected()
		reports := a.node.reports(2)
		a.net.cut("")
		until(t, &a.node.event, "a report", func() bool { return a.node.reports(2) > reports })
		sendUntilReceived()
	}
	// The same when the whole peer goes and comes back.
	connected()
	reports := a.node.reports(2)
	b.stopServer()
	until(t, &a.node.event, "a report", func() bool { return a.node.reports(2) > reports })
	b.restartServer()
	sendUntilReceived()
	last := uint64(0)
	for _, m := range b.node.received(raftpb.MsgApp) {
		if m.GetIndex() <= last {
			t.Fatalf("message %d came after %d", m.GetIndex(), last)
		}
		last = m.GetIndex()
	}
}

func TestMembersComeGoAndMove(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	// Unknown: dropped and reported.
	a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 1, 2, 1)})
	until(t, &a.node.event, "a report", func() bool { return a.node.reports(2) > 0 })
	// At a wrong address first: another node answers there, and is not mistaken.
	c := newStation(t, 3, nil)
	a.transport.SetMembers([]raftnode.Member{a.member(), {ID: 2, Addr: c.id.PeerAddr}})
	until(t, &a.log.event, "a refusal", func() bool { return a.log.count(slog.LevelError) > 0 })
	if a.transport.Stats()[0].Connected {
		t.Error("connected to a node with another id")
	}
	// It moves to the right one.
	introduce(a, b)
	var i uint64
	until(t, &b.node.event, "a heartbeat", func() bool {
		i++
		a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 1, 2, i)})
		if len(b.node.received(raftpb.MsgHeartbeat)) > 0 {
			return true
		}
		b.node.event.fire()
		return false
	})
	// It leaves.
	a.transport.SetMembers([]raftnode.Member{a.member()})
	if s := a.transport.Stats(); len(s) != 0 {
		t.Errorf("peers after removal: %+v", s)
	}
	if len(c.node.received(raftpb.MsgHeartbeat)) != 0 {
		t.Error("messages went to another node than the one they were for")
	}
}

func TestHandshakeRefusals(t *testing.T) {
	cases := []struct {
		name   string
		change func(*Identity)
		want   string
	}{
		{"other cluster", func(i *Identity) { i.ClusterID++ }, "belongs to cluster"},
		{"same id", func(i *Identity) { i.NodeID = 2 }, "share one id"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			a := newStation(t, 1, func(o *TransportOptions) { c.change(&o.Identity) })
			b := newStation(t, 2, nil)
			a.transport.SetMembers([]raftnode.Member{{ID: 2, Addr: b.id.PeerAddr}, {ID: 9, Addr: b.id.PeerAddr}})
			until(t, &a.log.event, "a refusal", func() bool { return a.log.count(slog.LevelError) > 0 })
			// It goes on trying, but does not fill the log.
			dials := a.net.dials.Load()
			until(t, &a.node.event, "more attempts", func() bool { return a.net.dials.Load() > dials+10 })
			if n := a.log.count(slog.LevelError); n > 2 {
				t.Errorf("%d lines about the refusal of at most two peers", n)
			}
			found := false
			a.log.mu.Lock()
			for _, r := range a.log.lines {
				r.Attrs(func(at slog.Attr) bool {
					found = found || strings.Contains(at.Value.String(), c.want)
					return true
				})
			}
			a.log.mu.Unlock()
			if !found {
				t.Errorf("the reason %q is not in the log", c.want)
			}
			a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, a.id.NodeID, 2, 1)})
			if n := len(b.node.received(raftpb.MsgHeartbeat)); n != 0 {
				t.Errorf("%d messages passed a refused handshake", n)
			}
		})
	}
}

func TestHelloCheck(t *testing.T) {
	me := Identity{ClusterID: 1, NodeID: 2}
	good := Identity{ClusterID: 1, NodeID: 1}.hello(2)
	if err := me.check(good, 1); err != nil {
		t.Fatal(err)
	}
	if err := me.check(good, 3); !errors.Is(err, ErrRefused) {
		t.Errorf("another node than expected: %v", err)
	}
	if err := me.check(nil, 0); !errors.Is(err, ErrRefused) {
		t.Errorf("no greeting: %v", err)
	}
	h := Identity{ClusterID: 1, NodeID: 1}.hello(3)
	if err := me.check(h, 0); !errors.Is(err, ErrRefused) {
		t.Errorf("a greeting for another node: %v", err)
	}
	h = Identity{ClusterID: 1, NodeID: 1}.hello(2)
	h.Protocol = 2
	if err := me.check(h, 0); !errors.Is(err, ErrRefused) {
		t.Errorf("another protocol: %v", err)
	}
	h = Identity{ClusterID: 1, NodeID: 1, PeerAddr: strings.Repeat("x", maxAddrBytes+1)}.hello(2)
	if err := me.check(h, 0); !errors.Is(err, ErrRefused) {
		t.Errorf("a monstrous address: %v", err)
	}
}

// A node that was away while the membership changed does not know its new
// leader. It must be able to answer it all the same, or it never learns.
func TestUnknownNodeIsAnswered(t *testing.T) {
	checkLeaks(t)
	stale, leader := newStation(t, 3, nil), newStation(t, 4, nil)
	stale.transport.SetMembers([]raftnode.Member{stale.member()})
	leader.transport.SetMembers([]raftnode.Member{leader.member(), stale.member()})
	leader.transport.Send([]*raftpb.Message{message(raftpb.MsgApp, 4, 3, 1, 'x')})
	until(t, &stale.node.event, "an append", func() bool { return len(stale.node.received(raftpb.MsgApp)) == 1 })
	var i uint64
	until(t, &leader.node.event, "an answer", func() bool {
		i++
		stale.transport.Send([]*raftpb.Message{message(raftpb.MsgAppResp, 3, 4, i)})
		if len(leader.node.received(raftpb.MsgAppResp)) > 0 {
			return true
		}
		leader.node.event.fire()
		return false
	})
	// It goes when the other's streams end.
	leader.transport.Close()
	leader.stopServer()
	until(t, &stale.node.event, "the guest to leave", func() bool {
		if len(stale.transport.Stats()) == 0 {
			return true
		}
		stale.node.event.fire()
		return false
	})
}

// A removed node is told so, and what it sends does not reach raft.
func TestRemovedNodeIsRefused(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	introduce(a, b)
	b.transport.SetMembers([]raftnode.Member{b.member()})
	a.net.cut("")
	until(t, &a.log.event, "the refusal", func() bool { return a.log.count(slog.LevelError) > 0 })
	before := len(b.node.received(raftpb.MsgHeartbeat))
	a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 1, 2, 1)})
	until(t, &a.node.event, "a report", func() bool { return a.node.reports(2) > 0 })
	if n := len(b.node.received(raftpb.MsgHeartbeat)); n != before {
		t.Errorf("%d messages of a removed node were stepped", n-before)
	}
	// Added again (a correction by an operator), it is welcome.
	introduce(a, b)
	var i uint64
	until(t, &b.node.event, "a heartbeat", func() bool {
		i++
		a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 1, 2, i)})
		if len(b.node.received(raftpb.MsgHeartbeat)) > before {
			return true
		}
		b.node.event.fire()
		return false
	})
}

// Messages that no node of ours sends end the stream before raft sees them.
func TestForgedMessagesAreRefused(t *testing.T) {
	for name, m := range map[string]*raftpb.Message{
		"for another node":     message(raftpb.MsgApp, 1, 3, 1),
		"in another's name":    message(raftpb.MsgApp, 3, 2, 1),
		"a proposal":           message(raftpb.MsgProp, 1, 2, 1, 'x'),
		"a local message":      message(raftpb.MsgHup, 1, 2, 1),
		"a storage message":    message(raftpb.MsgStorageAppendResp, 1, 2, 1),
		"a snapshot, no image": message(raftpb.MsgSnap, 1, 2, 1),
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			a, b := newStation(t, 1, nil), newStation(t, 2, nil)
			var steps atomic.Int64
			b.node.step = func(context.Context, []*raftpb.Message) error { steps.Add(1); return nil }
			introduce(a, b)
			a.transport.mu.RLock()
			p := a.transport.peers[2]
			a.transport.mu.RUnlock()
			p.entries.push(m)
			until(t, &b.log.event, "the refusal", func() bool { return b.log.count(slog.LevelError) > 0 })
			if steps.Load() != 0 {
				t.Error("the message reached raft")
			}
		})
	}
}

// A peer that accepts connections and then says nothing counts as unreachable,
// and the attempt ends by itself.
func TestSilentPeer(t *testing.T) {
	checkLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := newStation(t, 1, func(o *TransportOptions) { o.DialTimeout = 20 * time.Millisecond })
	a.transport.SetMembers([]raftnode.Member{{ID: 2, Addr: l.Addr().String()}})
	a.transport.Send([]*raftpb.Message{message(raftpb.MsgVote, 1, 2, 1)})
	// The attempt that the message waits for need not be the first one.
	until(t, &a.node.event, "a report", func() bool { return a.node.reports(2) > 1 && a.transport.Stats()[0].Dropped > 0 })
	if s := a.transport.Stats()[0]; s.Connected || s.Dropped != 1 || s.QueuedBytes != 0 || s.LastError == "" {
		t.Errorf("%+v", s)
	}
}
