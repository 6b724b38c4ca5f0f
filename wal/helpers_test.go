package wal

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

var seedFlag = flag.Int64("seed", 0, "seed of the random tests, 0 = from the clock")

func seed(t testing.TB) int64 {
	s := *seedFlag
	if s == 0 {
		s = time.Now().UnixNano()
	}
	t.Logf("repeat with -seed %d", s)
	return s
}

const testSegment = 8 << 10

var (
	testID    = Identity{ClusterID: 0xc0, NodeID: 1}
	testStart = Start{Index: 1, Term: 1, ConfState: conf(1, 2, 3)}
)

func conf(ids ...uint64) *raftpb.ConfState { return &raftpb.ConfState{Voters: ids} }

func ent(i, term uint64, data string) *raftpb.Entry {
	return &raftpb.Entry{Index: new(i), Term: new(term), Data: []byte(data)}
}

// run makes entries lo..hi of one term whose payload names them.
func run(lo, hi, term uint64, size int) []*raftpb.Entry {
	var es []*raftpb.Entry
	for i := lo; i <= hi; i++ {
		d := []byte(fmt.Sprintf("%d@%d ", i, term))
		for len(d) < size {
			d = append(d, byte('a'+(len(d)+int(i))%26))
		}
		es = append(es, ent(i, term, string(d)))
	}
	return es
}

func hard(term, vote, commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: new(term), Vote: new(vote), Commit: new(commit)}
}

func open(t testing.TB, dir string, o Options) (*Log, Recovered) {
	t.Helper()
	l, rec, err := tryOpen(t, dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return l, rec
}

func tryOpen(t testing.TB, dir string, o Options) (*Log, Recovered, error) {
	t.Helper()
	if o.SegmentBytes == 0 {
		o.SegmentBytes = testSegment
	}
	l, rec, err := Open(dir, testID, testStart, o)
	if err == nil {
		t.Cleanup(func() { l.Close() })
	}
	return l, rec, err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// copyDir copies the files of dir, as a crash would leave them with nothing
// unsynced lost.
func copyDir(t testing.TB, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "wal")
	must(t, os.MkdirAll(to, 0o700))
	des, err := os.ReadDir(dir)
	must(t, err)
	for _, de := range des {
		in, err := os.Open(filepath.Join(dir, de.Name()))
		if os.IsNotExist(err) {
			continue // the preallocated next segment was taken meanwhile
		}
		must(t, err)
		out, err := os.Create(filepath.Join(to, de.Name()))
		must(t, err)
		_, err = io.Copy(out, in)
		must(t, err)
		in.Close()
		must(t, out.Close())
	}
	return to
}

// wantEntries asserts that the log holds exactly want after its start.
func wantEntries(t testing.TB, l *Log, want []*raftpb.Entry) {
	t.Helper()
	first, _ := l.FirstIndex()
	last, _ := l.LastIndex()
	if last+1-first != uint64(len(want)) {
		t.Fatalf("log holds %d..%d, want %d entries", first, last, len(want))
	}
	if len(want) == 0 {
		return
	}
	got, err := l.Entries(first, last+1, 1<<62)
	must(t, err)
	for i := range want {
		if !proto.Equal(got[i], want[i]) {
			t.Fatalf("entry %d is %v, want %v", i, got[i], want[i])
		}
	}
	var bytes int64
	for _, e := range want {
		bytes += entryBytes(e)
	}
	if l.Bytes() != bytes {
		t.Fatalf("Bytes() = %d, want %d", l.Bytes(), bytes)
	}
}

// lastSegment returns the newest segment of dir and where its records end.
func lastSegment(t testing.TB, dir string) (path string, end int64) {
	t.Helper()
	s, err := scan(dir)
	must(t, err)
	info := s.segments[len(s.segments)-1]
	return info.path, info.end
}
