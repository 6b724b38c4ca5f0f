package wal

import (
	"bytes"
	"errors"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// model is what the log must answer after a crash: what was acknowledged, and
// what the call in flight would make of it.
type model struct {
	index uint64 // start
	ents  []*raftpb.Entry
}

func (m model) append(es []*raftpb.Entry) model {
	out := model{index: m.index, ents: append([]*raftpb.Entry(nil), m.ents...)}
	for _, e := range es {
		out.ents = append(out.ents[:e.GetIndex()-m.index-1], e)
	}
	return out
}

func (m model) compact(i uint64) model { return model{index: i, ents: m.ents[i-m.index:]} }

// equals tells whether l starts and ends like m, and holds its entries.
func (m model) equals(t *testing.T, l *Log) bool {
	first, _ := l.FirstIndex()
	last, _ := l.LastIndex()
	if first != m.index+1 || last != m.index+uint64(len(m.ents)) {
		return false
	}
	for i, e := range m.ents {
		got, err := l.Entries(m.index+1+uint64(i), m.index+2+uint64(i), 0)
		must(t, err)
		if got[0].GetTerm() != e.GetTerm() || !bytes.Equal(got[0].GetData(), e.GetData()) {
			return false
		}
	}
	return true
}

// between tells whether l holds all of old and then a prefix of new, as
// a power loss in the middle of an append may leave it.
func between(t *testing.T, l *Log, old, new model) bool {
	for n := len(new.ents); n >= len(old.ents); n-- {
		if (model{index: new.index, ents: new.ents[:n]}).equals(t, l) {
			return true
		}
	}
	return false
}

// TestCrashAtEveryPoint drives a random workload and copies the directory at
// every fail point, as a stop of the process would leave it. For each copy: what
// was acknowledged before is there, what was in flight is there whole or not at
// all, and the reopened log goes on.
func TestCrashAtEveryPoint(t *testing.T) {
	rng := rand.New(rand.NewSource(seed(t)))
	dir := filepath.Join(t.TempDir(), "wal")
	type image struct {
		point, dir string
		old, new   model
	}
	var images []image
	counts := map[string]int{}
	m := model{index: 1}
	next := m
	armed := false
	o := Options{FailPoint: func(p string) error {
		counts[p]++
		if armed && (counts[p] < 12 || rng.Intn(10) == 0) {
			images = append(images, image{p, copyDir(t, dir), m, next})
		}
		return nil
	}}
	l, _ := open(t, dir, o)
	armed = true
	term := uint64(1)
	for range 300 {
		last := m.index + uint64(len(m.ents))
		commit := l.tail.hs.GetCommit()
		switch k := rng.Intn(20); {
		case k == 0 && last > m.index+3 && last > commit:
			term++
			lo := commit + 1 + uint64(rng.Intn(int(last-commit)))
			es := run(lo, lo+uint64(rng.Intn(4)), term, rng.Intn(900))
			next = m.append(es)
			must(t, l.Append(hard(term, 1, commit), es, true))
		case k == 1 && commit > m.index:
			to := m.index + 1 + uint64(rng.Intn(int(last-m.index)))
			if to > commit {
				to = commit
			}
			next = m.compact(to)
			must(t, l.Compact(to, conf(1, 2, 3)))
		case k == 2:
			term++
			to := commit + 1 + uint64(rng.Intn(20))
			next = model{index: to}
			must(t, l.InstallSnapshot(to, term, conf(1, 2, 3), nil))
		default:
			es := run(last+1, last+1+uint64(rng.Intn(3)), term, rng.Intn(900))
			next = m.append(es)
			c := max(commit, last-uint64(rng.Intn(3)))
			if c > last || c < m.index {
				c = commit
			}
			must(t, l.Append(hard(term, 1, c), es, true))
		}
		m = next
	}
	must(t, l.Close())
	for _, p := range []string{PointAppendBefore, PointAppendSynced, PointInstallBefore, PointInstallRecord, PointInstallSynced, PointCompactBefore, PointCompactState, PointCompactRecord, PointSegmentRemove, PointSegmentRemoved} {
		if counts[p] == 0 {
			t.Errorf("the workload never reached %s", p)
		}
	}
	for _, im := range images {
		l, _ := open(t, im.dir, Options{})
		if isOld, isNew := im.old.equals(t, l), im.new.equals(t, l); !isOld && !isNew {
			f, _ := l.FirstIndex()
			n, _ := l.LastIndex()
			t.Fatalf("stopped at %s: the log holds %d..%d, neither what was before (%d+%d) nor after (%d+%d)", im.point, f, n, im.old.index, len(im.old.ents), im.new.index, len(im.new.ents))
		} else if !isNew && (im.point == PointAppendSynced || im.point == PointInstallSynced || im.point == PointCompactRecord) {
			t.Fatalf("stopped at %s: what was synced is not there", im.point)
		}
		n, _ := l.LastIndex()
		must(t, l.Append(nil, run(n+1, n+2, term+9, 600), true))
		must(t, l.Close())
		l, _ = open(t, im.dir, Options{})
		if got, _ := l.LastIndex(); got != n+2 {
			t.Fatalf("stopped at %s: the log cannot be continued", im.point)
		}
		must(t, l.Close())
	}
	t.Logf("%d images", len(images))
}

// TestPowerLoss loses a random choice of the sectors that the last append wrote:
// the append may be lost or cut to a prefix, nothing before it may.
func TestPowerLoss(t *testing.T) {
	rng := rand.New(rand.NewSource(seed(t)))
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{SegmentBytes: 1 << 20})
	m := model{index: 1}
	must(t, l.Append(hard(1, 1, 1), run(2, 9, 1, 300), true))
	m = m.append(run(2, 9, 1, 300))
	path, from := lastSegment(t, dir)
	add := run(10, 17, 1, 700)
	must(t, l.Append(hard(1, 1, 9), add, true))
	after := m.append(add)
	_, to := lastSegment(t, dir)
	image := copyDir(t, dir)
	must(t, l.Close())
	file := filepath.Join(image, filepath.Base(path))
	whole, err := os.ReadFile(file)
	must(t, err)
	lost := 0
	for range 150 {
		b := bytes.Clone(whole)
		p := rng.Intn(3)
		for s := from; s < to; s = s/sector*sector + sector {
			e := min(s/sector*sector+sector, to)
			if p == 0 || p == 1 && rng.Intn(2) == 0 || p == 2 && rng.Intn(8) == 0 {
				clear(b[s:e])
			}
		}
		must(t, os.WriteFile(file, b, 0o600))
		l, rec := open(t, image, Options{SegmentBytes: 1 << 20})
		if !between(t, l, m, after) {
			t.Fatalf("acknowledged entries are missing or wrong: %+v", rec)
		}
		if !after.equals(t, l) {
			lost++
		}
		n, _ := l.LastIndex()
		must(t, l.Append(hard(2, 1, 9), run(n+1, n+1, 2, 10), true))
		must(t, l.Close())
		l, _ = open(t, image, Options{SegmentBytes: 1 << 20})
		if got, _ := l.LastIndex(); got != n+1 {
			t.Fatal("the repaired log cannot be continued")
		}
		must(t, l.Close())
	}
	if lost == 0 {
		t.Fatal("no image lost anything")
	}
}

