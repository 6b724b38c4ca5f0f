package placement

import (
	"cmp"
	"math"
	"slices"
)

// layout is where the stages of one pipeline run, and to which sidecar each
// sidecar hands on. Stages are named by their position in the spec, sidecars that
// take part by their position in nodes. One layout is used over and over.
//
// Invariant: the graph of hand-overs has no cycle.
type layout struct {
	e *Engine
	x *pipe

	// circular: every layout would hand records back to where they came from.
	circular bool
	// keepDraining: what drains may keep its stages, since nothing else works.
	keepDraining bool
	// suspectsLetGo: see forget.
	letGo bool
	// cautious: nobody hands over in a way that tables which sidecars may still hold
	// would make a circle of.
	cautious bool
	// firsts: one instance of every stage is looked for, more come later.
	firsts bool

	at    [][]int32 // per stage: nodes that run it, in the order they were added
	gap   []int32   // per stage: a stage downstream that cannot run, or -1
	kept  []bool    // per stage: an entry stage kept back for that
	able  []bool    // per stage: somebody may be given it
	shut  []int32   // wants of kept entry stages: who can meet them gets nothing
	shutS []*stage

	nodes []node
	turn  uint32 // of which host.slot is
	undo  []step
	// apart: nodes are not found by looking for the least loaded sidecar.
	apart bool

	words int
	seen  []int32 // nodes on the way of reaches
	stamp []int32
	now   int32
	way   []int32

	near   []anchor
	around []int32
	supply supply
	// indexes find the instances of stages that have many; see stale.
	indexes []index
}

// node is one sidecar's part of the pipeline.
type node struct {
	host  int32
	local bitset // stages run here
	bound bitset // stages that ran here until now
	// former: some of the pipeline ran here once.
	former bool
	since  uint64 // it ran here, as Assignment.Changed has it
	// awaits are the stages that another sidecar was told to let go of for this one, as
	// of awaited; revoked is when this one was told to let go of all it had.
	awaits           bitset
	awaited, revoked uint64
	apart            bool
	// links are the hand-overs of the table that the sidecar holds until it
	// hears of this plan.
	links []int32
	was   []hop // hand-overs until now, by stage
	hops  []hop // hand-overs
	ins   []hop // how many nodes hand a stage over to this one
	load  int32 // stages of other pipelines
	// told is the recorded assignment that is in force, -1 = none.
	told int32
}

// hop is a hand-over: a stage, and the node that runs it.
type hop struct{ stage, to int32 }

// step is one undoable change of a layout.
type step struct {
	kind    stepKind
	node    int32
	stg, to int32
}

type stepKind int8

const (
	stepPlace stepKind = iota
	stepRoute
	stepUnroute
)

// reset prepares l for x.
func (l *layout) reset(x *pipe) {
	l.x = x
	l.circular, l.keepDraining, l.letGo, l.apart, l.cautious = false, false, false, false, false
	n := len(x.stages)
	l.words = (n + 63) / 64
	for len(l.at) < n {
		l.at = append(l.at, nil)
	}
	l.gap = slices.Grow(l.gap[:0], n)[:n]
	l.kept = slices.Grow(l.kept[:0], n)[:n]
	l.able = slices.Grow(l.able[:0], n)[:n]
	for i := range n {
		l.at[i] = l.at[i][:0]
		l.gap[i], l.kept[i], l.able[i] = -1, false, false
		l.stale(int32(i))
	}
	l.shut, l.shutS = l.shut[:0], l.shutS[:0]
	l.nodes, l.undo = l.nodes[:0], l.undo[:0]
	if l.turn++; l.turn == 0 {
		l.turn = 1
		for i := range l.e.hosts {
			l.e.hosts[i].turn = 0
		}
	}
	l.remember()
}

