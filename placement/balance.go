package placement

import (
	"cmp"
	"math"
	"slices"
)

// How uneven load has to be before what runs well is moved: a sidecar has more than
// its share by a whole stage and by a tenth. A move is worth it when it brings nobody
// else there, or takes a tenth off the higher load of the two.
const worthwhile = 0.1

// Bounds of one call of Balance: sidecars and profiles looked at, and sidecars of the
// pipelines that are laid out again. The next call goes on.
const (
	maxLooks = 1 << 20
	maxLaid  = 1 << 17
	// maxTries is how often one pipeline is laid out in one call, since some of its
	// moves cannot be made together.
	maxTries = 12
	// maxOffers is how many sidecars are compared for one move.
	maxOffers = 16
)

// Balance returns steps that move up to most stages from sidecars that have more than
// their share of load to others that have less, those of the most loaded first. Plan
// keeps everything where it runs well, so that a sidecar that joins gets only what is
// new or was lost; this is what gives it its share.
//
// What one sidecar runs of a pipeline moves as a whole, so that no edge leaves its pod
// by it; and rather to where no other edge becomes longer, as compareRanks has it: who
// has room first, and near of those. Of two sidecars the higher load becomes lower by
// each move, so that after so many calls there is nothing more to do.
// With all set, the first move may be of more stages than most, which must be positive:
// what is larger than a whole budget could never move otherwise.
//
// Pipelines that Plan has yet to change, as it last told, are left alone, and so are
// those for which skip is true. Whoever calls it carries the steps out before the next
// Plan, or not at all. A step whose stages have to be let go of first ends as it was
// begun, since the sidecar that is told to notes for whom: see Assignment.MovedTo.
func (e *Engine) Balance(most int, all bool, skip func(pipeline string) bool) []Step {
	if most <= 0 {
		return nil
	}
	if e.drift > 0 {
		e.shares() // even one sidecar that came has a share
	}
	b := balance{e: e, left: most, whole: all, least: make(map[int32]uint64)}
	for _, t := range b.todo() {
		if b.left <= 0 || b.looks > maxLooks || b.laid > maxLaid {
			break
		}
		x := &e.pipes[t.pipe]
		if x.dirty || x.circular || skip(x.id) || !slices.ContainsFunc(t.from, b.uneven) {
			continue
		}
		if st, ok := b.move(x, t.from); ok {
			b.steps = append(b.steps, st)
		}
	}
	return b.steps
}

// balance is one call of Balance.
type balance struct {
	e     *Engine
	left  int  // stages that may be moved
	whole bool // the first move may be larger
	steps []Step
	looks int
	laid  int
	// least is by want the lowest key of anybody who may be given it, when first asked
	// for: who takes a stage gets more loaded, and who loses one had too many.
	least map[int32]uint64
}

// relief is a pipeline, and the sidecars that have too much and run some of it.
type relief struct {
	pipe   int32
	from   []int32
	load   uint64 // of the most loaded of them
	source bool   // that one runs a stage that has to be let go of first
}

// uneven is true for a sidecar that has more than its share.
func (b *balance) uneven(h int32) bool {
	x := &b.e.hosts[h]
	return x.takes && x.profile >= 0 && b.exceeds(h, x.load)
}

// exceeds is true when n stages are more than the share of h.
func (b *balance) exceeds(h, n int32) bool {
	x := &b.e.hosts[h]
	share := float64(b.e.profiles[x.profile].share+unit/1000) / unit * float64(x.capacity)
	return float64(n) > max(1, math.Ceil(share-1.0/64)) && float64(n) > (1+worthwhile)*share
}

