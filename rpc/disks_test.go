package rpc

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
)

// seenDisks implements Disks in memory.
type seenDisks struct {
	known map[uint64]uint64
	err   error
}

func (d *seenDisks) Check(node, disk uint64) (bool, error) {
	if d.err != nil {
		return false, d.err
	}
	if have, ok := d.known[node]; ok {
		return have == disk, nil
	}
	d.known[node] = disk
	return true, nil
}

// What a refused node acts on survives the way over the wire.
func TestRefusalsTravel(t *testing.T) {
	in := &RefusedError{Peer: 3, Reason: "why", Kind: Wiped, ClientAddr: "c:1", Applied: 77}
	var out *RefusedError
	if !errors.As(fromPeer(2, Status(in).Err()), &out) {
		t.Fatal("no refusal")
	}
	if out.Kind != Wiped || out.ClientAddr != "c:1" || out.Applied != 77 || !out.Told || out.Peer != 2 {
		t.Errorf("%+v", out)
	}
	if !errors.As(fromPeer(2, Status(&RefusedError{Reason: "other"}).Err()), &out) || out.Kind != "" {
		t.Errorf("a refusal without a kind became %+v", out)
	}
}

func newDiskTransport(t *testing.T, disks Disks, doubts *atomic.Int64) *PeerTransport {
	t.Helper()
	tr, err := NewPeerTransport(TransportOptions{
		Identity: Identity{ClusterID: testCluster, NodeID: 1, PeerAddr: "n1:1", ClientAddr: "c1:1"}, Disks: disks,
		Applied: func() uint64 { return 42 }, Doubt: func(uint64, uint64) { doubts.Add(1) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	return tr
}

// A node comes with its directory, with another one, after it was removed, and
// after the cluster took it in again while this node lagged.
func TestDisksOfPeers(t *testing.T) {
	checkLeaks(t)
	var doubts atomic.Int64
	disks := &seenDisks{known: map[uint64]uint64{}}
	tr := newDiskTransport(t, disks, &doubts)
	greet := func(node, disk uint64, want Refusal) {
		t.Helper()
		done, err := tr.greeted(&peerpb.Hello{NodeId: node, DiskId: disk, PeerAddr: "x:1"}, false)
		var r *RefusedError
		if err == nil {
			done()
		} else if !errors.As(err, &r) || r.Applied != 42 || r.ClientAddr != "c1:1" {
			t.Fatalf("node %d, disk %d: %v", node, disk, err)
		}
		if got := func() Refusal {
			if r == nil {
				return ""
			}
			return r.Kind
		}(); got != want {
			t.Errorf("node %d, disk %d: %q, want %q", node, disk, got, want)
		}
	}
	greet(2, 20, "")
	greet(2, 20, "")
	greet(2, 21, Wiped)
	greet(2, 0, "") // a release that does not say
	if doubts.Load() != 1 {
		t.Errorf("%d doubts", doubts.Load())
	}
	tr.Confirm(2, 21)
	greet(2, 21, "")
	greet(2, 22, Wiped)

	tr.SetMembers([]raftnode.Member{{ID: 1, Addr: "n1:1"}, {ID: 3, Disk: 30, Removed: true}})
	greet(3, 30, Removed)
	greet(3, 31, Removed) // removed comes first: losing the directory is no way back
	tr.Confirm(3, 31)
	greet(3, 31, "")
	greet(3, 30, Removed)

	// What could not be noted is not accepted.
	disks.err = errors.New("the disk is full")
	if _, err := tr.greeted(&peerpb.Hello{NodeId: 5, DiskId: 50}, false); err == nil {
		t.Error("accepted without a note")
	}
}

// A node that is removed while it is connected hears of it in answer to what it
// sends, for nobody sends it anything any more.
func TestRemovedWhileConnected(t *testing.T) {
	checkLeaks(t)
	told := make(chan *RefusedError, 1)
	a := newStation(t, 1, func(o *TransportOptions) {
		o.OnRefused = func(r *RefusedError) {
			select {
			case told <- r:
			default:
			}
		}
	})
	b := newStation(t, 2, nil)
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
	b.transport.SetMembers([]raftnode.Member{{ID: 1, Removed: true}, b.member()})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for {
		select {
		case r := <-told:
			if r.Kind != Removed || r.Peer != 2 {
				t.Errorf("%+v", r)
			}
			return
		case <-tick.C:
			i++
			a.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 1, 2, i)})
		case <-deadline:
			t.Fatal("it was not told")
		}
	}
}

// A member that has moved is found at another address that is known of it.
func TestPeerIsFoundElsewhere(t *testing.T) {
	checkLeaks(t)
	b := newStation(t, 2, nil)
	a := newStation(t, 1, func(o *TransportOptions) {
		o.Also = func(id uint64) []string { return []string{b.id.PeerAddr} }
	})
	b.transport.SetMembers([]raftnode.Member{a.member(), b.member()})
	a.transport.SetMembers([]raftnode.Member{a.member(), {ID: 2, Addr: "127.0.0.1:1"}})
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
}

// A preflight says what the asked node is, and whom it does not reach.
func TestPreflight(t *testing.T) {
	checkLeaks(t)
	a, b, c := newStation(t, 1, nil), newStation(t, 2, nil), newStation(t, 3, nil)
	b.stopServer()
	b.config = func(c *PeerServerConfig) {
		c.Preflight = PreflightInfo{
			Applied: func() uint64 { return 5 }, FreeBytes: func() uint64 { return 6 }, StateBytes: func() uint64 { return 7 },
			Now: func() time.Time { return time.UnixMilli(8) },
		}
	}
	b.restartServer()
	introduce(a, b)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	got, err := a.transport.Preflight(ctx, 2, []raftnode.Member{c.member(), {ID: 4, Addr: "127.0.0.1:1"}, b.member()})
	if err != nil {
		t.Fatal(err)
	}
	if got.Applied != 5 || got.FreeBytes != 6 || got.StateBytes != 7 || got.TimeUnixMs != 8 || got.Version != "test" {
		t.Errorf("%v", got)
	}
	if len(got.Unreachable) != 1 || got.Unreachable[0].NodeId != 4 {
		t.Errorf("unreachable %v", got.Unreachable)
	}
	if _, err := a.transport.Preflight(ctx, 9, nil); !errors.Is(err, ErrUnreachable) {
		t.Errorf("of an unknown node: %v", err)
	}
	if _, err := a.transport.Preflight(ctx, 2, make([]raftnode.Member, maxReach+1)); err == nil {
		t.Error("too many nodes were taken")
	}
}
