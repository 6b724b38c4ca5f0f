package router

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// TestEverySumHasItsTable: what is summed at commit is what is added up by a
// scan, and each table of records counts somewhere.
func TestEverySumHasItsTable(t *testing.T) {
	for i, table := range sumTables() {
		kind, ok := sumOf(table.prefix)
		if ok == (table.prefix == prefixCheckpoint) || ok && kind != sumKind(i) {
			t.Errorf("%s: sum %d, %v", table.name, kind, ok)
		}
	}
	derived := string([]byte{prefixByPipeline, prefixByName, prefixBySidecar, prefixLocalName, prefixMembership})
	for i := range len(dataTables) {
		p := dataTables[i]
		if _, ok := sumOf(p); !ok && p != prefixCheckpoint && !strings.ContainsRune(derived, rune(p)) {
			t.Errorf("table %c is not summed", p)
		}
	}
	if !slices.IsSorted([]byte(dataTables)) {
		t.Error("the tables are not in the order of their keys")
	}
	if names := SumTables(); len(names) != int(sumKinds)+1 {
		t.Errorf("%d names", len(names))
	}
}

// TestSumsFindADifference that nobody wrote through the log, after a restart as
// well, and name its table.
func TestSumsFindADifference(t *testing.T) {
	log := (&commands{r: randomness(t), time: 1_000_000}).log(t, 2, 300)
	fs := vfs.NewMem()
	a, b := openMem(t), open(t, fs, "state")
	for _, s := range []*FSM{a, b} {
		_, err := s.Apply(log[:200])
		noError(t, err)
	}
	c := command(t, `save_checkpoint { service_id: "silent" checkpoint_id: "c" }`).GetSaveCheckpoint()
	rec, err := (&commandpb.Checkpoint{ServiceId: c.ServiceId, CheckpointId: "d"}).MarshalVT()
	noError(t, err)
	noError(t, b.cur.db.Set(key(nil).partition(prefixSourceOffset, "silent", 1), encodeOffset(3, 0, 0), pebble.NoSync))
	noError(t, b.cur.db.Set(key(nil).single(prefixCheckpoint, "silent"), rec, pebble.NoSync))
	// Nothing reads what was damaged, so the sums go on as if nothing were.
	v := b.View()
	if err := v.CheckSums(t.Context()); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "source offsets") || strings.Contains(err.Error(), "checkpoints") {
		t.Fatalf("got %v", err)
	}
	noError(t, v.Close())
	// The next write of the record takes the damage for the old value.
	again := &commandpb.Command{Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: &commandpb.CommitSourceOffset{
		SourceId: "silent", Partition: 1, Offset: 9}}}
	e := Entry{Index: 202, Term: 1, Commands: [][]byte{marshal(t, again)}}
	for _, s := range []*FSM{a, b} {
		_, err := s.Apply([]Entry{e})
		noError(t, err)
	}
	newest := func(s *FSM) Sums {
		all := s.RecentSums()
		return all[len(all)-1]
	}
	if d := newest(a).Differ(newest(b)); !slices.Contains(d, "source offsets") || !slices.Contains(d, "clock") {
		t.Fatalf("differ: %v", d)
	}
	// Checkpoints: another order of writes is another chain.
	one := command(t, `save_checkpoint { service_id: "x" checkpoint_id: "1" }`)
	two := command(t, `save_checkpoint { service_id: "x" checkpoint_id: "2" }`)
	apply(t, a, one, two)
	apply(t, b, two, one)
	if d := newest(a).Differ(newest(b)); !slices.Contains(d, "checkpoints") {
		t.Fatalf("differ: %v", d)
	}
	before := newest(b)
	noError(t, b.Close())
	b = open(t, fs, "state")
	if d := newest(b).Differ(before); len(d) != 0 {
		t.Fatalf("the restart changed %v", d)
	}
	noError(t, b.Close())
}

