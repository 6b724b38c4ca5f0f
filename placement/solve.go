package placement

import (
	"cmp"
	"slices"
)

// searchSteps bounds the search for a layout without a circle, per pipeline and
// attempt. Pipelines of the field are found in as many steps as they have
// stages; the bound is for graphs made to be hard, which then stay pending
// instead of keeping the leader busy.
const searchSteps = 20000

// solve decides where every stage runs.
//
// It first keeps everything that can stay and places only what is missing. Only
// when that leaves no way without a circle does it look at the whole pipeline
// afresh, preferring the present places. When there is no such way either, the
// pipeline is not handed out at all: any part of it would lose records at the
// stage that has no place.
func (l *layout) solve() {
	if l.x.cyclic {
		return
	}
	l.scope()
	if l.settle() {
		return
	}
	if l.draining() {
		l.keepDraining = true
		l.scope()
		if l.settle() {
			return
		}
		l.keepDraining = false
	}
	// What only a suspect sidecar still runs may be what stands in the way.
	// It must be let go of before giving up, or else the next plan, which finds
	// it gone, would come to another end.
	l.letGo = true
	l.scope()
	if !l.settle() {
		l.clear()
		l.circular = true
	}
}

// settle looks for a layout of the stages in scope.
func (l *layout) settle() bool {
	if l.keep() && (l.search(true) || l.search(false)) {
		l.grow()
		return true
	}
	l.clear()
	if l.search(true) || l.search(false) {
		l.grow()
		return true
	}
	return false
}

// draining is true when something of the pipeline runs on a sidecar that drains, or
// with a service that does.
func (l *layout) draining() bool {
	return slices.ContainsFunc(l.nodes, func(n node) bool {
		for i := range l.x.stages {
			if n.bound.has(int32(i)) && l.leaves(int32(i), n.host) {
				return true
			}
		}
		return false
	})
}

// scope decides which stages can run and where. A stage nobody can run is a
// gap. An entry stage above a gap is kept back, because its records would be
// lost there, and so is the whole pipeline on every sidecar that offers that
// entry stage: a sidecar accepts records for any pipeline it has a table of.
// What else could run only there is then a gap in its turn, hence the loop.
func (l *layout) scope() {
	l.shut, l.shutS = l.shut[:0], l.shutS[:0]
	for i := range l.x.stages {
		l.kept[i] = false
	}
	for {
		again := false
		below := l.gapsBelow()
		for k := len(l.x.order) - 1; k >= 0; k-- {
			i := l.x.order[k]
			s := &l.x.stages[i]
			if !l.kept[i] { // the first gap found is the cause of those that follow
				l.gap[i] = below[i]
			}
			if s.entry && l.gap[i] >= 0 && !l.kept[i] {
				l.kept[i], again = true, true
				l.shut = append(l.shut, s.want)
				l.shutS = append(l.shutS, s)
			}
		}
		l.e.masks.begin(len(l.e.profiles))
		if !again {
			return
		}
	}
}

// gapsBelow returns per stage a stage downstream that cannot run, or -1.
func (l *layout) gapsBelow() []int32 {
	gap := make([]int32, len(l.x.stages)) // a stage at or below that cannot run, or -1
	below := make([]int32, len(gap))
	for k := len(l.x.order) - 1; k >= 0; k-- {
		i := l.x.order[k]
		below[i] = -1
		for _, d := range l.x.stages[i].down {
			if below[i] < 0 {
				below[i] = gap[d]
			}
		}
		gap[i] = below[i]
		l.able[i] = !l.kept[i] && l.someFresh(i)
		if !l.able[i] && (l.kept[i] || !l.someKeeps(i)) {
			gap[i] = i
		}
	}
	return below
}

// someFresh is true when any sidecar in scope may be given stage i.
func (l *layout) someFresh(i int32) bool {
	s := &l.x.stages[i]
	for _, pl := range l.e.wants[s.want].in {
		if pl.fit == fresh && l.e.profiles[pl.profile].open > 0 && !l.x.rival(s, pl.standIn) && !l.closed(pl.profile) {
			return true
		}
	}
	return false
}

// someKeeps is true when any sidecar in scope may keep stage i.
func (l *layout) someKeeps(i int32) bool {
	for n := range l.nodes {
		if l.nodes[n].bound.has(i) && l.mayKeep(i, int32(n)) {
			return true
		}
	}
	return false
}

// closed is true for profiles that can meet an entry stage that is kept back.
func (l *layout) closed(profile int32) bool {
	for k, w := range l.shut {
		if f, ok := l.e.profiles[profile].find(w); ok && !l.x.rival(l.shutS[k], f.standIn) {
			return true
		}
	}
	return false
}

// fit says how host h could run stage i, whatever its condition.
func (l *layout) fit(i, h int32) fitness {
	p := l.e.hosts[h].profile
	if p < 0 {
		return unfit
	}
	s := &l.x.stages[i]
	f, ok := l.e.profiles[p].find(s.want)
	if !ok || l.x.rival(s, f.standIn) || l.closed(p) {
		return unfit
	}
	return f.fit
}

