package placement

import (
	"cmp"
	"slices"
)

// Plan is what to change. Carried out as a whole it leads to where planning
// again changes nothing. Steps may be carried out one by one, in order: a driver
// that may move only so much now takes as many as fit and plans again later.
type Plan struct {
	Steps   []Step
	Quality Quality
}

// Step changes one pipeline. Its changes belong together: half of them could let
// records go round.
type Step struct {
	Pipeline string
	Version  uint64 // of the pipeline planned from; 0 for one that is gone
	Urgency  Urgency
	// Moves counts the stages that sidecars are newly given, Least the fewest that
	// any plan of it could do with.
	Moves, Least int
	Changes      []Change // by sidecar id
}

// Urgency says what a step is good for.
type Urgency uint8

// The urgencies, the most urgent first.
const (
	// Clean revokes what nobody is to run, and corrects addresses.
	Clean Urgency = iota
	// Serve lets stages run that run nowhere.
	Serve
	// Restore brings back instances that were lost.
	Restore
	// Grow adds instances that were never there.
	Grow
	// Evacuate takes stages from sidecars that drain.
	Evacuate
	// Rearrange moves what could run where it is, were it not for the rest of its
	// pipeline: a change of its edges makes records go round. It serves as it is.
	Rearrange
	// Even moves what runs well, so that load becomes even: see Engine.Balance.
	Even
)

// String returns the name of u.
func (u Urgency) String() string {
	return [...]string{"clean", "serve", "restore", "grow", "evacuate", "rearrange", "even"}[u]
}

// Change is what one sidecar is to be told of one pipeline.
type Change struct {
	Sidecar       string
	Generation    uint64 // of the sidecar planned from; 0 for one that is gone
	Revoke        bool
	LocalComplete bool
	Stages        []Assigned // in the order of the spec; all of them
	// Takes and Releases name the stages that it begins and ceases to run.
	Takes, Releases []string
	// Confirm names those of Releases that nobody else may begin before the sidecar
	// has confirmed this change, or is out of time.
	Confirm []string
	// After lists sidecars that must have confirmed their change, or be out of
	// time, before this one is told: it takes a source that they have yet to let
	// go of, and two of them must not read one source at a time.
	After []string // in order; shared between changes
	// MovedTo is the sidecar that what is revoked is given to for the sake of balance.
	MovedTo string
}

// Compute plans v as a whole. It is a pure function: equal views, in any order,
// give equal plans.
func Compute(v View) Plan { return NewEngine(v).Plan() }

// Plan plans the pipelines that events concern, all of them the first time. A
// pipeline that is to be changed is planned again every time until its
// assignments are as planned.
func (e *Engine) Plan() Plan {
	if e.drift*64 > e.total {
		e.shares()
	}
	var p Plan
	todo := e.dirty
	e.dirty = nil
	slices.SortFunc(todo, func(a, b int32) int { return cmp.Compare(e.pipes[a].id, e.pipes[b].id) })
	p.Steps = make([]Step, 0, len(todo))
	for _, i := range todo {
		x := &e.pipes[i]
		x.dirty = false
		x.step = -1
		if step, ok := e.lay(x); ok {
			x.step = int32(len(p.Steps))
			p.Steps = append(p.Steps, step)
			e.touch(i)
		}
	}
	e.level(todo, p.Steps)
	for _, i := range todo {
		x := &e.pipes[i]
		p.Quality.count(x)
		if x.spec == nil && len(x.recorded) == 0 {
			delete(e.pipeID, x.id)
			*x = pipe{index: i, dirty: x.dirty}
			e.freePipes = append(e.freePipes, i)
		}
	}
	e.freeHosts = append(e.freeHosts, e.buried...)
	e.buried = e.buried[:0]
	slices.SortStableFunc(p.Steps, func(a, b Step) int { return cmp.Compare(a.Urgency, b.Urgency) })
	e.sum(&p.Quality)
	return p
}

// level lays pipelines out again that were given stages in this plan on sidecars
// that got more than their share in the end. The first come take what is near to
// them, and the last may find the room that is left on too few sidecars. A
// pipeline is not laid out again when nobody else has changed anything since:
// that would come to the same.
func (e *Engine) level(todo []int32, steps []Step) {
	for range rounds {
		if len(e.over) == 0 {
			return
		}
		clear(e.over)
		before := e.shifts
		for _, i := range todo {
			x := &e.pipes[i]
			if x.step < 0 || !x.crowds(e) {
				continue
			}
			if x.shifts != e.shifts {
				if step, ok := e.lay(x); ok {
					steps[x.step] = step
				}
			}
			if x.crowds(e) {
				e.over[i] = true
			}
		}
		if e.shifts == before {
			return
		}
	}
}

