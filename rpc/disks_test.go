package rpc

import (
	"context"
	"errors"
	"sync"
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

func newDiskTransport(t *testing.T, disks Disks, pos *raftnode.Position) *PeerTransport {
	t.Helper()
	tr, err := NewPeerTransport(TransportOptions{
		Identity: Identity{ClusterID: testCluster, NodeID: 1, PeerAddr: "n1:1", ClientAddr: "c1:1"}, Disks: disks,
		Position: func() raftnode.Position { return *pos },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	return tr
}

// Goal: whose word counts. A node comes with its directory, with another one, after
// it was removed, and after the cluster took it in again; and it says so, at an
// index that this node has applied or has not.
func TestDisksOfPeers(t *testing.T) {
	checkLeaks(t)
	disks := &seenDisks{known: map[uint64]uint64{}}
	pos := &raftnode.Position{Index: 42}
	tr := newDiskTransport(t, disks, pos)
	apply := func(index uint64, members ...raftnode.Member) {
		*pos = raftnode.Position{Index: index, Members: members}
		tr.SetMembers(members)
	}
	greet := func(node, disk, listedAt uint64, want Refusal) {
		t.Helper()
		done, err := tr.greeted(&peerpb.Hello{NodeId: node, DiskId: disk, ListedAt: listedAt, PeerAddr: "x:1"}, false)
		var r *RefusedError
		if err == nil {
			done()
		} else if !errors.As(err, &r) || r.Applied != pos.Index || r.ClientAddr != "c1:1" {
			t.Fatalf("node %d, disk %d: %v", node, disk, err)
		}
		if got := func() Refusal {
			if r == nil {
				return ""
			}
			return r.Kind
		}(); got != want {
			t.Errorf("node %d, disk %d listed at %d, at %d here: %q, want %q", node, disk, listedAt, pos.Index, got, want)
		}
	}
	greet(2, 20, 0, "")
	greet(2, 20, 0, "")
	greet(2, 21, 0, Wiped)
	greet(2, 0, 0, "") // a release that does not say
	// It was taken in again, as those see who have applied more; what this node has
	// applied itself, it knows itself.
	greet(2, 21, 43, "")
	greet(2, 21, 42, Wiped)
	greet(2, 21, 41, Wiped)
	if disks.known[2] != 20 {
		t.Errorf("the word of a node was taken down as disk %d", disks.known[2])
	}
	apply(43, raftnode.Member{ID: 1, Addr: "n1:1"}, raftnode.Member{ID: 2, Disk: 21, Addr: "n2:1"})
	disks.known[2] = 21
	greet(2, 21, 0, "")
	greet(2, 20, 0, Wiped)
	greet(2, 20, 42, Wiped) // its old directory, which was listed as well
	greet(2, 22, 0, Wiped)

	apply(50, raftnode.Member{ID: 1, Addr: "n1:1"}, raftnode.Member{ID: 3, Disk: 30, Removed: true})
	greet(3, 30, 0, Removed)
	greet(3, 31, 0, Removed) // removed comes first: losing the directory is no way back
	greet(3, 30, 49, Removed)
	greet(3, 31, 51, "")
	apply(52, raftnode.Member{ID: 1, Addr: "n1:1"}, raftnode.Member{ID: 3, Disk: 31, Addr: "n3:1"})
	greet(3, 31, 51, "")
	greet(3, 30, 49, Wiped)

	// What could not be noted is not accepted.
	disks.err = errors.New("the disk is full")
	if _, err := tr.greeted(&peerpb.Hello{NodeId: 5, DiskId: 50}, false); err == nil {
		t.Error("accepted without a note")
	}
}

// A node says that it is listed only where its state lists it, with the directory
// that it has.
func TestListedAt(t *testing.T) {
	id := Identity{NodeID: 3, DiskID: 30}
	for _, c := range []struct {
		name   string
		member raftnode.Member
		want   uint64
	}{
		{"it joined", raftnode.Member{ID: 3, Disk: 30}, 77},
		{"a first member", raftnode.Member{ID: 3}, 0},
		{"with another directory", raftnode.Member{ID: 3, Disk: 31}, 0},
		{"it was removed", raftnode.Member{ID: 3, Disk: 30, Removed: true}, 0},
		{"it never was a member", raftnode.Member{ID: 4, Disk: 30}, 0},
	} {
		if got := id.At(raftnode.Position{Index: 77, Members: []raftnode.Member{c.member}}).hello(1).GetListedAt(); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	if got := (Identity{NodeID: 3}).At(raftnode.Position{Index: 77, Members: []raftnode.Member{{ID: 3}}}).ListedAt; got != 0 {
		t.Errorf("a node without a disk id is listed at %d", got)
	}
}

// standing is where a station has applied the log up to.
type standing struct {
	mu  sync.Mutex
	pos raftnode.Position
}

func (s *standing) set(index uint64, members ...raftnode.Member) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pos = raftnode.Position{Index: index, Members: members}
}

func (s *standing) get() raftnode.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pos
}

// Goal: a node that lags listens to a member that lost its directory and was taken
// in again meanwhile, though nobody else is there to ask and the member is at
// another address than the old one; not to one that was not taken in; and no longer
// once it has applied that the member has been replaced since.
func TestLaggardListensToOneThatRejoined(t *testing.T) {
	checkLeaks(t)
	memory := &diskMemory{known: map[uint64]uint64{2: 22}}
	var here, there standing
	here.set(40, raftnode.Member{ID: 1}, raftnode.Member{ID: 2})
	there.set(1, raftnode.Member{ID: 1}, raftnode.Member{ID: 2})
	a := newStation(t, 1, func(o *TransportOptions) {
		withDisk(11, memory, &refusals{})(o)
		o.Position = here.get
	})
	told := &refusals{}
	b := newStation(t, 2, func(o *TransportOptions) {
		withDisk(23, &diskMemory{}, told)(o)
		o.Position = there.get
	})
	// Where it was before; nobody listens there.
	a.transport.SetMembers([]raftnode.Member{a.member(), {ID: 2, Addr: "127.0.0.1:1"}})
	b.transport.SetMembers([]raftnode.Member{a.member(), b.member()})
	until(t, &told.event, "the refusal", func() bool { _, ok := told.first(); return ok })
	if r, _ := told.first(); r.Kind != Wiped || r.Applied != 40 {
		t.Fatalf("told %+v", r)
	}
	if n := len(a.node.received(raftpb.MsgHeartbeat)); n != 0 {
		t.Fatalf("%d messages of a node that lost its promises", n)
	}

	there.set(105, raftnode.Member{ID: 1}, raftnode.Member{ID: 2, Disk: 23})
	exchange(t, a, b)
	if memory.of(2) != 22 {
		t.Errorf("the word of a node was taken down as disk %d", memory.of(2))
	}
	// This node has caught up, as far as the member.
	members := []raftnode.Member{{ID: 1, Addr: a.id.PeerAddr}, {ID: 2, Addr: b.id.PeerAddr, Disk: 23}}
	here.set(105, members...)
	a.transport.SetMembers(members)
	exchange(t, a, b)

	members[1].Disk = 24
	here.set(200, members...)
	a.transport.SetMembers(members)
	before := told.count()
	var i uint64
	until(t, &told.event, "the end of the stream", func() bool {
		i++
		b.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 2, 1, i)})
		return told.count() > before
	})
}

