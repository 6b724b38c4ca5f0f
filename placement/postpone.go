package placement

import (
	"slices"
	"strings"
)

// Postpone returns what of a step may be told now without records going round
// between sidecars that have heard of it and others that have not. older lists the
// tables of the step's pipeline that a sidecar may hold besides the one that is
// recorded of it. later counts the changes that were put off, and by are sidecars that
// have to hear first, in order of ids. Planning again, once they have heard, gives what
// is left, or tells of others that have to hear then.
//
// Who beats every ten seconds holds a table for as long after it was replaced. The
// layout avoids what such a table and a new one could make of each other, but where
// a few sidecars have to share many stages there may be no such layout: say A hands
// stage s over to B, and is to run s while B hands s over to A. If B hears first,
// the records of s go to and fro until A hears. So A is told now, and B once A must
// have heard.
//
// Some change can always be told. What is recorded has no circle, so of those whose
// changes are put off there is one to whom no way leads from another one. A way
// back to it would have to lead through a table that is put off, or else be one of
// the layout itself, which has no circle either.
func (e *Engine) Postpone(st Step, older func(sidecar string) []*Assignment) (now Step, later int, by []string) {
	p, ok := e.pipeID[st.Pipeline]
	if !ok || !st.hands() {
		return st, 0, nil
	}
	if len(st.Changes) >= manyChanges && !e.goesRound(st, p, older) {
		return st, 0, nil
	}
	off, later, by := e.putOff(st, p, older)
	if later == 0 {
		return st, 0, nil
	}
	if later == len(st.Changes) {
		// Nothing of it now, if that is for tables which will be forgotten. If it were
		// for those that are recorded it would be for good, and be told all the same.
		if _, rest, _ := e.putOff(st, p, func(string) []*Assignment { return nil }); rest == later {
			return st, 0, nil
		}
	}
	now = st
	now.Changes, now.Moves = make([]Change, 0, len(st.Changes)-later), 0
	for i := range st.Changes {
		if !off[i] {
			now.Changes = append(now.Changes, st.Changes[i])
			now.Moves += len(st.Changes[i].Takes)
		}
	}
	return now, later, by
}

// manyChanges is from where on it pays to look at all tables together first: each
// change of thousands would find the same ways again.
const manyChanges = 64

// goesRound is true when there is a way round through any tables that may be held, and
// those of st, from a sidecar that st changes.
func (e *Engine) goesRound(st Step, p int32, older func(sidecar string) []*Assignment) bool {
	w := ways{x: &e.pipes[p], older: older, told: make(map[string][]Assigned, len(st.Changes)), seen: make(map[string]bool)}
	for i := range st.Changes {
		w.told[st.Changes[i].Sidecar] = st.Changes[i].Stages
	}
	done := make(map[string]bool) // false: on the way
	type visit struct {
		id   string
		next []string
	}
	for i := range st.Changes {
		if _, known := done[st.Changes[i].Sidecar]; known {
			continue
		}
		way := []visit{{st.Changes[i].Sidecar, w.from(st.Changes[i].Sidecar)}}
		done[way[0].id] = false
		for len(way) > 0 {
			last := &way[len(way)-1]
			if len(last.next) == 0 {
				done[last.id] = true
				way = way[:len(way)-1]
				continue
			}
			id := last.next[0]
			last.next = last.next[1:]
			if through, known := done[id]; !known {
				done[id] = false
				way = append(way, visit{id, w.from(id)})
			} else if !through {
				return true
			}
		}
	}
	return false
}

// putOff says of each change of st whether it has to be told later, of how many, and
// who has to hear first: those on the ways back that lead through a table which is
// replaced, or was, and not through one that is itself told later.
func (e *Engine) putOff(st Step, p int32, older func(sidecar string) []*Assignment) (off []bool, later int, by []string) {
	w := ways{
		x: &e.pipes[p], older: older, told: make(map[string][]Assigned), seen: make(map[string]bool),
		reached: make(map[string]string), blocks: make(map[string]bool),
	}
	off = make([]bool, len(st.Changes))
	for i := range st.Changes {
		c := &st.Changes[i]
		for k := range c.Stages {
			if to := c.Stages[k].Remote; to != "" && !off[i] && w.lead(to, c.Sidecar) {
				off[i] = true
				w.trace(&st, c.Sidecar)
			}
		}
		if off[i] {
			later++
		} else {
			w.told[c.Sidecar] = c.Stages
		}
	}
	// Nor is anybody told to hand over to one who will only later be told to take it.
	for again := later > 0; again; {
		again = false
		for i := range st.Changes {
			if !off[i] && st.reliesOn(&st.Changes[i], off) {
				off[i], again = true, true
				later++
			}
		}
	}
	for id, before := range w.blocks {
		if i, changes := st.change(id); before || changes && !off[i] {
			by = append(by, id)
		}
	}
	slices.Sort(by)
	return off, later, by
}

