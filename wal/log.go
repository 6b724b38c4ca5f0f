package wal

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// Log is the open log of one node. See the package comment for who may call
// what.
type Log struct {
	dir  string
	opts Options
	lg   *slog.Logger

	// compactMu orders Compact calls and keeps Close away from removals.
	compactMu sync.Mutex

	// mu orders everything that writes. It is held across the fsync.
	// The fields of tail change only under both mu and tail.mu, so a writer may
	// read them under mu alone.
	mu sync.Mutex
	w  *etcdwal.WAL
	// err is set once and for good by the first failure, or by Close.
	err    error
	closed bool
	// unsynced is true while records were written that no fsync followed.
	unsynced bool
	lock     *os.File
	spares   *spares

	tail tail
}

// fail stops the log for good. What the operation wrote may be on disk or not,
// and after a failed fsync nobody can find out: the kernel reports the error
// once and forgets the pages.
func (l *Log) fail(op string, err error) error {
	l.err = fmt.Errorf("%w: %s: %w", ErrFailed, op, err)
	l.lg.Error("the log failed", "op", op, "dir", l.dir, "error", err)
	return l.err
}

// point calls the fail point and fails the log on its error.
func (l *Log) point(p string) error {
	if err := l.opts.FailPoint(p); err != nil {
		return l.fail(p, err)
	}
	return nil
}

// Append writes entries and then the hard state (nil or empty = unchanged), and
// makes them readable. With sync, or whenever there are entries or the term or
// vote changed, it returns after they and everything before them are durable.
//
// ents may hold several runs: an index that goes back overwrites from there on.
// The log keeps the entries and hs (not the slice): nobody may change them any
// more. ErrRefused means a gap, a rewrite of a committed entry, a term that goes
// down or a commit past the end: nothing was written. Any other error is final.
func (l *Log) Append(hs *raftpb.HardState, ents []*raftpb.Entry, sync bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if raft.IsEmptyHardState(hs) {
		hs = nil
	}
	last, bytes, err := l.checkEntries(ents)
	if err != nil {
		return err
	}
	if hs, err = l.checkState(hs, last); err != nil {
		return err
	}
	if hs == nil && len(ents) == 0 && !(sync && l.unsynced) {
		return nil
	}
	if err := l.point(PointAppendBefore); err != nil {
		return err
	}
	write := hs
	if write == nil {
		// Repeated so that the record ends the batch; see invariant 5.
		write = l.tail.hs
	}
	if err := l.save(write, ents, bytes, sync); err != nil {
		return err
	}
	if err := l.point(PointAppendSynced); err != nil {
		return err
	}
	l.tail.append(hs, ents)
	return nil
}

func (l *Log) save(hs *raftpb.HardState, ents []*raftpb.Entry, bytes int64, sync bool) error {
	synced := raft.MustSync(hs, l.tail.hs, len(ents))
	begin := time.Now()
	if len(ents) > 0 || hs != l.tail.hs {
		if err := l.w.Save(hs, ents); err != nil {
			return l.fail("append", err)
		}
		l.unsynced = true
		// About: what a record takes beside its payload is less than that.
		l.spares.appended(bytes + int64(len(ents))*entryOverhead)
	}
	if sync && !synced && l.unsynced {
		// The underlying Save does not sync a commit that moved alone, but
		// responses may ride on it.
		if err := l.w.Sync(); err != nil {
			return l.fail("sync", err)
		}
		synced = true
	}
	if synced {
		l.unsynced = false
		l.opts.Sync(SyncInfo{Duration: time.Since(begin), Entries: len(ents), Bytes: bytes})
	}
	return nil
}

// checkEntries returns the last index of the log as it would be after ents, and
// the bytes of their payload. The underlying log accepts a gap and is unreadable
// ever after; hence the check comes before the first byte.
func (l *Log) checkEntries(ents []*raftpb.Entry) (last uint64, bytes int64, err error) {
	t := &l.tail
	last = t.last()
	commit := t.hs.GetCommit()
	var prev uint64 // index of the entry before in ents
	for k, e := range ents {
		i := e.GetIndex()
		bytes += int64(len(e.GetData()))
		switch {
		case i > last+1:
			return 0, 0, refused("entry %d would follow entry %d", i, last)
		case i <= t.index || i <= commit:
			return 0, 0, refused("entry %d would rewrite a committed entry (start %d, commit %d)", i, t.index, commit)
		}
		// The term before i: from the batch when i continues its last run,
		// otherwise found by looking back, which only overwrites do.
		var before uint64
		if k > 0 && i == prev+1 {
			before = ents[k-1].GetTerm()
		} else {
			before = l.termBefore(i, ents[:k])
		}
		if e.GetTerm() < before {
			return 0, 0, refused("entry %d has term %d after term %d", i, e.GetTerm(), before)
		}
		last, prev = i, i
	}
	return last, bytes, nil
}

