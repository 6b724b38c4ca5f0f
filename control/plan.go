package control

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// assignmentKey names one assignment.
type assignmentKey struct{ sidecar, pipeline string }

// Plan returns the changes that lead from the assignments of in to those that
// its pipelines, sidecars and services ask for; none when all is well. Changes
// of one pipeline stand together, in order of sidecar ids. Plan is a pure
// function: equal inputs, in any order, give equal plans.
func Plan(in Input) []*commandpb.AssignmentChange {
	f := newFleet(in)
	byPipeline := make(map[string][]*commandpb.Assignment)
	for _, a := range sortedAssignments(in.Assignments) {
		byPipeline[a.PipelineId] = append(byPipeline[a.PipelineId], a)
	}
	pipelines := slices.Clone(in.Pipelines)
	slices.SortFunc(pipelines, func(a, b *commandpb.Pipeline) int {
		return cmp.Compare(a.GetSpec().GetId(), b.GetSpec().GetId())
	})

	load := make([]int, len(f.hosts))
	for _, a := range in.Assignments {
		f.count(load, a, +1)
	}
	var changes []*commandpb.AssignmentChange
	for _, p := range pipelines {
		id := p.GetSpec().GetId()
		current := byPipeline[id]
		delete(byPipeline, id)
		var tables map[int]*commandpb.AssignmentChange
		if p.GetSpec().GetEnabled() {
			for _, a := range current {
				f.count(load, a, -1)
			}
			l := newLayout(f, p, current, load)
			l.solve()
			tables = l.tables()
			for h, n := range l.nodes {
				load[h] += len(n.local)
			}
		}
		changes = append(changes, f.diff(p, current, tables)...)
	}
	// What is left belongs to pipelines that are gone.
	ids := make([]string, 0, len(byPipeline))
	for id := range byPipeline {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		changes = append(changes, f.diff(nil, byPipeline[id], nil)...)
	}
	return changes
}

func sortedAssignments(as []*commandpb.Assignment) []*commandpb.Assignment {
	as = slices.Clone(as)
	slices.SortFunc(as, func(a, b *commandpb.Assignment) int {
		return cmp.Or(cmp.Compare(a.PipelineId, b.PipelineId), cmp.Compare(a.SidecarId, b.SidecarId))
	})
	return as
}

// count adds n for every stage a lets its sidecar run.
func (f *fleet) count(load []int, a *commandpb.Assignment, n int) {
	h, ok := f.byID[a.SidecarId]
	if !ok || a.Revoked {
		return
	}
	for _, s := range a.Stages {
		if s.RemoteSidecarId == "" {
			load[h] += n
		}
	}
}

// diff compares the assignments of one pipeline with the tables asked for.
// A nil pipeline is one that is gone.
func (f *fleet) diff(p *commandpb.Pipeline, current []*commandpb.Assignment, tables map[int]*commandpb.AssignmentChange) []*commandpb.AssignmentChange {
	var changes []*commandpb.AssignmentChange
	for _, a := range current {
		h, known := f.byID[a.SidecarId]
		if known && tables[h] != nil {
			if !a.Revoked && a.LocalComplete == tables[h].LocalComplete && sameStages(a.Stages, tables[h].Stages) {
				delete(tables, h)
			}
			continue
		}
		if a.Revoked {
			continue
		}
		c := &commandpb.AssignmentChange{SidecarId: a.SidecarId, PipelineId: a.PipelineId, Revoke: true}
		if known {
			c.SidecarGeneration = f.hosts[h].Generation
		}
		changes = append(changes, c)
	}
	for _, c := range tables {
		changes = append(changes, c)
	}
	for _, c := range changes {
		c.PipelineVersion = p.GetVersion()
	}
	slices.SortFunc(changes, func(a, b *commandpb.AssignmentChange) int { return cmp.Compare(a.SidecarId, b.SidecarId) })
	return changes
}

func sameStages(a, b []*commandpb.StageAssignment) bool {
	return slices.EqualFunc(a, b, func(x, y *commandpb.StageAssignment) bool { return proto.Equal(x, y) })
}
