package placement

import (
	"cmp"
	"slices"
)

// rounds is how often shares are evened out. Each round halves the error, and a
// few per cent of a stage make no difference.
const rounds = 8

// shares decides how much load by capacity the members of each profile are to
// have. A plan gives edges their way as long as sidecars have not had their
// share, so the shares must be such that everything asked for finds room: the
// demand for each want is poured, like water, over the profiles that can meet it,
// where it stands lowest, and again in turn until the levels are even.
//
// The simpler way, all demand by all capacity, would leave sidecars that alone
// offer something much asked for without room, and everything near them would be
// decided by load alone.
func (e *Engine) shares() {
	for i := range e.wants {
		e.wants[i].demand, e.wants[i].longest = 0, 0
	}
	total := int64(0)
	for i := range e.pipes {
		x := &e.pipes[i]
		if x.spec == nil || !x.spec.Enabled || x.cyclic {
			continue
		}
		for k := range x.stages {
			w := &e.wants[x.stages[k].want]
			w.demand += int64(x.stages[k].count)
			w.longest = max(w.longest, int32(len(x.stages)))
			total++
		}
	}
	level := make([]float64, len(e.profiles))
	var flows [][]float64
	var pools []pool
	for w := range e.wants {
		d := &e.wants[w]
		var into []int32
		members := int64(0)
		for _, pl := range d.in {
			if p := &e.profiles[pl.profile]; pl.fit == fresh && p.open > 0 {
				into = append(into, pl.profile)
				members += int64(p.open)
			}
		}
		slices.Sort(into)
		if len(into) == 0 || d.demand == 0 {
			continue
		}
		// A stage runs on a sidecar once: many instances asked for by few stages
		// may be more than there are sidecars.
		pools = append(pools, pool{into: into, demand: float64(min(d.demand, members*int64(d.stages)))})
		flows = append(flows, make([]float64, len(into)))
	}
	for range rounds {
		for k := range pools {
			e.pour(&pools[k], flows[k], level)
		}
	}
	for i := range e.profiles {
		e.profiles[i].share = uint64(max(0, level[i]*unit-unit/1000))
		if p := &e.profiles[i]; p.open > 0 {
			total += p.capacity
		}
	}
	e.rooms()
	e.drift, e.total = 0, max(64, total)
}

// rooms lets a sidecar be open until it has had its share, and no less than what
// there can be of one pipeline on one sidecar.
//
// Where a share is a part of a pipeline, the first stages that a sidecar is given
// use it up, whatever it could have run besides: those that can run the most of a
// pipeline together would be full as soon as any other, and what is left would go in
// pieces to sidecars that can run no more than these.
func (e *Engine) rooms() {
	runs := make([]int32, len(e.profiles)) // wants that a member may be given
	for i := range e.profiles {
		for _, f := range e.profiles[i].fits {
			if w := &e.wants[f.want]; f.fit == fresh && w.demand > 0 {
				runs[i]++
			}
		}
	}
	for i := range e.wants {
		w := &e.wants[i]
		w.together = 0
		for _, pl := range w.in {
			if pl.fit == fresh && e.profiles[pl.profile].open > 0 {
				w.together = max(w.together, min(w.longest, runs[pl.profile]))
			}
		}
	}
	for i := range e.profiles {
		p := &e.profiles[i]
		p.room = p.share
		if p.open == 0 {
			continue
		}
		for _, f := range p.fits {
			if f.fit == fresh {
				p.room = max(p.room, uint64(e.wants[f.want].together)*unit*uint64(p.open)/uint64(p.capacity))
			}
		}
	}
}

// pool is the demand for one want and the profiles that can meet it.
type pool struct {
	into   []int32
	demand float64
}

// pour takes the pool's flow out of the profiles and lets it in again where the
// level is lowest.
func (e *Engine) pour(p *pool, flow, level []float64) {
	type basin struct {
		at   int
		low  float64
		area float64
	}
	basins := make([]basin, len(p.into))
	for k, id := range p.into {
		area := float64(e.profiles[id].capacity)
		level[id] -= flow[k] / area
		basins[k] = basin{k, level[id], area}
	}
	slices.SortFunc(basins, func(a, b basin) int { return cmp.Or(cmp.Compare(a.low, b.low), cmp.Compare(a.at, b.at)) })
	area, volume, surface := 0.0, 0.0, 0.0
	for k, b := range basins {
		area += b.area
		volume += b.area * b.low
		surface = (p.demand + volume) / area
		if k+1 == len(basins) || surface <= basins[k+1].low {
			break
		}
	}
	for _, b := range basins {
		id := p.into[b.at]
		flow[b.at] = max(0, (surface-b.low)*b.area)
		level[id] = max(b.low, surface)
	}
}