// termBefore returns the term of entry i-1 in the log with ents on top.
func (l *Log) termBefore(i uint64, ents []*raftpb.Entry) uint64 {
	for k := len(ents) - 1; k >= 0; k-- {
		if ents[k].GetIndex() == i-1 {
			return ents[k].GetTerm()
		}
	}
	return l.tail.termOf(i - 1)
}

// checkState returns the hard state to write. A commit below the known one is
// raised: Compact may have written a newer one than raft had handed out.
func (l *Log) checkState(hs *raftpb.HardState, last uint64) (*raftpb.HardState, error) {
	known := l.tail.hs
	switch {
	case hs == nil:
		if known.GetCommit() > last {
			return nil, refused("the log would end at %d, before the commit %d", last, known.GetCommit())
		}
		return nil, nil
	case hs.GetTerm() < known.GetTerm():
		return nil, refused("the term would go from %d down to %d", known.GetTerm(), hs.GetTerm())
	case hs.GetCommit() > last:
		return nil, refused("commit %d lies past the last entry %d", hs.GetCommit(), last)
	case hs.GetCommit() < known.GetCommit():
		hs = proto.CloneOf(hs)
		hs.Commit = new(known.GetCommit())
	}
	return hs, nil
}

// InstallSnapshot makes the log begin anew after index: whatever it held is
// gone. It returns after that is durable. The state of index must be durable
// before: from now on nothing else can rebuild it. hs is the hard state that
// came with the snapshot, nil = the present one; its commit is raised to index.
func (l *Log) InstallSnapshot(index, term uint64, cs *raftpb.ConfState, hs *raftpb.HardState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	known := l.tail.hs
	switch {
	case cs == nil || term == 0:
		return refused("a snapshot at %d needs a term and a ConfState", index)
	case index <= known.GetCommit() || index <= l.tail.index:
		return refused("a snapshot at %d lies before the commit %d", index, known.GetCommit())
	case index <= l.tail.last() && l.tail.termOf(index) == term:
		// Raft keeps such a log. Emptying it would need another record format:
		// a start record of a held entry means "compacted up to here".
		return refused("a snapshot at %d, term %d repeats an entry the log holds", index, term)
	}
	if raft.IsEmptyHardState(hs) {
		hs = known
	}
	if hs.GetTerm() < known.GetTerm() {
		return refused("the term would go from %d down to %d", known.GetTerm(), hs.GetTerm())
	}
	hs = proto.CloneOf(hs)
	hs.Commit = new(max(hs.GetCommit(), index))
	hs.Term = new(max(hs.GetTerm(), term))
	if hs.GetCommit() > index {
		return refused("commit %d lies past the snapshot %d", hs.GetCommit(), index)
	}
	cs = proto.CloneOf(cs)

	if err := l.point(PointInstallBefore); err != nil {
		return err
	}
	begin := time.Now()
	// This order, and nothing between the two: the hard state first would name
	// a commit the log does not reach if we stopped here.
	if err := l.w.SaveSnapshot(&walpb.Snapshot{Index: new(index), Term: new(term), ConfState: cs}); err != nil {
		return l.fail("install: start record", err)
	}
	if err := l.point(PointInstallRecord); err != nil {
		return err
	}
	if err := l.w.Save(hs, nil); err != nil {
		return l.fail("install: hard state", err)
	}
	if err := l.w.Sync(); err != nil {
		return l.fail("install: sync", err)
	}
	l.unsynced = false
	l.opts.Sync(SyncInfo{Duration: time.Since(begin)})
	if err := l.point(PointInstallSynced); err != nil {
		return err
	}
	l.tail.reset(index, term, hs, cs)
	return nil
}

// Close releases the files. It waits for a running Append, InstallSnapshot and
// Compact; what comes later gets ErrClosed. The tail stays readable. A second
// Close does nothing.
func (l *Log) Close() error {
	l.compactMu.Lock()
	defer l.compactMu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	l.spares.close()
	if l.err != nil {
		// No fsync may come after one that failed; without it the underlying
		// Close just gives the files back.
		l.w.SetUnsafeNoFsync()
	} else {
		l.err = ErrClosed
	}
	err := l.w.Close()
	releaseSegmentSize()
	if cerr := unlockDir(l.lock); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("wal: close %s: %w", l.dir, err)
	}
	return nil
}
