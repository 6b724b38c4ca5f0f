package wal

import (
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// Goal: the scan reads of an entry what the underlying package reads of it, and refuses
// what that panics on.
func FuzzEntryHead(f *testing.F) {
	for _, e := range []*raftpb.Entry{
		{},
		{Index: new(uint64(7)), Term: new(uint64(3)), Data: []byte("a command")},
		{Index: new(uint64(1 << 63)), Type: raftpb.EntryConfChangeV2.Enum()},
	} {
		raw, err := proto.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		f.Add(append(raw, 0x10, 5, 0x18, 9))    // again: the last one counts
		f.Add(append(raw, 0x12, 1, 5, 0x7a, 0)) // another wire type; an unknown field
		f.Add(append(raw, 0x10))
		f.Add(append(raw, 0x0b, 0x10, 4, 0x0c)) // a group
	}
	f.Add([]byte("\b\x800\x80\x80\x80\x8000")) // a field with too high a number
	f.Fuzz(func(t *testing.T, raw []byte) {
		var e raftpb.Entry
		want := proto.Unmarshal(raw, &e)
		index, term, err := entryHead(raw)
		if (err == nil) != (want == nil) {
			t.Fatalf("got %v, proto.Unmarshal says %v", err, want)
		}
		if err == nil && (index != e.GetIndex() || term != e.GetTerm()) {
			t.Fatalf("index %d term %d, want %d and %d", index, term, e.GetIndex(), e.GetTerm())
		}
	})
}

// Goal: a byte that is not zero is seen wherever it is: a log that goes on behind a gap
// must not be taken for its end.
func TestAllZero(t *testing.T) {
	block := len(zeros)
	for _, n := range []int{0, 1, block - 1, block, block + 1, 2 * block, 3*block + 1} {
		b := make([]byte, n)
		if !allZero(b) {
			t.Errorf("%d zeroes are not", n)
		}
		for _, at := range []int{0, block - 1, block, block + 1, 2*block - 1, 2 * block, n - 1} {
			if at < 0 || at >= n {
				continue
			}
			b[at] = 1
			if allZero(b) {
				t.Errorf("byte %d of %d was not seen", at, n)
			}
			b[at] = 0
		}
	}
}
