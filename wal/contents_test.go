package wal

import (
	"errors"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// Goal: a tool reads from the disk the very log a node would start with, and
// changes nothing. Method: random appends, overwrites, compactions and installs;
// after each the two are compared.
func TestInspectSeesWhatOpenSees(t *testing.T) {
	rnd := rand.New(rand.NewSource(seed(t)))
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	term := uint64(1)
	for step := range 120 {
		first, _ := l.FirstIndex()
		last, _ := l.LastIndex()
		hs, _, err := l.InitialState()
		must(t, err)
		commit := max(hs.GetCommit(), first-1)
		switch k := rnd.Intn(10); {
		case k < 6:
			from := last + 1
			if last > commit && rnd.Intn(2) == 0 {
				from = commit + 1 + uint64(rnd.Int63n(int64(last-commit)))
				term++
			}
			to := from + uint64(rnd.Intn(20))
			must(t, l.Append(hard(term, 1, commit+(from-1-commit)/2), run(from, to, term, rnd.Intn(300)), true))
		case k < 8 && commit > first:
			must(t, l.Compact(first+uint64(rnd.Int63n(int64(commit-first+1))), conf(1, 2)))
		case k == 9:
			term++
			must(t, l.InstallSnapshot(last+5, term, conf(1, 2, 3), nil))
		}
		c, err := Inspect(dir)
		must(t, err)
		first, _ = l.FirstIndex()
		last, _ = l.LastIndex()
		if c.FirstIndex != first || c.LastIndex != last || c.Identity != testID {
			t.Fatalf("step %d: the tool sees %d..%d, the node %d..%d", step, c.FirstIndex, c.LastIndex, first, last)
		}
		if hs, _, _ = l.InitialState(); c.Commit() != hs.GetCommit() {
			t.Fatalf("step %d: commit %d, the node has %d", step, c.Commit(), hs.GetCommit())
		}
		for i := first - 1; i <= last; i++ {
			want, err := l.Term(i)
			must(t, err)
			if got, err := c.Term(i); err != nil || got != want {
				t.Fatalf("step %d: entry %d has term %d, %v; want %d", step, i, got, err, want)
			}
		}
		if last < first {
			continue
		}
		want, err := l.Entries(first, last+1, 1<<62)
		must(t, err)
		from := first + uint64(rnd.Int63n(int64(last-first+1)))
		next := from
		must(t, c.Entries(from, last, func(e *raftpb.Entry) error {
			if !proto.Equal(e, want[next-first]) {
				t.Fatalf("step %d: entry %d is %v, the node has %v", step, next, e, want[next-first])
			}
			next++
			return nil
		}))
		if next != last+1 {
			t.Fatalf("step %d: entries up to %d were given, %d are there", step, next-1, last)
		}
	}
}

func TestInspectBounds(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Append(hard(2, 1, 1), run(2, 9, 2, 50), true))
	must(t, l.Close())
	c, err := Inspect(dir)
	must(t, err)
	for _, i := range []uint64{0, 10} {
		if _, err := c.Term(i); err == nil {
			t.Errorf("term of entry %d", i)
		}
	}
	none := func(*raftpb.Entry) error { t.Error("an entry was given"); return nil }
	if err := c.Entries(1, 9, none); err == nil {
		t.Error("the entry before the first one")
	}
	if err := c.Entries(2, 10, none); err == nil {
		t.Error("the entry behind the last one")
	}
	if err := c.Entries(5, 4, none); err != nil {
		t.Error(err)
	}
	stop := errors.New("stop")
	if err := c.Entries(2, 9, func(*raftpb.Entry) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	// Damage between the look and the reading is noticed.
	path, end := lastSegment(t, dir)
	raw, err := os.ReadFile(path)
	must(t, err)
	raw[end-100] ^= 1
	must(t, os.WriteFile(path, raw, 0o600))
	if err := c.Entries(2, 9, func(*raftpb.Entry) error { return nil }); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	if _, err := Inspect(filepath.Join(dir, "none")); err == nil {
		t.Error("a log that is not there")
	}
}

// Of a damaged log, everything before the damage can be read, and nothing else.
func TestInspectDamaged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	for i := uint64(2); i < 60; i += 2 {
		must(t, l.Append(hard(2, 1, i), run(i, i+1, 2, 200), true))
	}
	must(t, l.Close())
	whole, err := InspectDamaged(dir)
	if err != nil || whole.Damage != nil || whole.LastIndex != 59 {
		t.Fatalf("a whole log: %+v, %v", whole, err)
	}
	path, end := lastSegment(t, dir)
	raw, err := os.ReadFile(path)
	must(t, err)
	rnd := rand.New(rand.NewSource(seed(t)))
	for range 50 {
		bad := append([]byte(nil), raw...)
		at := 200 + rnd.Int63n(end-200)
		for i := range int64(32) { // more than the padding of a record, which nothing covers
			bad[min(at+i, end-1)] ^= 0xff
		}
		must(t, os.WriteFile(path, bad, 0o600))
		c, err := InspectDamaged(dir)
		if errors.Is(err, ErrCorrupt) {
			continue // in the first records: nothing is left to start from
		}
		must(t, err)
		if c.LastIndex > 59 || c.Commit() > c.LastIndex || c.Damage == nil && c.LastIndex != 59 && c.Unfinished == "" {
			t.Fatalf("damage at %d: %+v", at, c)
		}
		n := uint64(0)
		must(t, c.Entries(c.FirstIndex, c.LastIndex, func(e *raftpb.Entry) error {
			want := run(e.GetIndex(), e.GetIndex(), 2, 200)[0]
			if !proto.Equal(e, want) {
				t.Fatalf("damage at %d: entry %v", at, e)
			}
			n++
			return nil
		}))
		if n != c.LastIndex-c.FirstIndex+1 {
			t.Fatalf("damage at %d: %d entries of %d to %d", at, n, c.FirstIndex, c.LastIndex)
		}
	}
	if _, err := InspectDamaged(t.TempDir()); err == nil {
		t.Error("an empty directory")
	}
}
