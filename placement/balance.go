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
// pipelines that are laid out again. Calls after one that came to one of them go on with
// the others, until one has come to the last of them.
const (
	maxLooks = 1 << 18
	maxLaid  = 1 << 14
	// maxTries is how often one pipeline is laid out in one call, since some of its
	// moves cannot be made together.
	maxTries = 12
	// maxFailed bounds how little of a pipeline is asked for after failures: a 64th of what
	// could be moved. More would only make it slow when it can be helped again.
	maxFailed = 6
	// maxOffers is how many sidecars are compared for one move.
	maxOffers = 16
)

// Limits say what Balance may do.
type Limits struct {
	// Moves is how many stages it may move. With Whole set the first move may be of
	// more: what is larger than a whole budget could never move otherwise.
	Moves int
	Whole bool
	// SkipPipeline and SkipSidecar are true for pipelines that are left alone, and for
	// sidecars that are given nothing by it; nil for none.
	SkipPipeline, SkipSidecar func(id string) bool
}

// Balance returns steps that move up to limits.Moves stages from sidecars that have more than
// their share of load to others that have less, those of the most loaded first. Plan
// keeps everything where it runs well, so that a sidecar that joins gets only what is
// new or was lost; this is what gives it its share.
//
// What one sidecar runs of a pipeline moves as a whole, so that no edge leaves its pod
// by it; and rather to where no other edge becomes longer, as compareRanks has it: who
// has room first, and near of those. Of two sidecars the higher load becomes lower by
// each move, so that after so many calls there is nothing more to do. A move is not made
// when a plan would have more to change afterwards, as where a stage finds a place that
// had led records round: that would load again whom it was to relieve.
//
// Pipelines that Plan has yet to change, as it last told, are left alone. Whoever calls
// it carries the steps out before the next Plan, or not at all. A step whose stages have
// to be let go of first ends as it was begun, since the sidecar that is told to notes
// for whom: see Assignment.MovedTo.
func (e *Engine) Balance(limits Limits) []Step {
	if limits.Moves <= 0 {
		return nil
	}
	if e.drift > 0 {
		e.shares() // even one sidecar that came has a share
	}
	b := balance{e: e, Limits: limits, left: limits.Moves, wants: make(map[int32]supplied)}
	over := b.over()
	if len(over) == 0 {
		e.pass++
		return nil
	}
	defer b.skip()()
	todo, all := b.todo(over)
	for _, t := range todo {
		if b.left <= 0 || b.looks > maxLooks || b.laid > maxLaid {
			all = false
			break
		}
		x := &e.pipes[t.pipe]
		if x.circular || b.SkipPipeline != nil && b.SkipPipeline(x.id) || !slices.ContainsFunc(t.from, b.uneven) {
			continue
		}
		before := b.laid
		if st, ok := b.move(x, t.from); ok {
			x.failed /= 2
			b.steps = append(b.steps, st)
		} else if before == 0 || b.laid <= maxLaid { // otherwise others left nothing for it
			e.Declined(x.id)
		}
	}
	if all {
		e.pass++
	}
	return b.steps
}

// Declined is told that a pipeline's step was not carried out: Balance comes to the others
// first, and asks for less of it the next time.
func (e *Engine) Declined(pipeline string) {
	if i, ok := e.pipeID[pipeline]; ok {
		x := &e.pipes[i]
		x.failed = min(x.failed+1, maxFailed)
		x.pass = e.pass
	}
}

// skip lets nobody find those who are given nothing until the returned function is
// called: the least loaded of many would stand for all of them.
func (b *balance) skip() (end func()) {
	e := b.e
	var hidden []int32
	set := func(h int32, to bool) {
		e.hosts[h].skipped = to
		e.refresh(h)
	}
	for h := range e.hosts {
		if x := &e.hosts[h]; b.SkipSidecar != nil && x.profile >= 0 && x.takes && b.SkipSidecar(x.s.ID) {
			hidden = append(hidden, int32(h))
			set(int32(h), true)
		}
	}
	return func() {
		for _, h := range hidden {
			set(h, false)
		}
	}
}

// balance is one call of Balance.
type balance struct {
	Limits
	e     *Engine
	left  int // stages that may be moved
	steps []Step
	looks int
	laid  int
	// wants is what was found of wants that were asked for.
	wants map[int32]supplied
}

