package wal

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
)

// smallLog writes a log of several segments, one entry an Append, and returns
// its directory and last index.
func smallLog(t testing.TB, n uint64) (string, uint64) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	for i := uint64(2); i < 2+n; i++ {
		must(t, l.Append(hard(1, 1, i-1), run(i, i, 1, 300), true))
	}
	must(t, l.Close())
	return dir, 1 + n
}

// Every length of the last segment is a crash image of a file system that lost
// the end. What lies whole before the cut must be there, and nothing else.
func TestTruncateAtEveryByte(t *testing.T) {
	dir, last := smallLog(t, 34)
	s, err := scan(dir)
	must(t, err)
	info := s.segments[len(s.segments)-1]
	if len(s.segments) < 2 || info.entries < 3 {
		t.Fatalf("want entries in a second segment, have %+v", info)
	}
	whole, err := os.ReadFile(info.path)
	must(t, err)
	// ends[i] is where the i-th entry of the segment ends; header where its own do.
	var ends []int64
	var header int64
	fr, err := openFrames(info.path)
	must(t, err)
	fr.crc, fr.chained = 0, false
	var rec record
	for n := 0; fr.next(&rec) == nil; n++ {
		if n == 1 {
			header = rec.end
		}
		if rec.typ == etcdwal.EntryType {
			ends = append(ends, rec.end)
		}
	}
	fr.close()
	for n := info.end; n >= 0; n-- {
		must(t, os.WriteFile(info.path, whole[:n], 0o600))
		s, err := scan(dir)
		if n < header {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("cut to %d, inside the synced header: %v", n, err)
			}
			continue
		}
		must(t, err)
		want := info.first - 1
		for _, e := range ends {
			if e <= n {
				want++
			}
		}
		if s.last() != want {
			t.Fatalf("cut to %d: last index %d, want %d of %d", n, s.last(), want, last)
		}
		// Reading covers every byte; repairing costs syncs, so it takes samples.
		if n%32 != 1 && n%137 != 0 {
			continue
		}
		l, rec, err := tryOpen(t, dir, Options{})
		must(t, err)
		if rec.LastIndex != want {
			t.Fatalf("cut to %d: opened at %d, want %d", n, rec.LastIndex, want)
		}
		must(t, l.Append(nil, run(want+1, want+1, 1, 10), true))
		must(t, l.Close())
	}
}

// One flipped bit anywhere: either the log is refused, or the flip lies in
// padding and everything is there. Only the last two appends, of which nothing
// on disk proves that they were synced, may be taken for an unfinished write.
func TestFlipEveryByte(t *testing.T) {
	dir, last := smallLog(t, 40)
	segs, err := listSegments(dir)
	must(t, err)
	refusedCount, cutCount := 0, 0
	for si, seg := range segs {
		whole, err := os.ReadFile(seg.path)
		must(t, err)
		end := int64(len(whole))
		if si == len(segs)-1 {
			_, end = lastSegment(t, dir)
		}
		for off := range end {
			b := bytes.Clone(whole)
			b[off] ^= 1 << (off % 8)
			must(t, os.WriteFile(seg.path, b, 0o600))
			s, err := scan(dir)
			switch {
			case errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNewerFormat):
				refusedCount++
				if off%997 == 0 {
					if _, _, err := tryOpen(t, dir, Options{}); err == nil || !strings.Contains(err.Error(), filepath.Base(seg.path)) {
						t.Fatalf("%s byte %d: Open says %v", seg.path, off, err)
					}
				}
			case err != nil:
				t.Fatal(err)
			case s.last() < last-2:
				t.Fatalf("%s byte %d: entries after %d would be cut off: %+v", seg.path, off, s.last(), s.torn)
			case s.torn != nil:
				cutCount++
			}
		}
		must(t, os.WriteFile(seg.path, whole, 0o600))
	}
	t.Logf("%d refused, %d cut", refusedCount, cutCount)
	l, _ := open(t, dir, Options{})
	wantEntries(t, l, run(2, last, 1, 300))
}