// mayTake is true when node n may be given stage i.
func (l *layout) mayTake(i, n int32) bool {
	h := l.nodes[n].host
	return !l.kept[i] && l.e.hosts[h].takes && l.fit(i, h) == fresh
}

// mayKeep is true when node n may keep stage i, which it runs until now.
func (l *layout) mayKeep(i, n int32) bool {
	h := l.nodes[n].host
	s := l.e.hosts[h].s
	if l.kept[i] || s.lost() || l.fit(i, h) == unfit {
		return false
	}
	if l.able[i] && !l.keepDraining && l.leaves(i, h) {
		return false // somebody else can
	}
	return !l.letGo || l.mayTake(i, n)
}

// usable is true when node n may run stage i in this layout.
func (l *layout) usable(i, n int32) bool {
	if l.nodes[n].bound.has(i) && l.mayKeep(i, n) {
		return true
	}
	return l.mayTake(i, n)
}

// keep puts every stage where it runs now, as far as its sidecar still may, and
// lets sidecars hand over to whom they hand over now. It returns false when not
// all of that can stand together, as after a change of the pipeline's edges.
func (l *layout) keep() bool {
	l.clear()
	for _, i := range l.x.order {
		for _, h := range l.survivors(i) {
			l.nodes[h].local.add(i)
			l.at[i] = append(l.at[i], h)
		}
		l.stale(i)
	}
	return l.keepRoutes()
}

// keepRoutes takes over the present hand-overs before it adds new ones: a new
// one added first could stand in the way of an old one.
func (l *layout) keepRoutes() bool {
	if l.unchanged() {
		return true
	}
	for _, i := range l.x.order {
		for _, from := range l.at[i] {
			n := &l.nodes[from]
			for _, d := range l.x.stages[i].down {
				k := find(n.was, d)
				if k < 0 || n.local.has(d) || find(n.hops, d) >= 0 {
					continue
				}
				if to := n.was[k].to; l.nodes[to].local.has(d) && !l.reaches(to, from, false) {
					l.addHop(from, d, to)
				}
			}
		}
	}
	for _, i := range l.x.order {
		for _, from := range l.at[i] {
			for _, d := range l.x.stages[i].down {
				if !l.route(from, d, true) && !l.route(from, d, false) {
					return false
				}
			}
		}
	}
	return true
}

// unchanged takes over the present hand-overs at once when all of them stand, as
// they mostly do, since what stood together once does so still. It returns false
// and changes nothing when any is missing or too many.
func (l *layout) unchanged() bool {
	for i := range l.nodes {
		n := &l.nodes[i]
		if !slices.Equal(n.local, n.bound) {
			return false
		}
		need := 0
		for k := range n.was {
			if n.local.has(n.was[k].stage) || !l.nodes[n.was[k].to].local.has(n.was[k].stage) {
				return false
			}
		}
		for stg := range l.x.stages {
			s := &l.x.stages[stg]
			if n.local.has(int32(stg)) || len(l.at[stg]) == 0 {
				continue
			}
			for _, u := range s.up {
				if n.local.has(u) {
					need++
					if find(n.was, int32(stg)) < 0 {
						return false
					}
					break
				}
			}
		}
		if need != len(n.was) || len(n.links) != len(n.was) {
			return false
		}
	}
	for i := range l.nodes {
		for _, w := range l.nodes[i].was {
			l.addHop(int32(i), w.stage, w.to)
		}
	}
	if l.cycle() {
		for i := range l.nodes {
			l.nodes[i].hops, l.nodes[i].ins = l.nodes[i].hops[:0], l.nodes[i].ins[:0]
		}
		return false
	}
	return true
}

// cycle is true when the hand-overs have a cycle.
func (l *layout) cycle() bool {
	for len(l.stamp) < len(l.nodes) {
		l.stamp = append(l.stamp, 0)
	}
	waits := l.stamp[:len(l.nodes)]
	clear(waits)
	for i := range l.nodes {
		for _, h := range l.nodes[i].hops {
			waits[h.to]++
		}
	}
	l.way = l.way[:0]
	for i := range l.nodes {
		if waits[i] == 0 {
			l.way = append(l.way, int32(i))
		}
	}
	done := 0
	for ; done < len(l.way); done++ {
		for _, h := range l.nodes[l.way[done]].hops {
			if waits[h.to]--; waits[h.to] == 0 {
				l.way = append(l.way, h.to)
			}
		}
	}
	clear(waits)
	l.now = 0
	clear(l.stamp)
	return done < len(l.nodes)
}