// todo lists what can be moved, the most loaded sidecars' pipelines first; of one
// sidecar's those before the others that nobody has to let go of first.
func (b *balance) todo() []relief {
	e := b.e
	var over []int32
	for h := range e.hosts {
		if b.uneven(int32(h)) {
			over = append(over, int32(h))
		}
	}
	if len(over) == 0 {
		return nil
	}
	key := func(h int32) uint64 { return weigh(e.hosts[h].load, e.hosts[h].capacity) }
	slices.SortFunc(over, func(a, c int32) int { return cmp.Or(-cmp.Compare(key(a), key(c)), e.compareIDs(a, c)) })
	at := make(map[int32]int) // pipe -> place in out
	var out []relief
	for _, h := range over {
		for _, p := range e.hosts[h].pipes {
			x := &e.pipes[p]
			if b.looks++; b.looks > maxLooks {
				return out
			}
			if x.spec == nil || !x.spec.Enabled || x.dirty {
				continue
			}
			hope, source := b.hope(x, h)
			if !hope {
				continue
			}
			k, known := at[p]
			if !known {
				k = len(out)
				at[p] = k
				out = append(out, relief{pipe: p, load: key(h), source: source})
			}
			out[k].from = append(out[k].from, h)
		}
	}
	slices.SortFunc(out, func(a, c relief) int {
		return cmp.Or(-cmp.Compare(a.load, c.load), compareBools(a.source, c.source), cmp.Compare(e.pipes[a.pipe].id, e.pipes[c.pipe].id))
	})
	return out
}

// hope is false when for some stage of x that h runs there is nobody who would be
// less loaded with it than h is. source is true when one of these has to be let go of
// before anybody else begins it.
func (b *balance) hope(x *pipe, h int32) (hope, source bool) {
	at, ok := x.find(b.e.hosts[h].s.ID)
	if !ok || x.recorded[at].Revoked {
		return false, false
	}
	now := weigh(b.e.hosts[h].load, b.e.hosts[h].capacity)
	for i := range x.recorded[at].Stages {
		a := &x.recorded[at].Stages[i]
		if a.Remote != "" {
			continue
		}
		k := x.stage(a.Stage, int32(i))
		if k < 0 || b.leastOf(x.stages[k].want) >= now {
			return false, false
		}
		source = source || x.stages[k].entry
		hope = true
	}
	return hope, source
}

// leastOf is how loaded the least loaded sidecar that may be given a want would be
// with it.
func (b *balance) leastOf(want int32) uint64 {
	if key, known := b.least[want]; known {
		return key
	}
	key := uint64(closed)
	for _, pl := range b.e.wants[want].in {
		if pl.fit == fresh {
			b.looks++
			if _, k := b.e.profiles[pl.profile].least(); k < key {
				key = k
			}
		}
	}
	b.least[want] = key
	return key
}

// transfer is what one node runs of a pipeline, to be run by a host.
type transfer struct {
	from, to int32 // hosts
	n        int32 // stages
}

// move lays x out anew with what some of from run given to others, and returns the
// step that leads there; false, with everything as it was, when that is not worth it.
func (b *balance) move(x *pipe, from []int32) (Step, bool) {
	e, l := b.e, &b.e.l
	e.drop(x)
	moved := b.arrange(x, from)
	if len(moved) == 0 {
		l.bringBack()
		if _, changed := e.lay(x); changed {
			e.touch(x.index)
		}
		return Step{}, false
	}
	st, _ := l.step()
	st.Urgency, st.Least = Even, st.Moves
	for i := range st.Changes {
		c := &st.Changes[i]
		k := slices.IndexFunc(moved, func(t transfer) bool { return c.Revoke && e.hosts[t.from].s.ID == c.Sidecar })
		if k >= 0 {
			c.MovedTo = e.hosts[moved[k].to].s.ID
		}
	}
	e.totals.add(x.figures, -1)
	x.figures = l.evaluate()
	e.totals.add(x.figures, +1)
	e.hold(x, l)
	e.touch(x.index)
	b.left -= st.Moves
	return st, true
}

