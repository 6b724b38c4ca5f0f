package placement

import (
	"cmp"
	"math"
	"slices"
)

// Rebalance plans voluntary moves: stages of sidecars that have had more than their
// share go to others that are less loaded, so that a fleet that has grown uses its
// new sidecars. At most so many stages are moved; each step is urgent as Balance.
//
// What a step moves is all that one sidecar runs of one pipeline. It moves only if
// no edge of the pipeline leaves its pod by it, nothing else moves, and whoever takes
// it is then clearly less loaded than who gave it was. So the highest load never
// rises, and moves come to an end. Edges leave their node or zone only for a
// sidecar that has clearly more than its share: when stages are placed, room
// comes before neighbourhood as well.
//
// It plans nothing while Plan has anything to plan. Call it with the outcome of the
// plan before taken over, carry out its steps or not, and call Plan as ever: what
// has not been carried out stays where it is. A call makes a bounded number of
// attempts, and the next one goes on with the sidecars not tried before, so that no
// steps do not mean that there is nothing to move. Apart from that it is a function
// of the view, as Plan is.
func (e *Engine) Rebalance(most int) Plan {
	var p Plan
	if len(e.dirty) > 0 || most <= 0 {
		return p
	}
	if e.drift > 0 {
		// Shares that are a little old would make the plan depend on what
		// happened before.
		e.shares()
	}
	tries := 64 + 4*most
	ended := true
	for _, h := range e.crowded(e.floors()) {
		if tries <= 0 || p.Quality.Moves >= most {
			ended = false
			break
		}
		pipes := slices.Clone(e.hosts[h].pipes)
		slices.SortFunc(pipes, func(a, b int32) int { return cmp.Compare(e.pipes[a].id, e.pipes[b].id) })
		for _, i := range pipes {
			if tries <= 0 || p.Quality.Moves >= most || e.open(h, e.hosts[h].load) {
				break
			}
			if e.pipes[i].dirty || !e.eases(i, h, most-p.Quality.Moves) {
				continue
			}
			tries--
			if step, ok := e.relieve(i, h); ok {
				p.Quality.Moves += step.Moves
				p.Steps = append(p.Steps, step)
			}
		}
		e.hosts[h].tried = e.round
	}
	if ended {
		e.round++ // all have had their turn
	}
	slices.SortFunc(p.Steps, func(a, b Step) int { return cmp.Compare(a.Pipeline, b.Pipeline) })
	e.sum(&p.Quality)
	return p
}

// floors returns per want how loaded the least loaded sidecar that may be given it
// would be with one stage more.
func (e *Engine) floors() []uint64 {
	out := make([]uint64, len(e.wants))
	for w := range e.wants {
		out[w] = closed
		for _, pl := range e.wants[w].in {
			if pl.fit == fresh {
				_, key := e.profiles[pl.profile].least()
				out[w] = min(out[w], key)
			}
		}
	}
	return out
}

// better is true when a load by capacity is clearly less than another: by a
// twentieth, which is as much as loads may be apart in a fleet that is even.
func better(load, than uint64) bool { return load <= than-than/20 && load < than }

// crowded lists the sidecars that have had their share and could give some of it
// to others, the most loaded first.
func (e *Engine) crowded(floor []uint64) []int32 {
	lowest := make([]uint64, len(e.profiles))
	for i := range e.profiles {
		lowest[i] = math.MaxUint64
		for _, f := range e.profiles[i].fits {
			lowest[i] = min(lowest[i], floor[f.want])
		}
	}
	var out []int32
	for h := range e.hosts {
		x := &e.hosts[h]
		if x.profile < 0 || !x.takes || x.tried == e.round || e.open(int32(h), x.load) {
			continue
		}
		if better(lowest[x.profile], weigh(x.load, x.capacity)) {
			out = append(out, int32(h))
		}
	}
	slices.SortFunc(out, func(a, b int32) int {
		x, y := &e.hosts[a], &e.hosts[b]
		return cmp.Or(-cmp.Compare(weigh(x.load, x.capacity), weigh(y.load, y.capacity)), e.compareIDs(a, b))
	})
	return out
}

// eases is true when pipe i has at most so many stages on h and somebody could be
// better off with all of them than h is. It is a quick look that saves most
// attempts.
func (e *Engine) eases(i, h int32, most int) bool {
	x, n := &e.pipes[i], int32(0)
	for _, c := range x.held {
		if c.host == h {
			n = c.n
		}
	}
	if n == 0 || int(n) > most || x.spec == nil {
		return false
	}
	a := x.recordedAt(e.hosts[h].s.ID)
	if a == nil {
		return false
	}
	load := weigh(e.hosts[h].load, e.hosts[h].capacity)
	for k := range a.Stages {
		if a.Stages[k].Remote != "" {
			continue
		}
		stg := x.stage(a.Stages[k].Stage, int32(k))
		if stg < 0 {
			return false
		}
		for _, pl := range e.wants[x.stages[stg].want].in {
			if pl.fit != fresh {
				continue
			}
			d, _ := e.profiles[pl.profile].least()
			if d >= 0 && better(weigh(e.hosts[d].load+n, e.hosts[d].capacity), load) {
				return true
			}
		}
		return false // whoever takes all of them takes the first one
	}
	return false
}

// recordedAt returns what a sidecar has been told of x, nil for nothing.
func (x *pipe) recordedAt(sidecar string) *Assignment {
	if k, ok := x.find(sidecar); ok && !x.recorded[k].Revoked {
		return x.recorded[k]
	}
	return nil
}

// relieve lays out pipe i without host h. It returns false, and everything is as it
// was, when that is not worth it.
func (e *Engine) relieve(i, h int32) (Step, bool) {
	x, l := &e.pipes[i], &e.l
	before, load := x.figures, weigh(e.hosts[h].load, e.hosts[h].capacity)
	e.drop(x)
	l.reset(x)
	l.shunned = h
	l.solve()
	if !l.worth(h, before, load) {
		l.release()
		l.reset(x)
		l.solve()
		if _, changed := e.adopt(x); changed {
			e.touch(i) // for Plan
		}
		return Step{}, false
	}
	step, changed := e.adopt(x)
	if !changed {
		return Step{}, false
	}
	e.touch(i)
	step.Urgency = Balance
	return step, true
}

// worth is true when the layout without host h keeps what the one before had, moves
// only what h ran, and to sidecars that are better off than h was.
func (l *layout) worth(h int32, before figures, load uint64) bool {
	f := l.evaluate()
	share := l.e.profiles[l.e.hosts[h].profile].share
	if l.circular || f.placed < before.placed || f.pending > before.pending || f.pod < before.pod {
		return false
	}
	if load < share+share/20 && (f.node < before.node || f.zone < before.zone) {
		return false
	}
	n, ok := l.nodeOf(h)
	if !ok || f.moves > int(l.nodes[n].bound.count()) {
		return false
	}
	for k := range l.nodes {
		x := &l.nodes[k]
		took := false
		for w := range x.local {
			took = took || x.local[w]&^x.bound[w] != 0
		}
		if took && !better(weigh(x.load+x.local.count(), l.e.hosts[x.host].capacity), load) {
			return false
		}
	}
	return true
}