// crowds is true when x was newly given stages on a sidecar that has had its share
// of others.
func (x *pipe) crowds(e *Engine) bool {
	return slices.ContainsFunc(x.held, func(c holding) bool { return c.fresh && !e.open(c.host, e.hosts[c.host].load-c.n) })
}

// lay lays out x anew and returns the step that leads there; false when it is
// there already.
func (e *Engine) lay(x *pipe) (Step, bool) {
	e.drop(x)
	l := &e.l
	l.reset(x)
	if x.spec != nil && x.spec.Enabled {
		l.solve()
	}
	x.circular = l.circular
	step, changed := l.step()
	e.totals.add(x.figures, -1)
	x.figures = l.evaluate()
	step.Least = x.figures.least
	e.totals.add(x.figures, +1)
	x.placed = slices.Grow(x.placed[:0], len(x.stages))[:len(x.stages)]
	for i := range x.stages {
		x.placed[i] = len(l.at[i]) > 0
	}
	e.hold(x, l)
	e.shorten(x, l)
	return step, changed
}

// drop takes back what x adds to the load of sidecars.
func (e *Engine) drop(x *pipe) {
	e.dropped = append(e.dropped[:0], x.held...)
	for _, c := range x.held {
		h := &e.hosts[c.host]
		h.load -= c.n
		h.inbound -= c.in
		if h.profile >= 0 {
			e.refresh(c.host)
		}
	}
	x.held = x.held[:0]
}

// hold counts what the layout adds to the load of sidecars.
func (e *Engine) hold(x *pipe, l *layout) {
	if cap(x.held) < len(l.nodes) {
		x.held = make([]holding, 0, len(l.nodes))
	}
	for i := range l.nodes {
		n := &l.nodes[i]
		h := &e.hosts[n.host]
		c := holding{host: n.host, n: n.local.count(), fresh: !slices.Equal(n.local, n.bound)}
		for _, in := range n.ins {
			c.in += in.to
		}
		if c.n > 0 || c.in > 0 {
			h.load += c.n
			h.inbound += c.in
			x.held = append(x.held, c)
			if c.fresh && c.n > 0 && !e.open(c.host, h.load-c.n) {
				e.over[x.index] = true
			}
		}
		if c.n > 0 || n.apart {
			h.held = false
			e.refresh(n.host)
		}
	}
	if !slices.EqualFunc(x.held, e.dropped, func(a, b holding) bool { return a.host == b.host && a.n == b.n && a.in == b.in }) {
		e.shifts++
	}
	x.shifts = e.shifts
}

// shorten tells the wants of x which of them are short of instances.
func (e *Engine) shorten(x *pipe, l *layout) {
	on := x.spec != nil && x.spec.Enabled && !x.cyclic
	for i := range x.stages {
		s := &x.stages[i]
		short := on && (len(l.at[i]) < int(s.count) || l.relies(int32(i)))
		if s.short && !short {
			e.fill(x, s)
		}
		if short {
			s.short = true
			e.wants[s.want].short[x.index] = true
		}
	}
}

// relies is true when stage i runs on a sidecar that drains, or with a service that
// does, for want of another.
func (l *layout) relies(i int32) bool {
	return slices.ContainsFunc(l.at[i], func(n int32) bool { return l.leaves(i, l.nodes[n].host) })
}

// step compares the layout with what is recorded.
func (l *layout) step() (Step, bool) {
	x, e := l.x, l.e
	st := Step{Pipeline: x.id, Urgency: Clean}
	if x.spec != nil {
		st.Version = x.spec.Version
	}
	for _, a := range x.recorded {
		if a.Revoked {
			continue
		}
		h, known := e.hostID[a.Sidecar]
		if known {
			if n, _ := l.nodeOf(h); l.nodes[n].local.count() > 0 {
				continue // below
			}
		}
		c := Change{Sidecar: a.Sidecar, Revoke: true}
		if known {
			c.Generation = e.hosts[h].s.Generation
		}
		for i := range a.Stages {
			if a.Stages[i].Remote == "" {
				c.Releases = append(c.Releases, a.Stages[i].Stage)
			}
		}
		st.Changes = append(st.Changes, c)
	}
	for n := range l.nodes {
		if l.nodes[n].local.count() == 0 {
			continue
		}
		s := e.hosts[l.nodes[n].host].s
		var now *Assignment
		if at := l.nodes[n].told; at >= 0 {
			now = x.recorded[at]
		}
		if now != nil && l.same(int32(n), now) {
			continue
		}
		c := Change{Sidecar: s.ID, Generation: s.Generation}
		c.Stages, c.LocalComplete = l.table(int32(n))
		for i := range x.stages {
			switch has, had := l.nodes[n].local.has(int32(i)), l.nodes[n].bound.has(int32(i)); {
			case has && !had:
				c.Takes = append(c.Takes, x.stages[i].ID)
			case had && !has:
				c.Releases = append(c.Releases, x.stages[i].ID)
			}
		}
		if now != nil {
			for i := range now.Stages { // of those the pipeline has no more
				if a := &now.Stages[i]; a.Remote == "" && x.stage(a.Stage, int32(i)) < 0 {
					c.Releases = append(c.Releases, a.Stage)
				}
			}
		}
		st.Moves += len(c.Takes)
		st.Changes = append(st.Changes, c)
	}
	if len(st.Changes) == 0 {
		return st, false
	}
	slices.SortFunc(st.Changes, func(a, b Change) int { return cmp.Compare(a.Sidecar, b.Sidecar) })
	l.order(&st)
	st.Urgency = l.urgency(st.Moves)
	return st, true
}

