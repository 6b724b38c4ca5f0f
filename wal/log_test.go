package wal

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

func TestCreateAndReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, rec := open(t, dir, Options{})
	if !rec.Created || rec.FirstIndex != 2 || rec.LastIndex != 1 || rec.HardState.GetCommit() != 1 || rec.HardState.GetTerm() != 1 {
		t.Fatalf("new log: %+v", rec)
	}
	want := run(2, 9, 2, 100)
	must(t, l.Append(hard(2, 3, 1), want, true))
	must(t, l.Append(hard(2, 3, 7), nil, false))
	wantEntries(t, l, want)
	must(t, l.Close())
	must(t, l.Close())
	if err := l.Append(nil, run(10, 10, 2, 1), true); !errors.Is(err, ErrClosed) {
		t.Fatalf("append after close: %v", err)
	}

	l, rec = open(t, dir, Options{})
	if rec.Created || rec.Repaired != 0 || rec.FirstIndex != 2 || rec.LastIndex != 9 || !proto.Equal(rec.HardState, hard(2, 3, 7)) {
		t.Fatalf("reopened: %+v", rec)
	}
	if !proto.Equal(rec.Snapshot.ConfState, testStart.ConfState) || rec.Snapshot.Index != 1 || rec.Snapshot.Term != 1 {
		t.Fatalf("start: %+v", rec.Snapshot)
	}
	wantEntries(t, l, want)
}

// A node that joins begins with nothing and is brought up by a snapshot.
func TestEmptyStartThenInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	o := Options{SegmentBytes: testSegment}
	l, rec, err := Open(dir, testID, Start{}, o)
	must(t, err)
	if rec.FirstIndex != 1 || rec.LastIndex != 0 || !raft.IsEmptyHardState(rec.HardState) || rec.Snapshot.ConfState == nil {
		t.Fatalf("empty log: %+v", rec)
	}
	must(t, l.Append(hard(5, 0, 0), nil, true))
	must(t, l.Close())
	l, rec, err = Open(dir, testID, Start{}, o)
	must(t, err)
	if rec.HardState.GetTerm() != 5 || rec.Created {
		t.Fatalf("after the first vote: %+v", rec)
	}
	must(t, l.InstallSnapshot(40, 5, conf(1, 2), hard(5, 0, 40)))
	must(t, l.Append(nil, run(41, 44, 5, 10), true))
	must(t, l.Close())
	l, rec, err = Open(dir, testID, Start{}, o)
	must(t, err)
	defer l.Close()
	if rec.FirstIndex != 41 || rec.LastIndex != 44 || rec.Snapshot.Term != 5 {
		t.Fatalf("after the snapshot: %+v", rec)
	}
}

func TestOverwrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Append(hard(2, 0, 1), run(2, 10, 2, 50), true))
	held, err := l.Entries(2, 11, math.MaxUint64)
	must(t, err)
	// One batch, several runs: what an appender makes of queued messages.
	batch := append(run(6, 9, 3, 50), append(run(8, 8, 4, 50), run(9, 9, 5, 50)...)...)
	must(t, l.Append(hard(5, 0, 8), batch, true))
	want := append(run(2, 5, 2, 50), run(6, 7, 3, 50)...)
	want = append(want, run(8, 8, 4, 50)...)
	want = append(want, run(9, 9, 5, 50)...)
	wantEntries(t, l, want)
	for i, e := range run(2, 10, 2, 50) {
		if !proto.Equal(held[i], e) {
			t.Fatalf("a slice handed out before the overwrite changed at %d", i)
		}
	}
	must(t, l.Close())
	l, rec := open(t, dir, Options{})
	wantEntries(t, l, want)
	if rec.HardState.GetCommit() != 8 {
		t.Fatal(rec.HardState)
	}
}

func TestRefusals(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Append(hard(3, 0, 4), run(2, 6, 3, 10), true))
	_, before := lastSegment(t, dir)
	for name, call := range map[string]func() error{
		"gap":               func() error { return l.Append(nil, run(8, 9, 3, 1), true) },
		"gap inside":        func() error { return l.Append(nil, append(run(7, 8, 3, 1), run(10, 10, 3, 1)...), true) },
		"committed rewrite": func() error { return l.Append(nil, run(4, 7, 3, 1), true) },
		"before the start":  func() error { return l.Append(nil, run(1, 1, 3, 1), true) },
		"term down":         func() error { return l.Append(nil, run(7, 7, 2, 1), true) },
		"term down inside":  func() error { return l.Append(nil, append(run(7, 8, 5, 1), run(8, 8, 4, 1)...), true) },
		"commit past end":   func() error { return l.Append(hard(3, 0, 8), run(7, 7, 3, 1), true) },
		"hard state back":   func() error { return l.Append(hard(2, 0, 4), nil, true) },
		"old snapshot":      func() error { return l.InstallSnapshot(4, 3, conf(1), nil) },
		"held snapshot":     func() error { return l.InstallSnapshot(5, 3, conf(1), nil) },
		"no conf":           func() error { return l.InstallSnapshot(50, 3, nil, nil) },
		"compact past end":  func() error { return l.Compact(7, conf(1)) },
		"compact no conf":   func() error { return l.Compact(4, nil) },
	} {
		if err := call(); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, end := lastSegment(t, dir); end != before {
		t.Fatalf("refused calls wrote %d bytes", end-before)
	}
	must(t, l.Append(nil, run(7, 7, 3, 10), true))
	wantEntries(t, l, run(2, 7, 3, 10))
}

