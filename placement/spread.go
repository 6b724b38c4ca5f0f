package placement

import (
	"cmp"
	"slices"
)

// spread balances the hand-overs to the instances of stage stg. Those that
// existed before stay, unless an instance would get nothing while another gets
// from several; hence every instance spread to is one less to come.
func (l *layout) spread(stg int32) bool {
	froms := l.handers(stg)
	changed := false
	for _, from := range froms {
		to, _ := l.nodes[from].next(stg)
		n := &l.nodes[from]
		if k := find(n.was, stg); k < 0 || n.was[k].to != to {
			l.reroute(from, stg, to)
			n = &l.nodes[from]
			now, _ := n.next(stg)
			n.setWas(stg, now)
			changed = changed || now != to
		}
	}
	var idle []int32
	for _, n := range l.at[stg] {
		if l.nodes[n].fanIn(stg) == 0 && !l.fed(stg, n) {
			idle = append(idle, n)
		}
	}
	if len(idle) == 0 {
		return changed
	}
	d := l.donors(stg, froms)
	if len(d.all) == 0 {
		return changed
	}
	slices.SortFunc(idle, func(a, b int32) int { return l.e.compareIDs(l.nodes[a].host, l.nodes[b].host) })
	for _, n := range idle {
		if l.feed(d, n, true) || l.feed(d, n, false) {
			changed = true
		}
	}
	return changed
}

func (n *node) setWas(stg, to int32) {
	if k := find(n.was, stg); k >= 0 {
		n.was[k].to = to
	} else {
		n.was = append(n.was, hop{stg, to})
	}
}

// donors are the nodes that hand a stage over to an instance others hand over to
// as well, by id: those of a node, those of a zone that hand over to another zone,
// those that hand over to another zone, and all. Only what is on the way anyway
// can be led elsewhere without making it longer.
type donors struct {
	stage        int32
	nodes, zones map[int32][]int32
	far, all     []int32
}

// donors lists who of froms can let an idle instance of stage stg have its
// records.
func (l *layout) donors(stg int32, froms []int32) *donors {
	d := &donors{stage: stg}
	for _, from := range froms {
		to, _ := l.nodes[from].next(stg)
		if l.nodes[to].fanIn(stg) < 2 {
			continue
		}
		d.all = append(d.all, from)
		h := &l.e.hosts[l.nodes[from].host]
		if h.node != 0 {
			if d.nodes == nil {
				d.nodes = make(map[int32][]int32)
			}
			d.nodes[h.node] = append(d.nodes[h.node], from)
		}
		way := l.e.distance(l.nodes[from].host, l.nodes[to].host)
		if h.zone != 0 && way >= 2 {
			if d.zones == nil {
				d.zones = make(map[int32][]int32)
			}
			d.zones[h.zone] = append(d.zones[h.zone], from)
		}
		if way == 3 {
			d.far = append(d.far, from)
		}
	}
	return d
}

// feed lets one of d hand over to idle: one on its node if there is any, else one
// that is as near to idle as to where it hands over now, else any.
func (l *layout) feed(d *donors, idle int32, careful bool) bool {
	h := &l.e.hosts[l.nodes[idle].host]
	if h.node != 0 {
		if list, ok := d.nodes[h.node]; ok {
			fed := l.feedFrom(&list, d.stage, idle, careful)
			d.nodes[h.node] = list
			if fed {
				return true
			}
		}
	}
	if h.zone != 0 {
		if list, ok := d.zones[h.zone]; ok {
			fed := l.feedFrom(&list, d.stage, idle, careful)
			d.zones[h.zone] = list
			if fed {
				return true
			}
		}
	}
	return l.feedFrom(&d.far, d.stage, idle, careful) || l.feedFrom(&d.all, d.stage, idle, careful)
}

// feedFrom lets the first of list that can hand over to idle. It drops those from
// the front that can spare nothing any more: where they hand over to, nobody else
// does, and as long as this goes on nobody will. Of those that idle itself hands
// records to it tries only so many.
func (l *layout) feedFrom(list *[]int32, stg, idle int32, careful bool) bool {
	careful = careful || l.cautious
	spare := func(from int32) bool {
		to, _ := l.nodes[from].next(stg)
		return l.nodes[to].fanIn(stg) >= 2
	}
	for len(*list) > 0 && !spare((*list)[0]) {
		*list = (*list)[1:]
	}
	tries := 0
	for _, from := range *list {
		if !spare(from) {
			continue
		}
		if l.reaches(idle, from, careful) {
			if tries++; tries == window {
				return false
			}
			continue
		}
		to, _ := l.nodes[from].next(stg)
		l.unroute(from, stg, to)
		l.addHop(from, stg, idle)
		l.nodes[from].setWas(stg, idle)
		return true
	}
	return false
}

// reroute chooses anew where from hands stage stg over to.
func (l *layout) reroute(from, stg, to int32) {
	l.unroute(from, stg, to)
	if !l.route(from, stg, true) && !l.route(from, stg, false) {
		l.rollback(len(l.undo) - 1)
	}
}