// survivors lists the nodes that run stage i now and may keep it, at most as
// many as are asked for, the best first.
func (l *layout) survivors(i int32) []int32 {
	l.seen = l.seen[:0]
	for n := range l.nodes {
		if l.nodes[n].bound.has(i) && l.mayKeep(i, int32(n)) {
			l.seen = append(l.seen, int32(n))
		}
	}
	if count := int(l.x.stages[i].count); len(l.seen) > count {
		ranks := make([]rank, len(l.seen))
		for k, n := range l.seen {
			ranks[k] = l.rank(i, n)
		}
		slices.SortFunc(ranks, func(a, b rank) int {
			// One that may soon be gone goes first when there are too many.
			x, y := l.e.steady(l.nodes[a.node].host), l.e.steady(l.nodes[b.node].host)
			return cmp.Or(cmp.Compare(x, y), l.compareRanks(a, b))
		})
		l.seen = l.seen[:0]
		for _, r := range ranks[:count] {
			l.seen = append(l.seen, r.node)
		}
	}
	return l.seen
}

// search places one instance of every stage that runs nowhere and has a
// candidate. It returns false, with the layout as it was, when no combination
// is free of circles or the search takes too long.
func (l *layout) search(careful bool) bool {
	var open []int32
	for _, i := range l.x.order {
		if len(l.at[i]) == 0 && !l.kept[i] && (l.able[i] || l.someKeeps(i)) {
			open = append(open, i)
		}
	}
	steps := searchSteps
	var visit func(int) bool
	visit = func(k int) bool {
		if k == len(open) {
			return true
		}
		for _, r := range l.choices(open[k]) {
			// Whoever hands over to the stage is looked at with each step.
			if steps -= 1 + l.upstream(open[k])/window; steps < 0 {
				return false
			}
			mark := len(l.undo)
			if !l.place(open[k], l.taken(r), careful) {
				continue
			}
			if visit(k + 1) {
				return true
			}
			l.rollback(mark)
		}
		return false
	}
	l.firsts = true
	found := visit(0)
	l.firsts = false
	return found
}

// upstream counts the instances of the stages above stage i.
func (l *layout) upstream(i int32) (n int) {
	for _, u := range l.x.stages[i].up {
		n += len(l.at[u])
	}
	return n
}

// grow adds instances until every stage has as many as asked for, as far as
// there are candidates and no circle comes of it, and spreads the hand-overs
// over them. It goes on until nothing more can be done: otherwise the next plan
// would find something to do although nothing happened. It tells whether it did any.
func (l *layout) grow() (grown bool) {
	for {
		changed := l.add()
		for _, i := range l.x.order {
			if len(l.at[i]) > 1 && l.spread(i) {
				changed = true
			}
		}
		if !changed {
			return grown
		}
		grown = true
	}
}

// settled is true when grow finds nothing more to do once every sidecar has heard of
// this layout. Tables that are replaced by it may stand in the way of an instance or a
// hand-over now, and do not then. When it returns false the layout is not to be used
// any more; it forgets what sidecars hold until they hear of it.
func (l *layout) settled() bool {
	l.cautious = false
	for i := range l.nodes {
		n := &l.nodes[i]
		n.was, n.links = append(n.was[:0], n.hops...), n.links[:0]
		for _, h := range n.hops {
			n.links = append(n.links, h.to)
		}
	}
	return !l.grow()
}

// add places more instances of the stages that have too few.
func (l *layout) add() bool {
	changed := false
	for _, i := range l.x.order {
		if len(l.at[i]) == 0 || len(l.at[i]) >= int(l.x.stages[i].count) {
			continue
		}
		for _, careful := range [...]bool{true, false} {
			if len(l.at[i]) < int(l.x.stages[i].count) {
				changed = l.addStage(i, careful) || changed
			}
		}
	}
	return changed
}

// addStage places more instances of stage i: where it ran, beside its neighbours,
// on sidecars that run nothing of the pipeline, and at last wherever else.
func (l *layout) addStage(i int32, careful bool) bool {
	changed := false
	want := int(l.x.stages[i].count)
	known := l.knownRanks(i)
	take := func(fit func(r *rank) bool) {
		for k := range known {
			r := &known[k]
			if len(l.at[i]) >= want {
				return
			}
			if fit(r) && !l.nodes[r.node].local.has(i) {
				changed = l.place(i, r.node, careful) || changed
			}
		}
	}
	stuck, begun := !l.able[i], false
	fresh := func(open bool) {
		for !stuck && len(l.at[i]) < want {
			if !begun {
				l.supply.begin(l, i)
				begun = true
			}
			r, ok := l.supply.next()
			if !ok || (open && !r.open) {
				return
			}
			if !l.place(i, l.taken(r), careful) {
				// Sidecars that run nothing of the pipeline are alike to the
				// search for circles: no other of them would do either.
				stuck = true
				return
			}
			l.supply.served()
			changed = true
		}
	}
	take(func(r *rank) bool { return r.tie != untied || (r.open && r.local > 0) })
	fresh(true)
	take(func(r *rank) bool { return r.local > 0 })
	fresh(false)
	take(func(*rank) bool { return true })
	return changed
}
