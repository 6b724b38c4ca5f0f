package placement

import (
	"cmp"
	"slices"
)

// Outlook is what would come of a loss.
type Outlook struct {
	// Before and After are the quality without the loss and once the plan is
	// carried out.
	Before, After Quality
	// Plan is what would be changed.
	Plan Plan
	// Pending names the stages, as pipeline and stage, that run now and would
	// run nowhere.
	Pending [][2]string
}

// WhatIf tells what would come of it if the sidecars were lost for which lose is
// true. v is not changed.
func WhatIf(v View, lose func(*Sidecar) bool) Outlook {
	var o Outlook
	e := NewEngine(v)
	e.Plan()
	o.Before = e.Measure()
	served := e.served()
	for _, s := range v.Sidecars {
		if lose(s) {
			gone := *s
			gone.Condition, gone.Grace = Expired, false
			e.PutSidecar(&gone)
		}
	}
	o.Plan = e.Plan()
	o.After = e.Measure()
	o.After.Moves, o.After.Least = o.Plan.Quality.Moves, o.Plan.Quality.Least
	after := e.served()
	for _, i := range e.byPipeline() {
		x := &e.pipes[i]
		for k := range x.stages {
			if served[i][k] && !after[i][k] {
				o.Pending = append(o.Pending, [2]string{x.id, x.stages[k].ID})
			}
		}
	}
	return o
}

// byPipeline lists the pipelines there are, by id.
func (e *Engine) byPipeline() []int32 {
	var all []int32
	for i := range e.pipes {
		if e.pipes[i].spec != nil {
			all = append(all, int32(i))
		}
	}
	slices.SortFunc(all, func(a, b int32) int { return cmp.Compare(e.pipes[a].id, e.pipes[b].id) })
	return all
}

// served tells of every pipeline which of its stages have a place in the newest
// layout.
func (e *Engine) served() map[int32][]bool {
	out := make(map[int32][]bool)
	for _, i := range e.byPipeline() {
		out[i] = slices.Clone(e.pipes[i].placed)
	}
	return out
}
