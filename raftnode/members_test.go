package raftnode

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// confChangeOf returns raft's form of c and what travels with it.
func confChangeOf(t *testing.T, c Change) (*raftpb.ConfChangeV2, changeContext) {
	t.Helper()
	cc, err := c.confChange()
	if err != nil {
		t.Fatal(err)
	}
	ctx, err := decodeChangeContext(cc.GetContext())
	if err != nil {
		t.Fatal(err)
	}
	return cc, ctx
}

// Goal: an id or a data directory that left the group does not come back, and no
// voter is demoted by adding it again; every node decides so from the log alone.
func TestAdmit(t *testing.T) {
	members := []Member{{ID: 1, Addr: "a"}, {ID: 2, Disk: 7, Removed: true}, {ID: 4, Removed: true}}
	full := []Member{{ID: 1, Addr: "a"}}
	for i := range uint64(maxMembers - 1) {
		full = append(full, Member{ID: 100 + i, Disk: 5, Removed: true})
	}
	for _, c := range []struct {
		name    string
		members []Member
		change  Change
		refused string
	}{
		{"a new id", members, Change{Kind: AddLearner, ID: 3, Addr: "x"}, ""},
		{"a member", members, Change{Kind: AddLearner, ID: 1, Addr: "x", Disk: 8, Rejoin: true}, "a member already"},
		{"a used id", members, Change{Kind: AddLearner, ID: 2, Addr: "x", Disk: 8}, "not reused"},
		{"the old disk", members, Change{Kind: AddLearner, ID: 2, Addr: "x", Disk: 7, Rejoin: true}, "with this data directory"},
		{"no disk", members, Change{Kind: AddLearner, ID: 4, Addr: "x", Rejoin: true}, "with this data directory"},
		{"a new disk", members, Change{Kind: AddLearner, ID: 2, Addr: "x", Disk: 8, Rejoin: true}, ""},
		{"a new disk, the old unknown", members, Change{Kind: AddLearner, ID: 4, Addr: "x", Disk: 8, Rejoin: true}, ""},
		{"a voter under a used id", members, Change{Kind: Promote, ID: 2}, "not reused"},
		{"the last place", full[:maxMembers-1], Change{Kind: AddLearner, ID: 2, Addr: "x"}, ""},
		{"one too many", full, Change{Kind: AddLearner, ID: 2, Addr: "x"}, "has had 1024 members"},
		{"a long address", members, Change{Kind: AddLearner, ID: 3, Addr: strings.Repeat("x", maxAddrBytes)}, ""},
		{"too long an address", members, Change{Kind: AddLearner, ID: 3, Addr: strings.Repeat("x", maxAddrBytes+1)}, "at most 512"},
		{"too long a new address", members, Change{Kind: UpdateAddr, ID: 1, Addr: strings.Repeat("x", maxAddrBytes+1)}, "at most 512"},
		{"a full record lets members go", full, Change{Kind: Remove, ID: 1}, ""},
		{"a full record lets members return", full, Change{Kind: AddLearner, ID: 100, Addr: "x", Disk: 6, Rejoin: true}, ""},
	} {
		cc, ctx := confChangeOf(t, c.change)
		err := admit(c.members, cc, ctx)
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v, want %q", c.name, err, c.refused)
		}
	}
}

// A change written by an earlier release says nothing of disks.
func TestChangeContextVersions(t *testing.T) {
	for text, want := range map[string]string{
		``: "", `{"v":1,"members":[{"ID":4,"Addr":"x"}]}`: "", `{"v":3}`: "newer release", `{"v":0}`: "newer release", `{`: "cannot be read",
	} {
		ctx, err := decodeChangeContext([]byte(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) || ctx.Rejoin {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestNextMembers(t *testing.T) {
	members := []Member{{ID: 1, Addr: "a"}, {ID: 2, Addr: "b", Disk: 7}, {ID: 3, Disk: 5, Removed: true}, {ID: 5, Addr: "e", Disk: 9, ReadReplica: true}}
	for _, c := range []struct {
		name string
		set  []Member
		cs   *raftpb.ConfState
		want []Member
	}{
		{"removed", nil, &raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{5}},
			[]Member{members[0], {ID: 2, Disk: 7, Removed: true}, members[2], members[3]}},
		{"on its way out", nil, &raftpb.ConfState{Voters: []uint64{1}, VotersOutgoing: []uint64{1, 2}, Learners: []uint64{5}}, members},
		{"a new address", []Member{{ID: 5, Addr: "f"}}, &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{5}},
			[]Member{members[0], members[1], members[2], {ID: 5, Addr: "f", Disk: 9, ReadReplica: true}}},
		{"rejoined", []Member{{ID: 3, Addr: "c", Disk: 6}}, &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{3, 5}},
			[]Member{members[0], members[1], {ID: 3, Addr: "c", Disk: 6}, members[3]}},
		{"a read replica is made a voter", nil, &raftpb.ConfState{Voters: []uint64{1, 2, 5}},
			[]Member{members[0], members[1], members[2], {ID: 5, Addr: "e", Disk: 9}}},
		{"a disk that was not known", []Member{{ID: 1, Addr: "a", Disk: 3}}, &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{5}},
			[]Member{{ID: 1, Addr: "a", Disk: 3}, members[1], members[2], members[3]}},
		{"a disk is told once", []Member{{ID: 2, Addr: "b", Disk: 3}}, &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{5}}, members},
		{"removed with a disk", []Member{{ID: 1, Disk: 3}}, &raftpb.ConfState{Voters: []uint64{2}, Learners: []uint64{5}},
			[]Member{{ID: 1, Disk: 3, Removed: true}, members[1], members[2], members[3]}},
		{"added", []Member{{ID: 4, Addr: "d", ReadReplica: true}}, &raftpb.ConfState{Voters: []uint64{1, 2}, Learners: []uint64{4, 5}},
			[]Member{members[0], members[1], members[2], {ID: 4, Addr: "d", ReadReplica: true}, members[3]}},
	} {
		before := fmt.Sprint(members)
		if got := nextMembers(members, c.set, c.cs); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
		if fmt.Sprint(members) != before {
			t.Fatalf("%s: the argument was changed", c.name)
		}
	}
}

// What the leader lets through because it has not applied the removal yet is
// refused by everybody where it is applied.
func TestRemovedIDIsRefusedAtApply(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	g.settle()
	g.mustChange(h, Change{Kind: Remove, ID: 3})
	g.mustRefuse(h, Change{Kind: AddLearner, ID: 3, Addr: "x"}, ErrMembershipRefused)
	blind := h.loop.members
	h.loop.members = func() []Member { return nil }
	cl := h.change(Change{Kind: AddLearner, ID: 3, Addr: "x"})
	g.settle()
	if o, ok := cl.poll(); !ok || !errors.Is(o.err, ErrMembershipRefused) {
		t.Fatalf("%v %v", ok, o.err)
	}
	h.loop.members = blind
	pos := g.mustChange(h, Change{Kind: AddLearner, ID: 3, Addr: "x", Disk: 8, Rejoin: true})
	if got, _ := pos.Member(3); got != (Member{ID: 3, Addr: "x", Disk: 8}) {
		t.Fatalf("rejoined as %v", got)
	}
	for _, id := range []uint64{1, 2} {
		if got := g.nodes[id].sm.Applied(); fmt.Sprint(got.Members) != fmt.Sprint(pos.Members) {
			t.Fatalf("node %d holds %v, the leader %v", id, got.Members, pos.Members)
		}
	}
}
