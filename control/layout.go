package control

import (
	"cmp"
	"slices"

	"github.com/cespare/xxhash/v2"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// layout is where the stages of one pipeline run, and to which sidecar each
// sidecar hands on. Stages are named by their position in the spec, sidecars by
// their position in the fleet.
//
// Invariant: the graph of hand-overs (out) has no cycle.
type layout struct {
	f      *fleet
	id     string
	stages []stage
	order  []int // stages, upstream first
	cyclic bool  // the spec has a cycle: nothing can be placed
	// circular: every layout would hand records back to where they came from.
	circular bool
	closed   map[int]bool // sidecars that get nothing of the pipeline; see scope

	// before is where the stages ran until now; links are the hand-overs of
	// the tables that sidecars hold until they hear of this plan.
	before map[spot]tie
	routes map[spot]int // (sidecar, downstream stage) -> sidecar handed over to
	links  map[int][]int

	nodes map[int]*node
	undo  []step
	load  []int // per sidecar: stages it runs, of all pipelines
}

type stage struct {
	want
	id       string
	up, down []int
	count    int   // instances asked for, at least 1
	bound    []int // sidecars that run it until now, by id
	able     []int // sidecars that may be given it, by id
	hosts    []int // sidecars in scope; see scope
	gap      int   // a stage downstream that cannot run, or -1
	kept     bool  // an entry stage kept back for that
	at       []int // sidecars that run it, in the order they were added
	entry    bool  // records enter the pipeline here
}

// spot is a stage on a sidecar.
type spot struct{ host, stage int }

// tie says how strongly a stage belongs to a spot.
type tie int

const (
	untied tie = iota
	former     // its sidecar ran some of the pipeline once
	bound      // runs there now
)

// node is one sidecar's part of the pipeline.
type node struct {
	local map[int]bool // stages run here
	next  map[int]int  // stage run elsewhere -> sidecar
	out   map[int]int  // sidecar -> number of hand-overs to it
}

// step is one undoable change of a layout.
type step struct {
	kind stepKind
	host int
	stg  int
	to   int
}

type stepKind int

const (
	stepPlace stepKind = iota
	stepRoute
	stepUnroute
)

// newLayout prepares pipeline p; current holds the assignments of that
// pipeline, load the stages per sidecar without those of p.
func newLayout(f *fleet, p *commandpb.Pipeline, current []*commandpb.Assignment, load []int) *layout {
	spec := p.GetSpec()
	l := &layout{
		f: f, id: spec.GetId(), load: load,
		stages: make([]stage, len(spec.GetStages())),
		before: make(map[spot]tie), routes: make(map[spot]int), links: make(map[int][]int),
		nodes: make(map[int]*node),
	}
	names := make([]string, len(l.stages))
	index := make(map[string]int, len(l.stages))
	for i, st := range spec.GetStages() {
		names[i] = router.NormalizeName(st.GetSelector().GetServiceName())
		index[st.GetId()] = i
	}
	for i, st := range spec.GetStages() {
		l.stages[i] = stage{want: f.wantOf(st, names), id: st.GetId(), count: max(1, int(st.GetParallelism()))}
	}
	for _, e := range spec.GetEdges() {
		from, ok1 := index[e.GetFromStage()]
		to, ok2 := index[e.GetToStage()]
		if ok1 && ok2 && !slices.Contains(l.stages[from].down, to) {
			l.stages[from].down = append(l.stages[from].down, to)
			l.stages[to].up = append(l.stages[to].up, from)
		}
	}
	l.sort()
	for i := range l.stages {
		s := &l.stages[i]
		s.entry = len(s.up) == 0 || s.stage.GetType() == commandpb.StageType_STAGE_TYPE_SOURCE
	}
	l.remember(current, index)
	for i := range l.stages {
		slices.Sort(l.stages[i].bound)
		l.stages[i].able = f.candidates(&l.stages[i].want)
	}
	return l
}

// sort orders the stages upstream first, those of equal rank as declared.
func (l *layout) sort() {
	waits := make([]int, len(l.stages))
	for i := range l.stages {
		waits[i] = len(l.stages[i].up)
	}
	done := make([]bool, len(l.stages))
	for len(l.order) < len(l.stages) {
		grew := false
		for i := range l.stages {
			if done[i] || waits[i] > 0 {
				continue
			}
			done[i], grew = true, true
			l.order = append(l.order, i)
			for _, d := range l.stages[i].down {
				waits[d]--
			}
		}
		if !grew {
			l.cyclic, l.order = true, nil
			return
		}
	}
}

// remember takes over what the sidecars hold now.
func (l *layout) remember(current []*commandpb.Assignment, index map[string]int) {
	for _, a := range current {
		h, ok := l.f.byID[a.GetSidecarId()]
		if !ok {
			continue
		}
		if a.GetRevoked() {
			// A revocation no longer says which stages ran there.
			for i := range l.stages {
				l.before[spot{h, i}] = former
			}
			continue
		}
		for _, s := range a.GetStages() {
			i, known := index[s.GetStageId()]
			if s.GetRemoteSidecarId() != "" {
				if to, ok := l.f.byID[s.GetRemoteSidecarId()]; ok && to != h {
					l.links[h] = append(l.links[h], to)
					if known {
						l.routes[spot{h, i}] = to
					}
				}
				continue
			}
			if known && l.before[spot{h, i}] != bound {
				l.stages[i].bound = append(l.stages[i].bound, h)
				l.before[spot{h, i}] = bound
			}
		}
	}
}

func (l *layout) node(h int) *node {
	n := l.nodes[h]
	if n == nil {
		n = &node{local: make(map[int]bool), next: make(map[int]int), out: make(map[int]int)}
		l.nodes[h] = n
	}
	return n
}

func (l *layout) runs(h, stg int) bool {
	n := l.nodes[h]
	return n != nil && n.local[stg]
}

// clear takes every stage off every sidecar.
func (l *layout) clear() {
	l.nodes = make(map[int]*node)
	l.undo = l.undo[:0]
	for i := range l.stages {
		l.stages[i].at = nil
	}
}

// place lets host h run stage stg and routes the hand-overs that follow from
// it. It changes nothing and returns false when a hand-over could only be
// routed in a circle. With careful set, the tables that sidecars may still hold
// count as hand-overs too, so that no circle exists while some have heard of a
// change and others have not.
func (l *layout) place(stg, h int, careful bool) bool {
	mark := len(l.undo)
	s := &l.stages[stg]
	n := l.node(h)
	if to, ok := n.next[stg]; ok {
		l.unroute(h, stg, to)
	}
	n.local[stg] = true
	s.at = append(s.at, h)
	l.undo = append(l.undo, step{stepPlace, h, stg, 0})
	for _, u := range s.up {
		for _, from := range l.stages[u].at {
			if !l.route(from, stg, careful) {
				l.rollback(mark)
				return false
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

// route makes sure that host from can hand over to stage stg if that runs
// anywhere.
func (l *layout) route(from, stg int, careful bool) bool {
	n := l.node(from)
	if n.local[stg] {
		return true
	}
	if _, ok := n.next[stg]; ok {
		return true
	}
	at := l.stages[stg].at
	if len(at) == 0 {
		return true
	}
	best := -1
	for _, to := range at {
		if l.reaches(to, from, careful) {
			continue
		}
		if best < 0 || l.compareTargets(from, stg, to, best) < 0 {
			best = to
		}
	}
	if best < 0 {
		return false
	}
	n.next[stg] = best
	n.out[best]++
	l.undo = append(l.undo, step{stepRoute, from, stg, best})
	return true
}

func (l *layout) unroute(from, stg, to int) {
	n := l.node(from)
	delete(n.next, stg)
	if n.out[to]--; n.out[to] == 0 {
		delete(n.out, to)
	}
	l.undo = append(l.undo, step{stepUnroute, from, stg, to})
}

func (l *layout) rollback(mark int) {
	for len(l.undo) > mark {
		st := l.undo[len(l.undo)-1]
		l.undo = l.undo[:len(l.undo)-1]
		n := l.node(st.host)
		switch st.kind {
		case stepPlace:
			delete(n.local, st.stg)
			at := l.stages[st.stg].at
			l.stages[st.stg].at = at[:len(at)-1]
		case stepRoute:
			delete(n.next, st.stg)
			if n.out[st.to]--; n.out[st.to] == 0 {
				delete(n.out, st.to)
			}
		case stepUnroute:
			n.next[st.stg] = st.to
			n.out[st.to]++
		}
	}
}

// reaches says whether a batch handed to host from can come to host to.
func (l *layout) reaches(from, to int, careful bool) bool {
	if from == to {
		return true
	}
	seen := map[int]bool{from: true}
	todo := []int{from}
	for len(todo) > 0 {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		visit := func(next int) bool {
			if next == to {
				return true
			}
			if !seen[next] {
				seen[next] = true
				todo = append(todo, next)
			}
			return false
		}
		if n := l.nodes[h]; n != nil {
			for next := range n.out { // order does not matter: the answer is yes or no
				if visit(next) {
					return true
				}
			}
		}
		if careful {
			for _, next := range l.links[h] {
				if visit(next) {
					return true
				}
			}
		}
	}
	return false
}

// compareTargets orders two sidecars that from could hand stg over to: the one
// it hands over to now, one that is not suspect, the one fewest hand over to.
func (l *layout) compareTargets(from, stg, a, b int) int {
	stays := func(h int) int {
		if to, ok := l.routes[spot{from, stg}]; ok && to == h {
			return 0
		}
		return 1
	}
	suspect := func(h int) int {
		if l.f.hosts[h].State == commandpb.SidecarState_SIDECAR_STATE_SUSPECT {
			return 1
		}
		return 0
	}
	if c := cmp.Or(cmp.Compare(stays(a), stays(b)), cmp.Compare(suspect(a), suspect(b)), cmp.Compare(l.fanIn(stg, a), l.fanIn(stg, b))); c != 0 {
		return c
	}
	pair := l.f.hosts[from].SidecarId
	return cmp.Or(-cmp.Compare(l.weight(pair, stg, a), l.weight(pair, stg, b)), cmp.Compare(a, b))
}

// fanIn counts the sidecars that hand stage stg over to host h.
func (l *layout) fanIn(stg, h int) int {
	n := 0
	for _, from := range l.nodes { // order does not matter: it is counted
		if to, ok := from.next[stg]; ok && to == h {
			n++
		}
	}
	return n
}

// weight is the rendezvous weight of host h for a stage: without it all
// pipelines would crowd on the sidecars that sort first.
func (l *layout) weight(salt string, stg, h int) uint64 {
	var d xxhash.Digest
	d.Reset()
	for _, s := range [...]string{l.id, l.stages[stg].id, salt, l.f.hosts[h].SidecarId} {
		_, _ = d.WriteString(s) // never fails
		_, _ = d.Write([]byte{0})
	}
	return d.Sum64()
}

// rank is how well a host suits a stage; see compareRanks.
type rank struct {
	host   int
	tie    tie
	local  int // edges that stay within the pod
	load   int
	weight uint64
}

func (l *layout) rank(stg, h int) rank {
	r := rank{host: h, tie: l.before[spot{h, stg}], load: l.load[h], weight: l.weight("", stg, h)}
	s := &l.stages[stg]
	for _, u := range s.up {
		if l.runs(h, u) {
			r.local++
		}
	}
	for _, d := range s.down {
		if l.runs(h, d) {
			r.local++
		}
	}
	if n := l.nodes[h]; n != nil {
		r.load += len(n.local)
	}
	return r
}

// compareRanks puts the better host first: where the stage runs or ran, then
// beside its neighbours, then the least loaded.
func compareRanks(a, b rank) int {
	return cmp.Or(
		-cmp.Compare(a.tie, b.tie),
		-cmp.Compare(a.local, b.local),
		cmp.Compare(a.load, b.load),
		-cmp.Compare(a.weight, b.weight),
		cmp.Compare(a.host, b.host),
	)
}
