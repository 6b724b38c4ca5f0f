package wal

import (
	"errors"
	"fmt"
	"io"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// segmentInfo is what the scan saw of one segment.
type segmentInfo struct {
	segment
	size, end   int64
	records     int
	entries     int
	first, last uint64 // lowest and highest entry index in the file, 0 = none
}

// tornTail is an unfinished write at the end of the log.
type tornTail struct {
	path   string
	off    int64
	reason string
}

// scanResult is the log as its records tell it, without the payloads.
type scanResult struct {
	segments []segmentInfo
	id       Identity
	hasID    bool
	hs       *raftpb.HardState // never nil
	start    *walpb.Snapshot   // newest start record in force, nil if none
	// based is false until a start record or an entry fixed base.
	based    bool
	base     uint64
	baseTerm uint64 // 0 = unknown
	terms    []uint64
	pending  *walpb.Snapshot
	torn     *tornTail
}

func (s *scanResult) last() uint64 { return s.base + uint64(len(s.terms)) }

func (s *scanResult) termOf(i uint64) uint64 {
	if i == s.base {
		return s.baseTerm
	}
	return s.terms[i-s.base-1]
}

// scan reads every segment of dir. A torn tail is part of the result, damage is
// a *CorruptError, and what was read before it is returned with either.
func scan(dir string) (*scanResult, error) {
	segs, err := listSegments(dir)
	if err != nil {
		return &scanResult{hs: &raftpb.HardState{}}, err
	}
	s := &scanResult{hs: &raftpb.HardState{}}
	if len(segs) == 0 {
		return s, &CorruptError{File: dir, Reason: "the directory holds no segment"}
	}
	segs = newestRun(segs)
	var crc uint32
	for i, seg := range segs {
		crc, err = s.scanSegment(seg, i == 0, i == len(segs)-1, crc)
		if err != nil {
			return s, err
		}
	}
	return s, s.check(dir, segs[len(segs)-1])
}

// check judges the log as a whole.
func (s *scanResult) check(dir string, lastSeg segment) error {
	end := s.segments[len(s.segments)-1].end
	if s.start == nil {
		return &CorruptError{File: s.segments[0].path, Reason: "no position to start from is left: older segments are missing"}
	}
	if s.hs.GetCommit() > s.last() {
		return &CorruptError{File: lastSeg.path, Offset: end, Reason: fmt.Sprintf("entries up to %d were committed, but the log ends at %d", s.hs.GetCommit(), s.last())}
	}
	if s.base > s.start.GetIndex() {
		return &CorruptError{File: dir, Reason: fmt.Sprintf("entries after %d are missing, the first is %d", s.start.GetIndex(), s.base+1)}
	}
	return nil
}

func (s *scanResult) scanSegment(seg segment, firstSeg, lastSeg bool, crc uint32) (uint32, error) {
	fr, err := openFrames(seg.path)
	if err != nil {
		return 0, err
	}
	defer fr.close()
	s.segments = append(s.segments, segmentInfo{segment: seg, size: fr.size})
	info := &s.segments[len(s.segments)-1]
	if !firstSeg {
		fr.crc, fr.chained = crc, true
	}
	var rec record
	for {
		err := fr.next(&rec)
		info.end = fr.off
		if err == nil {
			if err = s.header(info, &rec); err == nil {
				err = s.record(info, &rec)
			}
			if err != nil {
				return 0, locate(err, seg.path, rec.off)
			}
			info.records++
			continue
		}
		var bad *badFrame
		switch {
		case errors.Is(err, io.EOF):
			// A cut syncs the header before it gives the file its name.
			if info.records < 2 {
				return 0, &CorruptError{File: seg.path, Offset: info.end, Reason: "the segment has no header"}
			}
			return fr.crc, nil
		case errors.As(err, &bad):
			return 0, s.judge(info, bad, lastSeg)
		default:
			return 0, fmt.Errorf("wal: read %s: %w", seg.path, err)
		}
	}
}

// judge tells a write cut short by a crash from rot. Cutting rot off would lose
// acknowledged entries; refusing an unfinished write would keep a healthy node
// down after every power loss.
func (s *scanResult) judge(info *segmentInfo, bad *badFrame, lastSeg bool) error {
	corrupt := &CorruptError{File: info.path, Offset: bad.off, Reason: bad.reason}
	switch {
	case !lastSeg:
		// The next segment was only named after this one was synced.
		return corrupt
	case info.records < 2:
		corrupt.Reason += " (in the header, which was synced before the segment came into use)"
		return corrupt
	case !bad.missing && !bad.beyond:
		return corrupt
	}
	c, found, err := findChain(info.path, bad.off)
	if err != nil {
		return fmt.Errorf("wal: read %s: %w", info.path, err)
	}
	if found && (c.synced || bad.beyond) {
		corrupt.Reason += fmt.Sprintf("; intact records follow at byte %d, so this is no unfinished write", c.off)
		return corrupt
	}
	s.torn = &tornTail{path: info.path, off: bad.off, reason: bad.reason}
	return nil
}

func locate(err error, path string, off int64) error {
	var c *CorruptError
	if errors.As(err, &c) && c.File == "" {
		c.File, c.Offset = path, off
	} else if c == nil {
		return fmt.Errorf("%w (%s, byte %d)", err, path, off)
	}
	return err
}

// header demands the CRC and metadata records every segment begins with.
func (s *scanResult) header(info *segmentInfo, rec *record) error {
	if info.records == 0 && rec.typ != etcdwal.CrcType || info.records == 1 && rec.typ != etcdwal.MetadataType {
		return &CorruptError{Reason: "the segment does not begin with its header"}
	}
	return nil
}

// record applies one record to the model of the log.
func (s *scanResult) record(info *segmentInfo, rec *record) error {
	pending := s.pending
	if rec.typ != etcdwal.CrcType && rec.typ != etcdwal.MetadataType {
		s.pending = nil
	}
	switch rec.typ {
	case etcdwal.CrcType:
		return nil
	case etcdwal.MetadataType:
		return s.metadata(rec.data)
	case etcdwal.EntryType:
		i, term, err := entryHead(rec.data)
		if err != nil {
			return &CorruptError{Reason: "an entry cannot be decoded: " + err.Error()}
		}
		return s.entry(info, i, term)
	case etcdwal.StateType:
		hs := &raftpb.HardState{}
		if err := proto.Unmarshal(rec.data, hs); err != nil {
			return &CorruptError{Reason: "a hard state cannot be decoded: " + err.Error()}
		}
		s.hs = hs
		if pending != nil && hs.GetCommit() >= pending.GetIndex() {
			s.restart(pending)
		}
		return nil
	case etcdwal.SnapshotType:
		snap := &walpb.Snapshot{}
		if err := proto.Unmarshal(rec.data, snap); err != nil {
			return &CorruptError{Reason: "a start record cannot be decoded: " + err.Error()}
		}
		s.snapshot(snap)
		return nil
	default:
		return fmt.Errorf("%w: record of unknown type %d", ErrNewerFormat, rec.typ)
	}
}

func (s *scanResult) metadata(b []byte) error {
	id, err := decodeMetadata(b)
	switch {
	case errors.Is(err, ErrNewerFormat):
		return err
	case err != nil:
		return &CorruptError{Reason: err.Error()}
	case s.hasID && id != s.id:
		return &CorruptError{Reason: fmt.Sprintf("segments of different owners are mixed: %+v after %+v", id, s.id)}
	}
	s.id, s.hasID = id, true
	return nil
}

func (s *scanResult) entry(info *segmentInfo, i, term uint64) error {
	info.entries++
	if info.first == 0 || i < info.first {
		info.first = i
	}
	info.last = max(info.last, i)
	switch {
	case i == 0:
		return &CorruptError{Reason: "an entry has index 0"}
	case !s.based:
		s.based, s.base, s.baseTerm = true, i-1, 0
	case i > s.last()+1:
		return &CorruptError{Reason: fmt.Sprintf("entry %d follows entry %d", i, s.last())}
	case s.start != nil && i <= s.start.GetIndex():
		return &CorruptError{Reason: fmt.Sprintf("entry %d rewrites what lies before the start at %d", i, s.start.GetIndex())}
	case i <= s.base:
		// Only before a start record: the oldest file may begin inside a
		// stretch that was rewritten from further back.
		s.base, s.baseTerm, s.terms = i-1, 0, nil
	}
	s.terms = append(s.terms[:i-s.base-1], term)
	return nil
}

// snapshot decides what a start record means; see invariants 6 and 7.
func (s *scanResult) snapshot(snap *walpb.Snapshot) {
	i, t := snap.GetIndex(), snap.GetTerm()
	switch {
	case i == 0:
		s.restart(snap)
	case s.based && i >= s.base && i <= s.last() && i <= s.hs.GetCommit() && (s.termOf(i) == t || s.termOf(i) == 0):
		s.terms = append([]uint64(nil), s.terms[i-s.base:]...)
		s.base, s.baseTerm, s.start = i, t, snap
	case i <= s.hs.GetCommit() && (!s.based || s.start == nil && i < s.base):
		// That of a Compact, an Install lies past the commit: the segments with
		// its entry are gone, so a later one is in force. Taken for an Install
		// it would empty the log.
	default:
		s.pending = snap
	}
}

func (s *scanResult) restart(snap *walpb.Snapshot) {
	s.based, s.base, s.baseTerm, s.terms, s.start = true, snap.GetIndex(), snap.GetTerm(), nil, snap
}

// tornSuffix marks the file that keeps the bytes a repair cut off a segment; it
// is removed with the segment.
const tornSuffix = ".torn"
