package control

import (
	"slices"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router/commandpb"
)

// olderTables are tables that were replaced and that sidecars may still hold, since
// they have not confirmed the new one and may have beaten last before it. They are
// of one reign: a leader that was elected meanwhile does not know what was replaced
// before, so that for as long as sidecars take to hear, a plan of it is safe only
// against what is recorded. So is one after a restore.
type olderTables struct {
	keep  time.Duration
	by    map[string]map[string][]olderTable // pipeline, sidecar; the oldest first
	queue []olderKey                         // by time
}

type olderKey struct{ pipeline, sidecar string }

type olderTable struct {
	table *placement.Assignment
	until time.Time
	// confirms: a handover was left behind in the state, and with its end the sidecar
	// holds the table no more.
	confirms bool
}

func newOlderTables(keep time.Duration) *olderTables {
	return &olderTables{keep: keep, by: make(map[string]map[string][]olderTable)}
}

// add takes down the tables that changes are about to replace, as far as they hand
// over anything that the new ones do not.
func (o *olderTables) add(m *mirror, changes []*commandpb.AssignmentChange, at time.Time) {
	for _, c := range changes {
		o.retaken(m, c)
		old := m.engine.Recorded(c.PipelineId, c.SidecarId)
		if old == nil || !handsOverElsewhere(old, c) {
			continue
		}
		sidecars := o.by[c.PipelineId]
		if sidecars == nil {
			sidecars = make(map[string][]olderTable)
			o.by[c.PipelineId] = sidecars
		}
		sidecars[c.SidecarId] = append(sidecars[c.SidecarId], olderTable{
			table: old, until: at.Add(o.keep), confirms: len(c.Releases)+len(c.SharedReleases) > 0,
		})
		o.queue = append(o.queue, olderKey{c.PipelineId, c.SidecarId})
	}
}

// retaken notes that a handover is over because its sidecar is given back what it was to
// let go of, and not because it has confirmed anything.
func (o *olderTables) retaken(m *mirror, c *commandpb.AssignmentChange) {
	tables := o.by[c.PipelineId][c.SidecarId]
	if len(tables) == 0 {
		return
	}
	releases := m.handovers[c.PipelineId][c.SidecarId].GetReleases()
	if slices.ContainsFunc(releases, func(r *commandpb.Release) bool {
		return slices.ContainsFunc(c.Stages, func(s *commandpb.StageAssignment) bool { return s.RemoteSidecarId == "" && s.StageId == r.StageId })
	}) {
		for i := range tables {
			tables[i].confirms = false
		}
	}
}

// handsOverElsewhere is true when old hands a stage over to a sidecar to which c
// does not.
func handsOverElsewhere(old *placement.Assignment, c *commandpb.AssignmentChange) bool {
	return slices.ContainsFunc(old.Stages, func(s placement.Assigned) bool {
		return s.Remote != "" && !slices.ContainsFunc(c.Stages, func(n *commandpb.StageAssignment) bool { return n.RemoteSidecarId == s.Remote })
	})
}

// expire forgets the tables that nobody can hold any more at a time.
func (o *olderTables) expire(at time.Time) {
	n := 0
	for _, k := range o.queue {
		tables := o.by[k.pipeline][k.sidecar]
		if tables[0].until.After(at) {
			break
		}
		n++
		if tables = tables[1:]; len(tables) > 0 {
			o.by[k.pipeline][k.sidecar] = tables
			continue
		}
		delete(o.by[k.pipeline], k.sidecar)
		if len(o.by[k.pipeline]) == 0 {
			delete(o.by, k.pipeline)
		}
	}
	o.queue = o.queue[n:]
}

// of lists the tables of a pipeline that a sidecar may hold besides the one that is
// recorded.
func (o *olderTables) of(m *mirror, pipeline, sidecar string) (out []*placement.Assignment) {
	for _, t := range o.by[pipeline][sidecar] {
		if !t.confirms || m.handovers[pipeline][sidecar] != nil {
			out = append(out, t.table)
		}
	}
	return out
}

// next returns when the next table of a pipeline is forgotten.
func (o *olderTables) next(pipeline string) (at time.Time) {
	for _, tables := range o.by[pipeline] {
		if at.IsZero() || tables[0].until.Before(at) {
			at = tables[0].until
		}
	}
	return at
}
