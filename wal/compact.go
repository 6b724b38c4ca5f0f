package wal

import (
	"errors"
	"fmt"
	"os"

	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// Compact drops entries up to and including upTo: at once from memory, by whole
// segments from disk. The state at upTo must be durable and cs the
// configuration there. The other writers wait for at most one fsync; files are
// removed without holding them up.
//
// Nothing happens when upTo lies before the first entry. An error that is
// neither ErrRefused nor ErrFailed means old segments could not be removed: the
// log is well, the next Compact tries again.
func (l *Log) Compact(upTo uint64, cs *raftpb.ConfState) error {
	l.compactMu.Lock()
	defer l.compactMu.Unlock()
	if done, err := l.moveStart(upTo, cs); done || err != nil {
		return err
	}
	return l.removeSegments(upTo)
}

// moveStart makes the log start after upTo. done is true when there is nothing
// to remove.
func (l *Log) moveStart(upTo uint64, cs *raftpb.ConfState) (done bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := &l.tail
	switch {
	case l.err != nil:
		return true, l.err
	case upTo <= t.index:
		return true, nil
	case upTo > t.last():
		return true, refused("the log ends at %d, it cannot start after %d", t.last(), upTo)
	case cs == nil:
		return true, refused("a start at %d needs a ConfState", upTo)
	}
	if err := l.point(PointCompactBefore); err != nil {
		return true, err
	}
	hs := t.hs
	if hs.GetCommit() < upTo {
		// The applier may be ahead of the commit on disk, which is written
		// without a sync and behind it; a start record past the commit on disk
		// would not count.
		hs = proto.CloneOf(hs)
		hs.Commit = new(upTo)
		if err := l.w.Save(hs, nil); err != nil {
			return true, l.fail("compact: hard state", err)
		}
	}
	if err := l.point(PointCompactState); err != nil {
		return true, err
	}
	cs = proto.CloneOf(cs)
	snap := &walpb.Snapshot{Index: new(upTo), Term: new(t.termOf(upTo)), ConfState: cs}
	if err := l.w.SaveSnapshot(snap); err != nil {
		return true, l.fail("compact: start record", err)
	}
	l.unsynced = false
	if err := l.point(PointCompactRecord); err != nil {
		return true, err
	}
	if err := l.w.ReleaseLockTo(upTo); err != nil {
		return true, l.fail("compact: release", err)
	}
	t.compact(upTo, hs, cs)
	return false, nil
}

// removeSegments deletes segments of which every entry lies before index,
// oldest first, so that a crash leaves a run that ends at the newest. It keeps
// one more than strictly needed when a segment begins exactly there, by the
// rule after which the underlying log releases its locks.
func (l *Log) removeSegments(index uint64) error {
	segs, err := listSegments(l.dir)
	if err != nil {
		return fmt.Errorf("wal: list segments to remove: %w", err)
	}
	keep := len(segs) - 1
	for i, s := range segs {
		if s.index >= index {
			keep = i - 1
			break
		}
	}
	if keep <= 0 {
		return nil
	}
	for _, s := range segs[:keep] {
		if err := l.removePoint(PointSegmentRemove); err != nil {
			return err
		}
		if err := l.removeSegment(s); err != nil {
			return fmt.Errorf("wal: the log was compacted, but an old segment could not be removed: %w", err)
		}
		l.lg.Debug("removed an old segment of the log", "file", s.path)
		if err := l.removePoint(PointSegmentRemoved); err != nil {
			return err
		}
	}
	return syncDir(l.dir)
}

func (l *Log) removePoint(p string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	return l.point(p)
}

func (l *Log) removeSegment(s segment) error {
	if err := os.Remove(s.path + tornSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return l.opts.Remove(s.path)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("wal: sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("wal: sync directory %s: %w", dir, err)
	}
	return nil
}
