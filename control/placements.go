package control

import (
	"sync"

	"conveyor.etl/router/placement"
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
	mu sync.Mutex
	e  *placement.Engine
}

// NewExplainer indexes in once for many pipelines.
func NewExplainer(in Input) *Explainer {
	return &Explainer{e: placement.NewEngine(viewOf(in))}
}

// Placements tells where the stages of p run, in the order p declares them.
func (e *Explainer) Placements(p *commandpb.Pipeline) []Placement {
	e.mu.Lock()
	defer e.mu.Unlock()
	stages := e.e.Explain(p.GetSpec().GetId(), false)
	out := make([]Placement, len(stages))
	for i, s := range stages {
		out[i] = Placement{StageID: s.Stage, Sidecars: s.Sidecars, Pending: s.Pending}
	}
	return out
}
