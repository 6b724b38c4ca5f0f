package raftnode

import (
	"errors"
	"fmt"
	"sync"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// memLog is a Log in memory that knows what a crash would leave: everything up
// to the last sync, and of what came later any prefix of the writes.
type memLog struct {
	mu sync.Mutex
	memLogState
	// writes made since the last sync, as the states after each.
	unsynced []memLogState
	durable  memLogState
	// fail, when set, is asked before each operation: append, install, compact.
	fail  func(op string) error
	err   error
	syncs int
}

type memLogState struct {
	index, term uint64 // of the entry before ents[0]
	cs          *raftpb.ConfState
	hs          *raftpb.HardState
	ents        []*raftpb.Entry
}

func (s memLogState) clone() memLogState {
	s.ents = append([]*raftpb.Entry(nil), s.ents...)
	return s
}

func (s *memLogState) last() uint64 { return s.index + uint64(len(s.ents)) }

func newMemLog(pos Position) *memLog {
	st := memLogState{index: pos.Index, term: pos.Term, cs: cloneConfState(pos.ConfState), hs: &raftpb.HardState{}}
	return &memLog{memLogState: st, durable: st.clone()}
}

// crash returns the log a restart finds when keep of the unsynced writes made it
// to the disk.
func (l *memLog) crash(keep int) *memLog {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := l.durable
	if keep > len(l.unsynced) {
		keep = len(l.unsynced)
	}
	if keep > 0 {
		st = l.unsynced[keep-1]
	}
	return &memLog{memLogState: st.clone(), durable: st.clone()}
}

func (l *memLog) gateLocked(op string) error {
	if l.err != nil {
		return l.err
	}
	if l.fail != nil {
		if err := l.fail(op); err != nil {
			l.err = err
			return err
		}
	}
	return nil
}

func (l *memLog) syncLocked() {
	l.durable = l.memLogState.clone()
	l.unsynced = nil
	l.syncs++
}

func (l *memLog) Append(hs *raftpb.HardState, ents []*raftpb.Entry, sync bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.gateLocked("append"); err != nil {
		return err
	}
	for _, e := range ents {
		i := e.GetIndex()
		if i <= l.index || i > l.last()+1 {
			return fmt.Errorf("memlog: entry %d does not fit into [%d, %d]", i, l.index+1, l.last())
		}
		if i <= l.hs.GetCommit() {
			return fmt.Errorf("memlog: entry %d overwrites a committed one (commit %d)", i, l.hs.GetCommit())
		}
		l.ents = append(l.ents[:i-l.index-1:i-l.index-1], e)
	}
	if hs != nil {
		if hs.GetCommit() > l.last() || hs.GetCommit() < l.hs.GetCommit() || hs.GetTerm() < l.hs.GetTerm() {
			return fmt.Errorf("memlog: hard state %v after %v with last entry %d", hs, l.hs, l.last())
		}
		if hs.GetTerm() == l.hs.GetTerm() && l.hs.GetVote() != 0 && hs.GetVote() != l.hs.GetVote() {
			return fmt.Errorf("memlog: vote changed within a term: %v after %v", hs, l.hs)
		}
		l.hs = proto.CloneOf(hs)
	}
	if sync {
		l.syncLocked()
	} else {
		l.unsynced = append(l.unsynced, l.memLogState.clone())
	}
	return nil
}

func (l *memLog) InstallSnapshot(index, term uint64, cs *raftpb.ConfState, hs *raftpb.HardState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.gateLocked("install"); err != nil {
		return err
	}
	if hs.GetCommit() < index {
		return fmt.Errorf("memlog: install at %d with commit %d", index, hs.GetCommit())
	}
	l.index, l.term, l.cs, l.ents = index, term, cloneConfState(cs), nil
	l.hs = proto.CloneOf(hs)
	l.syncLocked()
	return nil
}

func (l *memLog) Compact(upTo uint64, cs *raftpb.ConfState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.gateLocked("compact"); err != nil {
		return err
	}
	if upTo <= l.index {
		return raft.ErrCompacted
	}
	if upTo > l.last() {
		return errors.New("memlog: compact beyond the end")
	}
	term := l.ents[upTo-l.index-1].GetTerm()
	l.ents = append([]*raftpb.Entry(nil), l.ents[upTo-l.index:]...)
	l.index, l.term, l.cs = upTo, term, cloneConfState(cs)
	l.syncLocked()
	return nil
}

func (l *memLog) Bytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := int64(0)
	for _, e := range l.ents {
		n += int64(len(e.GetData())) + 128
	}
	return n
}

func (l *memLog) InitialState() (*raftpb.HardState, *raftpb.ConfState, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return proto.CloneOf(l.hs), cloneConfState(l.cs), nil
}

func (l *memLog) FirstIndex() (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.index + 1, nil
}

func (l *memLog) LastIndex() (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last(), nil
}

func (l *memLog) Term(i uint64) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case i < l.index:
		return 0, raft.ErrCompacted
	case i > l.last():
		return 0, raft.ErrUnavailable
	case i == l.index:
		return l.term, nil
	}
	return l.ents[i-l.index-1].GetTerm(), nil
}

func (l *memLog) Entries(lo, hi, maxSize uint64) ([]*raftpb.Entry, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lo <= l.index {
		return nil, raft.ErrCompacted
	}
	if hi > l.last()+1 || lo >= hi {
		return nil, raft.ErrUnavailable
	}
	var out []*raftpb.Entry
	size := uint64(0)
	for _, e := range l.ents[lo-l.index-1 : hi-l.index-1] {
		if size += uint64(proto.Size(e)); size > maxSize && len(out) > 0 {
			break
		}
		out = append(out, e)
	}
	return out, nil
}