// remember takes over what the sidecars hold now.
func (l *layout) remember() {
	x := l.x
	for k, a := range x.recorded {
		h, ok := l.e.hostID[a.Sidecar]
		if !ok {
			continue
		}
		n := l.node(h)
		if a.Revoked {
			l.nodes[n].revoked = a.Changed
			// A revocation no longer says which stages ran there.
			if l.nodes[n].former, l.nodes[n].since = a.MovedTo == "", a.Changed; !l.nodes[n].former {
				l.await(a)
			}
			continue
		}
		l.nodes[n].told = int32(k)
		for i := range a.Stages {
			st := &a.Stages[i]
			stg := x.stage(st.Stage, int32(i))
			if st.Remote == "" {
				if stg >= 0 {
					l.nodes[n].bound.add(stg)
				}
				continue
			}
			t, ok := l.e.hostID[st.Remote]
			if !ok || t == h {
				continue
			}
			to := l.node(t)
			l.nodes[n].links = append(l.nodes[n].links, to)
			if stg >= 0 {
				l.nodes[n].was = append(l.nodes[n].was, hop{stg, to})
			}
		}
	}
}

// await notes for whom a sidecar lets go of what a says.
func (l *layout) await(a *Assignment) {
	h, ok := l.e.hostID[a.MovedTo]
	if !ok {
		return
	}
	n := &l.nodes[l.node(h)]
	if a.Changed < n.awaited {
		return
	}
	if a.Changed > n.awaited {
		clear(n.awaits)
	}
	n.awaited = a.Changed
	for i, id := range a.Moved {
		if stg := l.x.stage(id, int32(i)); stg >= 0 {
			n.awaits.add(stg)
		}
	}
}

// stage finds a stage by id; likely is where it may well be.
func (x *pipe) stage(id string, likely int32) int32 {
	if int(likely) < len(x.stages) && x.stages[likely].ID == id {
		return likely
	}
	for i := range x.stages {
		if x.stages[i].ID == id {
			return int32(i)
		}
	}
	return -1
}

// nodeOf returns the node of host h, if it has one.
func (l *layout) nodeOf(h int32) (int32, bool) {
	x := &l.e.hosts[h]
	return x.slot, x.turn == l.turn
}

// node returns the node of host h, made if need be.
func (l *layout) node(h int32) int32 {
	if n, ok := l.nodeOf(h); ok {
		return n
	}
	i := int32(len(l.nodes))
	if len(l.nodes) < cap(l.nodes) {
		l.nodes = l.nodes[:i+1]
	} else {
		l.nodes = append(l.nodes, node{})
	}
	n := &l.nodes[i]
	n.host, n.former, n.since, n.apart, n.awaited, n.revoked = h, false, 0, false, 0, 0
	n.local = blank(n.local, l.words)
	n.bound = blank(n.bound, l.words)
	n.awaits = blank(n.awaits, l.words)
	n.links, n.was, n.hops, n.ins = n.links[:0], n.was[:0], n.hops[:0], n.ins[:0]
	n.load, n.told = l.e.hosts[h].load, -1
	l.e.hosts[h].turn, l.e.hosts[h].slot = l.turn, i
	if l.apart {
		l.setApart(i)
	}
	return i
}

func blank(b bitset, words int) bitset {
	b = slices.Grow(b[:0], words)[:words]
	clear(b)
	return b
}

// setApart hides a node from those who look for the least loaded sidecar: nodes
// are looked at one by one.
func (l *layout) setApart(i int32) {
	n := &l.nodes[i]
	if !n.apart {
		n.apart = true
		l.e.hosts[n.host].held = true
		l.e.refresh(n.host)
	}
}

// find returns the position of stage stg in hops, or -1.
func find(hops []hop, stg int32) int {
	for i := range hops {
		if hops[i].stage == stg {
			return i
		}
	}
	return -1
}

// next returns the node that n hands stage stg over to.
func (n *node) next(stg int32) (int32, bool) {
	if i := find(n.hops, stg); i >= 0 {
		return n.hops[i].to, true
	}
	return 0, false
}

func (n *node) fanIn(stg int32) int32 {
	if i := find(n.ins, stg); i >= 0 {
		return n.ins[i].to
	}
	return 0
}

func (l *layout) addHop(from, stg, to int32) {
	l.nodes[from].hops = append(l.nodes[from].hops, hop{stg, to})
	t := &l.nodes[to]
	if i := find(t.ins, stg); i >= 0 {
		t.ins[i].to++
	} else {
		t.ins = append(t.ins, hop{stg, 1})
	}
}

func (l *layout) delHop(from, stg, to int32) {
	f := &l.nodes[from]
	i := find(f.hops, stg)
	f.hops = slices.Delete(f.hops, i, i+1)
	t := &l.nodes[to]
	t.ins[find(t.ins, stg)].to--
}