func TestCorruptionNamesTheWayOut(t *testing.T) {
	dir, _ := smallLog(t, 40)
	segs, err := listSegments(dir)
	must(t, err)
	b, err := os.ReadFile(segs[0].path)
	must(t, err)
	b[2000] ^= 0xff
	must(t, os.WriteFile(segs[0].path, b, 0o600))
	_, _, err = tryOpen(t, dir, Options{})
	var c *CorruptError
	if !errors.As(err, &c) || c.File != segs[0].path || c.Offset == 0 || c.Offset > 2000 {
		t.Fatalf("%v", err)
	}
	for _, part := range []string{"rejoin with an empty data directory", "backup", fmt.Sprint(c.Offset)} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
	after, err := os.ReadFile(segs[0].path)
	must(t, err)
	if !bytes.Equal(after, b) {
		t.Fatal("a refused log was changed")
	}
}

func TestMissingSegments(t *testing.T) {
	for drop := range 2 {
		dir, _ := smallLog(t, 80)
		segs, err := listSegments(dir)
		must(t, err)
		if len(segs) < 3 {
			t.Fatal(len(segs))
		}
		must(t, os.Remove(segs[drop].path))
		if _, _, err := tryOpen(t, dir, Options{}); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("without segment %d: %v", drop, err)
		}
	}
}

// A crash during a removal may bring an old segment back behind a gap.
func TestStraySegmentIsRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	for i := uint64(2); i <= 150; i++ {
		must(t, l.Append(hard(1, 1, i-1), run(i, i, 1, 300), true))
	}
	segs, err := listSegments(dir)
	must(t, err)
	old, err := os.ReadFile(segs[0].path)
	must(t, err)
	must(t, l.Compact(148, conf(1)))
	must(t, l.Close())
	must(t, os.WriteFile(segs[0].path, old, 0o600))
	if r, err := Verify(dir); err != nil || len(r.Ignored) != 1 || r.FirstIndex != 149 || r.LastIndex != 150 {
		t.Fatalf("%+v %v", r, err)
	}
	l, _ = open(t, dir, Options{})
	wantEntries(t, l, run(149, 150, 1, 300))
	if _, err := os.Stat(segs[0].path); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("the stray segment is still there")
	}
}

func TestNewerFormat(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	w, err := etcdwal.Create(nil, dir, []byte(`{"format":2,"cluster_id":192,"node_id":1}`))
	must(t, err)
	must(t, w.Close())
	if _, _, err := tryOpen(t, dir, Options{}); !errors.Is(err, ErrNewerFormat) || errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	if _, err := Verify(dir); !errors.Is(err, ErrNewerFormat) {
		t.Fatal(err)
	}
}

// A disk that takes only part of a write: the append fails, the log with it, and
// after space was made the next start has everything acknowledged.
func TestShortWrite(t *testing.T) {
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var was syscall.Rlimit
	must(t, syscall.Getrlimit(syscall.RLIMIT_FSIZE, &was))
	const segment = 1 << 20
	for room := int64(0); room < 12_000; room += 997 {
		dir := filepath.Join(t.TempDir(), "wal")
		l, _ := open(t, dir, Options{SegmentBytes: segment})
		acked := run(2, 20, 1, 500)
		must(t, l.Append(hard(1, 1, 1), acked, true))
		_, end := lastSegment(t, dir)
		limit := was
		limit.Cur = uint64(end + room)
		must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit))
		first := l.Append(nil, run(21, 40, 1, 2000), true)
		again := l.Append(nil, run(21, 21, 1, 1), true)
		must(t, l.Close())
		must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &was))
		if !errors.Is(first, ErrFailed) || !errors.Is(first, syscall.EFBIG) || again != first {
			t.Fatalf("room %d: %v, then %v", room, first, again)
		}
		wantEntries(t, l, acked)
		l, rec := open(t, dir, Options{SegmentBytes: segment})
		if rec.LastIndex < 20 || rec.LastIndex > 39 {
			t.Fatalf("room %d: %+v", room, rec)
		}
		wantEntries(t, l, append(acked, run(21, rec.LastIndex, 1, 2000)...))
		must(t, l.Append(nil, run(rec.LastIndex+1, rec.LastIndex+2, 1, 100), true))
		must(t, l.Close())
	}
}
