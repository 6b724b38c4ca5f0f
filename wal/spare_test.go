package wal

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	fi, err := os.Stat(path)
	must(t, err)
	return fi.Sys().(*syscall.Stat_t).Ino
}

// newestSegment returns the number and inode of the newest segment.
func newestSegment(t *testing.T, dir string) (uint64, uint64) {
	t.Helper()
	segs, err := listSegments(dir)
	must(t, err)
	s := segs[len(segs)-1]
	return s.seq, inode(t, s.path)
}

// TestWrittenSegments: a new log begins with two written segments, and the ones
// after them are prepared while it grows.
func TestWrittenSegments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	prepared := inode(t, filepath.Join(dir, pipelineNames[0]))
	next := uint64(2)
	grow := func(to uint64) uint64 {
		for {
			seq, ino := newestSegment(t, dir)
			if seq >= to {
				return ino
			}
			must(t, l.Append(hard(1, 0, next-1), run(next, next, 1, 512), true))
			next++
		}
	}
	if got := grow(1); got != prepared {
		t.Error("the first segment to come was not the written one")
	}
	for seq := uint64(2); seq < 6; seq++ {
		// Which of the names the underlying package holds is its affair; the other
		// one comes from us.
		waitFor(t, "a spare", func() bool {
			for _, name := range pipelineNames {
				if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
					l.spares.appended(testSegment)
					return false
				}
			}
			return true
		})
		grow(seq)
	}
	must(t, l.Close())
	if _, err := os.Stat(filepath.Join(dir, spareName)); !os.IsNotExist(err) {
		t.Errorf("a half spare is left: %v", err)
	}
	_, rec := open(t, dir, Options{})
	if rec.LastIndex != next-1 || rec.Repaired != 0 {
		t.Errorf("%+v, appended up to %d", rec, next-1)
	}
}

// TestSpareGivesWay: a spare never takes the place of a file, be it one the
// underlying package made while the spare was written.
func TestSpareGivesWay(t *testing.T) {
	dir := t.TempDir()
	s := &spares{dir: dir, size: testSegment, stop: make(chan struct{})}
	for i, name := range pipelineNames {
		must(t, s.provide())
		path := filepath.Join(dir, name)
		if ok, err := isBlank(path, testSegment); !ok || err != nil {
			t.Fatalf("%d names taken, %s is not blank: %v", i, name, err)
		}
		must(t, os.WriteFile(path, []byte("a segment that has begun"), 0o600))
	}
	must(t, s.provide())
	for _, name := range pipelineNames {
		if b, err := os.ReadFile(filepath.Join(dir, name)); string(b) != "a segment that has begun" {
			t.Errorf("%s holds %d other bytes: %v", name, len(b), err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, spareName)); !os.IsNotExist(err) {
		t.Errorf("the spare is left: %v", err)
	}
}

// TestLeftoversOfSegmentsToCome: what a crash left under the names of segments to
// come is used when it is blank and removed when it is not. The underlying package
// takes whatever lies there for blank: the rest of a longer head, or of an older
// segment, would follow its records.
func TestLeftoversOfSegmentsToCome(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Append(hard(1, 0, 1), run(2, 9, 1, 512), true))
	must(t, l.Close())
	segs, err := listSegments(dir)
	must(t, err)
	used, err := os.ReadFile(segs[0].path)
	must(t, err)
	for _, name := range []string{pipelineNames[0], pipelineNames[1], spareName} {
		must(t, os.WriteFile(filepath.Join(dir, name), used[:len(used)/2], 0o600))
	}
	must(t, os.WriteFile(filepath.Join(dir, pipelineNames[0]), used, 0o600))

	// Each round ends right after a segment began, so that little of what lay there
	// is overwritten.
	for round := range 4 {
		l, rec := open(t, dir, Options{})
		seq, _ := newestSegment(t, dir)
		i := rec.LastIndex
		for now := seq; now == seq; now, _ = newestSegment(t, dir) {
			i++
			must(t, l.Append(hard(1, 0, i-1), run(i, i, 1, 512), true))
		}
		must(t, l.Close())
		c, err := Inspect(dir)
		if err != nil || c.LastIndex != i {
			t.Fatalf("round %d: appended up to %d, found %+v, %v", round, i, c, err)
		}
		must(t, os.WriteFile(filepath.Join(dir, pipelineNames[0]), used, 0o600))
	}
}

// TestSpareStopsWithTheLog: closing does not wait for a whole segment.
func TestSpareStopsWithTheLog(t *testing.T) {
	dir := t.TempDir()
	const size = 1 << 30
	s := startSpares(dir, size, slog.New(slog.DiscardHandler))
	s.appended(size)
	path := filepath.Join(dir, spareName)
	waitFor(t, "the spare to begin", func() bool { fi, err := os.Stat(path); return err == nil && fi.Size() > 0 })
	s.close()
	for _, name := range append(pipelineNames[:], spareName) {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("no %s", what)
		}
	}
}

// TestEndOfData is what decides where zeros may be written.
func TestEndOfData(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, n := range []int{0, 1, 8, 100} {
		b := append(bytes.Repeat([]byte{7}, n), make([]byte, 50)...)
		must(t, os.WriteFile(path, b, 0o600))
		if got, err := endOfData(path); got != int64(n) || err != nil {
			t.Errorf("%d bytes: %d, %v", n, got, err)
		}
	}
}