// TestStopInsideCreateAndRepair stops a start at its own points; the next start
// finds a log or none, never half of one.
func TestStopInsideCreateAndRepair(t *testing.T) {
	stop := errors.New("stop")
	at := func(p string) Options {
		return Options{FailPoint: func(q string) error {
			if p == q {
				return stop
			}
			return nil
		}}
	}
	for _, p := range []string{PointCreateStaged, PointCreateRenamed} {
		dir := filepath.Join(t.TempDir(), "wal")
		if _, _, err := tryOpen(t, dir, at(p)); !errors.Is(err, stop) {
			t.Fatal(err)
		}
		l, rec := open(t, dir, Options{})
		if rec.Created != (p == PointCreateStaged) || rec.FirstIndex != 2 || rec.HardState.GetCommit() != 1 {
			t.Fatalf("%s: %+v", p, rec)
		}
		must(t, l.Close())
	}
	for _, p := range []string{PointRepairBefore, PointRepairCut} {
		dir := filepath.Join(t.TempDir(), "wal")
		l, _ := open(t, dir, Options{})
		must(t, l.Append(nil, run(2, 5, 1, 100), true))
		path, end := lastSegment(t, dir)
		must(t, l.Close())
		must(t, os.Truncate(path, end-60))
		if _, _, err := tryOpen(t, dir, at(p)); !errors.Is(err, stop) {
			t.Fatal(err)
		}
		l, _ = open(t, dir, Options{})
		wantEntries(t, l, run(2, 4, 1, 100))
		must(t, l.Close())
	}
}

// TestFailedForGood: after one failure every call returns it, reading goes on,
// and the entries in flight are not shown.
func TestFailedForGood(t *testing.T) {
	boom := errors.New("boom")
	for _, p := range []string{PointAppendBefore, PointAppendSynced, PointInstallRecord, PointCompactState, PointCompactRecord} {
		dir := filepath.Join(t.TempDir(), "wal")
		armed := false
		l, _ := open(t, dir, Options{FailPoint: func(q string) error {
			if armed && p == q {
				return boom
			}
			return nil
		}})
		want := run(2, 9, 1, 10)
		must(t, l.Append(nil, want, true))
		armed = true
		first := l.Compact(5, conf(1))
		if first == nil {
			first = l.InstallSnapshot(50, 2, conf(1), nil)
		}
		armed = p == PointAppendBefore || p == PointAppendSynced
		if first == nil {
			first = l.Append(nil, run(51, 51, 2, 1), true)
			want = nil
		} else if p == PointInstallRecord {
			want = run(6, 9, 1, 10)
		}
		if !errors.Is(first, boom) || !errors.Is(first, ErrFailed) {
			t.Fatalf("%s: %v", p, first)
		}
		for _, err := range []error{l.Append(nil, nil, true), l.InstallSnapshot(90, 9, conf(1), nil), l.Compact(7, conf(1))} {
			if err != first {
				t.Fatalf("%s: later call: %v", p, err)
			}
		}
		wantEntries(t, l, want)
		must(t, l.Close())
		_, _ = open(t, dir, Options{})
	}
}
