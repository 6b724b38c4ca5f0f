package placement

import (
	"cmp"
	"math/bits"
	"slices"
)

// tie says how strongly a stage belongs to a sidecar.
type tie int8

const (
	untied   tie = iota
	former       // the sidecar ran some of the pipeline once
	awaiting     // another one was told to let go of it for this one
	bound        // the stage runs there now
)

// rank is how well a sidecar suits a stage; see compareRanks.
type rank struct {
	node  int32 // -1 for a sidecar that runs nothing of the pipeline
	host  int32
	tie   tie
	since uint64 // when it ceased to run the pipeline, 0 = not or unknown
	open  bool   // it has not had its share yet, this pipeline apart
	local int8   // edges to stages that run there
	cover int8   // edges that could stay there besides
	far   int8   // distance to the nearest neighbour; see distance
	key   uint64 // load by capacity
}

// compareRanks puts the better one first: where the stage runs or ran, who has
// room, beside its neighbours, near to them, the least loaded.
//
// Room comes before neighbourhood: the other way round, one sidecar that offers
// everything would draw all pipelines to itself and its like would idle. A
// sidecar that has room may exceed its share by what this pipeline gives it, so
// that neighbours are not torn apart for the sake of an even count.
func (l *layout) compareRanks(a, b rank) int {
	return cmp.Or(
		-cmp.Compare(a.tie, b.tie),
		-cmp.Compare(a.since, b.since),
		compareBools(b.open, a.open),
		-cmp.Compare(a.local, b.local),
		-cmp.Compare(a.cover, b.cover),
		cmp.Compare(a.far, b.far),
		cmp.Compare(a.key, b.key),
		l.e.compareIDs(a.host, b.host),
	)
}

func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// open is true while a sidecar that runs load stages has room for more.
func (e *Engine) open(h, load int32) bool {
	x := &e.hosts[h]
	return load == 0 || x.profile >= 0 && weigh(load, x.capacity) < e.profiles[x.profile].room
}

// rank judges node n for stage i.
func (l *layout) rank(i, n int32) rank {
	x := &l.nodes[n]
	h := &l.e.hosts[x.host]
	r := rank{node: n, host: x.host, far: 3}
	switch {
	case x.bound.has(i) && !l.letGo:
		r.tie = bound
	case x.awaits.has(i) && x.awaited >= x.revoked:
		r.tie, r.since = awaiting, x.awaited
	case x.former || x.bound.has(i):
		r.tie, r.since = former, x.since
	}
	s := &l.x.stages[i]
	for _, u := range s.up {
		if x.local.has(u) {
			r.local++
		}
	}
	for _, d := range s.down {
		if x.local.has(d) {
			r.local++
		}
	}
	r.open = l.e.open(x.host, x.load)
	r.key = weigh(x.load+x.local.count()+1, h.capacity)
	if h.profile >= 0 {
		r.cover = l.cover(h.profile, i)
	}
	return r
}

// knownRanks lists the nodes that may run stage i and do not, the best first.
func (l *layout) knownRanks(i int32) []rank {
	var out []rank
	for n := range l.nodes {
		if !l.nodes[n].local.has(i) && l.usable(i, int32(n)) {
			out = append(out, l.rank(i, int32(n)))
		}
	}
	slices.SortFunc(out, l.compareRanks)
	return out
}

// choices lists those who may run stage i and do not, the best first. Of the
// sidecars that run nothing of the pipeline, those that can run the same of it are
// alike to the search for circles; the best one stands for all of them.
func (l *layout) choices(i int32) []rank {
	out := l.knownRanks(i)
	if !l.able[i] {
		return out
	}
	l.setAside()
	around := l.anchors(i)
	best := make(map[uint64]rank)
	for _, pl := range l.e.wants[l.x.stages[i].want].in {
		r, ok := l.bestOf(i, pl, around)
		if !ok {
			continue
		}
		like := l.mask(pl.profile)
		if len(l.x.stages) > 64 {
			like = uint64(pl.profile) // a mask does not hold all there is to compare
		}
		if b, ok := best[like]; !ok || l.compareRanks(r, b) < 0 {
			best[like] = r
		}
	}
	for _, r := range best {
		if r.open && r.far > 1 {
			if c, ok := l.beside(i, around, r); ok && l.mask(l.e.hosts[c.host].profile) == l.mask(l.e.hosts[r.host].profile) {
				r = c
			}
		}
		out = append(out, r)
	}
	slices.SortFunc(out, l.compareRanks) // a total order: how the map was walked does not show
	return out
}

