package control

import (
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Input is everything a plan depends on, as of one revision. The messages are
// shared with the caller and never modified. Order does not matter.
type Input struct {
	Pipelines []*commandpb.Pipeline
	Sidecars  []*commandpb.Sidecar
	Services  []*commandpb.Service
	// Assignments holds current and revoked ones. Revoked ones tell where a
	// pipeline used to run, which decides between otherwise equal sidecars.
	Assignments []*commandpb.Assignment
	// Handovers are what sidecars have yet to let go of. They decide when a plan is
	// carried out, not what it is.
	Handovers []*commandpb.Handover
}

// pageSize bounds how many records one scan of a View holds its iterator for.
const pageSize = 1000

// ReadInput collects the input of a plan from v. It does not close v.
func ReadInput(v *router.View) (Input, error) {
	var in Input
	if err := eachPipeline(v, func(p *commandpb.Pipeline) { in.Pipelines = append(in.Pipelines, p) }); err != nil {
		return Input{}, err
	}
	if err := eachSidecar(v, func(s *commandpb.Sidecar) { in.Sidecars = append(in.Sidecars, s) }); err != nil {
		return Input{}, err
	}
	if err := eachService(v, func(s *commandpb.Service) { in.Services = append(in.Services, s) }); err != nil {
		return Input{}, err
	}
	if err := v.Handovers(func(h *commandpb.Handover) bool { in.Handovers = append(in.Handovers, h); return true }); err != nil {
		return Input{}, err
	}
	// Assignments of sidecars that are gone are reached through the pipelines,
	// those of pipelines that are gone through the sidecars.
	seen := make(map[assignmentKey]bool)
	add := func(a *commandpb.Assignment) bool {
		k := assignmentKey{a.SidecarId, a.PipelineId}
		if !seen[k] {
			seen[k] = true
			in.Assignments = append(in.Assignments, a)
		}
		return true
	}
	for _, s := range in.Sidecars {
		if err := v.Assignments(s.SidecarId, add); err != nil {
			return Input{}, err
		}
	}
	for _, p := range in.Pipelines {
		if err := v.PipelineAssignments(p.GetSpec().GetId(), add); err != nil {
			return Input{}, err
		}
	}
	return in, nil
}

func eachPipeline(v *router.View, fn func(*commandpb.Pipeline)) error {
	return pages(func(after string) (string, int, error) {
		n := 0
		err := v.Pipelines(after, pageSize, func(p *commandpb.Pipeline) bool {
			fn(p)
			after, n = p.GetSpec().GetId(), n+1
			return true
		})
		return after, n, err
	})
}

func eachSidecar(v *router.View, fn func(*commandpb.Sidecar)) error {
	return pages(func(after string) (string, int, error) {
		n := 0
		err := v.Sidecars(after, pageSize, func(s *commandpb.Sidecar) bool {
			fn(s)
			after, n = s.SidecarId, n+1
			return true
		})
		return after, n, err
	})
}

func eachService(v *router.View, fn func(*commandpb.Service)) error {
	return pages(func(after string) (string, int, error) {
		n := 0
		err := v.Services(after, pageSize, func(s *commandpb.Service) bool {
			fn(s)
			after, n = s.ServiceId, n+1
			return true
		})
		return after, n, err
	})
}

// pages calls page with the key the last one ended at until one is not full.
func pages(page func(after string) (last string, n int, err error)) error {
	after := ""
	for {
		last, n, err := page(after)
		if err != nil || n < pageSize {
			return err
		}
		after = last
	}
}