// Commit must not go back on disk when Compact knew more than the appender.
func TestCompactAndReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	for i := uint64(2); i <= 200; i++ {
		must(t, l.Append(hard(2, 1, i-1), run(i, i, 2, 400), true))
	}
	segs, err := listSegments(dir)
	must(t, err)
	must(t, l.Compact(200, conf(1, 2, 4)))
	must(t, l.Compact(150, conf(9))) // behind: nothing happens
	must(t, l.Append(hard(2, 1, 199), run(201, 203, 2, 400), true))
	after, err := listSegments(dir)
	must(t, err)
	if len(after) >= len(segs) || len(after) > 2 {
		t.Fatalf("%d segments before, %d after compaction", len(segs), len(after))
	}
	wantEntries(t, l, run(201, 203, 2, 400))
	if term, err := l.Term(200); err != nil || term != 2 {
		t.Fatal(term, err)
	}
	if _, err := l.Term(199); !errors.Is(err, raft.ErrCompacted) {
		t.Fatal(err)
	}
	if _, err := l.Entries(200, 202, math.MaxUint64); !errors.Is(err, raft.ErrCompacted) {
		t.Fatal(err)
	}
	if _, err := l.Entries(201, 205, math.MaxUint64); !errors.Is(err, raft.ErrUnavailable) {
		t.Fatal(err)
	}
	must(t, l.Close())
	l, rec := open(t, dir, Options{})
	if rec.FirstIndex != 201 || rec.HardState.GetCommit() != 200 || !proto.Equal(rec.Snapshot.ConfState, conf(1, 2, 4)) {
		t.Fatalf("%+v", rec)
	}
	wantEntries(t, l, run(201, 203, 2, 400))
}

// A snapshot replaces a log whose end disagrees with it. The old end must not
// come back: it would vote with entries the group never committed.
func TestInstallVoidsTheOldEnd(t *testing.T) {
	for _, after := range []int{0, 3} {
		dir := filepath.Join(t.TempDir(), "wal")
		l, _ := open(t, dir, Options{})
		must(t, l.Append(hard(2, 0, 10), run(2, 60, 2, 100), true))
		must(t, l.InstallSnapshot(40, 4, conf(1, 2, 3), hard(4, 0, 40)))
		var want []*raftpb.Entry
		if after > 0 {
			want = run(41, 40+uint64(after), 4, 10)
			must(t, l.Append(nil, want, true))
		}
		wantEntries(t, l, want)
		must(t, l.Close())
		for range 2 { // what the first reopening leaves must do for the second
			var rec Recovered
			l, rec = open(t, dir, Options{})
			if rec.Snapshot.Index != 40 || rec.Snapshot.Term != 4 || rec.HardState.GetCommit() != 40 {
				t.Fatalf("%+v", rec)
			}
			wantEntries(t, l, want)
			must(t, l.Close())
		}
		l, _ = open(t, dir, Options{})
		lo := 41 + uint64(after)
		for i := lo; i < lo+100; i++ { // across segments
			must(t, l.Append(hard(4, 0, i-1), run(i, i, 4, 300), true))
		}
		must(t, l.Compact(lo+50, conf(1)))
		must(t, l.Close())
		l, _ = open(t, dir, Options{})
		wantEntries(t, l, run(lo+51, lo+99, 4, 300))
		must(t, l.Close())
	}
}

func TestLockedAndForeign(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	if _, _, err := tryOpen(t, dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Fatalf("second open: %v", err)
	}
	if _, _, err := tryOpen(t, dir, Options{SegmentBytes: 2 * testSegment}); err == nil || errors.Is(err, ErrLocked) {
		t.Fatalf("other segment size: %v", err)
	}
	must(t, l.Append(nil, run(2, 3, 1, 10), true))
	must(t, l.Close())
	_, _, err := Open(dir, Identity{ClusterID: 0xc0, NodeID: 2}, testStart, Options{SegmentBytes: testSegment})
	if !errors.Is(err, ErrForeign) {
		t.Fatalf("another node: %v", err)
	}
	l, _ = open(t, dir, Options{})
	wantEntries(t, l, run(2, 3, 1, 10))
}

func TestFilesThatAreNoLog(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("x"), 0o600))
	if _, _, err := tryOpen(t, dir, Options{}); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

// Goal: a lock that a child of this process holds for as long as it takes to become
// another program does not keep the log from being opened, and one that stays does.
func TestSegmentLockedForAMoment(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Close())
	segments, err := filepath.Glob(filepath.Join(dir, "*.wal"))
	must(t, err)
	held, err := fileutil.TryLockFile(segments[len(segments)-1], os.O_RDWR, 0o600)
	must(t, err)
	if _, _, err := tryOpen(t, dir, Options{}); !errors.Is(err, fileutil.ErrLocked) {
		t.Fatalf("a locked segment: %v", err)
	}
	time.AfterFunc(lockPatience/10, func() { held.Close() })
	l, _ = open(t, dir, Options{})
	must(t, l.Close())
}
