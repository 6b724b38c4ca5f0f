package control

import (
	"cmp"
	"slices"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router/commandpb"
)

// assignmentKey names one assignment.
type assignmentKey struct{ sidecar, pipeline string }

// Plan returns the changes that lead from the assignments of in to those that
// its pipelines, sidecars and services ask for; none when all is well. Changes
// of one pipeline stand together, in order of sidecar ids, the most urgent
// pipeline first. Plan is a pure function: equal inputs, in any order, give equal
// plans.
func Plan(in Input) []*commandpb.AssignmentChange {
	plan := placement.Compute(viewOf(in))
	return changesOf(plan.Steps)
}

// changesOf puts the changes of steps into commands.
func changesOf(steps []placement.Step) []*commandpb.AssignmentChange {
	var out []*commandpb.AssignmentChange
	for i := range steps {
		for k := range steps[i].Changes {
			c := &steps[i].Changes[k]
			ch := &commandpb.AssignmentChange{
				SidecarId: c.Sidecar, PipelineId: steps[i].Pipeline, SidecarGeneration: c.Generation,
				PipelineVersion: steps[i].Version, Revoke: c.Revoke, LocalComplete: c.LocalComplete, Releases: c.Confirm,
				MovedTo: c.MovedTo,
			}
			for _, s := range c.Stages {
				ch.Stages = append(ch.Stages, &commandpb.StageAssignment{
					StageId: s.Stage, LocalEndpoint: s.Endpoint, RemoteSidecarId: s.Remote, RemoteEndpoint: s.RemoteEndpoint,
				})
			}
			out = append(out, ch)
		}
	}
	return out
}

func sortedAssignments(as []*commandpb.Assignment) []*commandpb.Assignment {
	as = slices.Clone(as)
	slices.SortFunc(as, func(a, b *commandpb.Assignment) int {
		return cmp.Or(cmp.Compare(a.PipelineId, b.PipelineId), cmp.Compare(a.SidecarId, b.SidecarId))
	})
	return as
}
