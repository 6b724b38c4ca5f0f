package placement

import "slices"

// Defer returns what of a step may be carried out now: all but the beginning of
// stages that another sidecar has yet to let go of, be it that this very step tells
// it to or that an earlier one did, which busy knows. A sidecar whose table has to
// wait in part is given the rest of it; it may be that nothing is left. waiting
// counts what was put off. Planning again, once the others have let go, gives what
// is left.
//
// The simpler way, to put off the step as a whole, would leave stages without a
// sidecar that have nothing to do with the handover.
func (e *Engine) Defer(st Step, busy func(stage, sidecar string) bool) (now Step, waiting int) {
	confirm := st.confirmers()
	now = st
	now.Changes, now.Moves = make([]Change, 0, len(st.Changes)), 0
	for i := range st.Changes {
		c := st.Changes[i]
		var blocked []string
		for _, id := range c.Takes {
			if busy(id, c.Sidecar) || len(confirm[id]) > 0 && slices.ContainsFunc(c.After, func(s string) bool { return confirm[id][s] }) {
				blocked = append(blocked, id)
			}
		}
		if len(blocked) > 0 {
			waiting += len(blocked)
			var ok bool
			if c, ok = e.without(c, st.Pipeline, blocked); !ok {
				continue
			}
		}
		now.Moves += len(c.Takes)
		now.Changes = append(now.Changes, c)
	}
	return now, waiting
}

// Idle lists the stages to begin in st that nobody runs once now, which Defer or
// Postpone made of it, is carried out; by id.
func (e *Engine) Idle(st, now Step) []string {
	p, ok := e.pipeID[st.Pipeline]
	if !ok {
		return nil
	}
	// Of few stages there are many changes, so that tables are looked at once.
	wanted, runs := make(map[string]bool), make(map[string]bool)
	for i := range st.Changes {
		for _, id := range st.Changes[i].Takes {
			wanted[id] = true
		}
	}
	note := func(stages []Assigned) {
		for i := range stages {
			if stages[i].Remote == "" {
				runs[stages[i].Stage] = true
			}
		}
	}
	told := make(map[string]bool, len(now.Changes))
	for i := range now.Changes {
		told[now.Changes[i].Sidecar] = true
		note(now.Changes[i].Stages)
	}
	for _, a := range e.pipes[p].recorded {
		if !a.Revoked && !told[a.Sidecar] {
			note(a.Stages)
		}
	}
	var idle []string
	for id := range wanted {
		if !runs[id] {
			idle = append(idle, id)
		}
	}
	slices.Sort(idle)
	return idle
}

// confirmers lists per stage the sidecars that have to confirm in this step that they
// let go of it.
func (st *Step) confirmers() map[string]map[string]bool {
	out := make(map[string]map[string]bool)
	for i := range st.Changes {
		for _, stage := range st.Changes[i].Confirm {
			if out[stage] == nil {
				out[stage] = make(map[string]bool)
			}
			out[stage][st.Changes[i].Sidecar] = true
		}
	}
	return out
}

// without returns c without stages that it would begin, and without the hops that
// only these need; false when that is nothing, or what the sidecar has already.
func (e *Engine) without(c Change, pipeline string, stages []string) (Change, bool) {
	p, ok := e.pipeID[pipeline]
	if !ok {
		return c, false
	}
	x := &e.pipes[p]
	var local []int32
	for _, a := range c.Stages {
		if a.Remote == "" && !slices.Contains(stages, a.Stage) {
			local = append(local, x.stage(a.Stage, 0))
		}
	}
	rest := make([]Assigned, 0, len(c.Stages))
	for _, a := range c.Stages {
		k := x.stage(a.Stage, 0)
		switch {
		case slices.Contains(local, k) && a.Remote == "":
			rest = append(rest, a)
		case a.Remote != "" && slices.ContainsFunc(local, func(from int32) bool { return slices.Contains(x.stages[from].down, k) }):
			rest = append(rest, a)
		}
	}
	c.Stages, c.LocalComplete = rest, false
	c.Takes = slices.DeleteFunc(slices.Clone(c.Takes), func(s string) bool { return slices.Contains(stages, s) })
	now := e.Recorded(pipeline, c.Sidecar)
	if len(local) == 0 {
		// What it had is all gone: it is told so now, and what it gets later.
		if now == nil {
			return c, false
		}
		c.Stages, c.Revoke = nil, true
		return c, true
	}
	return c, now == nil || now.LocalComplete || !slices.Equal(now.Stages, c.Stages)
}

// Runs is true when a sidecar has been told to run something, by what is recorded.
func (e *Engine) Runs(sidecar string) bool {
	return e.runs(sidecar, func(*Assignment) bool { return true })
}

// RunsAt is true when a sidecar has been told to run a stage itself with a service at
// one of the endpoints.
func (e *Engine) RunsAt(sidecar string, endpoints []string) bool {
	return e.runs(sidecar, func(a *Assignment) bool {
		return slices.ContainsFunc(a.Stages, func(s Assigned) bool { return s.Remote == "" && slices.Contains(endpoints, s.Endpoint) })
	})
}

// runs is true when of what a sidecar has been told to run something is like that.
func (e *Engine) runs(sidecar string, like func(*Assignment) bool) bool {
	runs := func(pipes []int32) bool {
		return slices.ContainsFunc(pipes, func(p int32) bool {
			return slices.ContainsFunc(e.pipes[p].recorded, func(a *Assignment) bool { return a.Sidecar == sidecar && !a.Revoked && like(a) })
		})
	}
	if h, ok := e.hostID[sidecar]; ok {
		return runs(e.hosts[h].pipes)
	}
	return runs(e.orphans[sidecar])
}