// change returns the place of a sidecar's change in st.
func (st *Step) change(sidecar string) (int, bool) {
	return slices.BinarySearchFunc(st.Changes, sidecar, func(c Change, id string) int { return strings.Compare(c.Sidecar, id) })
}

// hands is true when st makes anybody hand over to another sidecar.
func (st *Step) hands() bool {
	return slices.ContainsFunc(st.Changes, func(c Change) bool {
		return slices.ContainsFunc(c.Stages, func(s Assigned) bool { return s.Remote != "" })
	})
}

// reliesOn is true when c hands a stage over to a sidecar whose change, which lets
// it begin that, is off.
func (st *Step) reliesOn(c *Change, off []bool) bool {
	for k := range c.Stages {
		if c.Stages[k].Remote == "" {
			continue
		}
		i, ok := st.change(c.Stages[k].Remote)
		if ok && off[i] && slices.Contains(st.Changes[i].Takes, c.Stages[k].Stage) {
			return true
		}
	}
	return false
}

// ways is the hand-overs of a pipeline by any table that a sidecar may hold.
type ways struct {
	x     *pipe
	older func(sidecar string) []*Assignment
	told  map[string][]Assigned // what this step tells
	seen  map[string]bool
	open  []string
	// reached is from whom each of seen was reached last; blocks are who stands in the
	// way by a table that is replaced (false) or was before (true).
	reached map[string]string
	blocks  map[string]bool
}

// lead is true when a batch that is handed to from can come to to.
func (w *ways) lead(from, to string) bool {
	clear(w.seen)
	clear(w.reached)
	w.open = append(w.open[:0], from)
	w.seen[from] = true
	for len(w.open) > 0 {
		id := w.open[len(w.open)-1]
		w.open = w.open[:len(w.open)-1]
		if id == to {
			return true
		}
		for _, next := range w.from(id) {
			if !w.seen[next] {
				w.seen[next] = true
				w.open = append(w.open, next)
				if w.reached != nil {
					w.reached[next] = id
				}
			}
		}
	}
	return false
}

// trace notes who stands in the way that lead has just found to a sidecar: whoever
// takes a step of it that st does not leave to it.
func (w *ways) trace(st *Step, to string) {
	for {
		id, ok := w.reached[to]
		if !ok {
			return // the way begins here
		}
		handsTo := func(stages []Assigned) bool {
			return slices.ContainsFunc(stages, func(s Assigned) bool { return s.Remote == to })
		}
		recorded := false
		if at, ok := w.x.find(id); ok && !w.x.recorded[at].Revoked {
			recorded = handsTo(w.x.recorded[at].Stages)
		}
		i, changes := st.change(id)
		switch {
		case changes && handsTo(st.Changes[i].Stages):
		case changes || !recorded:
			w.blocks[id] = w.blocks[id] || !recorded
		}
		to = id
	}
}

// from lists to whom a sidecar may hand over, some of them twice.
func (w *ways) from(id string) (to []string) {
	follow := func(stages []Assigned) {
		for i := range stages {
			if stages[i].Remote != "" {
				to = append(to, stages[i].Remote)
			}
		}
	}
	if at, ok := w.x.find(id); ok && !w.x.recorded[at].Revoked {
		follow(w.x.recorded[at].Stages)
	}
	for _, a := range w.older(id) {
		follow(a.Stages)
	}
	follow(w.told[id])
	return to
}

// Recorded returns what a sidecar was told of a pipeline last, nil when that is
// nothing, or that it has nothing to run any more.
func (e *Engine) Recorded(pipeline, sidecar string) *Assignment {
	p, ok := e.pipeID[pipeline]
	if !ok {
		return nil
	}
	x := &e.pipes[p]
	if at, ok := x.find(sidecar); ok && !x.recorded[at].Revoked {
		return x.recorded[at]
	}
	return nil
}

// EachRecorded calls fn with everything that sidecars were told last, in no order that
// means anything.
func (e *Engine) EachRecorded(fn func(*Assignment)) {
	for i := range e.pipes {
		for _, a := range e.pipes[i].recorded {
			if !a.Revoked {
				fn(a)
			}
		}
	}
}
