package rpc

import (
	"fmt"
	"strings"
	"testing"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// lag has the node fall behind: what was decided last is not applied here yet.
func (n *oneNode) lag(entries uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.behind = entries
}

// change changes the state with one entry.
func (n *oneNode) change(t *testing.T) uint64 {
	t.Helper()
	return n.must(t, &commandpb.Command{Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
		Create: true, Operation: &commandpb.Operation{OperationId: fmt.Sprint("noted-", n.entryCount()), Kind: "test", State: commandpb.OperationState_OPERATION_STATE_RUNNING},
	}}}).Revision
}

// claims lets every one of ids say, on one stream, that it has applied a revision.
func (c *beatClient) claims(ids []string, revision uint64) {
	c.a.t.Helper()
	req := &sidecarpb.HeartbeatStreamRequest{}
	for i, id := range ids {
		req.Full = append(req.Full, &sidecarpb.StreamedHeartbeat{Number: uint32(i), Heartbeat: &sidecarpb.SidecarHeartbeatRequest{
			SidecarId: id, AppliedRevision: revision, AppliedEpoch: c.a.node.fsm.Epoch(),
		}})
	}
	c.send(req)
}

// waits says whether it is kept, and nothing else is due, that a sidecar says to have
// applied a revision.
func (a *api) waits(id string, revision uint64) bool {
	a.told.mu.Lock()
	m := a.told.by[id].member
	a.told.mu.Unlock()
	m.stream.mu.Lock()
	defer m.stream.mu.Unlock()
	return m.claim.revision == revision && m.due == 0
}

func (a *api) fleet(n int) (ids []string) {
	a.t.Helper()
	for i := range n {
		ids = append(ids, fmt.Sprintf("ns/pod-%03d", i))
		a.registerSidecar(ids[i])
	}
	a.noted()
	return ids
}

// Goal: a stream of many sidecars that are ahead of this node waits for it once in a
// round, not once for each of them, and what they said counts as soon as the node has
// caught up, though none of them says it again. Method: the node says that it lags,
// and counts how often it is asked.
func TestClaimsAheadOfTheNode(t *testing.T) {
	a := newAPI(t)
	ids := a.fleet(200)
	c := a.streamBeats()
	for i, id := range ids {
		c.introduce(uint32(i), id)
	}
	next := a.node.fsm.Revision() + 1
	a.node.lag(1)
	before := a.node.readCount()
	c.claims(ids, next)
	eventually(t, "all claims wait for the node", func() bool {
		for _, id := range ids {
			if !a.waits(id, next) {
				return false
			}
		}
		return true
	})
	// One for the round, and those of the one goroutine that waits for the node.
	if n := a.node.readCount() - before; n > 10 {
		t.Errorf("%d sidecars made the node ask %d times", len(ids), n)
	}
	if revision, _ := a.entryOf(ids[7]).upTo(); revision != 0 {
		t.Errorf("revision %d counts, which this node does not have", revision)
	}
	a.node.lag(0)
	if got := a.node.change(t); got != next {
		t.Fatalf("the state is at %d, want %d", got, next)
	}
	eventually(t, "every claim counts", func() bool {
		for _, id := range ids {
			if revision, _ := a.entryOf(id).upTo(); revision != next {
				return false
			}
		}
		return true
	})
}

// Goal: the word that was kept and turns out to be of what was never decided is
// answered so, and the newest one is kept.
func TestClaimThatWaitsIsReplaced(t *testing.T) {
	a := newAPI(t)
	ids := a.fleet(2)
	c := a.streamBeats()
	c.introduce(0, ids[0])
	c.introduce(1, ids[1])
	next := a.node.fsm.Revision() + 1
	a.node.lag(1)
	c.claims(ids, 1<<40)
	c.claims(ids[:1], next)
	eventually(t, "both wait", func() bool { return a.waits(ids[0], next) && a.waits(ids[1], 1<<40) })
	a.node.lag(0)
	a.node.change(t)
	if r := c.answer(1); !r.GetAcknowledged() || !strings.Contains(r.GetReason(), "does not exist in this cluster") {
		t.Fatal(r)
	}
	eventually(t, "the newer claim counts", func() bool {
		revision, _ := a.entryOf(ids[0]).upTo()
		return revision == next
	})
}

// Goal: what is said before a sidecar is judged, or with news of another kind after
// it, is not lost.
func TestClaimWithOtherNews(t *testing.T) {
	a := newAPI(t)
	ids := a.fleet(1)
	for range 3 {
		a.node.change(t)
	}
	s := &sidecarStream{api: a.sidecarAPI(), bell: newBell(), stream: beatsFrom{ctx: a.from("10.0.0.1")}}
	defer s.close()
	say := func(applied uint64, health ...*sidecarpb.LocalServiceHealth) {
		t.Helper()
		noError(t, s.take(full(0, &sidecarpb.SidecarHeartbeatRequest{SidecarId: ids[0], AppliedRevision: applied, ServiceHealth: health})))
	}
	answer := func() {
		t.Helper()
		_, err := s.work(s.stream.Context(), s.next(make([]dueMember, 0, 1)))
		noError(t, err)
	}
	upTo := func(want uint64) {
		t.Helper()
		if got, _ := a.entryOf(ids[0]).upTo(); got != want {
			t.Fatalf("known to have applied %d, want %d", got, want)
		}
	}
	say(1)
	answer()
	upTo(1)
	say(2)
	say(0, &sidecarpb.LocalServiceHealth{ServiceName: "x"})
	answer()
	upTo(2)
	m := s.member(0)
	a.told.detach(m) // as when it is forgotten between two heartbeats
	s.due(m, dueNews, &sidecarpb.SidecarHeartbeatRequest{SidecarId: ids[0], AppliedRevision: 3})
	answer()
	noError(t, s.take(&sidecarpb.HeartbeatStreamRequest{Alive: []uint32{0}}))
	answer()
	upTo(3)
}
