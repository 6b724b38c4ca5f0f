package raftnode

import (
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/wal"
)

// Log is the durable raft log of one node as this package uses it. wal.Log is
// the real one; tests have one in memory with explicit sync points.
//
// Append and InstallSnapshot are called by one goroutine, Compact by another;
// the reading methods by any.
type Log interface {
	// InitialState returns the durable hard state. The ConfState is not used:
	// raft is started with the one of the applied position.
	InitialState() (*raftpb.HardState, *raftpb.ConfState, error)
	FirstIndex() (uint64, error)
	LastIndex() (uint64, error)
	// Term and Entries follow raft.Storage.
	Term(i uint64) (uint64, error)
	Entries(lo, hi, maxSize uint64) ([]*raftpb.Entry, error)

	// Append writes ents (several runs, each overwriting from its first index
	// on) and hs (nil: unchanged), makes them and everything appended before
	// durable when sync, and only then readable. The slice is not kept.
	Append(hs *raftpb.HardState, ents []*raftpb.Entry, sync bool) error
	// InstallSnapshot empties the log and lets it begin after index; durable
	// on return.
	InstallSnapshot(index, term uint64, cs *raftpb.ConfState, hs *raftpb.HardState) error
	// Compact drops the entries up to and including upTo.
	Compact(upTo uint64, cs *raftpb.ConfState) error
	// Bytes returns the memory held by the readable entries.
	Bytes() int64
}

var _ Log = (*wal.Log)(nil)

// storage is the raft.Storage the RawNode sees: the log, started from the
// applied position, with images for snapshots. Its methods run on the loop.
type storage struct {
	Log
	hs    *raftpb.HardState
	cs    *raftpb.ConfState
	snaps *snapshots
	loop  *loop
}

var _ raft.Storage = (*storage)(nil)

// InitialState implements raft.Storage.
func (s *storage) InitialState() (*raftpb.HardState, *raftpb.ConfState, error) {
	return s.hs, s.cs, nil
}

// Snapshot implements raft.Storage. It returns only the name of an image and
// never waits for one: it runs on the loop, in the middle of a Step.
func (s *storage) Snapshot() (*raftpb.Snapshot, error) {
	first, err := s.Log.FirstIndex()
	if err != nil {
		return nil, err
	}
	sn := s.snaps.newest(first, s.loop.confState, s.loop.now)
	if sn == nil {
		return nil, raft.ErrSnapshotTemporarilyUnavailable
	}
	return sn, nil
}
