package wal

import (
	"errors"
	"fmt"
	"io/fs"

	"go.etcd.io/raft/v3/raftpb"
)

// SegmentReport describes one segment file as far as it could be read.
type SegmentReport struct {
	File       string `json:"file"`
	Size       int64  `json:"size"`     // of the file, preallocated space included
	Readable   int64  `json:"readable"` // bytes of intact records from the beginning
	Records    int    `json:"records"`
	Entries    int    `json:"entries"`
	FirstEntry uint64 `json:"first_entry,omitempty"` // lowest index of an entry record
	LastEntry  uint64 `json:"last_entry,omitempty"`  // highest index of an entry record
}

// Report describes a whole log.
type Report struct {
	Dir      string          `json:"dir"`
	Segments []SegmentReport `json:"segments"`
	// Ignored lists segments before a gap in the sequence. Open removes them.
	Ignored  []string `json:"ignored,omitempty"`
	Identity Identity `json:"identity"`
	// HardState is the newest readable one.
	HardState *raftpb.HardState `json:"hard_state"`
	// Start is the position a node would start after.
	Start Position `json:"start"`
	// FirstIndex and LastIndex are the entries a node would start with.
	FirstIndex uint64 `json:"first_index"`
	LastIndex  uint64 `json:"last_index"`
	// Unfinished tells of a write without its end. On the directory of a
	// running node that is a write in flight, otherwise the next start cuts it.
	Unfinished string `json:"unfinished,omitempty"`
}

// Verify reads the whole log in dir without changing or locking anything, also
// while a node writes it, and says what a start would find. The error is the
// one Open would refuse the log with (ErrCorrupt, ErrNewerFormat); the report
// then covers what lies before the damage.
func Verify(dir string) (Report, error) {
	var s *scanResult
	var err error
	// A running node may remove a segment between our listing and opening it.
	for range 3 {
		if s, err = scan(dir); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return report(dir, s, err)
}

// report describes the outcome of a scan.
func report(dir string, s *scanResult, err error) (Report, error) {
	r := Report{Dir: dir, Identity: s.id, HardState: s.hs}
	for _, seg := range s.segments {
		r.Segments = append(r.Segments, SegmentReport{
			File: seg.path, Size: seg.size, Readable: seg.end,
			Records: seg.records, Entries: seg.entries, FirstEntry: seg.first, LastEntry: seg.last,
		})
	}
	if all, lerr := listSegments(dir); lerr == nil && len(s.segments) > 0 {
		for _, seg := range all {
			if seg.seq < s.segments[0].seq {
				r.Ignored = append(r.Ignored, seg.path)
			}
		}
	}
	if s.start != nil {
		r.Start = Position{Index: s.start.GetIndex(), Term: s.start.GetTerm(), ConfState: s.start.GetConfState()}
		r.FirstIndex, r.LastIndex = s.start.GetIndex()+1, s.last()
	}
	if s.torn != nil {
		r.Unfinished = fmt.Sprintf("%s at byte %d: %s", s.torn.path, s.torn.off, s.torn.reason)
	}
	if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewerFormat) {
		err = fmt.Errorf("wal: verify %s: %w", dir, err)
	}
	return r, err
}
