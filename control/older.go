package control

import (
	"cmp"
	"slices"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// olderTables are tables that were replaced and that sidecars may still hold, since
// they have not confirmed the new one and may have beaten last before it. They are
// of one reign. What was replaced before it the state says (Assignment.replaced), for
// as long as sidecars take to hear, and that alone, so that a new leader also waits for
// those who have confirmed; of a restore that happens in a reign, its leader knows all
// tables there were before.
type olderTables struct {
	keep  time.Duration
	by    map[string]map[string][]olderTable // pipeline, sidecar; the first to be forgotten first
	queue []olderKey                         // by time
}

type olderKey struct {
	pipeline, sidecar string
	until             time.Time
}

type olderTable struct {
	table *placement.Assignment
	until time.Time
	// confirms: the sidecar was told to let go of something when the table was replaced,
	// or since, and with the end of that handover it holds the table no more.
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
		o.note(olderTable{table: old, until: at.Add(o.keep)})
	}
}

// note takes down one table.
func (o *olderTables) note(t olderTable) {
	pipeline, sidecar := t.table.Pipeline, t.table.Sidecar
	sidecars := o.by[pipeline]
	if sidecars == nil {
		sidecars = make(map[string][]olderTable)
		o.by[pipeline] = sidecars
	}
	tables := sidecars[sidecar]
	i, _ := slices.BinarySearchFunc(tables, t.until, func(x olderTable, at time.Time) int { return cmp.Or(x.until.Compare(at), -1) })
	sidecars[sidecar] = slices.Insert(tables, i, t)
	i, _ = slices.BinarySearchFunc(o.queue, t.until, func(x olderKey, at time.Time) int { return cmp.Or(x.until.Compare(at), -1) })
	o.queue = slices.Insert(o.queue, i, olderKey{pipeline, sidecar, t.until})
}

// load takes down what the state that m was read from says was replaced before. ms is
// the time of that state, which is never ahead of what has passed, so that nobody gets
// less than its time.
func (o *olderTables) load(m *mirror, ms uint64, at time.Time) {
	for _, a := range m.replaced {
		for _, h := range a.Replaced {
			if h.UntilMs > ms {
				o.note(olderTable{
					table: &placement.Assignment{Pipeline: a.PipelineId, Sidecar: a.SidecarId, Stages: []placement.Assigned{{Remote: h.SidecarId}}},
					until: at.Add(time.Duration(h.UntilMs-ms) * time.Millisecond),
				})
			}
		}
	}
	m.replaced = nil
}

// restored takes down all tables of a state that was replaced by one from a backup, and
// those that were sent to it last.
func (o *olderTables) restored(before *mirror, sent []*commandpb.AssignmentChange, at time.Time) {
	before.engine.EachRecorded(func(a *placement.Assignment) {
		if slices.ContainsFunc(a.Stages, func(s placement.Assigned) bool { return s.Remote != "" }) {
			o.note(olderTable{table: a, until: at.Add(o.keep)})
		}
	})
	for _, c := range sent {
		o.note(olderTable{table: assignmentOf(&commandpb.Assignment{PipelineId: c.PipelineId, SidecarId: c.SidecarId, Stages: c.Stages}), until: at.Add(o.keep)})
	}
}

// changed takes over what has become of tables. sent is what the placer has sent and
// not seen the outcome of before.
//
// It takes down tables that were replaced by others than the placer, such as those of a
// pipeline that was deleted, or by a command that it had given up. By the revision they
// would not be told from its own: one entry of the log holds commands of many. A sidecar
// that was removed is gone, by the word of who removed it.
//
// That a sidecar is waited for is taken from the state, and not from having asked for it:
// of one that is expired, or was when the command came, nothing is left behind that could
// be confirmed, and it may be heard of again with the table it had.
func (o *olderTables) changed(m *mirror, changes []router.Change, sent []*commandpb.AssignmentChange, at time.Time) {
	var own map[string]bool // by key, whether it is a revocation
	for i := range changes {
		c := &changes[i]
		switch c.Table {
		case router.TableAssignments:
			old, _ := c.Prev.(*commandpb.Assignment)
			if old == nil || old.Revoked || m.sidecars[old.SidecarId] == nil || !slices.ContainsFunc(old.Stages, handsOver) {
				continue
			}
			if own == nil {
				own = make(map[string]bool, len(sent))
				for _, s := range sent {
					own[router.AssignmentKey(s.SidecarId, s.PipelineId)] = s.Revoke
				}
			}
			next, _ := c.Next.(*commandpb.Assignment)
			if revoke, was := own[c.Key]; !was || revoke != (next == nil || next.Revoked) {
				o.note(olderTable{table: assignmentOf(old), until: at.Add(o.keep)})
			}
		case router.TableHandovers:
			h, _ := c.Next.(*commandpb.Handover)
			if !slices.ContainsFunc(h.GetReleases(), func(r *commandpb.Release) bool { return r.Revision == c.Revision }) {
				continue
			}
			tables := o.by[h.PipelineId][h.SidecarId]
			for i := range tables {
				tables[i].confirms = true
			}
		}
	}
}

func handsOver(s *commandpb.StageAssignment) bool { return s.RemoteSidecarId != "" }

// retaken notes that a handover is over because its sidecar is given back what it was to
// let go of, and not because it has confirmed anything.
func (o *olderTables) retaken(m *mirror, c *commandpb.AssignmentChange) {
	if len(o.by[c.PipelineId][c.SidecarId]) == 0 {
		return
	}
	releases := m.handovers[c.PipelineId][c.SidecarId].GetReleases()
	if slices.ContainsFunc(releases, func(r *commandpb.Release) bool {
		return slices.ContainsFunc(c.Stages, func(s *commandpb.StageAssignment) bool { return s.RemoteSidecarId == "" && s.StageId == r.StageId })
	}) {
		o.unconfirmed(c.PipelineId, c.SidecarId)
	}
}

// unconfirmed notes that the handovers of a sidecar are over, or are about to be, though
// it has confirmed nothing: it is silent, or has had its time, which may be shorter than
// the one in which it must have heard.
func (o *olderTables) unconfirmed(pipeline, sidecar string) {
	tables := o.by[pipeline][sidecar]
	for i := range tables {
		tables[i].confirms = false
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
		if k.until.After(at) {
			break
		}
		tables := o.by[k.pipeline][k.sidecar]
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
