package placement

import "slices"

// unask counts a stage less that asks for want w.
func (e *Engine) unask(w int32) {
	if e.wants[w].stages--; e.wants[w].stages == 0 && !e.wants[w].fixed {
		e.unasked = append(e.unasked, w)
	}
}

// sweep forgets what nobody asks for and nobody offers any more, at the end of an
// event: in the middle of one, what a new form of a pipeline asks for again would
// be forgotten and made anew, at the cost of a look at every sidecar that has it.
//
// Without it, services that are named anew with every release of what they run,
// and labels that carry a version, would stay for as long as the node leads.
func (e *Engine) sweep() {
	for _, w := range e.unasked {
		if x := &e.wants[w]; x.stages == 0 && x.short != nil {
			e.forgetWant(w)
		}
	}
	e.unasked = e.unasked[:0]
	for _, n := range e.unused {
		x := &e.names[n]
		if len(x.hosts) == 0 && x.stages == 0 && len(x.wants) == 0 && e.nameID[x.text] == n {
			delete(e.nameID, x.text)
			*x = name{}
			e.freeNames = append(e.freeNames, n)
		}
	}
	e.unused = e.unused[:0]
}

// forgetWant takes w out of the profiles that can meet it and frees it. A profile
// that is the same as another one without it becomes one with it.
func (e *Engine) forgetWant(w int32) {
	x := &e.wants[w]
	delete(e.wantID, x.key())
	if x.byType {
		e.typed = remove(e.typed, w)
	} else {
		n := e.nameID[x.name]
		e.names[n].wants = remove(e.names[n].wants, w)
		e.unused = append(e.unused, n)
	}
	var alike []int32
	for _, pl := range slices.Clone(x.in) {
		p := &e.profiles[pl.profile]
		fits := slices.DeleteFunc(slices.Clone(p.fits), func(f fit) bool { return f.want == w })
		key := profileKey(fits)
		if _, other := e.profileID[key]; other {
			alike = append(alike, p.members...)
			continue
		}
		delete(e.profileID, p.key)
		p.key, p.fits = key, fits
		e.profileID[key] = pl.profile
		x.in = slices.DeleteFunc(x.in, func(o place) bool { return o.profile == pl.profile })
	}
	e.match(alike)
	e.wants[w] = want{}
	e.freeWants = append(e.freeWants, w)
}