// arrange makes of l the present layout of x with as many of the possible moves as can
// stand together, and returns them.
func (b *balance) arrange(x *pipe, from []int32) []transfer {
	l := &b.e.l
	if !l.present(x) {
		return nil
	}
	b.laid += len(l.nodes)
	was := l.evaluate()
	todo := b.transfers(x, from)
	for try := 0; len(todo) > 0 && try < maxTries; {
		moves := todo
		for {
			try++
			b.laid += len(l.nodes)
			if l.shift(x, moves) {
				if f := l.evaluate(); f.placed == was.placed && f.pod >= was.pod {
					return moves
				}
			}
			if len(moves) == 1 || try >= maxTries {
				break
			}
			moves = moves[:len(moves)/2]
		}
		todo = todo[1:] // this one cannot be made
	}
	return nil
}

// present lays x out as it is recorded; false when that is not how it should be.
func (l *layout) present(x *pipe) bool {
	l.reset(x)
	l.scope()
	if l.draining() || !l.keep() {
		return false
	}
	for i := range l.nodes {
		if !slices.Equal(l.nodes[i].local, l.nodes[i].bound) {
			return false
		}
	}
	l.grow()
	return true
}

// shift lays x out as it is recorded, but for moves. It returns false when records
// would go round, or when it comes out otherwise.
func (l *layout) shift(x *pipe, moves []transfer) bool {
	l.bringBack()
	l.reset(x)
	l.scope()
	l.clear()
	to := make(map[int32]int32, len(moves)) // node -> node
	for _, m := range moves {
		from, taker := l.node(m.from), l.node(m.to)
		to[from] = taker
	}
	for _, i := range l.x.order {
		for _, h := range l.survivors(i) {
			if t, moves := to[h]; moves {
				h = t
			}
			if l.nodes[h].local.has(i) {
				return false
			}
			l.nodes[h].local.add(i)
			l.at[i] = append(l.at[i], h)
		}
		l.stale(i)
	}
	if !l.keepRoutes() {
		return false
	}
	l.grow()
	for _, m := range moves {
		from, _ := l.nodeOf(m.from)
		if l.nodes[from].local.count() > 0 {
			return false // it got something else
		}
	}
	return true
}

// transfers chooses who takes what nodes of the present layout run: for each of from
// that still has too much, the least loaded sidecar, of those as near if any is.
func (b *balance) transfers(x *pipe, from []int32) (out []transfer) {
	e, l := b.e, &b.e.l
	l.setAside()
	ins := l.senders()
	given := make(map[int32]bool) // hosts that take something in this call
	left := b.left
	for _, h := range from {
		node, ok := l.nodeOf(h)
		if !ok {
			continue
		}
		n := l.nodes[node].local.count()
		has := e.hosts[h].load + n // of others, and of x
		if n == 0 || !b.exceeds(h, has) {
			continue
		}
		if int(n) > left && (!b.whole || len(b.steps)+len(out) > 0) {
			continue
		}
		if to, ok := b.taker(node, has, ins, given); ok {
			given[to] = true
			l.node(to) // the next one finds another
			left -= int(n)
			out = append(out, transfer{h, to, n})
			if left <= 0 {
				break
			}
		}
	}
	return out
}

// bringBack lets the nodes be found by load again.
func (l *layout) bringBack() {
	l.apart = false
	for i := range l.nodes {
		if n := &l.nodes[i]; n.apart {
			n.apart = false
			l.e.hosts[n.host].held = false
			l.e.refresh(n.host)
		}
	}
}

// senders lists who hands over to each node, once for each stage.
func (l *layout) senders() [][]int32 {
	ins := make([][]int32, len(l.nodes))
	for n := range l.nodes {
		for _, h := range l.nodes[n].hops {
			ins[h.to] = append(ins[h.to], int32(n))
		}
	}
	return ins
}