// clear takes every stage off every sidecar.
func (l *layout) clear() {
	for i := range l.nodes {
		n := &l.nodes[i]
		clear(n.local)
		n.hops, n.ins = n.hops[:0], n.ins[:0]
	}
	l.undo = l.undo[:0]
	for i := range l.x.stages {
		l.at[i] = l.at[i][:0]
		l.stale(int32(i))
	}
}

// place lets node h run stage stg and routes the hand-overs that follow from
// it. It changes nothing and returns false when a hand-over could only be
// routed in a circle. With careful set, the tables that sidecars may still hold
// count as hand-overs too, so that no circle exists while some have heard of a
// change and others have not.
func (l *layout) place(stg, h int32, careful bool) bool {
	mark := len(l.undo)
	s := &l.x.stages[stg]
	first := len(l.at[stg]) == 0
	if to, ok := l.nodes[h].next(stg); ok {
		l.unroute(h, stg, to)
	}
	l.nodes[h].local.add(stg)
	l.at[stg] = append(l.at[stg], h)
	l.stale(stg)
	l.undo = append(l.undo, step{stepPlace, h, stg, 0})
	if first { // whoever hands over to another one already goes on doing so
		for _, u := range s.up {
			for _, from := range l.at[u] {
				if !l.route(from, stg, careful) {
					l.rollback(mark)
					return false
				}
			}
		}
	}
	for _, d := range s.down {
		if !l.route(h, d, careful) {
			l.rollback(mark)
			return false
		}
	}
	return true
}

// route makes sure that from can hand over to stage stg if that runs anywhere.
func (l *layout) route(from, stg int32, careful bool) bool {
	careful = careful || l.cautious
	if l.nodes[from].local.has(stg) {
		return true
	}
	if _, ok := l.nodes[from].next(stg); ok {
		return true
	}
	at := l.at[stg]
	if len(at) == 0 {
		return true
	}
	best := int32(-1)
	if len(at) > window {
		if i := find(l.nodes[from].was, stg); i >= 0 && l.nodes[l.nodes[from].was[i].to].local.has(stg) {
			if to := l.nodes[from].was[i].to; !l.reaches(to, from, careful) {
				best = to
			}
		}
		if best < 0 {
			best = l.nearest(from, stg, careful)
		}
	} else {
		for _, to := range at {
			if best >= 0 && l.compareTargets(from, stg, to, best) >= 0 {
				continue
			}
			if !l.reaches(to, from, careful) {
				best = to
			}
		}
	}
	if best < 0 {
		return false
	}
	l.addHop(from, stg, best)
	l.undo = append(l.undo, step{stepRoute, from, stg, best})
	return true
}

func (l *layout) unroute(from, stg, to int32) {
	l.delHop(from, stg, to)
	l.undo = append(l.undo, step{stepUnroute, from, stg, to})
}

func (l *layout) rollback(mark int) {
	for len(l.undo) > mark {
		st := l.undo[len(l.undo)-1]
		l.undo = l.undo[:len(l.undo)-1]
		switch st.kind {
		case stepPlace:
			l.nodes[st.node].local.del(st.stg)
			l.at[st.stg] = l.at[st.stg][:len(l.at[st.stg])-1]
			l.stale(st.stg)
		case stepRoute:
			l.delHop(st.node, st.stg, st.to)
		case stepUnroute:
			l.addHop(st.node, st.stg, st.to)
		}
	}
}

// reaches says whether a batch handed to node from can come to node to.
func (l *layout) reaches(from, to int32, careful bool) bool {
	if from == to {
		return true
	}
	if f := &l.nodes[from]; len(f.hops) == 0 && (!careful || len(f.links) == 0) {
		return false
	}
	for len(l.stamp) < len(l.nodes) {
		l.stamp = append(l.stamp, 0)
	}
	if l.now == math.MaxInt32 {
		clear(l.stamp)
		l.now = 0
	}
	l.now++
	l.stamp[from] = l.now
	l.way = append(l.way[:0], from)
	for len(l.way) > 0 {
		h := l.way[len(l.way)-1]
		l.way = l.way[:len(l.way)-1]
		n := &l.nodes[h]
		for i := range n.hops {
			if next := n.hops[i].to; next == to {
				return true
			} else if l.stamp[next] != l.now {
				l.stamp[next] = l.now
				l.way = append(l.way, next)
			}
		}
		if !careful {
			continue
		}
		for _, next := range n.links {
			if next == to {
				return true
			} else if l.stamp[next] != l.now {
				l.stamp[next] = l.now
				l.way = append(l.way, next)
			}
		}
	}
	return false
}

