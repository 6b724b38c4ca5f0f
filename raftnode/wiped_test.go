package raftnode

import (
	crand "crypto/rand"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// wipedWorld is a group whose nodes may lose their disks. As rpc does, nodes
// refuse each other's messages when one comes with another disk than the one
// known of it, and those of removed nodes.
type wipedWorld struct {
	*group
	rng    *rand.Rand
	voters []uint64
	// first is the disk each node began with, disk the one it has now.
	first, disk map[uint64]uint64
	away        map[uint64]bool
	wiped       uint64 // the node that has lost its disk and is no voter again
	asking      bool   // it has stopped taking itself for a member, and asks
	added       bool   // it was let in as a learner
	changing    *call
	change      ChangeKind
	proposed    []*asked
	commands    []string
	unguarded   bool
}

func newWipedWorld(t *testing.T, seed uint64, n int) *wipedWorld {
	w := &wipedWorld{
		rng: rand.New(rand.NewPCG(seed, 0x11ce)), first: map[uint64]uint64{}, disk: map[uint64]uint64{}, away: map[uint64]bool{},
	}
	for id := uint64(1); id <= uint64(n); id++ {
		w.voters = append(w.voters, id)
		w.first[id], w.disk[id] = 100+id, 100+id
	}
	w.group = newGroup(t, nil, w.voters...)
	w.drop = func(m *raftpb.Message) bool {
		from, to := m.GetFrom(), m.GetTo()
		if w.asking && !w.added && (from == w.wiped || to == w.wiped) {
			return true // it runs no raft
		}
		return w.away[from] || w.away[to] || !w.unguarded && (!w.accepts(to, from) || !w.accepts(from, to))
	}
	return w
}

// accepts reports whether node listens to other.
func (w *wipedWorld) accepts(node, other uint64) bool {
	if node == w.wiped && !w.added {
		return true // it remembers nothing
	}
	// What a member has applied of itself, the cluster has agreed on; whoever has
	// applied less takes its word: see rpc/disks.go.
	here, there := w.nodes[node].sm.Applied(), w.nodes[other].sm.Applied()
	if m, ok := there.Member(other); ok && !m.Removed && m.Disk == w.disk[other] && there.Index > here.Index {
		return true
	}
	m, ok := here.Member(other)
	switch {
	case ok && m.Removed:
		return false
	case ok && m.Disk != 0:
		return m.Disk == w.disk[other]
	}
	return w.first[other] == w.disk[other]
}

func (w *wipedWorld) leading() *harness {
	for _, id := range w.ids() {
		if h := w.nodes[id]; h.loop.leading() && !w.away[id] && (id != w.wiped || w.added) {
			return h
		}
	}
	return nil
}

// wipe lets a node come back with nothing, taking itself for a first member.
func (w *wipedWorld) wipe(id uint64) {
	w.nodes[id].Node.resolve()
	w.nodes[id] = newHarness(w.t, id, nil, w.voters...)
	w.disk[id] += 1000
	w.wiped, w.asking, w.added = id, false, false
}

// rejoin does the next step of bringing the wiped node back.
func (w *wipedWorld) rejoin() {
	h := w.leading()
	if w.wiped == 0 || h == nil {
		return
	}
	w.asking = true
	if w.changing != nil {
		o, ok := w.changing.poll()
		if !ok {
			return
		}
		w.changing = nil
		if w.change == AddLearner && o.err == nil {
			// The node begins again, with nothing at all.
			w.added = true
			w.nodes[w.wiped].Node.resolve()
			w.nodes[w.wiped] = newHarness(w.t, w.wiped, nil)
		}
		if w.change == Promote && o.err == nil {
			w.wiped = 0
		}
		return
	}
	m, ok := h.sm.Applied().Member(w.wiped)
	c := Change{Kind: Remove, ID: w.wiped, Disk: w.first[w.wiped]}
	switch {
	case ok && !m.Removed && m.Disk == w.disk[w.wiped] && !w.added:
		// The answer was lost, the change was not.
		w.added = true
		w.nodes[w.wiped].Node.resolve()
		w.nodes[w.wiped] = newHarness(w.t, w.wiped, nil)
		return
	case ok && !m.Removed && m.Disk == w.disk[w.wiped] && slices.Contains(h.sm.Applied().ConfState.GetVoters(), w.wiped):
		w.wiped = 0
		return
	case ok && !m.Removed && m.Disk == w.disk[w.wiped]:
		c = Change{Kind: Promote, ID: w.wiped}
	case ok && m.Removed:
		c = Change{Kind: AddLearner, ID: w.wiped, Addr: "again:1", Disk: w.disk[w.wiped], Rejoin: true}
	}
	w.change, w.changing = c.Kind, h.change(c)
}

func (w *wipedWorld) propose() {
	if h := w.leading(); h != nil {
		cmd := fmt.Sprintf("c%d", len(w.commands))
		w.commands = append(w.commands, cmd)
		w.proposed = append(w.proposed, h.propose(cmd))
	}
}

func (w *wipedWorld) round() {
	switch w.rng.IntN(10) {
	case 0:
		w.away[w.voters[w.rng.IntN(len(w.voters))]] = true
	case 1, 2:
		clear(w.away)
	case 3:
		if w.wiped == 0 {
			w.wipe(w.voters[w.rng.IntN(len(w.voters))])
		}
	case 4, 5, 6:
		w.rejoin()
	default:
		w.propose()
	}
	for range w.rng.IntN(12) {
		w.tick()
	}
	w.images()
}

// Nodes lose their disks one after the other, while others are cut off. Goal: as
// long as one node at a time has lost its disk, nothing acknowledged is lost,
// whatever else happens, and the group gets all its voters back. Method: random
// worlds with the refusals of rpc; the seed is printed.
func TestWipedMembersLoseNothing(t *testing.T) {
	saved := crand.Reader
	defer func() { crand.Reader = saved }()
	seeds, wipes, acked := uint64(60), 0, 0
	if testing.Short() {
		seeds = 10
	}
	for seed := uint64(1); seed <= seeds; seed++ {
		crand.Reader = simRandom{rand.New(rand.NewPCG(seed, 0x7a57))}
		w := newWipedWorld(t, seed, 3+2*int(seed%2))
		for range 80 {
			w.round()
		}
		clear(w.away)
		for range 400 {
			w.tick()
			w.images()
			if w.rejoin(); w.wiped == 0 && w.leading() != nil {
				break
			}
		}
		h := w.leading()
		if w.wiped != 0 || h == nil {
			t.Fatalf("seed %d: node %d has not come back (leader %v)", seed, w.wiped, h)
		}
		last := h.propose("last")
		for range 20 {
			w.tick()
			w.images()
		}
		if last.done != 1 || last.err != nil {
			t.Fatalf("seed %d: the group does not go on: %d %v", seed, last.done, last.err)
		}
		got := map[string]int{}
		for _, cmd := range h.sm.commands() {
			got[cmd]++
		}
		for i, a := range w.proposed {
			if a.done == 1 && a.err == nil {
				acked++
				if got[w.commands[i]] != 1 {
					t.Fatalf("seed %d: acknowledged command %s is there %d times", seed, w.commands[i], got[w.commands[i]])
				}
			}
		}
		for id := range w.disk {
			wipes += int(w.disk[id]-w.first[id]) / 1000
		}
	}
	t.Logf("%d disks were lost, %d commands acknowledged", wipes, acked)
	if wipes == 0 || acked == 0 {
		t.Error("nothing happened")
	}
}

// Goal: the refusals are what keeps an empty voter from electing a node that
// lags. Method: the same story with and without them; without, an acknowledged
// command is gone.
func TestAnEmptyVoterWouldElectALaggard(t *testing.T) {
	for _, unguarded := range []bool{false, true} {
		w := newWipedWorld(t, 1, 3)
		h := w.elect(2)
		w.settle()
		w.away[1] = true
		a := h.propose("precious")
		w.settle()
		a.mustBe(t, true, nil)
		// Node 2 dies, node 3 loses its disk, node 1 is back and lacks the entry.
		w.away[1], w.away[2] = false, true
		w.unguarded = unguarded
		w.wipe(3)
		for range 200 {
			w.tick()
		}
		elected := w.nodes[1].loop.leading() || w.nodes[3].loop.leading()
		if elected != unguarded {
			t.Errorf("unguarded %t: a leader was elected %t", unguarded, elected)
		}
	}
}

// Goal: a node that was away while others lost their disks and came back listens to
// them, though nobody is left who knew them by the disks it remembers. Method: of
// five, node 5 is away while 4 and then 3 are wiped and rejoin; then 1 and 2 die, so
// that nothing can be committed without node 5.
func TestALaggardAmongRejoinedMembers(t *testing.T) {
	w := newWipedWorld(t, 1, 5)
	w.elect(1)
	w.settle()
	w.away[5] = true
	for _, id := range []uint64{4, 3} {
		w.wipe(id)
		for range 400 {
			w.tick()
			w.images()
			if w.rejoin(); w.wiped == 0 {
				break
			}
		}
		if w.wiped != 0 {
			t.Fatalf("node %d has not come back", id)
		}
	}
	w.away[1], w.away[2], w.away[5] = true, true, false
	var a *asked
	for range 400 {
		w.tick()
		w.images()
		if h := w.leading(); h != nil && a == nil {
			a = h.propose("together")
		}
	}
	if a == nil || a.done != 1 || a.err != nil {
		t.Fatalf("the three do not go on: %+v", a)
	}
	if got := w.nodes[5].sm.commands(); len(got) == 0 || got[len(got)-1] != "together" {
		t.Fatalf("node 5 has %v", got)
	}
}
