package control

import (
	"container/heap"
	"iter"
	"slices"

	"conveyor.etl/router/router/commandpb"
)

// searchSteps bounds the search for a layout without a circle, per pipeline and
// attempt. Pipelines of the field are found in as many steps as they have
// stages; the bound is for graphs made to be hard, which then stay partly
// pending instead of keeping the leader busy.
const searchSteps = 20000

// solve decides where every stage runs.
//
// It first keeps everything that can stay and places only what is missing. Only
// when that leaves no way without a circle does it look at the whole pipeline
// afresh, preferring the present places. When there is no such way either, the
// pipeline is not handed out at all: any part of it would lose records at the
// stage that has no place.
func (l *layout) solve() {
	if l.cyclic {
		return
	}
	l.scope()
	if l.settle() {
		return
	}
	// What only a suspect sidecar still runs may be what stands in the way.
	// It must be let go of before giving up, or else the next plan, which finds
	// it gone, would come to another end.
	l.forget()
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

// forget treats what runs now as what ran once.
func (l *layout) forget() {
	for sp, t := range l.before {
		if t == bound {
			l.before[sp] = former
		}
	}
	for i := range l.stages {
		l.stages[i].bound = nil
	}
}

// scope decides which stages can run and where. A stage nobody can run is a
// gap. An entry stage above a gap is kept back, because its records would be
// lost there, and so is the whole pipeline on every sidecar that offers that
// entry stage: a sidecar accepts records for any pipeline it has a table of.
// What else could run only there is then a gap in its turn, hence the loop.
func (l *layout) scope() {
	l.closed = make(map[int]bool)
	for i := range l.stages {
		l.stages[i].kept = false
	}
	for {
		gap := make([]int, len(l.stages)) // a stage at or below that cannot run, or -1
		again := false
		for k := len(l.order) - 1; k >= 0; k-- {
			i := l.order[k]
			s := &l.stages[i]
			gap[i] = -1
			for _, d := range s.down {
				if gap[i] < 0 {
					gap[i] = gap[d]
				}
			}
			if !s.kept { // the first gap found is the cause of those that follow
				s.gap = gap[i]
			}
			s.hosts = l.eligible(i)
			if len(s.hosts) == 0 {
				gap[i] = i
			}
			s.kept = s.entry && s.gap >= 0
			if !s.kept {
				continue
			}
			s.hosts = nil
			for h := range l.f.hosts {
				if _, fit := l.f.match(&s.want, h); fit != unfit && !l.closed[h] {
					l.closed[h], again = true, true
				}
			}
		}
		if !again {
			return
		}
	}
}

// eligible lists the hosts that may run stage stg: the candidates and, though they
// are none, those that may keep what they have.
func (l *layout) eligible(stg int) []int {
	s := &l.stages[stg]
	var out []int
	for _, h := range s.able {
		if !l.closed[h] {
			out = append(out, h)
		}
	}
	for _, h := range s.bound {
		if _, fit := l.f.match(&s.want, h); fit == keeping && !l.closed[h] {
			out = append(out, h)
		}
	}
	return out
}

// keep puts every stage where it runs now, as far as its sidecar still may, and
// lets sidecars hand over to whom they hand over now. It returns false when not
// all of that can stand together, as after a change of the pipeline's edges.
func (l *layout) keep() bool {
	l.clear()
	for _, i := range l.order {
		for _, h := range l.survivors(i) {
			l.node(h).local[i] = true
			l.stages[i].at = append(l.stages[i].at, h)
		}
	}
	return l.keepRoutes()
}

// keepRoutes takes over the present hand-overs before it adds new ones: a new
// one added first could stand in the way of an old one.
func (l *layout) keepRoutes() bool {
	for _, i := range l.order {
		for _, from := range l.stages[i].at {
			n := l.node(from)
			for _, d := range l.stages[i].down {
				to, ok := l.routes[spot{from, d}]
				if _, routed := n.next[d]; !ok || routed || n.local[d] || !l.runs(to, d) || l.reaches(to, from, false) {
					continue
				}
				n.next[d] = to
				n.out[to]++
			}
		}
	}
	for _, i := range l.order {
		for _, from := range l.stages[i].at {
			for _, d := range l.stages[i].down {
				if !l.route(from, d, true) && !l.route(from, d, false) {
					return false
				}
			}
		}
	}
	return true
}

// survivors lists the hosts that run stage stg now and may keep it, at most as
// many as are asked for, the best first.
func (l *layout) survivors(stg int) []int {
	s := &l.stages[stg]
	var ranks []rank
	for _, h := range s.bound {
		if slices.Contains(s.hosts, h) {
			ranks = append(ranks, l.rank(stg, h))
		}
	}
	slices.SortFunc(ranks, func(a, b rank) int {
		// A suspect one goes first when there are too many.
		if x, y := l.suspect(a.host), l.suspect(b.host); x != y {
			if x {
				return 1
			}
			return -1
		}
		return compareRanks(a, b)
	})
	if len(ranks) > s.count {
		ranks = ranks[:s.count]
	}
	hosts := make([]int, len(ranks))
	for i, r := range ranks {
		hosts[i] = r.host
	}
	return hosts
}

func (l *layout) suspect(h int) bool {
	return l.f.hosts[h].State == commandpb.SidecarState_SIDECAR_STATE_SUSPECT
}

// missing lists the stages that run nowhere, upstream first.
func (l *layout) missing() []int {
	var out []int
	for _, i := range l.order {
		if len(l.stages[i].at) == 0 {
			out = append(out, i)
		}
	}
	return out
}

// choices yields the hosts that may run stage stg and do not, the best first,
// as ranked now. Mostly the first one is taken, out of up to a whole fleet: a
// heap orders no more of them than are asked for.
func (l *layout) choices(stg int) iter.Seq[int] {
	return func(yield func(int) bool) {
		s := &l.stages[stg]
		ranks := make(rankHeap, 0, len(s.hosts))
		for _, h := range s.hosts {
			if !l.runs(h, stg) {
				ranks = append(ranks, l.rank(stg, h))
			}
		}
		heap.Init(&ranks)
		for len(ranks) > 0 {
			if !yield(heap.Pop(&ranks).(rank).host) {
				return
			}
		}
	}
}

// rankHeap is a heap with the best rank on top.
type rankHeap []rank

func (h rankHeap) Len() int           { return len(h) }
func (h rankHeap) Less(i, j int) bool { return compareRanks(h[i], h[j]) < 0 }
func (h rankHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *rankHeap) Push(x any)        { *h = append(*h, x.(rank)) }
func (h *rankHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	*h = old[:len(old)-1]
	return last
}

// search places one instance of every stage that runs nowhere and has a
// candidate. It returns false, with the layout as it was, when no combination
// is free of circles or the search takes too long.
func (l *layout) search(careful bool) bool {
	var open []int
	for _, i := range l.missing() {
		if len(l.stages[i].hosts) > 0 {
			open = append(open, i)
		}
	}
	steps := searchSteps
	var visit func(int) bool
	visit = func(k int) bool {
		if k == len(open) {
			return true
		}
		for h := range l.choices(open[k]) {
			if steps--; steps < 0 {
				return false
			}
			mark := len(l.undo)
			if !l.place(open[k], h, careful) {
				continue
			}
			if visit(k + 1) {
				return true
			}
			l.rollback(mark)
		}
		return false
	}
	return visit(0)
}

// grow adds instances until every stage has as many as asked for, as far as
// there are candidates and no circle comes of it, and spreads the hand-overs
// over them. It goes on until nothing more can be done: otherwise the next plan
// would find something to do although nothing happened.
func (l *layout) grow() {
	for {
		changed := l.add()
		for _, i := range l.order {
			if len(l.stages[i].at) > 1 && l.spread(i) {
				changed = true
			}
		}
		if !changed {
			return
		}
	}
}

// add places more instances of the stages that have too few.
func (l *layout) add() bool {
	changed := false
	for _, i := range l.order {
		s := &l.stages[i]
		if len(s.at) == 0 || len(s.at) >= s.count {
			continue
		}
		for _, careful := range []bool{true, false} {
			for h := range l.choices(i) {
				if len(s.at) >= s.count {
					break
				}
				if l.place(i, h, careful) {
					changed = true
				}
			}
		}
	}
	return changed
}

// spread balances the hand-overs to the instances of stage stg. Those that
// existed before stay, unless an instance would get nothing while another gets
// from several; hence every instance spread to is one less to come.
func (l *layout) spread(stg int) bool {
	changed := false
	froms := l.handers(stg)
	for _, from := range froms {
		n := l.nodes[from]
		to := n.next[stg]
		if was, ok := l.routes[spot{from, stg}]; !ok || was != to {
			l.reroute(from, stg, to)
			l.routes[spot{from, stg}] = n.next[stg]
			changed = changed || n.next[stg] != to
		}
	}
	for _, idle := range slices.Sorted(slices.Values(l.stages[stg].at)) {
		if l.fanIn(stg, idle) == 0 && !l.fed(stg, idle) &&
			(l.feed(stg, idle, froms, true) || l.feed(stg, idle, froms, false)) {
			changed = true
		}
	}
	return changed
}

// feed lets one of froms hand over to idle that now hands over to an instance
// others hand over to as well.
func (l *layout) feed(stg, idle int, froms []int, careful bool) bool {
	for _, from := range froms {
		to := l.nodes[from].next[stg]
		if l.fanIn(stg, to) < 2 || l.reaches(idle, from, careful) {
			continue
		}
		l.unroute(from, stg, to)
		l.nodes[from].next[stg] = idle
		l.nodes[from].out[idle]++
		l.routes[spot{from, stg}] = idle
		return true
	}
	return false
}

// reroute chooses anew where from hands stage stg over to.
func (l *layout) reroute(from, stg, to int) {
	l.unroute(from, stg, to)
	if !l.route(from, stg, true) && !l.route(from, stg, false) {
		l.rollback(len(l.undo) - 1)
	}
}

// handers lists the hosts that hand stage stg over, by id.
func (l *layout) handers(stg int) []int {
	var out []int
	for h, n := range l.nodes {
		if _, ok := n.next[stg]; ok {
			out = append(out, h)
		}
	}
	slices.Sort(out)
	return out
}

// fed is true when host h gets records for stage stg from a stage of its own.
func (l *layout) fed(stg, h int) bool {
	for _, u := range l.stages[stg].up {
		if l.runs(h, u) {
			return true
		}
	}
	return false
}

// tables renders what every sidecar has to hold of the pipeline, by sidecar.
func (l *layout) tables() map[int]*commandpb.AssignmentChange {
	if l.cyclic {
		return nil
	}
	out := make(map[int]*commandpb.AssignmentChange)
	for h, n := range l.nodes { // each host is rendered by itself: order does not matter
		if len(n.local) == 0 {
			continue
		}
		c := &commandpb.AssignmentChange{
			SidecarId: l.f.hosts[h].SidecarId, PipelineId: l.id,
			SidecarGeneration: l.f.hosts[h].Generation, LocalComplete: len(n.local) == len(l.stages),
		}
		for i := range l.stages {
			s := &l.stages[i]
			if n.local[i] {
				endpoint, _ := l.f.match(&s.want, h)
				c.Stages = append(c.Stages, &commandpb.StageAssignment{StageId: s.id, LocalEndpoint: endpoint})
			} else if to, ok := n.next[i]; ok {
				c.Stages = append(c.Stages, &commandpb.StageAssignment{
					StageId: s.id, RemoteSidecarId: l.f.hosts[to].SidecarId, RemoteEndpoint: l.f.hosts[to].Endpoint,
				})
			}
		}
		out[h] = c
	}
	return out
}
