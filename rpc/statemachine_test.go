package rpc

import (
	"errors"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

func samePosition(a, b raftnode.Position) bool {
	return a.Index == b.Index && a.Term == b.Term && proto.Equal(a.ConfState, b.ConfState) && slices.Equal(a.Members, b.Members)
}

// What raftnode hands to the state machine comes back as it was, through the
// real state, an image, and another node.
func TestStateMachineAdapter(t *testing.T) {
	first := raftnode.Position{Index: 1, Term: 1, ConfState: &raftpb.ConfState{Voters: []uint64{1, 2, 3}},
		Members: []raftnode.Member{{ID: 1, Addr: "a:1"}, {ID: 2, Addr: "b:1"}, {ID: 3, Addr: "c:1"}}}
	bootstrap, err := EncodePosition(first)
	if err != nil {
		t.Fatal(err)
	}
	fs := vfs.NewMem()
	open := func(dir string) raftnode.StateMachine {
		t.Helper()
		fsm, err := router.Open(fs, dir, router.Options{Bootstrap: bootstrap})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { fsm.Close() })
		sm, err := NewStateMachine(fsm)
		if err != nil {
			t.Fatal(err)
		}
		return sm
	}
	a := open("a")
	if !samePosition(a.Applied(), first) {
		t.Fatalf("a new state is at %+v", a.Applied())
	}
	command := func(offset uint64) []byte {
		raw, err := (&commandpb.Command{TimeMs: 1, Op: &commandpb.Command_CommitSourceOffset{
			CommitSourceOffset: &commandpb.CommitSourceOffset{SourceId: "s", Offset: offset}}}).MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	results, err := a.Apply([]raftnode.Batch{
		{Index: 2, Term: 1},
		{Index: 3, Term: 1, Commands: [][]byte{command(5), command(7)}, Local: true},
		{Index: 4, Term: 1, Commands: [][]byte{command(9)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 3 || len(results[0]) != 0 || len(results[1]) != 2 || len(results[2]) != 0 {
		t.Fatalf("results: %v", results)
	}
	for i, want := range []uint64{5, 7} {
		r, ok := results[1][i].(*commandpb.Result)
		if !ok || r.GetRejection() != nil || r.GetOffset() != want {
			t.Errorf("result %d: %v", i, results[1][i])
		}
	}
	next := raftnode.Position{Index: 5, Term: 2, ConfState: &raftpb.ConfState{Voters: []uint64{1, 2}},
		Members: []raftnode.Member{{ID: 1, Addr: "a:1"}, {ID: 2, Addr: "moved:1"}}}
	if err := a.ApplyMembership(next); err != nil {
		t.Fatal(err)
	}
	if !samePosition(a.Applied(), next) {
		t.Fatalf("after a membership change: %+v", a.Applied())
	}
	pos, err := a.Image("image")
	if err != nil || !samePosition(pos, next) {
		t.Fatalf("the image is at %+v, %v", pos, err)
	}
	b := open("b")
	pos, err = b.Install("image")
	if err != nil || !samePosition(pos, next) || !samePosition(b.Applied(), next) {
		t.Fatalf("installed at %+v, %v", pos, err)
	}
}

func TestPositionRoundTrip(t *testing.T) {
	for _, p := range []raftnode.Position{
		{Index: 1, Term: 1, ConfState: &raftpb.ConfState{}},
		{Index: 1 << 60, Term: 9, ConfState: &raftpb.ConfState{Voters: []uint64{1}, Learners: []uint64{2},
			VotersOutgoing: []uint64{1, 3}, LearnersNext: []uint64{3}, AutoLeave: new(true)},
			Members: []raftnode.Member{{ID: 1, Addr: "[::1]:7"}}},
	} {
		raw, err := EncodePosition(p)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodePosition(raw)
		if err != nil || !samePosition(got, p) {
			t.Errorf("%+v came back as %+v, %v", p, got, err)
		}
	}
	for _, bad := range []router.Position{{ConfState: []byte{0xff}}, {Members: []byte("{")}} {
		if _, err := DecodePosition(bad); !errors.Is(err, router.ErrCorrupt) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
