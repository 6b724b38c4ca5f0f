package server

import (
	"errors"
	"testing"

	"conveyor.etl/router/raftnode"
)

// What a node says of the members was so at the index it had applied: a member
// that has applied more does not believe that it was removed, one that has
// applied less does.
func TestWordsOfALaggard(t *testing.T) {
	again := raftnode.Position{Index: 60, Members: []raftnode.Member{{ID: 3, Disk: 7}}}
	gone := raftnode.Position{Index: 60, Members: []raftnode.Member{{ID: 3, Disk: 7, Removed: true}}}
	first := bootstrapPosition([]uint64{1, 2, 3})
	for _, c := range []struct {
		name    string
		pos     raftnode.Position
		applied uint64
		want    bool
	}{
		{"it has applied the removal only", again, 55, true},
		{"it has applied as much", again, 60, true},
		{"it has applied more", again, 61, false},
		{"this node has applied its removal", gone, 55, false},
		{"this node has applied nothing", first, 55, false},
		{"neither has applied anything", first, bootstrapIndex, false},
		{"this node is no member", raftnode.Position{Index: 60}, 55, false},
	} {
		if got := outdated(c.pos, 3, c.applied); got != c.want {
			t.Errorf("%s: %t, want %t", c.name, got, c.want)
		}
	}
}

// A directory whose node was removed is not started again.
func TestRemovedDirectoryIsRefused(t *testing.T) {
	c := settings(t, t.TempDir(), 1)[0]
	s := start(t, c)
	s.leave("a test")
	stop(t, s)
	if err := New(c, Options{}).Start(within(t)); !errors.Is(err, ErrRemoved) {
		t.Errorf("started again: %v", err)
	}
}
