package router

import (
	"github.com/cockroachdb/pebble/v2"

	"conveyor.etl/router/router/commandpb"
)

// countKind numbers the row counters in Clock.counts. Stored: only ever add.
type countKind int

const (
	countPipelines countKind = iota
	countSidecars
	countServices
	countGroups
	countSourceOffsets
	countWatermarks
	countGroupOffsets
	countAssignments
	countRevoked
	countOperations
	countKinds
)

// Counts says how many records there are of each kind.
type Counts struct {
	Pipelines, Sidecars, Services, Groups  uint64
	SourceOffsets, Watermarks              uint64
	GroupOffsets, Checkpoints, Assignments uint64
	// Revoked assignments are kept for a while and not part of Assignments.
	Revoked uint64
	// Requests is the number of remembered request ids.
	Requests uint64
	// Operations is the number of running and remembered operations. They are no
	// part of a backup.
	Operations uint64
}

// ByName returns the counts that are not zero by the names users know the kinds
// by.
func (c *Counts) ByName() map[string]uint64 {
	out := map[string]uint64{}
	for name, n := range map[string]uint64{
		"pipelines": c.Pipelines, "sidecars": c.Sidecars, "services": c.Services, "groups": c.Groups,
		"source_offsets": c.SourceOffsets, "watermarks": c.Watermarks, "group_offsets": c.GroupOffsets,
		"checkpoints": c.Checkpoints, "assignments": c.Assignments,
	} {
		if n > 0 {
			out[name] = n
		}
	}
	return out
}

// checkpointCount is a count of checkpoints and the checkpoint revision it
// holds for.
type checkpointCount struct {
	revision, n uint64
}

// Counts returns how many records the view holds. All but the checkpoints are
// kept as counters; those are counted by walking their keys, again only after
// one was written: keeping a counter would need a read per save.
func (v *View) Counts() (Counts, error) {
	out, err := v.QuickCounts()
	if err != nil {
		return out, err
	}
	err = v.readDatabase(func(d *database, r pebble.Reader) error {
		c, err := readClock(r)
		if err == nil {
			out.Checkpoints, err = v.countCheckpoints(d, r, c)
		}
		return err
	})
	return out, err
}

// QuickCounts is Counts without the checkpoints, which takes no time.
func (v *View) QuickCounts() (Counts, error) {
	var out Counts
	err := v.read(func(r pebble.Reader) error {
		c, err := readClock(r)
		if err != nil {
			return err
		}
		n := c.Counts
		out = Counts{
			Pipelines: n[countPipelines], Sidecars: n[countSidecars], Services: n[countServices], Groups: n[countGroups],
			SourceOffsets: n[countSourceOffsets], Watermarks: n[countWatermarks], GroupOffsets: n[countGroupOffsets],
			Assignments: n[countAssignments], Revoked: n[countRevoked], Requests: c.RequestTail - c.RequestHead,
			Operations: n[countOperations],
		}
		return nil
	})
	return out, err
}

func (v *View) countCheckpoints(d *database, r pebble.Reader, c *commandpb.Clock) (uint64, error) {
	if m := d.ckptMemo.Load(); m != nil && m.revision == c.CheckpointRevision {
		return m.n, nil
	}
	var n uint64
	err := scanKeys(r, key(nil).table(prefixCheckpoint), nil, func(_, _ []byte) (bool, error) {
		n++
		return true, nil
	})
	if err == nil {
		v.noteCheckpoints(d, c, n)
	}
	return n, err
}

// noteCheckpoints remembers that there are n checkpoints at the clock c.
func (v *View) noteCheckpoints(d *database, c *commandpb.Clock, n uint64) {
	// A view without a snapshot may have counted newer keys than its clock
	// says; remembering that would be a wrong count for good.
	if !v.latest {
		d.ckptMemo.Store(&checkpointCount{revision: c.CheckpointRevision, n: n})
	}
}
