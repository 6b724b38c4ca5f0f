package raftnode

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
)

// Goal: replaying a log gives the state the group came to, membership included.
// Method: a group changes and commits; the log of its leader is replayed, in
// batches of several sizes, onto the state it began with.
func TestReplayEqualsTheGroup(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	begin := h.sm.Applied()
	for i := range 5 {
		h.propose(fmt.Sprint(i))
	}
	g.settle()
	g.nodes[4] = newHarness(t, 4, nil)
	g.mustChange(h, Change{Kind: AddLearner, ID: 4, Addr: "node-4:1"})
	g.catchUp(4)
	g.mustChange(h, Change{Kind: Promote, ID: 4, Replaces: 3})
	h.propose("last")
	g.settle()
	want := h.sm.Applied()
	first, _ := h.log.FirstIndex()
	entries, err := h.log.Entries(begin.Index+1, want.Index+1, 1<<62)
	if err != nil {
		t.Fatalf("the log begins at %d, the state at %d: %v", first, begin.Index, err)
	}
	if begin.Index+1 != first {
		// The first election is part of the state already.
		t.Logf("replaying from %d", begin.Index+1)
	}
	for _, size := range []int{1, 20, 1 << 20} {
		pos := begin
		sm := newMemMachine(vfs.NewMem(), pos)
		sm.state.Commands = nil
		r := NewReplay(sm, size)
		for _, e := range entries {
			if err := r.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := sm.Applied(); got.Index != want.Index || got.Term != want.Term ||
			!sameConfState(got.ConfState, want.ConfState) || !slices.Equal(got.Members, want.Members) {
			t.Errorf("batches of %d bytes end at %+v, the group at %+v", size, got, want)
		}
		if got := sm.commands(); !slices.Equal(got, h.sm.commands()) {
			t.Errorf("batches of %d bytes: commands %q, the group has %q", size, got, h.sm.commands())
		}
	}
	r := NewReplay(newMemMachine(vfs.NewMem(), begin), 1)
	if err := r.Add(entries[1]); err == nil {
		t.Error("an entry out of order was taken")
	}
}

func TestJudgeFit(t *testing.T) {
	term := func(i uint64) (uint64, error) {
		if i < 9 || i > 20 {
			return 0, errors.New("not there")
		}
		return 2 + i/15, nil // 2, from 15 on 3
	}
	for _, c := range []struct {
		index, term, commit uint64
		want                Fit
		err                 error
	}{
		{index: 8, term: 2, commit: 9, want: FitBehind},
		{index: 9, term: 2, commit: 9, want: FitOK},
		{index: 14, term: 2, commit: 12, want: FitOK},
		{index: 20, term: 3, commit: 20, want: FitOK},
		{index: 21, term: 3, commit: 20, want: FitInstalled},
		{index: 14, term: 4, commit: 12, want: FitInstalled},
		{index: 14, term: 4, commit: 14, err: ErrDiverged},
		{index: 14, term: 2, commit: 21, err: ErrDiverged},
	} {
		pos := Position{Index: c.index, Term: c.term, ConfState: &raftpb.ConfState{}}
		got, err := JudgeFit(pos, 10, 20, c.commit, term)
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%+v: %v, %v", c, got, err)
		}
	}
}
