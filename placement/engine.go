package placement

import (
	"cmp"
	"slices"
)

// Engine keeps what plans are made from, indexed, so that an event costs what
// it concerns. It belongs to one goroutine at a time.
type Engine struct {
	hosts     []host
	freeHosts []int32
	hostID    map[string]int32

	nodes     []machine // 0 is none
	freeNodes []int32
	nodeID    map[machineKey]int32
	zones     []zone // 0 is none
	freeZones []int32
	zoneID    map[string]int32

	names     []name // 0 is none
	freeNames []int32
	nameID    map[string]int32

	wants     []want
	freeWants []int32
	wantID    map[string]int32
	typed     []int32 // wants that go by type
	// unasked are wants and unused names that nobody may need any more; see sweep.
	unasked, unused []int32

	profiles     []profile
	freeProfiles []int32
	profileID    map[string]int32

	pipes     []pipe
	freePipes []int32
	pipeID    map[string]int32
	dirty     []int32

	// drift is how much capacity and demand came and went since shares were
	// counted.
	drift, total int64
	// pass counts how often Balance has come to all there is, from 1.
	pass     uint64
	building bool
	// buried are sidecars that are gone and whose place is not free yet: what
	// was laid out may still count them.
	buried []int32
	// orphans are the pipelines of assignments whose sidecar is not known.
	orphans map[string][]int32

	totals figures // of all pipelines
	// over are the pipelines that brought a sidecar above its share.
	over map[int32]bool
	// shifts counts the layouts that came out otherwise than before; dropped is
	// what the pipeline that is being laid out held before.
	shifts  uint64
	dropped []holding

	// lone lists by type of stage the sidecars that have exactly one service of
	// that type, by id; made when it is asked for, until offers change.
	lone      [4][]int32
	loneKnown bool

	fits  []fit // scratch
	masks masks
	l     layout
}

// host is a sidecar.
type host struct {
	s        *Sidecar
	capacity int64
	profile  int32 // -1 = gone
	pos      int32 // in the profile
	zone     int32 // 0 = unknown
	node     int32 // 0 = unknown
	load     int32 // stages it runs, of all pipelines
	inbound  int32 // sidecars that hand over to it, over all pipelines
	takes    bool  // it may be given stages
	held     bool  // the pipeline that is being laid out looks at it by itself
	skipped  bool  // Balance gives it nothing
	// order is the place of its id among those of the first view, -1 for a later
	// one.
	order int32
	// turn says of which layout slot is its node.
	turn  uint32
	slot  int32
	pipes []int32 // pipelines of which it has a table
	names []int32 // it offers
}

// set lets x be s from now on.
func (x *host) set(s *Sidecar) { x.s, x.takes, x.capacity = s, s.takes(), s.capacity() }

// machine is a node of the cluster that sidecars run on.
type machine struct{ hosts []resident }

// resident is a sidecar on a machine, with its profile at hand.
type resident struct{ host, profile int32 }

type machineKey struct{ zone, node string }

// zone is where sidecars run; members counts them.
type zone struct{ members int }

// name is the name of a service.
type name struct {
	text   string
	hosts  []int32 // that offer it
	wants  []int32 // that ask for it
	offers [4]int32
	stages int             // that select it
	pipes  map[int32]int32 // pipelines that select it
}

