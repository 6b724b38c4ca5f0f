package router

import (
	"errors"
	"math/rand"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/encoding/protowire"

	"conveyor.etl/router/router/commandpb"
)

// TestUnknownCommandStopsTheReplica, for good, and without a trace of the
// entry it is in.
func TestUnknownCommandStopsTheReplica(t *testing.T) {
	unknown := protowire.AppendBytes(protowire.AppendTag(nil, 99, protowire.BytesType), []byte("x"))
	inBatch := marshal(t, &commandpb.Command{Op: &commandpb.Command_CommitBatch{CommitBatch: &commandpb.CommitBatch{Ops: []*commandpb.CommitOp{{}}}}})
	// The operation inside is of a kind only a newer release knows.
	inBatch = append(inBatch[:len(inBatch)-2], append([]byte{0x0a, byte(len(unknown))}, unknown...)...)
	inBatch[2] = byte(len(unknown) + 2)
	for name, raw := range map[string][]byte{"unknown": unknown, "garbage": {0xff, 0xff, 0xff}, "in a batch": inBatch} {
		t.Run(name, func(t *testing.T) {
			s := openMem(t)
			before := hash(t, s)
			good := marshal(t, offsetCommand("a", 1))
			_, err := s.Apply([]Entry{{Index: 2, Term: 1, Commands: [][]byte{good, raw}}})
			if !errors.Is(err, ErrUnknownCommand) {
				t.Fatalf("got %v, want ErrUnknownCommand", err)
			}
			if s.Applied().Index != 1 || hash(t, s) != before {
				t.Fatal("part of the entry was applied")
			}
			if _, err := s.Apply([]Entry{{Index: 2, Term: 1}}); !errors.Is(err, ErrUnknownCommand) {
				t.Fatalf("Apply went on with %v", err)
			}
		})
	}
}

// TestEntriesFollowEachOther: a gap or a repeat is an error, not a guess.
func TestEntriesFollowEachOther(t *testing.T) {
	for _, index := range []uint64{1, 3} {
		s := openMem(t)
		if _, err := s.Apply([]Entry{{Index: index, Term: 1}}); err == nil {
			t.Fatalf("entry %d was taken after 1", index)
		}
	}
}

// TestMembershipIsPartOfThePosition and survives a restart with it.
func TestMembershipIsPartOfThePosition(t *testing.T) {
	s := openMem(t)
	want := Position{Index: 2, Term: 3, ConfState: []byte("c2"), Members: []byte("m2")}
	noError(t, s.ApplyMembership(want))
	if s.Durable() != 1 {
		t.Fatalf("durable %d before a flush", s.Durable())
	}
	i, err := s.Flush()
	noError(t, err)
	got := s.Applied()
	if i != 2 || got.Index != 2 || got.Term != 3 || string(got.ConfState) != "c2" || string(got.Members) != "m2" {
		t.Fatalf("flushed %d, applied %+v", i, got)
	}
	apply(t, s, offsetCommand("a", 1))
	if got := s.Applied(); got.Index != 3 || string(got.Members) != "m2" {
		t.Fatalf("applied %+v", got)
	}
}

// TestLimits: what is too large is refused and leaves nothing behind.
func TestLimits(t *testing.T) {
	s := openMem(t)
	long := strings.Repeat("x", maxIDBytes+1)
	big := &commandpb.SaveCheckpoint{ServiceId: "a", CheckpointId: "c", Data: make([]byte, maxCheckpointBytes+1)}
	stages := &commandpb.PipelineSpec{Id: "p", Stages: make([]*commandpb.Stage, maxStages+1)}
	for i := range stages.Stages {
		stages.Stages[i] = &commandpb.Stage{}
	}
	deep := &commandpb.Condition{}
	for range 10_000 {
		deep = &commandpb.Condition{Condition: &commandpb.Condition_Not{Not: deep}}
	}
	nested := &commandpb.PipelineSpec{Id: "p", Edges: []*commandpb.Edge{{Condition: deep}}}
	res := apply(t, s,
		offsetCommand(long, 1),
		&commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: big}},
		&commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: stages}}},
		&commandpb.Command{Op: &commandpb.Command_CommitBatch{CommitBatch: &commandpb.CommitBatch{Ops: make([]*commandpb.CommitOp, 0)}}},
	)
	want := []commandpb.Code{commandpb.Code_CODE_INVALID, commandpb.Code_CODE_LIMIT, commandpb.Code_CODE_LIMIT, commandpb.Code_CODE_INVALID}
	for i, r := range res {
		if r.GetRejection().GetCode() != want[i] {
			t.Fatalf("command %d: %s, want %s", i, text(r), want[i])
		}
	}
	raw, err := (&commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: nested}}}).MarshalVT()
	noError(t, err)
	out, err := s.Apply([]Entry{{Index: 3, Term: 1, Commands: [][]byte{raw}, Local: true}})
	noError(t, err)
	if out[0][0].GetRejection().GetCode() != commandpb.Code_CODE_LIMIT {
		t.Fatalf("nested: %s", text(out[0][0]))
	}
	if s.Revision() != 0 {
		t.Fatalf("revision %d after refusals only", s.Revision())
	}
	for id, ok := range map[string]bool{
		"default/orders": true, "größe": true, "a b": true, "日本": true, "..": false, "a/..": false, "a..b": true,
		"": false, "a\x7f": false, "a\u202eb": false, "\xff": false, "a\u0085": false,
	} {
		if got := CheckID(id) == ""; got != ok {
			t.Errorf("CheckID(%q) = %q", id, CheckID(id))
		}
	}
}

// FuzzApply: whatever bytes are committed, Apply answers or refuses; it never
// panics, and two replicas agree.
func FuzzApply(f *testing.F) {
	g := &commands{r: rand.New(rand.NewSource(1)), time: 1000}
	for range 60 {
		f.Add(marshal(f, g.next()), marshal(f, g.next()))
	}
	// One pair of replicas takes input after input: that is quicker than a new
	// pair each, and the state grows interesting. A log a replica stops at is
	// dropped with both.
	var pair [2]*FSM
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var errs [2]error
		for i := range pair {
			if pair[i] == nil {
				pair[i] = open(t, vfs.NewMem(), "state")
			}
			e := Entry{Index: pair[i].Applied().Index + 1, Term: 1, Commands: [][]byte{a, b}, Local: i == 0}
			_, errs[i] = pair[i].Apply([]Entry{e})
		}
		if x, y := hash(t, pair[0]), hash(t, pair[1]); x != y || (errs[0] == nil) != (errs[1] == nil) {
			t.Fatalf("replicas differ: %v, %v", errs[0], errs[1])
		}
		if errs[0] != nil {
			for i := range pair {
				noError(t, pair[i].Close())
				pair[i] = nil
			}
		}
	})
}
