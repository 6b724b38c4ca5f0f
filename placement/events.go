package placement

import "slices"

// PutSidecar takes over a sidecar that is new or has changed. Pipelines it
// concerns are planned again: those it has a table of, and those that are short
// of what it offers.
func (e *Engine) PutSidecar(s *Sidecar) {
	s = canonical(s)
	h, known := e.hostID[s.ID]
	if !known {
		h, turned := e.addHost(s)
		e.hosts[h].pipes = e.orphans[s.ID]
		delete(e.orphans, s.ID)
		e.turn(turned)
		e.match([]int32{h})
		e.touchHost(h)
		e.offerTo(h)
		e.sweep()
		return
	}
	x := &e.hosts[h]
	old := x.s
	e.recall(h)
	if old.Zone != s.Zone || old.Node != s.Node {
		e.leave(h)
		e.unlocate(h)
		x.set(s)
		e.locate(h)
	} else {
		e.countOpen(h, -1)
		x.set(s)
		e.countOpen(h, +1)
		if old.takes() && s.takes() && old.capacity() == s.capacity() {
			e.drift -= 2 * s.capacity() // nothing came or went
		}
	}
	other := !slices.EqualFunc(old.Offers, s.Offers, sameOffer)
	if other {
		x.s = old
		turned := e.unoffer(h)
		x.s = s
		turned = append(turned, e.offer(h)...)
		e.turn(turned)
	}
	e.match([]int32{h})
	e.refresh(h)
	e.touchHost(h)
	if s.takes() && (!old.takes() || other) {
		e.offerTo(h)
	}
	e.sweep()
}

func sameOffer(a, b Offer) bool {
	return a.Name == b.Name && a.Raw == b.Raw && a.Type == b.Type && a.Endpoint == b.Endpoint &&
		slices.EqualFunc(a.Registrations, b.Registrations, func(x, y Registration) bool {
			if x.Group != y.Group || x.Expired != y.Expired || x.Unhealthy != y.Unhealthy || x.Draining != y.Draining || len(x.Labels) != len(y.Labels) {
				return false
			}
			for k, v := range x.Labels {
				if w, ok := y.Labels[k]; !ok || v != w {
					return false
				}
			}
			return true
		})
}

// RemoveSidecar forgets a sidecar.
func (e *Engine) RemoveSidecar(id string) {
	h, ok := e.hostID[id]
	if !ok {
		return
	}
	e.touchHost(h)
	e.recall(h)
	e.leave(h)
	e.unlocate(h)
	turned := e.unoffer(h)
	delete(e.hostID, id)
	x := &e.hosts[h]
	if len(x.pipes) > 0 {
		e.orphans[id] = x.pipes
	}
	x.pipes, x.names = nil, nil
	e.buried = append(e.buried, h)
	e.turn(turned)
	e.sweep()
}

// PutPipeline takes over a pipeline that is new or has changed.
func (e *Engine) PutPipeline(p *Pipeline) {
	i := e.pipeOf(p.ID)
	x := &e.pipes[i]
	old := x.stages
	if x.spec != nil {
		e.unspec(x)
	}
	e.addPipe(p)
	x = &e.pipes[i]
	e.resolve(x)
	e.drift += int64(len(old) + len(x.stages))
	e.touch(i)
	e.sweep()
}

// RemovePipeline forgets a pipeline; what is assigned of it is revoked by the
// next plan.
func (e *Engine) RemovePipeline(id string) {
	i, ok := e.pipeID[id]
	if !ok || e.pipes[i].spec == nil {
		return
	}
	e.drift += int64(len(e.pipes[i].stages))
	e.unspec(&e.pipes[i])
	e.touch(i)
	e.sweep()
}

// PutAssignment takes over what a sidecar has been told.
func (e *Engine) PutAssignment(a *Assignment) { e.touch(e.record(a)) }

// RemoveAssignment forgets what a sidecar has been told of a pipeline.
func (e *Engine) RemoveAssignment(sidecar, pipeline string) {
	i, ok := e.pipeID[pipeline]
	if !ok {
		return
	}
	x := &e.pipes[i]
	at, ok := x.find(sidecar)
	if !ok {
		return
	}
	if !x.recorded[at].Revoked {
		e.touch(i)
	}
	e.untie(sidecar, i)
	x.recorded = slices.Delete(x.recorded, at, at+1)
	if x.spec == nil {
		e.touch(i) // perhaps nothing is left of it
	}
}

// touchHost marks the pipelines h has a table of.
func (e *Engine) touchHost(h int32) {
	for _, i := range e.hosts[h].pipes {
		e.touch(i)
	}
}

// offerTo marks the pipelines that are short of what h offers.
func (e *Engine) offerTo(h int32) {
	x := &e.hosts[h]
	if x.profile < 0 || !x.takes {
		return
	}
	for _, f := range e.profiles[x.profile].fits {
		if f.fit != fresh {
			continue
		}
		for i := range e.wants[f.want].short { // marked in any order, planned in one
			e.touch(i)
		}
	}
}

// recall marks the pipelines that are not handed out because every layout would
// go round, and to which h offered something: without it a stage may run nowhere,
// and then the rest can be handed out as far as nothing is lost.
func (e *Engine) recall(h int32) {
	x := &e.hosts[h]
	if x.profile < 0 || !x.takes {
		return
	}
	for _, f := range e.profiles[x.profile].fits {
		for i := range e.wants[f.want].short { // marked in any order, planned in one
			if e.pipes[i].circular {
				e.touch(i)
			}
		}
	}
}

// turn resolves the pipelines again that select one of names.
func (e *Engine) turn(names []int32) {
	for _, n := range names {
		for _, i := range sortedKeys(e.names[n].pipes) {
			x := &e.pipes[i]
			before := make([]int32, len(x.stages))
			for k := range x.stages {
				before[k] = x.stages[k].want
			}
			e.resolve(x)
			for k := range x.stages {
				if x.stages[k].want != before[k] {
					e.touch(i)
					break
				}
			}
		}
	}
}

func sortedKeys[V any](m map[int32]V) []int32 {
	out := make([]int32, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