// NewEngine indexes v and marks everything as to be planned.
func NewEngine(v View) *Engine {
	e := &Engine{
		hostID:    make(map[string]int32, len(v.Sidecars)),
		nodeID:    make(map[machineKey]int32),
		zoneID:    make(map[string]int32),
		names:     make([]name, 1),
		nameID:    make(map[string]int32),
		wantID:    make(map[string]int32),
		profileID: make(map[string]int32),
		pipeID:    make(map[string]int32, len(v.Pipelines)),
		nodes:     make([]machine, 1),
		zones:     make([]zone, 1),
		orphans:   make(map[string][]int32),
		over:      make(map[int32]bool),
		pass:      1,
		hosts:     make([]host, 0, len(v.Sidecars)),
	}
	e.l.e = e
	e.building = true
	for _, t := range [...]StageType{SourceStage, TransformStage, SinkStage} {
		id, _ := e.wantOf(&Stage{Type: t})
		e.wants[id].fixed = true // always there, or the first to ask would make all profiles anew
	}
	sidecars := sorted(v.Sidecars, func(s *Sidecar) string { return s.ID })
	for i, s := range sidecars {
		h, _ := e.addHost(s)
		e.hosts[h].order = int32(i)
	}
	pipelines := sorted(v.Pipelines, func(p *Pipeline) string { return p.ID })
	e.pipes = make([]pipe, 0, len(pipelines))
	for _, p := range pipelines {
		e.addPipe(p)
	}
	for i := range e.pipes {
		e.resolve(&e.pipes[i])
	}
	for i := range e.hosts {
		e.enter(int32(i))
	}
	for i := range e.profiles {
		p := &e.profiles[i]
		slices.SortFunc(p.members, e.compareHosts)
		p.stale = true
	}
	e.building = false
	as := slices.Clone(v.Assignments)
	slices.SortFunc(as, func(a, b *Assignment) int {
		return cmp.Or(cmp.Compare(a.Pipeline, b.Pipeline), cmp.Compare(a.Sidecar, b.Sidecar))
	})
	for _, a := range as {
		e.record(a)
	}
	for i := range e.pipes {
		e.carry(&e.pipes[i])
		e.touch(int32(i))
	}
	for i := range e.hosts {
		e.refresh(int32(i))
	}
	e.shares()
	return e
}

func sorted[T any](in []*T, id func(*T) string) []*T {
	byID := func(a, b *T) int { return cmp.Compare(id(a), id(b)) }
	if slices.IsSortedFunc(in, byID) {
		return in
	}
	in = slices.Clone(in)
	slices.SortFunc(in, byID)
	return in
}

// addHost indexes s without a profile. It returns the names whose stages have to
// be looked at again.
func (e *Engine) addHost(s *Sidecar) (h int32, turned []int32) {
	s = canonical(s)
	if n := len(e.freeHosts); n > 0 {
		h, e.freeHosts = e.freeHosts[n-1], e.freeHosts[:n-1]
		e.hosts[h] = host{}
	} else {
		h = int32(len(e.hosts))
		e.hosts = append(e.hosts, host{})
	}
	x := &e.hosts[h]
	x.set(s)
	x.profile, x.order = -1, -1
	e.hostID[s.ID] = h
	e.locate(h)
	return h, e.offer(h)
}

// canonical returns s with its offers in order.
func canonical(s *Sidecar) *Sidecar {
	offers := sortOffers(s.Offers)
	if len(offers) > 0 && &offers[0] != &s.Offers[0] {
		c := *s
		c.Offers = offers
		return &c
	}
	return s
}

// locate enters h into its zone and node.
func (e *Engine) locate(h int32) {
	x := &e.hosts[h]
	x.zone, x.node = 0, 0
	if z := x.s.Zone; z != "" {
		id, ok := e.zoneID[z]
		if !ok {
			id = vacant(&e.zones, &e.freeZones)
			e.zoneID[z] = id
		}
		x.zone = id
		e.zones[id].members++
	}
	if n := x.s.Node; n != "" {
		k := machineKey{x.s.Zone, n}
		id, ok := e.nodeID[k]
		if !ok {
			id = vacant(&e.nodes, &e.freeNodes)
			e.nodeID[k] = id
		}
		x.node = id
		e.nodes[id].hosts = append(e.nodes[id].hosts, resident{h, -1})
	}
}