// Goal: the old directory of a member that has come back on a new one does not come
// between the member and a node that lags, and knows the old one by its own state or
// not at all: once both have spoken, the word of the later index counts, whatever the
// order, and the answers go to where it came from.
func TestOldDirectoryReturnsToALaggard(t *testing.T) {
	for _, c := range []struct {
		name          string
		known, listed uint64 // of member 2, to the laggard
		old           uint64 // where the old directory was last listed
	}{
		{name: "the laggard knows the old one", known: 22, listed: 22, old: 100},
		{name: "the laggard has seen it with the old one", known: 22, old: 0},
		{name: "the laggard knows one before that", known: 21, listed: 21, old: 100},
		{name: "the laggard has seen the new one", known: 23, old: 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			memory := &diskMemory{known: map[uint64]uint64{2: c.known}}
			var here standing
			a := newStation(t, 1, func(o *TransportOptions) {
				withDisk(11, memory, &refusals{})(o)
				o.Position = here.get
			})
			told := &refusals{}
			old := newStation(t, 2, func(o *TransportOptions) {
				withDisk(22, &diskMemory{}, told)(o)
				o.Position = func() raftnode.Position {
					if c.old == 0 {
						return raftnode.Position{Index: 90, Members: []raftnode.Member{{ID: 1}, {ID: 2}}}
					}
					return raftnode.Position{Index: c.old, Members: []raftnode.Member{{ID: 1}, {ID: 2, Disk: 22}}}
				}
			})
			back := newStation(t, 2, func(o *TransportOptions) {
				withDisk(23, &diskMemory{}, &refusals{})(o)
				o.Position = func() raftnode.Position {
					return raftnode.Position{Index: 200, Members: []raftnode.Member{{ID: 1}, {ID: 2, Disk: 23}}}
				}
			})
			here.set(40, raftnode.Member{ID: 1}, raftnode.Member{ID: 2, Disk: c.listed})
			// The old one is where the member was.
			a.transport.SetMembers([]raftnode.Member{a.member(), old.member()})
			old.transport.SetMembers([]raftnode.Member{a.member(), old.member()})
			exchange(t, a, old)
			back.transport.SetMembers([]raftnode.Member{a.member(), back.member()})
			exchange(t, a, back)
			until(t, &told.event, "the refusal of the old one", func() bool {
				old.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 2, 1, 1)})
				_, ok := told.first()
				return ok
			})
			if r, _ := told.first(); r.Kind != Wiped || r.Applied != 200 {
				t.Errorf("the old one was told %+v", r)
			}
			// From here on not one message passes between it and the laggard.
			from, to := len(a.node.received(raftpb.MsgPreVote)), len(old.node.received(raftpb.MsgPreVote))
			dials := old.net.dials.Load()
			until(t, &told.event, "many attempts", func() bool {
				old.transport.Send([]*raftpb.Message{message(raftpb.MsgPreVote, 2, 1, 1)})
				a.transport.Send([]*raftpb.Message{message(raftpb.MsgPreVote, 1, 2, 1)})
				return old.net.dials.Load() > dials+10
			})
			if len(a.node.received(raftpb.MsgPreVote)) != from || len(old.node.received(raftpb.MsgPreVote)) != to {
				t.Error("the old directory is still believed")
			}
			if memory.of(2) != c.known {
				t.Errorf("the word of a node was taken down as disk %d", memory.of(2))
			}
			exchange(t, a, back)
		})
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