// taken returns the node of r, made if need be.
func (l *layout) taken(r rank) int32 {
	if r.node >= 0 {
		return r.node
	}
	return l.node(r.host)
}

// setAside hides the nodes from those who look for the least loaded sidecar.
func (l *layout) setAside() {
	if !l.apart {
		l.apart = true
		for i := range l.nodes {
			l.setApart(int32(i))
		}
	}
}

// mask tells which of the first 64 stages the members of a profile may be given.
func (l *layout) mask(profile int32) uint64 {
	if m, ok := l.e.masks.get(profile); ok {
		return m
	}
	m := uint64(0)
	p := &l.e.profiles[profile]
	if !l.closed(profile) {
		for i := range l.x.stages[:min(64, len(l.x.stages))] {
			s := &l.x.stages[i]
			if f, ok := p.find(s.want); ok && f.fit == fresh && !l.x.rival(s, f.standIn) {
				m |= 1 << i
			}
		}
	}
	l.e.masks.put(profile, m)
	return m
}

// masks remembers the mask of each profile during one layout.
type masks struct {
	stamp []uint32
	mask  []uint64
	now   uint32
}

func (m *masks) begin(profiles int) {
	for len(m.stamp) < profiles {
		m.stamp, m.mask = append(m.stamp, 0), append(m.mask, 0)
	}
	if m.now++; m.now == 0 {
		clear(m.stamp)
		m.now = 1
	}
}

func (m *masks) get(profile int32) (uint64, bool) {
	return m.mask[profile], m.stamp[profile] == m.now
}

func (m *masks) put(profile int32, mask uint64) {
	m.mask[profile], m.stamp[profile] = mask, m.now
}

// cover counts the edges that could stay on a sidecar of a profile if it were
// given stage i and what hangs together with it of the stages that lack
// instances.
func (l *layout) cover(profile, i int32) int8 {
	if i >= 64 {
		return 0
	}
	m := l.mask(profile) & l.missing()
	if m&(1<<i) == 0 {
		return 0
	}
	in, edges := uint64(1)<<i, 0
	for todo := in; todo != 0; {
		j := bits.TrailingZeros64(todo)
		todo &^= 1 << j
		s := &l.x.stages[j]
		for _, next := range [...][]int32{s.up, s.down} {
			for _, d := range next {
				if d < 64 && m&(1<<d) != 0 && in&(1<<d) == 0 {
					in |= 1 << d
					todo |= 1 << d
				}
			}
		}
	}
	for rest := in; rest != 0; rest &= rest - 1 {
		for _, d := range l.x.stages[bits.TrailingZeros64(rest)].down {
			if d < 64 && in&(1<<d) != 0 {
				edges++
			}
		}
	}
	return int8(min(edges, 127))
}

// missing tells which of the first 64 stages lack instances.
func (l *layout) missing() (m uint64) {
	for i := range l.x.stages[:min(64, len(l.x.stages))] {
		if n := len(l.at[i]); n == 0 || (!l.firsts && n < int(l.x.stages[i].count)) {
			m |= 1 << i
		}
	}
	return m
}

// manyProfiles is from how many profiles on that can meet a want only the least
// loaded member of each is looked at, wherever it is. So many profiles mean that
// each has few members.
const manyProfiles = 64

