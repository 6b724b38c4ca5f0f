package router

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// putOp creates an operation or moves it on.
func putOp(t testing.TB, create bool, id, kind, state string, done int) *commandpb.Command {
	t.Helper()
	return command(t, fmt.Sprintf(
		`put_operation { create: %v operation { operation_id: %q kind: %q subject: "it" state: OPERATION_STATE_%s done: %d total: 9 } }`, create, id, kind, state, done))
}

// operationsOf lists operations as "id STATE done".
func operationsOf(t testing.TB, s *FSM) []string {
	t.Helper()
	v := s.View()
	defer v.Close()
	var out []string
	noError(t, v.Operations(func(op *commandpb.Operation) bool {
		out = append(out, fmt.Sprintf("%s %s %d", op.OperationId, operationStateName(op.State), op.Done))
		return true
	}))
	slices.Sort(out)
	return out
}

// TestRestoreLeavesOperationsAlone. Goal: operations are the cluster's, not the
// backup's: one that ended since the backup does not run again, one begun since is
// not forgotten, one that only the backup knows does not come up, progress does not
// fall back, and all go on being moved, ended and forgotten afterwards. The same
// after a restart, and on the way back through the undo point.
func TestRestoreLeavesOperationsAlone(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	accepted(t, s, put("p", "1"),
		putOp(t, true, "ended-since", "backup", "RUNNING", 1),
		putOp(t, true, "runs-on", "replace", "RUNNING", 2),
		putOp(t, true, "ended-before", "backup", "RUNNING", 1), putOp(t, false, "ended-before", "backup", "DONE", 9))
	_, err := s.Image("image")
	noError(t, err)
	accepted(t, s, put("p", "2"),
		putOp(t, false, "ended-since", "backup", "FAILED", 3),
		putOp(t, false, "runs-on", "replace", "RUNNING", 5),
		putOp(t, true, "begun-since", "catch-up", "RUNNING", 4),
		command(t, `cancel_operation { operation_id: "runs-on" }`),
		putOp(t, true, "op", "restore", "RUNNING", 0))
	want := []string{"begun-since running 4", "ended-before done 9", "ended-since failed 3", "op running 0", "runs-on running 5"}
	restore := func(dir, id string) {
		t.Helper()
		accepted(t, s, stageCommands(t, fs, dir, id)...)
		noError(t, s.Prepare(t.Context(), id))
		accepted(t, s, report(id, 1), swap(id))
		sound(t, s)
	}
	check := func(when string) {
		t.Helper()
		if got := operationsOf(t, s); !slices.Equal(got, want) {
			t.Fatalf("%s:\n got %v\nwant %v", when, got, want)
		}
		v := s.View()
		defer v.Close()
		op, err := v.Operation("runs-on")
		noError(t, err)
		if !op.CancelRequested {
			t.Fatalf("%s: that its end was asked for is forgotten", when)
		}
	}
	restore("image", "op")
	check("after the restore")
	noError(t, errors.Join(s.Close()))
	s = open(t, fs, "state")
	check("after a restart")

	if r := apply(t, s, putOp(t, false, "ended-since", "backup", "RUNNING", 4))[0]; r.Rejection.GetCode() != commandpb.Code_CODE_PRECONDITION {
		t.Fatalf("an ended operation runs again: %s", text(r))
	}
	if r := apply(t, s, putOp(t, false, "op", "restore", "FAILED", 0))[0]; r.Rejection.GetCode() != commandpb.Code_CODE_PRECONDITION {
		t.Fatalf("a restore that is in force has failed: %s", text(r))
	}
	accepted(t, s, putOp(t, false, "op", "restore", "DONE", 9), putOp(t, false, "begun-since", "catch-up", "DONE", 9),
		putOp(t, true, "undo", "restore", "RUNNING", 0))
	undo, ok := s.UndoPoint()
	if !ok {
		t.Fatal("no undo point")
	}
	restore(undo.Dir, "undo")
	want = []string{"begun-since done 9", "ended-before done 9", "ended-since failed 3", "op done 9", "runs-on running 5", "undo running 0"}
	check("after the way back")

	// The queue of those to be forgotten is whole.
	for i := range maxEndedOperations {
		id := fmt.Sprintf("more-%d", i)
		accepted(t, s, putOp(t, true, id, "backup", "RUNNING", 0), putOp(t, false, id, "backup", "DONE", 0))
	}
	got := operationsOf(t, s)
	running := slices.DeleteFunc(slices.Clone(got), func(l string) bool { return l[:5] == "more-" })
	if want := []string{"runs-on running 5", "undo running 0"}; len(got) != maxEndedOperations+2 || !slices.Equal(running, want) {
		t.Fatalf("%d are kept, of the old ones %v", len(got), running)
	}
	sound(t, s)
	noError(t, s.Close())
}