// taker finds a sidecar for all that a node runs, which has stages altogether.
func (b *balance) taker(node, has int32, ins [][]int32, given map[int32]bool) (int32, bool) {
	e, l := b.e, &b.e.l
	h := l.nodes[node].host
	n := l.nodes[node].local.count()
	now := weigh(has, e.hosts[h].capacity)
	type offer struct {
		host int32
		key  uint64
	}
	var offers []offer
	add := func(to int32) {
		if b.looks++; to < 0 || to == h || given[to] || !e.hosts[to].takes {
			return
		}
		load := e.hosts[to].load + n
		if t, ok := l.nodeOf(to); ok {
			load += l.nodes[t].local.count()
		}
		key := weigh(load, e.hosts[to].capacity)
		if key >= now || b.exceeds(to, load) && float64(key) > (1-worthwhile)*float64(now) {
			return
		}
		if !slices.ContainsFunc(offers, func(o offer) bool { return o.host == to }) && b.suits(node, to) {
			offers = append(offers, offer{to, key})
		}
	}
	// Sidecars that have a part in the pipeline, or had, are not found by load.
	if some := l.nodes; len(some) <= window {
		for t := range some {
			add(some[t].host)
		}
	} else {
		for t := range some {
			if some[t].local.count() == 0 {
				add(some[t].host)
			}
		}
	}
	around := l.edges(node, ins)
	first := int32(0)
	for !l.nodes[node].local.has(first) {
		first++
	}
	for _, pl := range e.wants[l.x.stages[first].want].in {
		if pl.fit != fresh {
			continue
		}
		p := &e.profiles[pl.profile]
		least, key := p.least()
		if b.looks++; least < 0 || key >= now {
			continue
		}
		add(least)
		zone := int32(0)
		for _, a := range append([]int32{h}, around...) {
			if z := e.hosts[a].zone; z != 0 && z != zone {
				zone = z
				lo, hi := e.zoneOf(p, z)
				to, _ := p.leastOf(lo, hi)
				add(to)
			}
		}
	}
	machine := int32(0)
	for _, a := range around {
		if m := e.hosts[a].node; m != 0 && m != machine {
			machine = m
			for _, r := range e.nodes[m].hosts[:min(nodeWindow, len(e.nodes[m].hosts))] {
				add(r.host)
			}
		}
	}
	slices.SortFunc(offers, func(a, c offer) int { return cmp.Or(cmp.Compare(a.key, c.key), e.compareIDs(a.host, c.host)) })
	for _, o := range offers[:min(maxOffers, len(offers))] {
		if l.asNear(node, o.host, ins) {
			return o.host, true
		}
	}
	if len(offers) == 0 {
		return -1, false
	}
	return offers[0].host, true
}

// suits is true when a sidecar may be given all that a node runs, and runs none of it.
func (b *balance) suits(node, to int32) bool {
	l := &b.e.l
	t, part := l.nodeOf(to)
	for i := range l.x.stages {
		if !l.nodes[node].local.has(int32(i)) {
			continue
		}
		if l.kept[i] || l.fit(int32(i), to) != fresh || part && l.nodes[t].local.has(int32(i)) {
			return false
		}
	}
	return true
}

// edges lists the hosts that a node hands over to, and that hand over to it, up to
// maxAnchors of them.
func (l *layout) edges(node int32, ins [][]int32) (out []int32) {
	add := func(n int32) {
		if h := l.nodes[n].host; len(out) < maxAnchors && !slices.Contains(out, h) {
			out = append(out, h)
		}
	}
	for _, h := range l.nodes[node].hops {
		add(h.to)
	}
	for _, n := range ins[node] {
		add(n)
	}
	return out
}

// asNear is true when no kind of edge of a node becomes rarer if its stages run on
// another sidecar and all others hand over as they do.
func (l *layout) asNear(node, to int32, ins [][]int32) bool {
	var now, then [3]int
	count := func(other int32) {
		h := l.nodes[other].host
		for far := l.e.distance(l.nodes[node].host, h); far < 3; far++ {
			now[far]++
		}
		for far := l.e.distance(to, h); far < 3; far++ {
			then[far]++
		}
	}
	for _, h := range l.nodes[node].hops {
		count(h.to)
	}
	for _, n := range ins[node] {
		count(n)
	}
	return then[0] >= now[0] && then[1] >= now[1] && then[2] >= now[2]
}