// bestOf finds the best member of a profile for stage i.
func (l *layout) bestOf(i int32, pl place, around []int32) (rank, bool) {
	if pl.fit != fresh || l.kept[i] || l.x.rival(&l.x.stages[i], pl.standIn) || (len(l.shut) > 0 && l.closed(pl.profile)) {
		return rank{}, false
	}
	p := &l.e.profiles[pl.profile]
	h, key := p.least()
	if h < 0 {
		return rank{}, false
	}
	r := rank{node: -1, host: h, far: 3, key: key, cover: l.cover(pl.profile, i)}
	r.open = l.e.open(h, l.e.hosts[h].load)
	for _, a := range around {
		r.far = min(r.far, l.e.distance(h, a))
	}
	if !r.open || r.far <= 2 || len(l.e.wants[l.x.stages[i].want].in) > manyProfiles {
		return r, true
	}
	for k, a := range around {
		zone := l.e.hosts[a].zone
		if zone == 0 || slices.ContainsFunc(around[:k], func(b int32) bool { return l.e.hosts[b].zone == zone }) {
			continue
		}
		lo, hi := l.e.zoneOf(p, zone)
		if h, key := p.leastOf(lo, hi); h >= 0 && l.e.open(h, l.e.hosts[h].load) {
			r.host, r.key, r.far = h, key, 2
			break // the neighbours are in the order in which they need one
		}
	}
	return r, true
}

// nodeWindow is how many sidecars of one node are looked at.
const nodeWindow = 256

// beside finds a sidecar on the node of a neighbour that is as good as r.
func (l *layout) beside(i int32, around []int32, r rank) (rank, bool) {
	for _, a := range around {
		n := l.e.hosts[a].node
		if n == 0 {
			continue
		}
		hosts := l.e.nodes[n].hosts
		best, found := r, false
		for _, at := range hosts[:min(nodeWindow, len(hosts))] {
			if at.profile < 0 || !l.gives(i, at.profile) {
				continue
			}
			x := &l.e.hosts[at.host]
			if x.held || !x.takes || !l.e.open(at.host, x.load) {
				continue
			}
			c := rank{node: -1, host: at.host, open: true, far: 1, key: weigh(x.load+1, x.capacity), cover: l.cover(at.profile, i)}
			if l.compareRanks(c, best) < 0 {
				best, found = c, true
			}
		}
		if found {
			return best, true
		}
	}
	return rank{}, false
}

// gives is true when members of a profile may be given stage i.
func (l *layout) gives(i, profile int32) bool {
	if i < 64 {
		// Every profile that meets what the stage asks for has been looked at.
		m, known := l.e.masks.get(profile)
		return known && m&(1<<i) != 0
	}
	s := &l.x.stages[i]
	f, ok := l.e.profiles[profile].find(s.want)
	return ok && f.fit == fresh && !l.x.rival(s, f.standIn) && !l.closed(profile)
}

// maxAnchors bounds how many neighbours a new instance is looked for around.
const maxAnchors = 16

// anchors lists the sidecars near which an instance of stage i is of use, at most
// maxAnchors of them; see neighbours.
func (l *layout) anchors(i int32) []int32 {
	l.around = l.neighbours(i, l.around[:0])
	l.around = l.around[:min(maxAnchors, len(l.around))]
	return l.around
}

// neighbours appends to out the sidecars near which an instance of stage i is of
// use: those that run a neighbouring stage, first who has no instance to hand over
// to or only a distant one.
func (l *layout) neighbours(i int32, out []int32) []int32 {
	l.near = l.near[:0]
	s := &l.x.stages[i]
	for _, u := range s.up {
		for _, n := range l.at[u] {
			x := &l.nodes[n]
			if x.local.has(i) {
				continue
			}
			far := int8(4)
			if to, ok := x.next(i); ok {
				far = l.e.distance(x.host, l.nodes[to].host)
			}
			l.near = append(l.near, anchor{x.host, far})
		}
	}
	for _, d := range s.down {
		for _, n := range l.at[d] {
			x := &l.nodes[n]
			if x.local.has(i) || l.fed(d, n) {
				continue
			}
			far := int8(3)
			if x.fanIn(d) > 0 {
				far = 2
			}
			l.near = append(l.near, anchor{x.host, far})
		}
	}
	for far := int8(4); far >= 0; far-- {
		for _, a := range l.near {
			if a.far == far {
				out = append(out, a.host)
			}
		}
	}
	return out
}

// anchor is a neighbour and how far away who serves it is.
type anchor struct {
	host int32
	far  int8
}