// supplied is who there is for a want: how many, and how loaded the least loaded of
// them would be with it, as it was first. Who takes a stage gets more loaded, and who
// loses one had too many.
type supplied struct {
	least   uint64
	members int
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

// over lists the sidecars that have too much, the most loaded first.
func (b *balance) over() (over []int32) {
	e := b.e
	for h := range e.hosts {
		if b.uneven(int32(h)) {
			over = append(over, int32(h))
		}
	}
	slices.SortFunc(over, func(a, c int32) int { return cmp.Or(-cmp.Compare(b.key(a), b.key(c)), e.compareIDs(a, c)) })
	return over
}

// key is how loaded h is.
func (b *balance) key(h int32) uint64 { return weigh(b.e.hosts[h].load, b.e.hosts[h].capacity) }

// todo lists what can be moved from those that have too much and was not found
// impossible in this pass: the most loaded sidecars' pipelines first, and of one
// sidecar's those before the others that nobody has to let go of first. all is false when
// that is not all, since there is too much of it.
func (b *balance) todo(over []int32) (out []relief, all bool) {
	e := b.e
	all = true
	at := make(map[int32]int) // pipe -> place in out
	for _, h := range over {
		if b.looks > maxLooks {
			all = false
			break
		}
		for _, p := range e.hosts[h].pipes {
			x := &e.pipes[p]
			if x.spec == nil || !x.spec.Enabled || x.dirty || x.pass == e.pass {
				continue
			}
			b.looks++
			hope, source := b.hope(x, h)
			if !hope {
				continue
			}
			k, known := at[p]
			if !known {
				k = len(out)
				at[p] = k
				out = append(out, relief{pipe: p, load: b.key(h), source: source})
			}
			out[k].from = append(out[k].from, h)
		}
	}
	slices.SortFunc(out, func(a, c relief) int {
		return cmp.Or(-cmp.Compare(a.load, c.load), compareBools(a.source, c.source), cmp.Compare(e.pipes[a.pipe].id, e.pipes[c.pipe].id))
	})
	b.looks = 0
	return out, all
}

// hope is false when for some stage of x that h runs there is nobody who would be
// less loaded with it than h is, or nobody who does not run it already. source is true
// when one of these has to be let go of before anybody else begins it.
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
		if k < 0 {
			return false, false
		}
		if s := b.supplied(x.stages[k].want); s.least >= now || s.members <= int(x.stages[k].count) {
			return false, false
		}
		source = source || x.stages[k].entry
		hope = true
	}
	return hope, source
}

// supplied tells who there is for a want.
func (b *balance) supplied(want int32) supplied {
	if s, known := b.wants[want]; known {
		return s
	}
	s := supplied{least: closed}
	for _, pl := range b.e.wants[want].in {
		if pl.fit == fresh {
			b.looks++
			p := &b.e.profiles[pl.profile]
			_, key := p.least()
			s.least = min(s.least, key)
			s.members += p.open
		}
	}
	b.wants[want] = s
	return s
}

// transfer moves what one host runs of a pipeline to another.
type transfer struct{ from, to int32 }

