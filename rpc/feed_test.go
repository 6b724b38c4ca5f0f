package rpc

import (
	"fmt"
	"log/slog"
	"testing"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Goal: whoever the first changes of a large revision concern is woken before the last of
// them was looked at, and nobody is told before the end that all of it was.
func TestALargeRevisionWakesAsItGoes(t *testing.T) {
	const n, revision = 10 * dispatchPart, 7
	f := newFeed(nil, slog.New(slog.DiscardHandler))
	id := func(i int) string { return fmt.Sprint("s", i) }
	rang := make([]bell, n)
	var changes []router.Change
	for i := range n {
		rang[i] = newBell()
		defer f.watchSidecar(id(i), rang[i])()
		changes = append(changes, router.Change{Revision: revision, Table: router.TableAssignments, Next: &commandpb.Assignment{SidecarId: id(i)}})
	}
	heard := 0
	f.onAssignment = func(sidecar string, at uint64) {
		if sidecar != id(heard) || at != revision {
			t.Fatalf("%s at %d is heard of as number %d", sidecar, at, heard)
		}
		if heard++; heard == n {
			if len(rang[0]) == 0 {
				t.Error("the first was not woken before the last was looked at")
			}
			if up := f.rungUp(); up != 0 || f.reached != 0 {
				t.Errorf("it is said that all up to %d, and %d, was told", up, f.reached)
			}
		}
	}
	f.dispatch(changes, revision)
	for i, b := range rang {
		if len(b) == 0 {
			t.Fatalf("number %d was not woken", i)
		}
	}
	if heard != n || f.rungUp() != revision || f.reached != revision {
		t.Fatalf("%d were heard of, up to %d and %d", heard, f.rungUp(), f.reached)
	}
}
