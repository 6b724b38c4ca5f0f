package control

import (
	"fmt"
	"slices"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Placement says where one stage of a pipeline runs.
type Placement struct {
	StageID string
	// Sidecars run the stage by their present assignments, in order of ids.
	Sidecars []string
	// Pending says why no sidecar runs the stage and what would help; empty
	// when one does.
	Pending string
}

// Explainer answers where stages run and why others do not, as of one Input.
// It is safe for concurrent use.
type Explainer struct {
	f       *fleet
	current map[string][]*commandpb.Assignment
}

// NewExplainer indexes in once for many pipelines.
func NewExplainer(in Input) *Explainer {
	e := &Explainer{f: newFleet(in), current: make(map[string][]*commandpb.Assignment)}
	for _, a := range sortedAssignments(in.Assignments) {
		e.current[a.PipelineId] = append(e.current[a.PipelineId], a)
	}
	return e
}

// Placements reads v and tells where the stages of p run, in the order p
// declares them. Use an Explainer for more than a few pipelines.
func Placements(v *router.View, p *commandpb.Pipeline) ([]Placement, error) {
	in, err := ReadInput(v)
	if err != nil {
		return nil, err
	}
	return NewExplainer(in).Placements(p), nil
}

// Placements tells where the stages of p run, in the order p declares them.
func (e *Explainer) Placements(p *commandpb.Pipeline) []Placement {
	spec := p.GetSpec()
	current := e.current[spec.GetId()]
	out := make([]Placement, len(spec.GetStages()))
	missing := false
	for i, st := range spec.GetStages() {
		out[i].StageID = st.GetId()
		for _, a := range current {
			if a.Revoked {
				continue
			}
			for _, s := range a.Stages {
				if s.StageId == st.GetId() && s.RemoteSidecarId == "" {
					out[i].Sidecars = append(out[i].Sidecars, a.SidecarId)
				}
			}
		}
		slices.Sort(out[i].Sidecars)
		missing = missing || len(out[i].Sidecars) == 0
	}
	if !missing {
		return out
	}
	l := newLayout(e.f, p, current, make([]int, len(e.f.hosts)))
	l.solve()
	for i := range out {
		if len(out[i].Sidecars) > 0 {
			continue
		}
		s := &l.stages[i]
		switch {
		case !spec.GetEnabled():
			out[i].Pending = "the pipeline is disabled"
		case l.cyclic:
			out[i].Pending = "the edges of the pipeline form a cycle"
		case s.kept:
			out[i].Pending = fmt.Sprintf("held back until stage %q downstream is served: records would be lost there", l.stages[s.gap].id)
		case len(s.hosts) == 0 && len(s.able) > 0:
			out[i].Pending = fmt.Sprintf("held back together with a source on the same sidecar: %s", few(l.hostIDs(s.able)))
		case len(s.hosts) == 0:
			out[i].Pending = e.f.missing(&s.want)
		case l.circular:
			out[i].Pending = "every way to place the stages would hand records back to a sidecar they have passed; offer one of the services on another sidecar"
		default:
			out[i].Pending = "about to be assigned"
		}
	}
	return out
}

func (l *layout) hostIDs(hosts []int) []string {
	ids := make([]string, len(hosts))
	for i, h := range hosts {
		ids[i] = l.f.hosts[h].SidecarId
	}
	return ids
}
