package wal

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Position is the index and term of an entry with the configuration there.
type Position struct {
	Index     uint64
	Term      uint64
	ConfState *raftpb.ConfState
}

// Recovered says what Open found.
type Recovered struct {
	// HardState is never nil. Its Commit may lie before what the state machine
	// has applied: a commit that moved alone is not synced.
	HardState *raftpb.HardState
	// Snapshot is the position the log starts after.
	Snapshot Position
	// FirstIndex is Snapshot.Index+1; LastIndex is FirstIndex-1 when empty.
	FirstIndex, LastIndex uint64
	// Created is true when there was no log.
	Created bool
	// Repaired counts the bytes of an unfinished write that were cut off the
	// end. They were never acknowledged.
	Repaired int64
}

// Open opens the log in dir, or creates it, beginning after start, when dir is
// absent or empty. start is not used otherwise. An unfinished write at the end
// is cut off, once; other damage is refused with a *CorruptError.
func Open(dir string, id Identity, start Start, o Options) (*Log, Recovered, error) {
	o.EnsureDefaults()
	if err := errors.Join(o.Validate(), start.validate()); err != nil {
		return nil, Recovered{}, err
	}
	dir = filepath.Clean(dir)
	if err := acquireSegmentSize(o.SegmentBytes); err != nil {
		return nil, Recovered{}, err
	}
	l := &Log{dir: dir, opts: o, lg: o.Logger}
	rec, err := l.open(id, start)
	if err != nil {
		if l.lock != nil {
			_ = unlockDir(l.lock)
		}
		releaseSegmentSize()
		return nil, Recovered{}, err
	}
	return l, rec, nil
}

func (l *Log) open(id Identity, start Start) (Recovered, error) {
	var rec Recovered
	absent, err := isAbsent(l.dir)
	if err != nil {
		return rec, fmt.Errorf("wal: open: %w", err)
	}
	if absent {
		if err := l.create(id, start); err != nil {
			return rec, err
		}
		rec.Created = true
	}
	// The underlying package locks the segments it opens, but only after our
	// scan and repair, which must not touch the tail of a live log.
	if l.lock, err = lockDir(l.dir); err != nil {
		return rec, err
	}
	s, err := scan(l.dir)
	// Whose log it is comes before what is wrong with it: a foreign log is not
	// ours to repair.
	if s.hasID && s.id != id {
		return rec, fmt.Errorf("%w: %s was written by node %x of cluster %x, this is node %x of cluster %x; nothing was changed, check the data directory",
			ErrForeign, l.dir, s.id.NodeID, s.id.ClusterID, id.NodeID, id.ClusterID)
	}
	if err != nil {
		return rec, err
	}
	if s.torn != nil {
		torn := s.torn
		if rec.Repaired, err = l.repair(torn); err != nil {
			return rec, err
		}
		if s, err = scan(l.dir); err != nil {
			return rec, err
		}
		if s.torn != nil {
			return rec, &CorruptError{File: torn.path, Offset: torn.off, Reason: "the end cannot be repaired: " + torn.reason}
		}
	}
	if err := errors.Join(l.removeStray(s), removeLeftovers(l.dir, l.opts.SegmentBytes)); err != nil {
		return rec, err
	}
	return rec, l.load(s, id, &rec)
}

func isAbsent(dir string) (bool, error) {
	des, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return len(des) == 0, err
}

// create builds the log under another name and moves it into place whole: a log
// that exists has its start record.
func (l *Log) create(id Identity, start Start) error {
	wrap := func(err error) error { return fmt.Errorf("wal: create %s: %w", l.dir, err) }
	staging := l.dir + ".creating"
	for _, p := range []string{staging, staging + ".tmp"} {
		if err := os.RemoveAll(p); err != nil {
			return wrap(err)
		}
	}
	w, err := etcdwal.Create(zapLogger(l.lg), staging, encodeMetadata(id))
	if err != nil {
		return wrap(err)
	}
	if start.Index > 0 {
		err = w.SaveSnapshot(&walpb.Snapshot{Index: new(start.Index), Term: new(start.Term), ConfState: start.ConfState})
		if err == nil {
			err = w.Save(&raftpb.HardState{Term: new(start.Term), Vote: new(uint64(0)), Commit: new(start.Index)}, nil)
		}
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return wrap(err)
	}
	if err := prefill(staging, l.opts.SegmentBytes); err != nil {
		return wrap(err)
	}
	if err := l.opts.FailPoint(PointCreateStaged); err != nil {
		return wrap(err)
	}
	if err := os.Rename(staging, l.dir); err != nil {
		return wrap(err)
	}
	if err := l.opts.FailPoint(PointCreateRenamed); err != nil {
		return wrap(err)
	}
	return syncDir(filepath.Dir(l.dir))
}

// lockDir locks the directory itself, so no lock file lies among the segments.
// The lock goes with the process.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("wal: lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s; stop the other one first", ErrLocked, dir)
		}
		return nil, fmt.Errorf("wal: lock %s: %w", dir, err)
	}
	return f, nil
}

// unlockDir undoes lockDir. To close the file would not be enough; see
// openForWriting.
func unlockDir(f *os.File) error {
	return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
}

