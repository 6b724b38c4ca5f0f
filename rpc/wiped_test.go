package rpc

import (
	"errors"
	"sync"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
)

// diskMemory is a Disks in memory.
type diskMemory struct {
	mu    sync.Mutex
	known map[uint64]uint64
	fail  error
	asked event
}

func (d *diskMemory) Check(node, disk uint64) (bool, error) {
	defer d.asked.fire()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return false, d.fail
	}
	if d.known == nil {
		d.known = map[uint64]uint64{}
	}
	if _, ok := d.known[node]; !ok {
		d.known[node] = disk
	}
	return d.known[node] == disk, nil
}

func (d *diskMemory) of(node uint64) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.known[node]
}

// refusals keeps what a transport was told.
type refusals struct {
	mu    sync.Mutex
	all   []RefusedError
	event event
}

func (r *refusals) add(e *RefusedError) {
	r.mu.Lock()
	r.all = append(r.all, *e)
	r.mu.Unlock()
	r.event.fire()
}

func (r *refusals) first() (RefusedError, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) == 0 {
		return RefusedError{}, false
	}
	return r.all[0], true
}

func (r *refusals) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// withDisk gives a station a data directory, a memory of those of others and an
// ear for refusals.
func withDisk(disk uint64, d Disks, r *refusals) func(*TransportOptions) {
	return func(o *TransportOptions) {
		o.Identity.DiskID, o.Disks, o.OnRefused = disk, d, r.add
	}
}

// exchange sends heartbeats both ways until each has got one.
func exchange(t *testing.T, a, b *station) {
	t.Helper()
	for _, s := range [][2]*station{{a, b}, {b, a}} {
		from, to := s[0], s[1]
		before := len(to.node.received(raftpb.MsgHeartbeat))
		var i uint64
		until(t, &to.node.event, "a heartbeat", func() bool {
			i++
			from.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, from.id.NodeID, to.id.NodeID, i)})
			if len(to.node.received(raftpb.MsgHeartbeat)) > before {
				return true
			}
			to.node.event.fire()
			return false
		})
	}
}

// Goal: a node is known by the data directory it was seen with first. When it
// comes with another one, not one message passes between the two, whoever calls
// whom; it is told why and where to ask; the log of the other is not filled.
func TestWipedNodeIsRefused(t *testing.T) {
	checkLeaks(t)
	memory := &diskMemory{}
	a := newStation(t, 1, withDisk(11, memory, &refusals{}))
	b := newStation(t, 2, withDisk(22, &diskMemory{}, &refusals{}))
	introduce(a, b)
	exchange(t, a, b)
	if memory.of(2) != 22 {
		t.Fatalf("node 2 is known with disk %d", memory.of(2))
	}
	b.transport.Close()
	b.stopServer()

	told := &refusals{}
	wiped := newStation(t, 2, withDisk(23, &diskMemory{}, told))
	introduce(a, wiped)
	until(t, &told.event, "the refusal", func() bool { _, ok := told.first(); return ok })
	if r, _ := told.first(); r.Kind != Wiped || r.Peer != 1 || r.ClientAddr != "client-1:1" || !r.Told || !errors.Is(&r, ErrRefused) {
		t.Fatalf("told %+v", r)
	}
	dials := a.net.dials.Load()
	until(t, &memory.asked, "many attempts of both", func() bool {
		a.transport.Send([]*raftpb.Message{message(raftpb.MsgPreVote, 1, 2, 1)})
		wiped.transport.Send([]*raftpb.Message{message(raftpb.MsgPreVote, 2, 1, 1)})
		return a.net.dials.Load() > dials+20 && wiped.net.dials.Load() > 20
	})
	if n, m := len(a.node.received(raftpb.MsgPreVote)), len(wiped.node.received(raftpb.MsgPreVote)); n+m != 0 {
		t.Fatalf("%d messages of and %d to a node that lost its promises", n, m)
	}
	if memory.of(2) != 22 {
		t.Fatal("the other directory is taken for the known one")
	}
	// Once the group has agreed on the new one, the two talk.
	memory.mu.Lock()
	memory.known[2] = 23
	memory.mu.Unlock()
	exchange(t, a, wiped)
}

// Goal: what cannot be written down is not accepted, and one who does not say is.
func TestDiskThatCannotBeRecorded(t *testing.T) {
	checkLeaks(t)
	full := &diskMemory{fail: errors.New("no space")}
	a := newStation(t, 1, withDisk(11, full, &refusals{}))
	b := newStation(t, 2, withDisk(22, &diskMemory{}, &refusals{}))
	introduce(a, b)
	dials := a.net.dials.Load()
	until(t, &full.asked, "attempts", func() bool {
		b.transport.Send([]*raftpb.Message{message(raftpb.MsgHeartbeat, 2, 1, 1)})
		return a.net.dials.Load() > dials+5
	})
	if n := len(a.node.received(raftpb.MsgHeartbeat)); n != 0 {
		t.Fatalf("%d messages of a node whose directory is not on record", n)
	}
	full.mu.Lock()
	full.fail = nil
	full.mu.Unlock()
	exchange(t, a, b)

	old := newStation(t, 3, nil) // an earlier release
	a.transport.SetMembers([]raftnode.Member{a.member(), b.member(), old.member()})
	old.transport.SetMembers([]raftnode.Member{a.member(), old.member()})
	exchange(t, a, old)
}

// Goal: a node that comes up asks whether it is known with another directory, and
// those who are down do not keep it.
func TestAskRefusal(t *testing.T) {
	checkLeaks(t)
	a := newStation(t, 1, withDisk(11, &diskMemory{known: map[uint64]uint64{2: 22}}, &refusals{}))
	self := Identity{ClusterID: testCluster, NodeID: 2, DiskID: 23, PeerAddr: "127.0.0.1:1", ClientAddr: "c:1"}
	peers := []raftnode.Member{{ID: 1, Addr: a.id.PeerAddr}, {ID: 2, Addr: self.PeerAddr}, {ID: 3, Addr: "127.0.0.1:1"}, {ID: 4}}
	if r := AskRefusal(t.Context(), self, peers); r == nil || r.Kind != Wiped || r.Peer != 1 {
		t.Fatalf("%+v", r)
	}
	self.DiskID = 22
	if r := AskRefusal(t.Context(), self, peers); r != nil {
		t.Fatalf("%+v", r)
	}
}
