package raftnode

import (
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
)

func wantMembers(t *testing.T, pos Position, want ...Member) {
	t.Helper()
	if !slices.Equal(pos.Members, want) {
		t.Fatalf("the members are %+v, want %+v", pos.Members, want)
	}
}

// Goal: what is known of a member goes through its whole life, and a refused
// change moves the position and nothing else. Method: changes are applied one
// after the other; each line says what must come out, none that it is refused.
func TestMemberLife(t *testing.T) {
	one, two := Member{ID: 1, Addr: "node-1:1"}, Member{ID: 2, Addr: "node-2:1"}
	gone := Member{ID: 4, Disk: 44, Removed: true}
	pos := bootPosition(1, 2)
	for i, step := range []struct {
		change Change
		want   []Member
	}{
		{Change{Kind: AddLearner, ID: 4, Addr: "d:1", Disk: 44, ReadReplica: true}, []Member{one, two, {ID: 4, Addr: "d:1", Disk: 44, ReadReplica: true}}},
		{Change{Kind: UpdateAddr, ID: 4, Addr: "d:2"}, []Member{one, two, {ID: 4, Addr: "d:2", Disk: 44, ReadReplica: true}}},
		{Change{Kind: Promote, ID: 4}, []Member{one, two, {ID: 4, Addr: "d:2", Disk: 44}}},
		{Change{Kind: Remove, ID: 4}, []Member{one, two, gone}},
		{Change{Kind: AddLearner, ID: 4, Addr: "x", Disk: 45}, nil},
		{Change{Kind: AddLearner, ID: 4, Addr: "x", Rejoin: true}, nil},
		{Change{Kind: AddLearner, ID: 4, Addr: "x", Rejoin: true, Disk: 44}, nil},
		{Change{Kind: Promote, ID: 4}, nil},
		// It is not there: there is nothing to say of it, and it is not forgotten.
		{Change{Kind: UpdateAddr, ID: 4, Addr: "x", Disk: 46}, []Member{one, two, gone}},
		{Change{Kind: Remove, ID: 4}, []Member{one, two, gone}},
		{Change{Kind: UpdateAddr, ID: 7, Addr: "x"}, []Member{one, two, gone}},
		{Change{Kind: AddLearner, ID: 4, Addr: "d:9", Rejoin: true, Disk: 46}, []Member{one, two, {ID: 4, Addr: "d:9", Disk: 46}}},
		{Change{Kind: Remove, ID: 4}, []Member{one, two, {ID: 4, Disk: 46, Removed: true}}},
	} {
		cc, ctx := confChangeOf(t, step.change)
		before := pos.clone()
		next, refused := pos.after(pos.Index+1, 2, cc, ctx)
		if (refused != nil) != (step.want == nil) {
			t.Fatalf("step %d, %+v: %v", i, step.change, refused)
		}
		if refused != nil {
			step.want = before.Members
			if !sameConfState(next.ConfState, before.ConfState) {
				t.Fatalf("step %d was refused and made %v of %v", i, next.ConfState, before.ConfState)
			}
		}
		wantMembers(t, next, step.want...)
		wantMembers(t, pos, before.Members...)
		if next.Index != before.Index+1 || next.Term != 2 {
			t.Fatalf("step %d ends at entry %d (term %d)", i, next.Index, next.Term)
		}
		pos = next
	}
}

// A member that is replaced is one until the joint configuration is left.
func TestReplacedMemberStaysUntilTheEnd(t *testing.T) {
	pos := bootPosition(1, 2)
	for _, c := range []Change{{Kind: AddLearner, ID: 3, Addr: "c:1", Disk: 33}, {Kind: Promote, ID: 3, Replaces: 2}} {
		cc, ctx := confChangeOf(t, c)
		var refused error
		if pos, refused = pos.after(pos.Index+1, 2, cc, ctx); refused != nil {
			t.Fatal(refused)
		}
	}
	if !isJoint(pos.ConfState) {
		t.Fatalf("not joint: %v", pos.ConfState)
	}
	wantMembers(t, pos, Member{ID: 1, Addr: "node-1:1"}, Member{ID: 2, Addr: "node-2:1"}, Member{ID: 3, Addr: "c:1", Disk: 33})
	pos, refused := pos.after(pos.Index+1, 2, &raftpb.ConfChangeV2{}, changeContext{})
	if refused != nil {
		t.Fatal(refused)
	}
	wantMembers(t, pos, Member{ID: 1, Addr: "node-1:1"}, Member{ID: 2, Removed: true}, Member{ID: 3, Addr: "c:1", Disk: 33})
	if meta := imageMeta(pos); len(meta.Members) != 2 || meta.Members[1].ID != 3 {
		t.Fatalf("an image lists %v", meta.Members)
	}
}

// Goal: removed nodes stay known whatever way a state comes to a node. Method:
// nodes leave, the rest restarts with and without their newest state, the log is
// replayed; one comes back with another disk and gets everything from an image.
func TestRemovedSurviveImageAndRestart(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3, 4)
	h := g.elect(1)
	begin := h.sm.Applied()
	g.mustChange(h, Change{Kind: UpdateAddr, ID: 3, Addr: "c:1", Disk: 33})
	g.mustRefuse(h, Change{Kind: UpdateAddr, ID: 3, Addr: "c:1", Disk: 34}, ErrMembershipRefused)
	g.mustChange(h, Change{Kind: Remove, ID: 3})
	pos := g.mustChange(h, Change{Kind: Remove, ID: 4})
	gone := []Member{{ID: 3, Disk: 33, Removed: true}, {ID: 4, Removed: true}}
	wantMembers(t, pos, append(bootPosition(1, 2).Members, gone...)...)
	for _, flush := range []bool{false, true} {
		if flush {
			if _, err := h.sm.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		h.crash(0)
		h = g.elect(1)
		wantMembers(t, h.sm.Applied(), pos.Members...)
		g.mustRefuse(h, Change{Kind: AddLearner, ID: 3, Addr: "c:2", Disk: 34}, ErrMembershipRefused)
	}
	entries, err := h.log.Entries(begin.Index+1, pos.Index+1, 1<<62)
	if err != nil {
		t.Fatal(err)
	}
	sm := newMemMachine(vfs.NewMem(), begin)
	r := NewReplay(sm, 1)
	for _, e := range entries {
		if err := r.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	wantMembers(t, sm.Applied(), pos.Members...)

	h.propose("what the image is known by")
	g.settle()
	g.nodes[3] = newHarness(t, 3, nil)
	installed := 0
	g.nodes[3].Node.cfg.Events.ImageInstalled = func(time.Duration, uint64) { installed++ }
	g.mustChange(h, Change{Kind: AddLearner, ID: 3, Addr: "c:2", Disk: 34, Rejoin: true})
	g.catchUp(3)
	three := g.nodes[3]
	if installed == 0 {
		t.Fatal("node 3 was not brought up by an image")
	}
	want := append(bootPosition(1, 2).Members, Member{ID: 3, Addr: "c:2", Disk: 34}, gone[1])
	wantMembers(t, three.sm.Applied(), want...)
	three.crash(0)
	wantMembers(t, three.sm.Applied(), want...)
	// It knows as much as the others when it leads.
	g.mustChange(h, Change{Kind: Promote, ID: 3})
	three = g.elect(3)
	g.mustRefuse(three, Change{Kind: AddLearner, ID: 4, Addr: "d:2"}, ErrMembershipRefused)
}
