package server

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/internal/crashpoint"
	"conveyor.etl/router/raftnode"
)

func mustKnow(t *testing.T, d *disks, node, disk uint64, want bool) {
	t.Helper()
	if got, err := d.Check(node, disk); err != nil || got != want {
		t.Fatalf("node %d with disk %d: %v %v, want %v", node, disk, got, err, want)
	}
}

func openDisksAgain(t *testing.T, dir string) *disks {
	t.Helper()
	points, err := crashpoint.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := openDisks(dir, points)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Goal: the first directory of a node is the one it is known by, also after a
// restart; only the word of the group changes that.
func TestDisks(t *testing.T) {
	dir := t.TempDir()
	d := openDisksAgain(t, dir)
	mustKnow(t, d, 2, 1<<64-1, true)
	mustKnow(t, d, 2, 23, false)
	d = openDisksAgain(t, dir)
	mustKnow(t, d, 2, 23, false)
	mustKnow(t, d, 2, 1<<64-1, true)
	mustKnow(t, d, 3, 33, true)
	err := d.learn([]raftnode.Member{
		{ID: 1}, {ID: 2, Addr: "x", Disk: 23}, {ID: 3, Disk: 34, Removed: true}, {ID: 4, Disk: 44},
	})
	if err != nil {
		t.Fatal(err)
	}
	d = openDisksAgain(t, dir)
	mustKnow(t, d, 2, 1<<64-1, false)
	mustKnow(t, d, 2, 23, true)
	mustKnow(t, d, 3, 33, true) // a tombstone says nothing of who may come
	mustKnow(t, d, 4, 45, false)
	mustKnow(t, d, 4, 44, true)
}

// Goal: a directory that cannot be recorded is not accepted, not even the next
// time, and a damaged record stops the node instead of being taken for an empty
// one.
func TestDisksThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	d := openDisksAgain(t, dir)
	gone := filepath.Join(dir, "gone")
	d.name = filepath.Join(gone, disksName)
	for range 2 {
		if _, err := d.Check(2, 22); err == nil {
			t.Fatal("accepted without a record")
		}
	}
	if err := os.Mkdir(gone, 0o700); err != nil {
		t.Fatal(err)
	}
	mustKnow(t, d, 2, 22, true)
	for _, raw := range []string{"", "{", `{"x":"1"}`, `{"2":"zz"}`} {
		if err := os.WriteFile(d.name, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openDisks(gone, d.points); !errors.Is(err, ErrIncomplete) {
			t.Errorf("%q: %v", raw, err)
		}
	}
}

// Goal: what a join has replaced is removed by the next start; what an operator's
// recovery keeps is not.
func TestRemoveReplaced(t *testing.T) {
	dir := t.TempDir()
	kept := filepath.Join(dir, datadir.BeforeName)
	if err := removeReplaced(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(kept, datadir.WALName), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := removeReplaced(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Fatalf("what a recovery kept is gone: %v", err)
	}
	if err := datadir.WriteJoining(kept, datadir.Joining{DiskID: 7}); err != nil {
		t.Fatal(err)
	}
	if err := removeReplaced(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(kept); !os.IsNotExist(err) {
		t.Fatalf("what a join replaced is still there: %v", err)
	}
}