// order fills in who must wait for whom.
func (l *layout) order(st *Step) {
	var leaving map[string][]string // source stage -> sidecars that are there and let go of it
	for i := range st.Changes {
		c := &st.Changes[i]
		if len(c.Releases) == 0 {
			continue
		}
		h, known := l.e.hostID[c.Sidecar]
		if !known || l.e.hosts[h].s.lost() {
			continue
		}
		for _, id := range c.Releases {
			// A stage that is no longer in the pipeline may be there again soon, as a
			// source: what it was is not known any more. Nothing waits for it until then.
			if k := l.x.stage(id, 0); k < 0 || l.x.stages[k].entry {
				if leaving == nil {
					leaving = make(map[string][]string)
				}
				leaving[id] = append(leaving[id], c.Sidecar)
				c.Confirm = append(c.Confirm, id)
			}
		}
	}
	if leaving == nil {
		return
	}
	// They are in order, as the changes are. Sidecars that take the same source
	// wait for the same ones and share the list: 10,000 lists of 10,000 would be
	// more than there is memory.
	for i := range st.Changes {
		c := &st.Changes[i]
		for _, id := range c.Takes {
			switch before := leaving[id]; {
			case len(before) == 0:
			case c.After == nil:
				c.After = slices.Clip(before)
			default:
				c.After = slices.Concat(c.After, before)
				slices.Sort(c.After)
				c.After = slices.Compact(c.After)
			}
		}
	}
}

// urgency says what the step is good for.
func (l *layout) urgency(moves int) Urgency {
	if moves == 0 {
		return Clean
	}
	u := Rearrange
	for i := range l.x.stages {
		kept, were, lost, drained := 0, 0, 0, 0
		for n := range l.nodes {
			x := &l.nodes[n]
			if !x.bound.has(int32(i)) {
				continue
			}
			were++
			switch s := l.e.hosts[x.host].s; {
			case x.local.has(int32(i)):
				kept++
			case s.lost() || l.fit(int32(i), x.host) == unfit:
				lost++
			case l.leaves(int32(i), x.host):
				drained++
			}
		}
		for _, a := range l.x.recorded { // of sidecars that are gone altogether
			if _, known := l.e.hostID[a.Sidecar]; !known && !a.Revoked {
				lost++
				were++
			}
		}
		switch now := len(l.at[i]); {
		case now == kept:
		case kept == 0 && lost == were:
			u = min(u, Serve)
		case lost > 0:
			u = min(u, Restore)
		case now > were:
			u = min(u, Grow)
		case drained > 0:
			u = min(u, Evacuate)
		}
	}
	return u
}

// table renders what node n has to hold of the pipeline.
func (l *layout) table(n int32) (stages []Assigned, complete bool) {
	x := &l.nodes[n]
	stages = make([]Assigned, 0, int(x.local.count())+len(x.hops))
	for i := range l.x.stages {
		if a, ok := l.entry(n, int32(i)); ok {
			stages = append(stages, a)
		}
	}
	return stages, int(x.local.count()) == len(l.x.stages)
}

// entry renders what node n has to hold of stage i.
func (l *layout) entry(n, i int32) (Assigned, bool) {
	x, s := &l.nodes[n], &l.x.stages[i]
	if x.local.has(i) {
		a := Assigned{Stage: s.ID}
		if o := l.e.hosts[x.host].s.offer(&l.e.wants[s.want]); o != nil {
			a.Endpoint = o.Endpoint
		}
		return a, true
	}
	if to, ok := x.next(i); ok {
		t := l.e.hosts[l.nodes[to].host].s
		return Assigned{Stage: s.ID, Remote: t.ID, RemoteEndpoint: t.Endpoint}, true
	}
	return Assigned{}, false
}

// same is true when a says what node n has to hold.
func (l *layout) same(n int32, a *Assignment) bool {
	x := &l.nodes[n]
	local := int(x.local.count())
	if len(a.Stages) != local+len(x.hops) || a.LocalComplete != (local == len(l.x.stages)) {
		return false
	}
	k := 0
	for i := range l.x.stages {
		if want, ok := l.entry(n, int32(i)); ok {
			if a.Stages[k] != want {
				return false
			}
			k++
		}
	}
	return true
}
