package wal

import (
	"bytes"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the golden files")

// The dump of a log that did everything a log can do. It pins the records each
// call writes and their order, which the invariants of recovery rest on.
func TestDumpGolden(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Append(hard(1, 2, 1), run(2, 4, 1, 20), true))
	must(t, l.Append(hard(1, 2, 3), nil, false))
	must(t, l.Append(nil, run(4, 6, 2, 20), true))
	cc, err := proto.Marshal((&raftpb.ConfChangeV2{Changes: []*raftpb.ConfChangeSingle{{Type: raftpb.ConfChangeAddLearnerNode.Enum(), NodeId: new(uint64(4))}}}))
	must(t, err)
	must(t, l.Append(hard(3, 0, 6), []*raftpb.Entry{{Index: new(uint64(7)), Term: new(uint64(3)), Type: raftpb.EntryConfChangeV2.Enum(), Data: cc}}, true))
	must(t, l.Compact(7, conf(1, 2, 3)))
	must(t, l.InstallSnapshot(30, 4, conf(1, 2, 3, 4), nil))
	must(t, l.Append(nil, run(31, 31, 4, 9000), true)) // ends the segment
	must(t, l.Append(nil, run(32, 33, 4, 300), true))
	must(t, l.Append(nil, run(34, 34, 4, 60), true))
	must(t, l.Close())
	path, end := lastSegment(t, dir)
	must(t, os.Truncate(path, end-70))

	var got bytes.Buffer
	must(t, Dump(&got, dir, DumpOptions{}))
	golden := filepath.Join("testdata", "dump.txt")
	if *rewrite {
		must(t, os.WriteFile(golden, got.Bytes(), 0o644))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if !bytes.Equal(got.Bytes(), want) {
		t.Fatalf("the dump changed (run with -rewrite if that is wanted):\n%s", got.String())
	}

	got.Reset()
	must(t, Dump(&got, dir, DumpOptions{From: 32, To: 32, EntryFormatter: func(e *raftpb.Entry) string { return "mine" }}))
	if n := strings.Count(got.String(), "  entry  "); n != 1 || !strings.Contains(got.String(), "32 term 4 mine") {
		t.Fatalf("%d entries:\n%s", n, got.String())
	}
}

// Damage hides only the damaged record, not what follows it.
func TestDumpAcrossDamage(t *testing.T) {
	dir, last := smallLog(t, 40)
	segs, err := listSegments(dir)
	must(t, err)
	b, err := os.ReadFile(segs[0].path)
	must(t, err)
	b[2000] ^= 0xff
	must(t, os.WriteFile(segs[0].path, b, 0o600))
	var out bytes.Buffer
	must(t, Dump(&out, dir, DumpOptions{EntryFormatter: func(*raftpb.Entry) string { return "x" }}))
	if n := strings.Count(out.String(), " term 1 x\n"); n < int(last)-4 {
		t.Fatalf("only %d of %d entries are shown:\n%s", n, last-1, out.String())
	}
	if !strings.Contains(out.String(), "unreadable: checksum mismatch") || !strings.Contains(out.String(), "readable again") {
		t.Fatal(out.String())
	}
	r, err := Verify(dir)
	var c *CorruptError
	if !errors.As(err, &c) || len(r.Segments) != 1 || r.Segments[0].Readable != c.Offset {
		t.Fatalf("%+v %v", r, err)
	}
}

// The log of a running node: nothing is locked, nothing is changed.
func TestVerifyAndDumpOfALiveLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	must(t, l.Append(hard(1, 3, 2), run(2, 80, 1, 300), true))
	r, err := Verify(dir)
	must(t, err)
	if r.FirstIndex != 2 || r.LastIndex != 80 || r.Identity != testID || r.HardState.GetVote() != 3 || r.Unfinished != "" {
		t.Fatalf("%+v", r)
	}
	must(t, Dump(&bytes.Buffer{}, dir, DumpOptions{}))
	must(t, l.Append(nil, run(81, 81, 1, 300), true))
	must(t, l.Close())

	path, end := lastSegment(t, dir)
	must(t, os.Truncate(path, end-10))
	r, err = Verify(dir)
	must(t, err)
	if r.Unfinished == "" || r.LastIndex != 81 {
		t.Fatalf("%+v", r)
	}
	if _, err := Verify(filepath.Join(dir, "nowhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := Dump(&bytes.Buffer{}, t.TempDir(), DumpOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

// FuzzSegment opens, verifies and dumps a log whose only segment is arbitrary
// bytes. Nothing may panic, Verify and Open must agree, and a log that opens
// must go on.
func FuzzSegment(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "wal")
	l, _ := open(f, dir, Options{})
	must(f, l.Append(hard(1, 3, 2), run(2, 6, 1, 40), true))
	must(f, l.Append(nil, run(5, 8, 2, 700), true))
	must(f, l.Compact(3, conf(1, 2, 3)))
	must(f, l.InstallSnapshot(20, 3, conf(1, 2, 3), nil))
	must(f, l.Append(nil, run(21, 23, 3, 40), true))
	must(f, l.Close())
	path, end := lastSegment(f, dir)
	whole, err := os.ReadFile(path)
	must(f, err)
	f.Add(whole[:end])
	f.Add(whole)
	f.Add([]byte{})
	for n := int64(8); n < end; n += 211 {
		f.Add(whole[:n])
		b := bytes.Clone(whole[:end+40])
		b[n] ^= 0x41
		f.Add(b)
		b = bytes.Clone(whole)
		clear(b[n:min(end, n+600)])
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<20 {
			t.Skip()
		}
		dir := filepath.Join(t.TempDir(), "wal")
		must(t, os.MkdirAll(dir, 0o700))
		must(t, os.WriteFile(filepath.Join(dir, filepath.Base(path)), data, 0o600))
		must(t, Dump(&bytes.Buffer{}, dir, DumpOptions{}))
		r, verr := Verify(dir)
		l, rec, err := tryOpen(t, dir, Options{})
		if err != nil {
			if verr == nil && !errors.Is(err, ErrForeign) {
				t.Fatalf("Verify accepts what Open refuses: %v", err)
			}
			return
		}
		if verr != nil || r.LastIndex != rec.LastIndex || r.FirstIndex != rec.FirstIndex {
			t.Fatalf("Open found %+v, Verify %+v, %v", rec, r, verr)
		}
		n := rec.LastIndex + 1
		term, err := l.Term(rec.LastIndex)
		must(t, err)
		term = max(term, rec.HardState.GetTerm(), 1)
		must(t, l.Append(hard(term, 0, 0), run(n, n, term, 30), true))
		must(t, l.Close())
		l, rec, err = tryOpen(t, dir, Options{})
		must(t, err)
		if rec.LastIndex != n {
			t.Fatalf("entry %d is gone: %+v", n, rec)
		}
		must(t, l.Close())
	})
}