// repair cuts the unfinished write off and keeps its bytes beside the segment.
func (l *Log) repair(t *tornTail) (int64, error) {
	wrap := func(err error) error { return fmt.Errorf("wal: repair %s: %w", t.path, err) }
	data, err := os.ReadFile(t.path)
	if err != nil {
		return 0, wrap(err)
	}
	cut := bytes.TrimRight(data[t.off:], "\x00")
	l.lg.Warn("the log ends in an unfinished write that was never acknowledged; cutting it off",
		"file", t.path, "offset", t.off, "bytes", len(cut), "reason", t.reason, "kept_in", t.path+tornSuffix)
	if err := os.WriteFile(t.path+tornSuffix, cut, 0o600); err != nil {
		return 0, wrap(err)
	}
	if err := l.opts.FailPoint(PointRepairBefore); err != nil {
		return 0, wrap(err)
	}
	f, err := os.OpenFile(t.path, os.O_WRONLY, 0)
	if err != nil {
		return 0, wrap(err)
	}
	defer f.Close()
	// Cut, then grown back: the underlying package preallocates again up to the
	// size it finds, and a short file would pay for its growth at every sync.
	// Whole sectors, or the rest of a frame length would look like another tear.
	size := (int64(len(data)) + sector - 1) / sector * sector
	for _, n := range []int64{t.off, size} {
		if err := f.Truncate(n); err != nil {
			return 0, wrap(err)
		}
	}
	if err := l.opts.FailPoint(PointRepairCut); err != nil {
		return 0, wrap(err)
	}
	if err := f.Sync(); err != nil {
		return 0, wrap(err)
	}
	return int64(len(cut)), nil
}

// removeStray deletes segments that a crash during a removal brought back.
func (l *Log) removeStray(s *scanResult) error {
	segs, err := listSegments(l.dir)
	if err != nil {
		return fmt.Errorf("wal: open: %w", err)
	}
	for _, seg := range segs {
		if seg.seq >= s.segments[0].seq {
			break
		}
		if err := l.removeSegment(seg); err != nil {
			return fmt.Errorf("wal: remove a stray segment: %w", err)
		}
	}
	return nil
}

// lockPatience is how long a lock on a segment may outlast who held it.
const lockPatience = time.Second

// openForWriting opens the underlying log, which locks its segments. This log has
// the lock of the directory, so nobody else writes here. But a child that this
// process is just starting holds every file that was open when it was forked, and its
// lock, until it has become another program, also when the file was closed since, as
// after the log was made.
func (l *Log) openForWriting(at *walpb.Snapshot) (*etcdwal.WAL, error) {
	began := time.Now()
	for pause := 5 * time.Millisecond; ; pause *= 2 {
		w, err := etcdwal.Open(zapLogger(l.lg), l.dir, &walpb.Snapshot{Index: new(at.GetIndex()), Term: new(at.GetTerm())})
		if !errors.Is(err, fileutil.ErrLocked) || time.Since(began) > lockPatience {
			return w, err
		}
		time.Sleep(pause)
	}
}

// load opens the underlying log for writing at the position the scan chose, and
// fills the tail. The underlying package does not report that the position is
// not in the log, and returns entries that a later start record made void: what
// it returns is held against the scan.
func (l *Log) load(s *scanResult, id Identity, rec *Recovered) error {
	at := s.start
	w, err := l.openForWriting(at)
	if err != nil {
		return fmt.Errorf("wal: open %s: %w", l.dir, err)
	}
	meta, _, ents, err := w.ReadAll()
	if err == nil {
		err = agree(s, id, meta, ents)
	}
	if err != nil {
		w.Close()
		var c *CorruptError
		if errors.As(err, &c) {
			c.File = l.dir
			return c
		}
		return fmt.Errorf("wal: read %s: %w", l.dir, err)
	}
	ents = ents[:s.last()-at.GetIndex()]
	// A process that was killed between write and fsync, or between rename and
	// the fsync of the directory, left what reads back fine now and is gone
	// after a power failure. Our caller takes all we return for stored.
	if err := errors.Join(w.Sync(), syncDir(l.dir), syncDir(filepath.Dir(l.dir))); err != nil {
		w.Close()
		return fmt.Errorf("wal: sync what was found in %s: %w", l.dir, err)
	}

	hs := s.hs
	if hs.GetCommit() < at.GetIndex() {
		hs = proto.CloneOf(hs)
		hs.Commit = new(at.GetIndex())
	}
	cs := at.GetConfState()
	if cs == nil {
		cs = &raftpb.ConfState{}
	}
	l.w = w
	l.spares = startSpares(l.dir, l.opts.SegmentBytes, l.lg)
	l.tail.reset(at.GetIndex(), at.GetTerm(), hs, cs)
	l.tail.append(nil, ents)

	rec.HardState = proto.CloneOf(hs)
	rec.Snapshot = Position{Index: at.GetIndex(), Term: at.GetTerm(), ConfState: proto.CloneOf(cs)}
	rec.FirstIndex, rec.LastIndex = l.tail.first(), l.tail.last()
	return nil
}

func agree(s *scanResult, id Identity, meta []byte, ents []*raftpb.Entry) error {
	if got, err := decodeMetadata(meta); err != nil || got != id {
		return &CorruptError{Reason: fmt.Sprintf("the metadata changed while opening: %q", meta)}
	}
	at := s.start.GetIndex()
	if uint64(len(ents)) < s.last()-at {
		return &CorruptError{Reason: fmt.Sprintf("entries %d to %d should follow the start, only %d were read", at+1, s.last(), len(ents))}
	}
	for i := at + 1; i <= s.last(); i++ {
		if e := ents[i-at-1]; e.GetIndex() != i || e.GetTerm() != s.termOf(i) {
			return &CorruptError{Reason: fmt.Sprintf("entry %d reads back as index %d, term %d, expected term %d", i, e.GetIndex(), e.GetTerm(), s.termOf(i))}
		}
	}
	return nil
}
