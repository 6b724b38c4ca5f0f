package datadir

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Goal: what a node remembers of a join survives as it was written, and a note
// that cannot be read is not taken for none.
func TestJoining(t *testing.T) {
	dir := t.TempDir()
	if _, found, err := ReadJoining(dir); found || err != nil {
		t.Fatal(found, err)
	}
	want := Joining{DiskID: 1<<64 - 1, NodeID: 4, Rejoin: true, ReadReplica: true, Members: []string{"a:1", "b:2"}}
	for _, j := range []Joining{{DiskID: 1, Members: []string{"a:1"}}, want} {
		if err := WriteJoining(dir, j); err != nil {
			t.Fatal(err)
		}
	}
	got, found, err := ReadJoining(dir)
	if err != nil || !found || got.DiskID != want.DiskID || got.NodeID != 4 || !got.Rejoin || !got.ReadReplica || !slices.Equal(got.Members, want.Members) {
		t.Fatalf("%+v %v %v", got, found, err)
	}
	for _, raw := range []string{"", "{", `{"disk_id":"0","node_id":4}`, `{"disk_id":7}`} {
		if err := os.WriteFile(filepath.Join(dir, JoiningName), []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ReadJoining(dir); !errors.Is(err, ErrIncomplete) {
			t.Errorf("%q: %v", raw, err)
		}
	}
	for range 2 {
		if err := RemoveJoining(dir); err != nil {
			t.Fatal(err)
		}
	}
	if _, found, err := ReadJoining(dir); found || err != nil {
		t.Fatal(found, err)
	}
}

func TestNewDiskID(t *testing.T) {
	seen := map[uint64]bool{}
	for range 100 {
		id, err := NewDiskID()
		if err != nil || id == 0 || seen[id] {
			t.Fatal(id, err)
		}
		seen[id] = true
	}
}
