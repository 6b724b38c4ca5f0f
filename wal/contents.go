package wal

import (
	"errors"
	"fmt"
	"io"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// Contents is a log as it lies on disk: what a node that starts would find. It
// was read without changing or locking anything and holds no files open; it is
// for tools that hold the data directory.
type Contents struct {
	Report
	// Damage is why reading ended before the end of the log; nil for a whole
	// log. See InspectDamaged.
	Damage error
	scan   *scanResult
}

// Inspect reads the log in dir as Verify does and keeps what is needed to read
// its entries. An error is one of Verify.
func Inspect(dir string) (*Contents, error) {
	s, err := scan(dir)
	r, err := report(dir, s, err)
	if err != nil {
		return nil, err
	}
	return &Contents{Report: r, scan: s}, nil
}

// InspectDamaged is Inspect for a log that may be damaged: the result then covers
// what lies before the damage. No node may start from that, for what followed may
// have been acknowledged; it is for saving what can be saved. It fails when there
// is not even a position to start from.
func InspectDamaged(dir string) (*Contents, error) {
	s, err := scan(dir)
	r, err := report(dir, s, err)
	if err != nil && (!errors.Is(err, ErrCorrupt) || s.start == nil || s.base > s.start.GetIndex()) {
		return nil, err
	}
	return &Contents{Report: r, Damage: err, scan: s}, nil
}

// Commit returns the commit index a node would start with. Of a damaged log it
// is not behind the last entry.
func (c *Contents) Commit() uint64 {
	return max(min(c.scan.hs.GetCommit(), c.LastIndex), c.Start.Index)
}

// Term returns the term of entry i, which must lie between the start of the
// log and its last entry.
func (c *Contents) Term(i uint64) (uint64, error) {
	if i < c.Start.Index || i > c.LastIndex {
		return 0, fmt.Errorf("wal: the log in %s holds entries %d to %d, not %d", c.Dir, c.FirstIndex, c.LastIndex, i)
	}
	if i == c.Start.Index {
		return c.Start.Term, nil
	}
	return c.scan.termOf(i), nil
}

// Entries calls fn for the entries from index from to index to, ascending, both
// included; they are fn's to keep. It reads the whole log and holds one entry
// in memory.
func (c *Contents) Entries(from, to uint64, fn func(*raftpb.Entry) error) error {
	if from > to {
		return nil
	}
	if from < c.FirstIndex || to > c.LastIndex {
		return fmt.Errorf("wal: the log in %s holds entries %d to %d, not %d to %d", c.Dir, c.FirstIndex, c.LastIndex, from, to)
	}
	// An index may have been written several times, each time in a higher term:
	// the record with the term that is in force is the one that counts, and
	// those of the indexes after it come later.
	next := from
	for _, seg := range c.scan.segments {
		if err := c.segment(seg, &next, to, fn); err != nil {
			return err
		}
		if next > to {
			return nil
		}
	}
	return &CorruptError{File: c.Dir, Reason: fmt.Sprintf("entry %d was found before and is gone now", next)}
}

func (c *Contents) segment(seg segmentInfo, next *uint64, to uint64, fn func(*raftpb.Entry) error) error {
	fr, err := openFrames(seg.path)
	if err != nil {
		return fmt.Errorf("wal: read the log: %w", err)
	}
	defer fr.close()
	var rec record
	for fr.off < seg.end && *next <= to {
		err := fr.next(&rec)
		if errors.Is(err, io.EOF) {
			return nil
		}
		var bad *badFrame
		if errors.As(err, &bad) {
			return &CorruptError{File: seg.path, Offset: bad.off, Reason: bad.reason}
		}
		if err != nil {
			return fmt.Errorf("wal: read %s: %w", seg.path, err)
		}
		if rec.typ != etcdwal.EntryType {
			continue
		}
		e := &raftpb.Entry{}
		if err := proto.Unmarshal(rec.data, e); err != nil {
			return &CorruptError{File: seg.path, Offset: rec.off, Reason: "an entry cannot be decoded: " + err.Error()}
		}
		if e.GetIndex() != *next || e.GetTerm() != c.scan.termOf(*next) {
			continue
		}
		if err := fn(e); err != nil {
			return err
		}
		*next++
	}
	return nil
}