// handers lists the nodes that hand stage stg over, by id.
func (l *layout) handers(stg int32) []int32 {
	var out []int32
	for n := range l.nodes {
		if _, ok := l.nodes[n].next(stg); ok {
			out = append(out, int32(n))
		}
	}
	slices.SortFunc(out, func(a, b int32) int { return l.e.compareIDs(l.nodes[a].host, l.nodes[b].host) })
	return out
}

// fed is true when node n gets records for stage stg from a stage of its own.
func (l *layout) fed(stg, n int32) bool {
	for _, u := range l.x.stages[stg].up {
		if l.nodes[n].local.has(u) {
			return true
		}
	}
	return false
}

// window is how many instances of a stage are compared for one hand-over. More
// would make a stage of n instances behind another one cost n squared.
const window = 64

// index orders the instances of a stage so that those near to a sidecar are found:
// those that are well first, by zone, node and id. It is made for stages of more
// than window instances.
type index struct {
	valid bool
	// nodes run the stage; the first well of them are well.
	nodes []int32
	well  int
}

// indexOf returns the index of stage stg as it is now.
func (l *layout) indexOf(stg int32) *index {
	for len(l.indexes) <= int(stg) {
		l.indexes = append(l.indexes, index{})
	}
	x := &l.indexes[stg]
	if x.valid {
		return x
	}
	x.valid = true
	x.nodes = append(x.nodes[:0], l.at[stg]...)
	e := l.e
	slices.SortFunc(x.nodes, func(a, b int32) int {
		ha, hb := l.nodes[a].host, l.nodes[b].host
		p, q := &e.hosts[ha], &e.hosts[hb]
		if c := cmp.Or(cmp.Compare(e.steady(ha), e.steady(hb)), cmp.Compare(p.zone, q.zone), cmp.Compare(p.node, q.node)); c != 0 {
			return c
		}
		return e.compareIDs(ha, hb)
	})
	x.well = 0
	for x.well < len(x.nodes) && e.steady(l.nodes[x.nodes[x.well]].host) == 0 {
		x.well++
	}
	return x
}

// stale marks the index of stage stg as to be made anew.
func (l *layout) stale(stg int32) {
	if int(stg) < len(l.indexes) {
		l.indexes[stg].valid = false
	}
}

// within returns the part of nodes, which are in the order of an index, that lies
// in the zone of h, and on its node if that is asked for.
func (l *layout) within(nodes []int32, h *host, machine bool) []int32 {
	side := func(n int32, _ struct{}) int {
		x := &l.e.hosts[l.nodes[n].host]
		if c := cmp.Compare(x.zone, h.zone); c != 0 || !machine {
			return c
		}
		return cmp.Compare(x.node, h.node)
	}
	lo, _ := slices.BinarySearchFunc(nodes, struct{}{}, side)
	hi, _ := slices.BinarySearchFunc(nodes[lo:], struct{}{}, func(n int32, z struct{}) int {
		if side(n, z) <= 0 {
			return -1
		}
		return 1
	})
	return nodes[lo : lo+hi]
}

// nearest chooses to whom of many instances of stage stg from hands over: of those
// that are well the ones on its node, then in its zone, then any, and last those
// that are not well. It returns -1 when each of them would hand records back.
func (l *layout) nearest(from, stg int32, careful bool) int32 {
	x := l.indexOf(stg)
	h := &l.e.hosts[l.nodes[from].host]
	begin := l.weight(from, stg, from)
	for _, nodes := range [...][]int32{x.nodes[:x.well], x.nodes[x.well:]} {
		if h.node != 0 {
			if best := l.best(from, stg, l.within(nodes, h, true), begin, window, careful); best >= 0 {
				return best
			}
		}
		if h.zone != 0 {
			if best := l.best(from, stg, l.within(nodes, h, false), begin, window, careful); best >= 0 {
				return best
			}
		}
		if best := l.best(from, stg, nodes, begin, len(nodes), careful); best >= 0 {
			return best
		}
	}
	return -1
}

// best chooses one of nodes by the strategy of the stage. It looks at a window of
// them, at another place for each from, and at up to most until it has found one
// that hands no record back.
func (l *layout) best(from, stg int32, nodes []int32, begin uint64, most int, careful bool) int32 {
	if len(nodes) == 0 {
		return -1
	}
	best := int32(-1)
	at := int(begin % uint64(len(nodes)))
	even := l.x.stages[stg].Strategy
	for i := 0; i < min(most, len(nodes)) && (i < window || best < 0); i++ {
		to := nodes[at]
		if at++; at == len(nodes) {
			at = 0
		}
		if best >= 0 && l.compareEqual(from, stg, to, best, true) >= 0 {
			continue
		}
		if l.reaches(to, from, careful) {
			continue
		}
		best = to
		if (even == RoundRobin || even == AnyStrategy) && l.nodes[to].fanIn(stg) == 0 {
			break // nobody gets less
		}
	}
	return best
}