// TestSumsAreKept for the last 64 multiples of 128, however entries come.
func TestSumsAreKept(t *testing.T) {
	s := openMem(t)
	var log []Entry
	for i := range 100 * sumEvery {
		log = append(log, Entry{Index: uint64(i + 2), Term: 1})
	}
	_, err := s.Apply(log)
	noError(t, err)
	all := s.RecentSums()
	if len(all) != sumsKept+1 || all[sumsKept].Index != 100*sumEvery+1 {
		t.Fatalf("%d kept, the newest of %d", len(all), all[len(all)-1].Index)
	}
	for i, x := range all[:sumsKept] {
		if x.Index != uint64(100-sumsKept+1+i)*sumEvery {
			t.Fatalf("number %d is of %d", i, x.Index)
		}
	}
}

// TestStateWithoutSums is of an older release: they are made up for, except for
// the chain of checkpoints, which nobody can know and nobody compares.
func TestStateWithoutSums(t *testing.T) {
	fs := vfs.NewMem()
	log := (&commands{r: randomness(t), time: 1_000_000}).log(t, 2, 200)
	s, ref := open(t, fs, "state"), openMem(t)
	for _, x := range []*FSM{s, ref} {
		_, err := x.Apply(log[:100])
		noError(t, err)
	}
	s.clock.Sums = nil
	b, err := s.clock.MarshalVT()
	noError(t, err)
	noError(t, s.cur.db.Set(key(nil).meta(metaClock), b, pebble.NoSync))
	noError(t, s.Close())
	s = open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	for _, x := range []*FSM{s, ref} {
		_, err := x.Apply(log[100:])
		noError(t, err)
	}
	x, y := s.RecentSums(), ref.RecentSums()
	a, z := x[len(x)-1], y[len(y)-1]
	if d := a.Differ(z); len(d) != 0 || a.Sums[sumCheckpoints] != 0 || z.Sums[sumCheckpoints] == 0 {
		t.Fatalf("differ: %v, chains %d and %d", d, a.Sums[sumCheckpoints], z.Sums[sumCheckpoints])
	}
	sound(t, s)
}

// TestOperationsArePurged, the oldest that ended first, and those that run stay.
func TestOperationsArePurged(t *testing.T) {
	s := openMem(t)
	operation := func(id string, state commandpb.OperationState) *commandpb.Command {
		return &commandpb.Command{Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
			Create: true, Operation: &commandpb.Operation{OperationId: id, Kind: "backup", State: state}}}}
	}
	for i := range maxRunningOperations {
		accepted(t, s, operation(fmt.Sprint("running-", i), commandpb.OperationState_OPERATION_STATE_RUNNING))
	}
	if r := apply(t, s, operation("more", commandpb.OperationState_OPERATION_STATE_RUNNING))[0]; r.Rejection.GetCode() != commandpb.Code_CODE_LIMIT {
		t.Fatalf("got %s, want LIMIT", text(r))
	}
	accepted(t, s, command(t, `put_operation { operation { operation_id: "running-0" kind: "backup" state: OPERATION_STATE_FAILED } }`))
	for i := range maxEndedOperations {
		accepted(t, s, operation(fmt.Sprint("ended-", i), commandpb.OperationState_OPERATION_STATE_DONE))
	}
	v := s.View()
	defer v.Close()
	c, err := v.Counts()
	noError(t, err)
	gone, err := v.Operation("running-0")
	noError(t, err)
	kept, err := v.Operation("running-1")
	noError(t, err)
	if c.Operations != maxEndedOperations+maxRunningOperations-1 || gone != nil || kept == nil {
		t.Fatalf("%d operations, the oldest ended %v, a running one %v", c.Operations, gone, kept)
	}
	var first string
	noError(t, v.Operations(func(o *commandpb.Operation) bool {
		first = o.OperationId
		return false
	}))
	if first != fmt.Sprint("ended-", maxEndedOperations-1) {
		t.Fatalf("the newest is %s", first)
	}
	noError(t, v.check(t.Context(), false))
}