// vacant returns the position of an unused element of all, appended if none is
// free.
func vacant[T any](all *[]T, free *[]int32) int32 {
	if n := len(*free); n > 0 {
		id := (*free)[n-1]
		*free = (*free)[:n-1]
		return id
	}
	var none T
	*all = append(*all, none)
	return int32(len(*all) - 1)
}

// unlocate takes h out of its zone and node, which are forgotten with the last
// sidecar: nodes come and go under ever new names.
func (e *Engine) unlocate(h int32) {
	x := &e.hosts[h]
	if n := x.node; n != 0 {
		e.nodes[n].hosts = slices.DeleteFunc(e.nodes[n].hosts, func(r resident) bool { return r.host == h })
		if len(e.nodes[n].hosts) == 0 {
			delete(e.nodeID, machineKey{x.s.Zone, x.s.Node})
			e.nodes[n] = machine{}
			e.freeNodes = append(e.freeNodes, n)
		}
	}
	if z := x.zone; z != 0 {
		if e.zones[z].members--; e.zones[z].members == 0 {
			delete(e.zoneID, x.s.Zone)
			e.freeZones = append(e.freeZones, z)
		}
	}
}

// setProfile notes the profile of h.
func (e *Engine) setProfile(h, profile int32) {
	x := &e.hosts[h]
	x.profile = profile
	if x.node == 0 {
		return
	}
	for i := range e.nodes[x.node].hosts {
		if r := &e.nodes[x.node].hosts[i]; r.host == h {
			r.profile = profile
			return
		}
	}
}

// remove takes x out of s, keeping the order.
func remove(s []int32, x int32) []int32 {
	if i := slices.Index(s, x); i >= 0 {
		return slices.Delete(s, i, i+1)
	}
	return s
}

func (e *Engine) nameOf(s string) int32 {
	id, ok := e.nameID[s]
	if !ok {
		id = vacant(&e.names, &e.freeNames)
		e.names[id] = name{text: s}
		e.nameID[s] = id
	}
	return id
}

// offer enters the names h offers. It returns those whose stages have to be
// looked at again: what was asked for by type goes by name now, or the reverse.
func (e *Engine) offer(h int32) (turned []int32) {
	e.loneKnown = false
	x := &e.hosts[h]
	x.names = x.names[:0]
	x.s.eachName(func(s string, same []Offer) {
		n := e.nameOf(s)
		x.names = append(x.names, n)
		e.names[n].hosts = append(e.names[n].hosts, h)
		if e.countOffers(n, same, +1) {
			turned = append(turned, n)
		}
	})
	return turned
}

// unoffer is the reverse of offer.
func (e *Engine) unoffer(h int32) (turned []int32) {
	e.loneKnown = false
	e.hosts[h].s.eachName(func(s string, same []Offer) {
		n := e.nameID[s]
		e.names[n].hosts = remove(e.names[n].hosts, h)
		if len(e.names[n].hosts) == 0 {
			e.unused = append(e.unused, n)
		}
		if e.countOffers(n, same, -1) {
			turned = append(turned, n)
		}
	})
	return turned
}

// eachName calls fn for every name s offers, with the offers of that name.
func (s *Sidecar) eachName(fn func(name string, same []Offer)) {
	for i := 0; i < len(s.Offers); {
		j := i + 1
		for j < len(s.Offers) && s.Offers[j].Name == s.Offers[i].Name {
			j++
		}
		fn(s.Offers[i].Name, s.Offers[i:j])
		i = j
	}
}

// countOffers counts for which types of stages one sidecar offers name n. It
// returns true when that is the first or the last one for any of them.
func (e *Engine) countOffers(n int32, same []Offer, by int32) bool {
	turned := false
	nm := &e.names[n]
	for t := range nm.offers {
		if slices.ContainsFunc(same, func(o Offer) bool { return StageType(t).fits(o.Type) }) {
			was := nm.offers[t]
			nm.offers[t] += by
			turned = turned || was == 0 || nm.offers[t] == 0
		}
	}
	return turned && nm.stages > 0
}