// move lays x out anew with what some of from run given to others, and returns the
// step that leads there; false, with everything as it was, when that is not worth it.
func (b *balance) move(x *pipe, from []int32) (Step, bool) {
	e, l := b.e, &b.e.l
	e.drop(x)
	moved := b.arrange(x, from)
	if len(moved) == 0 {
		l.bringBack()
		b.laid += len(x.recorded)
		if _, changed := e.lay(x); changed {
			e.touch(x.index)
		}
		return Step{}, false
	}
	st, _ := l.step()
	st.Urgency, st.Least = Even, st.Moves
	to := make(map[string]string, len(moved))
	for _, m := range moved {
		to[e.hosts[m.from].s.ID] = e.hosts[m.to].s.ID
	}
	for i := range st.Changes {
		if c := &st.Changes[i]; c.Revoke {
			c.MovedTo = to[c.Sidecar]
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
	if n := len(todo); n > 0 { // others first in each pass: some cannot be made
		k := int(b.e.pass % uint64(n))
		todo = slices.Concat(todo[k:], todo[:k])
	}
	for try := 0; len(todo) > 0 && try < maxTries; {
		// Fewer together each time: of a wide pipeline there is not more than one try.
		moves := todo[:max(1, len(todo)>>x.failed)]
		for {
			try++
			b.laid += len(l.nodes)
			if l.shift(x, moves) {
				if f := l.evaluate(); f.placed == was.placed && f.pod >= was.pod && l.settled() {
					return moves
				}
			}
			if b.laid > maxLaid {
				return nil
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
	l.cautious = true // or a part of it might have to be told later
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
	ins, parts := l.senders(), b.parts()
	given := make(map[int32]bool) // hosts that take something in this call
	left := b.left
	for _, h := range from {
		if left <= 0 || b.looks > maxLooks {
			break
		}
		node, ok := l.nodeOf(h)
		if !ok {
			continue
		}
		n := l.nodes[node].local.count()
		has := e.hosts[h].load + n // of others, and of x
		if n == 0 || !b.exceeds(h, has) {
			continue
		}
		if int(n) > left && (!b.Whole || len(b.steps)+len(out) > 0) {
			continue
		}
		// Who is silent cannot hear to whom it hands over from now on.
		if slices.ContainsFunc(ins[node], func(n int32) bool { return e.steady(l.nodes[n].host) != 0 }) {
			continue
		}
		if to, ok := b.taker(node, has, ins, parts, given); ok {
			given[to] = true
			l.node(to) // the next one finds another
			left -= int(n)
			out = append(out, transfer{h, to})
		}
	}
	return out
}

// parts lists the sidecars that are not found by load since they have a part in the
// pipeline, or had one: all when these are few, else the least loaded of those that have
// none now.
func (b *balance) parts() (out []int32) {
	e, l := b.e, &b.e.l
	few := len(l.nodes) <= window
	for t := range l.nodes {
		if h := l.nodes[t].host; e.hosts[h].takes && (few || l.nodes[t].local.count() == 0) {
			out = append(out, h)
		}
	}
	if few {
		return out
	}
	slices.SortFunc(out, func(a, c int32) int {
		x, y := &e.hosts[a], &e.hosts[c]
		return cmp.Or(cmp.Compare(weigh(x.load, x.capacity), weigh(y.load, y.capacity)), e.compareIDs(a, c))
	})
	return out[:min(window, len(out))]
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

// offer is a sidecar that would do, and how loaded it would be then.
type offer struct {
	host int32
	key  uint64
}

// taker finds a sidecar for all that a node runs, which has stages altogether.
func (b *balance) taker(node, has int32, ins [][]int32, parts []int32, given map[int32]bool) (int32, bool) {
	e, l := b.e, &b.e.l
	h := l.nodes[node].host
	n := l.nodes[node].local.count()
	now := weigh(has, e.hosts[h].capacity)
	best := make([]offer, 0, maxOffers) // in order
	add := func(to int32) {
		if b.looks++; to < 0 || to == h || given[to] || !e.hosts[to].takes {
			return
		}
		load := e.hosts[to].load + n
		if t, ok := l.nodeOf(to); ok {
			load += l.nodes[t].local.count()
		}
		o := offer{to, weigh(load, e.hosts[to].capacity)}
		if o.key >= now || b.exceeds(to, load) && float64(o.key) > (1-worthwhile)*float64(now) {
			return
		}
		at, known := slices.BinarySearchFunc(best, o, func(a, c offer) int { return cmp.Or(cmp.Compare(a.key, c.key), e.compareIDs(a.host, c.host)) })
		if known || at == maxOffers || !b.suits(node, to, ins) {
			return
		}
		best = slices.Insert(best[:min(len(best), maxOffers-1)], at, o)
	}
	for _, h := range parts {
		add(h)
	}
	around := append(l.edges(node, ins), h)
	first := int32(0)
	for !l.nodes[node].local.has(first) {
		first++
	}
	for _, pl := range e.wants[l.x.stages[first].want].in {
		if pl.fit != fresh || b.looks > maxLooks {
			continue
		}
		p := &e.profiles[pl.profile]
		least, key := p.least()
		if b.looks++; least < 0 || key >= now {
			continue
		}
		add(least)
		zone := int32(0)
		for _, a := range around {
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
	for _, o := range best {
		if l.asNear(node, o.host, ins) {
			return o.host, true
		}
	}
	if len(best) == 0 {
		return -1, false
	}
	return best[0].host, true
}

// suits is true when a sidecar may be given all that a node runs, runs none of it, and
// no records would go round if all others handed over as they do.
func (b *balance) suits(node, to int32, ins [][]int32) bool {
	if b.e.hosts[to].skipped {
		return false
	}
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
	if !part {
		return true
	}
	for _, h := range l.nodes[node].hops {
		if h.to != t && l.reaches(h.to, t, true) {
			return false
		}
	}
	return !slices.ContainsFunc(ins[node], func(from int32) bool { return from != t && l.reaches(t, from, true) })
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