// distance of two sidecars: 0 the same, 1 on one node, 2 in one zone, 3 apart.
func (e *Engine) distance(a, b int32) int8 {
	x, y := &e.hosts[a], &e.hosts[b]
	switch {
	case a == b:
		return 0
	case x.node != 0 && x.node == y.node:
		return 1
	case x.zone != 0 && x.zone == y.zone:
		return 2
	}
	return 3
}

// compareTargets orders two nodes that from could hand stg over to: the one it
// hands over to now, one that is not suspect, the nearer one, then as the stage's
// strategy has it.
func (l *layout) compareTargets(from, stg, a, b int32) int {
	f := &l.nodes[from]
	if i := find(f.was, stg); i >= 0 {
		if was := f.was[i].to; was == a {
			return -1
		} else if was == b {
			return 1
		}
	}
	x, y := &l.nodes[a], &l.nodes[b]
	e := l.e
	if c := cmp.Compare(e.steady(x.host), e.steady(y.host)); c != 0 {
		return c
	}
	if c := cmp.Compare(e.distance(f.host, x.host), e.distance(f.host, y.host)); c != 0 {
		return c
	}
	return l.compareEqual(from, stg, a, b, false)
}

// compareEqual orders two nodes that are equally well and near, as the strategy of
// the stage has it. With first set, a that is no better in what the strategy goes
// by counts as worse: whoever is found first is as good as anybody.
func (l *layout) compareEqual(from, stg, a, b int32, first bool) int {
	x, y := &l.nodes[a], &l.nodes[b]
	e := l.e
	switch l.x.stages[stg].Strategy {
	case ConsistentHash:
		return cmp.Or(-cmp.Compare(l.weight(from, stg, a), l.weight(from, stg, b)), e.compareIDs(x.host, y.host))
	case WeightedRandom:
		return cmp.Or(cmp.Compare(l.draw(from, stg, a), l.draw(from, stg, b)), e.compareIDs(x.host, y.host))
	case LeastConnections:
		in := func(n *node) uint64 {
			h := &e.hosts[n.host]
			return weigh(h.inbound+n.fanIn(stg), h.capacity)
		}
		if c := cmp.Compare(in(x), in(y)); c != 0 {
			return c
		}
	}
	if c := cmp.Compare(x.fanIn(stg), y.fanIn(stg)); c != 0 || first {
		return c
	}
	return cmp.Or(-cmp.Compare(l.weight(from, stg, a), l.weight(from, stg, b)), e.compareIDs(x.host, y.host))
}

// steady is 0 for a sidecar that is well, 1 for one that may soon be gone.
func (e *Engine) steady(h int32) int {
	if s := e.hosts[h].s; s.Condition == Alive && !s.Draining {
		return 0
	}
	return 1
}

func (e *Engine) compareIDs(a, b int32) int {
	if x, y := e.hosts[a].order, e.hosts[b].order; x >= 0 && y >= 0 {
		return cmp.Compare(x, y)
	}
	return cmp.Compare(e.hosts[a].s.ID, e.hosts[b].s.ID)
}

// weight is the rendezvous weight of node to for hand-overs of from: each from
// has an order of its own, in which a target that comes or goes moves no other.
func (l *layout) weight(from, stg, to int32) uint64 {
	h := uint64(14695981039346656037)
	for _, s := range [...]string{l.x.id, l.x.stages[stg].ID, l.e.hosts[l.nodes[from].host].s.ID, l.e.hosts[l.nodes[to].host].s.ID} {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * 1099511628211
		}
		h = (h ^ 0xff) * 1099511628211
	}
	// FNV mixes the last bytes badly into the upper bits.
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// draw is the lot of node to in a weighted draw: the smallest wins, and a target
// wins in proportion to its capacity.
func (l *layout) draw(from, stg, to int32) float64 {
	u := (float64(l.weight(from, stg, to)>>11) + 1) / (1 << 53)
	return -math.Log(u) / float64(l.e.hosts[l.nodes[to].host].capacity)
}
