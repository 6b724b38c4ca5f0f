package placement

import (
	"cmp"
	"reflect"
	"slices"
)

// Outlook is what would come of a change.
type Outlook struct {
	// Before and After are the quality without the change and once its plan is
	// carried out. After counts the moves of the plan.
	Before, After Quality
	// Plan is what would be changed because of it.
	Plan Plan
	// Waiting are the stages that run now and would run nowhere, and all of the
	// declared pipelines that would; Waits counts them. Reason is given for those
	// of the first pipelines only.
	Waiting []Waiting
	Waits   int
	// UnderWay counts the pipelines that are to be changed whatever becomes of
	// this; their steps are in no plan here.
	UnderWay int
}

// WhatIf tells what would come of it if the sidecars were lost for which lose is
// true. v is not changed.
func WhatIf(v View, lose func(*Sidecar) bool) Outlook {
	return NewEngine(v).WhatIf(lose, len(v.Pipelines))
}

// WhatIf tells what would come of it if the sidecars were lost for which lose is
// true, with the reasons why stages of at most so many pipelines would wait. lose
// is asked about every sidecar, by id. What is recorded in e stays as it is.
//
// The change is made and taken back, rather than made to a copy: it costs what it
// concerns, where a copy costs as much as everything there is.
func (e *Engine) WhatIf(lose func(*Sidecar) bool, reasons int) Outlook {
	var lost []*Sidecar
	for _, h := range e.byID() {
		if s := e.hosts[h].s; lose(s) {
			lost = append(lost, s)
		}
	}
	return e.outlook(nil, reasons, func() {
		for _, s := range lost {
			gone := *s
			gone.Condition, gone.Grace = Expired, false
			e.PutSidecar(&gone)
		}
	}, func() {
		for _, s := range lost {
			e.PutSidecar(s)
		}
	})
}

// Try tells what would come of declaring pipelines, new ones and others than are
// declared now, with the reasons why stages of at most so many pipelines would
// wait. What is recorded in e stays as it is.
func (e *Engine) Try(pipelines []*Pipeline, reasons int) Outlook {
	ids := make([]string, len(pipelines))
	before := make([]*Pipeline, len(pipelines))
	for k, p := range pipelines {
		ids[k] = p.ID
		if i, ok := e.pipeID[p.ID]; ok {
			before[k] = e.pipes[i].spec
		}
	}
	return e.outlook(ids, reasons, func() {
		for _, p := range pipelines {
			e.PutPipeline(p)
		}
	}, func() {
		// Backwards: of two with one id, the first knows what there was.
		for k := len(pipelines) - 1; k >= 0; k-- {
			if before[k] != nil {
				e.PutPipeline(before[k])
			} else {
				e.RemovePipeline(ids[k])
			}
		}
	})
}

// outlook makes a change, plans, and takes the change back.
func (e *Engine) outlook(declared []string, reasons int, change, undo func()) (o Outlook) {
	first := e.Plan().Steps
	o.Before = e.Measure()
	served := e.served()
	change()
	e.drift = e.total + 1 // shares as a plan of the whole would have them
	o.Plan = e.Plan()
	o.After = e.Measure()
	o.UnderWay = o.Plan.without(first)
	o.Plan.Quality.Moves, o.Plan.Quality.Least = 0, 0
	for i := range o.Plan.Steps {
		o.Plan.Quality.Moves += o.Plan.Steps[i].Moves
		o.Plan.Quality.Least += o.Plan.Steps[i].Least
	}
	o.After.Moves, o.After.Least = o.Plan.Quality.Moves, o.Plan.Quality.Least
	declared = slices.Clone(declared)
	slices.Sort(declared)
	for _, i := range e.byPipeline() {
		x := &e.pipes[i]
		if !x.spec.Enabled {
			continue
		}
		_, asked := slices.BinarySearch(declared, x.id)
		begin := len(o.Waiting)
		for k := range x.stages {
			if x.placed[k] || (!asked && !served[i].has(int32(k))) {
				continue
			}
			o.Waiting = append(o.Waiting, Waiting{Pipeline: x.id, Stage: x.stages[k].ID})
		}
		if len(o.Waiting) > begin && reasons > 0 {
			reasons--
			e.explainAll(o.Waiting[begin:])
		}
	}
	o.Waits = len(o.Waiting)
	undo()
	e.Plan() // the layouts are again as before
	return o
}

// explainAll fills in the reasons of stages of one pipeline.
func (e *Engine) explainAll(of []Waiting) {
	for _, w := range e.Waiting(of[0].Pipeline) {
		for i := range of {
			if of[i].Stage == w.Stage {
				of[i].Reason = w.Reason
			}
		}
	}
}

// without takes the steps out of p that are in first too, and returns how many.
func (p *Plan) without(first []Step) int {
	if len(first) == 0 {
		return 0
	}
	known := make(map[string]*Step, len(first))
	for i := range first {
		known[first[i].Pipeline] = &first[i]
	}
	n := len(p.Steps)
	p.Steps = slices.DeleteFunc(p.Steps, func(s Step) bool {
		k := known[s.Pipeline]
		return k != nil && reflect.DeepEqual(*k, s)
	})
	return n - len(p.Steps)
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

// places tells which stages of a pipeline have a place.
type places []bool

func (p places) has(k int32) bool { return int(k) < len(p) && p[k] }

// served tells of every pipeline which of its stages have a place in the newest
// layout.
func (e *Engine) served() map[int32]places {
	out := make(map[int32]places, len(e.pipes))
	for i := range e.pipes {
		if x := &e.pipes[i]; x.spec != nil && slices.Contains(x.placed, true) {
			out[int32(i)] = slices.Clone(x.placed)
		}
	}
	return out
}
