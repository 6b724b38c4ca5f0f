package wal

import (
	"sync"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// entryOverhead is what an entry costs in memory besides its payload: the
// message, its scalar pointers and the slot in the tail.
const entryOverhead = 128

// tail is the part of the log that can be read: the entries after one position.
// Methods lock for themselves; the lock is never held across IO, because raft
// reads on its loop and must not wait for a disk.
type tail struct {
	mu sync.RWMutex
	// index and term are those of the entry before ents[0].
	index uint64
	term  uint64
	// ents[i] has index tail.index+1+i. Slots below len are never written
	// again: readers hold slices of the array.
	ents  []*raftpb.Entry
	bytes int64
	hs    *raftpb.HardState // never nil, never changed in place
	cs    *raftpb.ConfState // never nil, never changed in place
}

func (t *tail) first() uint64 { return t.index + 1 }
func (t *tail) last() uint64  { return t.index + uint64(len(t.ents)) }

// termOf returns the term of entry i, which must lie in [index, last].
func (t *tail) termOf(i uint64) uint64 {
	if i == t.index {
		return t.term
	}
	return t.ents[i-t.index-1].GetTerm()
}

func entryBytes(e *raftpb.Entry) int64 { return int64(len(e.GetData())) + entryOverhead }

// append shows ents, which may consist of several runs that each overwrite
// what is there from their first index on, and hs (nil = unchanged).
func (t *tail) append(hs *raftpb.HardState, ents []*raftpb.Entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(ents) > 0 {
		n := 1
		for n < len(ents) && ents[n].GetIndex() == ents[n-1].GetIndex()+1 {
			n++
		}
		t.appendRunLocked(ents[:n])
		ents = ents[n:]
	}
	if hs != nil {
		t.hs = hs
	}
}

func (t *tail) appendRunLocked(run []*raftpb.Entry) {
	off := run[0].GetIndex() - t.index - 1
	if off < uint64(len(t.ents)) {
		for _, e := range t.ents[off:] {
			t.bytes -= entryBytes(e)
		}
		// The cap forces a copy: readers may hold the slots being replaced.
		t.ents = t.ents[:off:off]
	}
	for _, e := range run {
		t.bytes += entryBytes(e)
	}
	t.ents = append(t.ents, run...)
}

// compact drops entries up to and including i, which must lie in (index, last].
func (t *tail) compact(i uint64, hs *raftpb.HardState, cs *raftpb.ConfState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := i - t.index
	for _, e := range t.ents[:n] {
		t.bytes -= entryBytes(e)
	}
	term := t.termOf(i)
	// A new array: reslicing would keep the dropped entries reachable.
	t.ents = append(make([]*raftpb.Entry, 0, uint64(len(t.ents))-n), t.ents[n:]...)
	t.index, t.term, t.hs, t.cs = i, term, hs, cs
}

// reset empties the tail after a position.
func (t *tail) reset(index, term uint64, hs *raftpb.HardState, cs *raftpb.ConfState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index, t.term, t.ents, t.bytes, t.hs, t.cs = index, term, nil, 0, hs, cs
}

// InitialState implements raft.Storage. The ConfState is that of the position
// the log starts after, which is older than the applied one: raft must be
// started with the latter.
func (l *Log) InitialState() (*raftpb.HardState, *raftpb.ConfState, error) {
	l.tail.mu.RLock()
	defer l.tail.mu.RUnlock()
	return proto.CloneOf(l.tail.hs), proto.CloneOf(l.tail.cs), nil
}

// FirstIndex implements raft.Storage.
func (l *Log) FirstIndex() (uint64, error) {
	l.tail.mu.RLock()
	defer l.tail.mu.RUnlock()
	return l.tail.first(), nil
}

// LastIndex implements raft.Storage.
func (l *Log) LastIndex() (uint64, error) {
	l.tail.mu.RLock()
	defer l.tail.mu.RUnlock()
	return l.tail.last(), nil
}

// Term implements raft.Storage.
func (l *Log) Term(i uint64) (uint64, error) {
	l.tail.mu.RLock()
	defer l.tail.mu.RUnlock()
	switch {
	case i < l.tail.index:
		return 0, raft.ErrCompacted
	case i > l.tail.last():
		return 0, raft.ErrUnavailable
	}
	return l.tail.termOf(i), nil
}

// Entries implements raft.Storage. The slice cannot grow into the log; the
// entries are shared and must not be changed.
func (l *Log) Entries(lo, hi, maxSize uint64) ([]*raftpb.Entry, error) {
	l.tail.mu.RLock()
	defer l.tail.mu.RUnlock()
	t := &l.tail
	switch {
	case lo <= t.index:
		return nil, raft.ErrCompacted
	case hi > t.last()+1 || lo >= hi:
		return nil, raft.ErrUnavailable
	}
	ents := t.ents[lo-t.index-1 : hi-t.index-1]
	n, size := 1, uint64(proto.Size(ents[0]))
	for ; n < len(ents); n++ {
		if size += uint64(proto.Size(ents[n])); size > maxSize {
			break
		}
	}
	return ents[:n:n], nil
}

// Snapshot implements raft.Storage. The log has none: whoever wraps it for raft
// knows the images of the state machine.
func (l *Log) Snapshot() (*raftpb.Snapshot, error) {
	return nil, raft.ErrSnapshotTemporarilyUnavailable
}

// Bytes returns the memory held by readable entries.
func (l *Log) Bytes() int64 {
	l.tail.mu.RLock()
	defer l.tail.mu.RUnlock()
	return l.tail.bytes
}
