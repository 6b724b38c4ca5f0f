package placement

import "cmp"

// supply hands out the sidecars that run nothing of the pipeline for instances of
// one stage, the best first. It costs a look at every profile once and then a few
// comparisons for each sidecar: a pipeline that asks for 10,000 instances, in a
// fleet of as many profiles, could not be laid out in time if each of them were
// looked for among all.
//
// Sidecars that were handed out are nodes of the layout and do not come back, so
// that what is left of a profile only gets worse.
type supply struct {
	l *layout
	i int32
	// heap holds the profiles by their best member, zones those by their best
	// member in a zone, made for zones that were asked for; looked counts what
	// that took.
	heap   []lead
	zones  map[int32][]lead
	looked int
	// nodes remembers how many edges anybody on a node could cover, -1 for no
	// edges and nobody.
	nodes map[int32]int8
	// around are the neighbours, who needs an instance most first; turn is whose
	// turn it is.
	around []int32
	ready  bool
	turn   int
}

// lead is the best member of a profile.
type lead struct {
	profile, host int32
	open          bool
	cover         int8
	key           uint64
}

// maxZoneLeads bounds how many profiles are looked at, over all zones: beyond it
// an instance is not looked for in zones not asked for before.
const maxZoneLeads = 1 << 16

// compare puts the better one first, as compareRanks does.
func (s *supply) compare(a, b lead) int {
	if c := cmp.Or(compareBools(b.open, a.open), -cmp.Compare(a.cover, b.cover), cmp.Compare(a.key, b.key)); c != 0 {
		return c
	}
	return s.l.e.compareIDs(a.host, b.host)
}

// begin makes s ready for stage i of l.
func (s *supply) begin(l *layout, i int32) {
	l.setAside()
	s.l, s.i = l, i
	s.heap, s.around, s.ready, s.turn, s.looked = s.heap[:0], s.around[:0], false, 0, 0
	clear(s.zones)
	clear(s.nodes)
	for _, pl := range l.e.wants[l.x.stages[i].want].in {
		if pl.fit != fresh || l.kept[i] || l.x.rival(&l.x.stages[i], pl.standIn) || (len(l.shut) > 0 && l.closed(pl.profile)) {
			continue
		}
		d := lead{profile: pl.profile, cover: l.cover(pl.profile, i)}
		if s.renew(&d, 0) {
			s.heap = append(s.heap, d)
		}
	}
	s.order(s.heap)
}

// renew brings d up to date; false when nobody is left, in its zone if that is
// not 0.
func (s *supply) renew(d *lead, zone int32) bool {
	e := s.l.e
	p := &e.profiles[d.profile]
	if zone == 0 {
		d.host, d.key = p.least()
	} else {
		lo, hi := e.zoneOf(p, zone)
		d.host, d.key = p.leastOf(lo, hi)
	}
	if d.host < 0 {
		return false
	}
	d.open = e.open(d.host, e.hosts[d.host].load)
	return true
}

// order makes a heap of h.
func (s *supply) order(h []lead) {
	for k := len(h)/2 - 1; k >= 0; k-- {
		s.sink(h, k)
	}
}

func (s *supply) sink(h []lead, k int) {
	for {
		c := 2*k + 1
		if c >= len(h) {
			return
		}
		if c+1 < len(h) && s.compare(h[c+1], h[c]) < 0 {
			c++
		}
		if s.compare(h[k], h[c]) <= 0 {
			return
		}
		h[k], h[c] = h[c], h[k]
		k = c
	}
}

// top returns the best of h, brought up to date. What h holds may be better than
// what is left, never worse.
func (s *supply) top(h *[]lead, zone int32) (lead, bool) {
	for len(*h) > 0 {
		d := &(*h)[0]
		was := *d
		switch {
		case !s.renew(d, zone):
			last := len(*h) - 1
			(*h)[0] = (*h)[last]
			*h = (*h)[:last]
		case *d == was:
			return was, true
		}
		s.sink(*h, 0)
	}
	return lead{}, false
}

// next returns the best sidecar that is left.
func (s *supply) next() (rank, bool) {
	d, ok := s.top(&s.heap, 0)
	if !ok {
		return rank{}, false
	}
	far := int8(3)
	if d.open {
		if !s.ready {
			s.around = s.l.neighbours(s.i, s.around)
			s.ready = true
		}
		if c, ok := s.beside(d.cover); ok {
			d, far = c, 1
		} else if c, ok := s.within(d.cover); ok {
			d, far = c, 2
		}
	}
	return rank{node: -1, host: d.host, open: d.open, cover: d.cover, far: far, key: d.key}, true
}

// served lets the next neighbour have its turn: one after the other, and not the
// first one's zone filled up before the second is thought of.
func (s *supply) served() { s.turn++ }

// neighbours calls fn for those whose turn it is, until it returns true.
func (s *supply) neighbours(fn func(host int32) bool) {
	for k := range min(maxAnchors, len(s.around)) {
		if fn(s.around[(s.turn+k)%len(s.around)]) {
			return
		}
	}
}

// beside finds somebody on the node of a neighbour who is open and covers as many
// edges as the best.
func (s *supply) beside(cover int8) (best lead, found bool) {
	e := s.l.e
	s.neighbours(func(a int32) bool {
		n := e.hosts[a].node
		if n == 0 {
			return false
		}
		if most, known := s.nodes[n]; known && most < cover {
			return false
		}
		most := int8(-1)
		hosts := e.nodes[n].hosts
		for _, at := range hosts[:min(nodeWindow, len(hosts))] {
			if at.profile < 0 || !s.l.gives(s.i, at.profile) {
				continue
			}
			x := &e.hosts[at.host]
			if x.held || !x.takes || !e.open(at.host, x.load) {
				continue
			}
			c := lead{profile: at.profile, host: at.host, open: true, key: weigh(x.load+1, x.capacity), cover: s.l.cover(at.profile, s.i)}
			most = max(most, c.cover)
			if c.cover >= cover && (!found || s.compare(c, best) < 0) {
				best, found = c, true
			}
		}
		if s.nodes == nil {
			s.nodes = make(map[int32]int8)
		}
		s.nodes[n] = most
		return found
	})
	return best, found
}

// within finds somebody in the zone of a neighbour who is open and covers as many
// edges as the best.
func (s *supply) within(cover int8) (best lead, found bool) {
	e := s.l.e
	last := int32(0)
	s.neighbours(func(a int32) bool {
		zone := e.hosts[a].zone
		if zone == 0 || zone == last {
			return false
		}
		last = zone
		h, made := s.zones[zone]
		if !made {
			if s.looked >= maxZoneLeads {
				return false
			}
			s.looked += len(s.heap)
			for _, d := range s.heap {
				if s.renew(&d, zone) {
					h = append(h, d)
				}
			}
			s.order(h)
			if s.zones == nil {
				s.zones = make(map[int32][]lead)
			}
		}
		d, ok := s.top(&h, zone)
		s.zones[zone] = h
		if ok && d.open && d.cover >= cover {
			best, found = d, true
		}
		return found
	})
	return best, found
}
