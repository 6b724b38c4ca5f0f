package placement

import (
	"cmp"
	"math/bits"
	"slices"
)

// pipe is a pipeline, or what is left of one that is gone.
type pipe struct {
	id     string
	index  int32
	spec   *Pipeline // nil = gone
	stages []stage
	order  []int32 // stages, upstream first
	cyclic bool    // the spec has a cycle: nothing can be placed

	// recorded is what its sidecars have been told, by sidecar id.
	recorded []*Assignment
	// held is what it adds to the load of sidecars.
	held  []holding
	dirty bool
	// circular: nothing of it is handed out, since every layout goes round.
	circular bool
	step     int32  // of the plan that is being made, -1 = none
	shifts   uint64 // Engine.shifts when it was laid out

	// pass is in which pass of Balance nothing of it could be moved, failed in how many,
	// up to maxFailed; half of that after each that went well.
	pass   uint64
	failed uint8

	// What came of the newest layout: its figures, and which stages have a place.
	figures figures
	placed  []bool
}

// stage is one of a pipe.
type stage struct {
	*Stage
	name     int32   // 0 = any
	want     int32   // -1 = not resolved
	rivals   []int32 // names other stages of the pipeline select, for wants by type
	up, down []int32
	count    int32 // instances asked for, at least 1
	entry    bool  // records enter the pipeline here
	short    bool  // it has fewer than asked for, and its want knows
}

// holding is what one pipeline adds to one sidecar.
type holding struct {
	host int32
	n    int32 // stages
	in   int32 // hand-overs to it
	// fresh: it was not given all of this before.
	fresh bool
}

// figures tell how good a layout is.
type figures struct {
	asked, placed   int // instances
	pending         int // stages that run nowhere
	edges           int // one for each downstream stage of each instance
	pod, node, zone int // those that stay within
	moves, least    int // see Quality
}

func (f *figures) add(o figures, by int) {
	f.asked += by * o.asked
	f.placed += by * o.placed
	f.pending += by * o.pending
	f.edges += by * o.edges
	f.pod += by * o.pod
	f.node += by * o.node
	f.zone += by * o.zone
}

// declare makes the stages and edges of x as its spec has them.
func (x *pipe) declare() {
	p := x.spec
	x.stages = make([]stage, len(p.Stages))
	index := make(map[string]int32, len(p.Stages))
	for k := range p.Stages {
		st := &p.Stages[k]
		index[st.ID] = int32(k)
		s := &x.stages[k]
		s.Stage, s.count, s.want = st, int32(min(max(1, st.Parallelism), 1<<30)), -1
	}
	for _, edge := range p.Edges {
		from, ok1 := index[edge.From]
		to, ok2 := index[edge.To]
		if ok1 && ok2 && !slices.Contains(x.stages[from].down, to) {
			x.stages[from].down = append(x.stages[from].down, to)
			x.stages[to].up = append(x.stages[to].up, from)
		}
	}
}

// addPipe indexes p without its wants.
func (e *Engine) addPipe(p *Pipeline) int32 {
	i := e.pipeOf(p.ID)
	x := &e.pipes[i]
	x.spec = p
	x.declare()
	x.order = x.order[:0]
	for k := range x.stages {
		s := &x.stages[k]
		if st := s.Stage; st.Name != "" {
			s.name = e.nameOf(st.Name)
			n := &e.names[s.name]
			n.stages++
			if n.pipes == nil {
				n.pipes = make(map[int32]int32)
			}
			n.pipes[i]++
		}
	}
	x.sort()
	for k := range x.stages {
		s := &x.stages[k]
		s.entry = len(s.up) == 0 || s.Type == SourceStage
		for j := range x.stages {
			if n := x.stages[j].name; n != 0 && n != s.name && len(x.stages) <= maxRivals {
				s.rivals = append(s.rivals, n)
			}
		}
		slices.Sort(s.rivals)
		s.rivals = slices.Compact(s.rivals)
	}
	return i
}

// maxRivals is up to how many stages a pipeline's names are kept with each of its
// stages; in larger ones they are looked up in the pipeline.
const maxRivals = 64

// rival is true when another stage of the pipeline than s selects name n.
func (x *pipe) rival(s *stage, n int32) bool {
	if n == 0 || n == s.name {
		return false
	}
	if len(x.stages) <= maxRivals {
		_, ok := slices.BinarySearch(s.rivals, n)
		return ok
	}
	return slices.ContainsFunc(x.stages, func(o stage) bool { return o.name == n })
}

// sort orders the stages upstream first, those of equal rank as declared.
func (x *pipe) sort() {
	x.cyclic = false
	waits := make([]int, len(x.stages))
	var ready []int32
	for i := range x.stages {
		if waits[i] = len(x.stages[i].up); waits[i] == 0 {
			ready = append(ready, int32(i))
		}
	}
	for len(ready) > 0 {
		var next []int32
		for _, i := range ready {
			x.order = append(x.order, i)
			for _, d := range x.stages[i].down {
				if waits[d]--; waits[d] == 0 {
					next = append(next, d)
				}
			}
		}
		slices.Sort(next)
		ready = next
	}
	if len(x.order) < len(x.stages) {
		x.cyclic, x.order = true, x.order[:0]
	}
}

// pipeOf returns the pipe with that id, made if need be.
func (e *Engine) pipeOf(id string) int32 {
	if i, ok := e.pipeID[id]; ok {
		return i
	}
	var i int32
	if n := len(e.freePipes); n > 0 {
		i, e.freePipes = e.freePipes[n-1], e.freePipes[:n-1]
	} else {
		i = int32(len(e.pipes))
		e.pipes = append(e.pipes, pipe{})
	}
	e.pipes[i] = pipe{id: id, index: i}
	e.pipeID[id] = i
	return i
}

// wantOf returns what st asks for, made if need be.
func (e *Engine) wantOf(st *Stage) (id int32, made bool) {
	w := want{stage: st.Type, labels: st.Labels, group: st.Group}
	n := int32(0)
	if st.Name != "" {
		n = e.nameOf(st.Name)
	}
	if n == 0 || e.names[n].offers[min(st.Type, SinkStage)] == 0 {
		w.byType = true
	} else {
		w.name, w.raw = st.Name, st.Raw
	}
	key := w.key()
	if id, ok := e.wantID[key]; ok {
		return id, false
	}
	id = vacant(&e.wants, &e.freeWants)
	w.short = make(map[int32]bool)
	e.wants[id] = w
	e.wantID[key] = id
	if w.byType {
		e.typed = append(e.typed, id)
	} else {
		e.names[n].wants = append(e.names[n].wants, id)
	}
	return id, true
}

// resolve finds the wants of the stages of x, and lets the sidecars that could
// meet new ones be matched again.
func (e *Engine) resolve(x *pipe) {
	var again []int32
	all := false
	for k := range x.stages {
		s := &x.stages[k]
		id, made := e.wantOf(s.Stage)
		if id != s.want {
			if s.want >= 0 {
				e.fill(x, s)
				e.unask(s.want)
			}
			s.want = id
			e.wants[id].stages++
		}
		if made || (s.name != 0 && e.names[s.name].stages == 1) {
			again = append(again, s.name)
			all = all || (made && e.wants[id].byType)
		}
	}
	if e.building || len(again) == 0 {
		return
	}
	var hosts []int32
	if all {
		for h := range e.hosts {
			if e.hosts[h].profile >= 0 {
				hosts = append(hosts, int32(h))
			}
		}
	} else {
		for _, n := range again {
			hosts = append(hosts, e.names[n].hosts...)
		}
		slices.Sort(hosts)
		hosts = slices.Compact(hosts)
		hosts = slices.DeleteFunc(hosts, func(h int32) bool { return e.hosts[h].profile < 0 })
	}
	e.match(hosts)
}

// fill forgets that s of x is short of instances.
func (e *Engine) fill(x *pipe, s *stage) {
	if !s.short {
		return
	}
	s.short = false
	for k := range x.stages {
		if o := &x.stages[k]; o.short && o.want == s.want {
			return
		}
	}
	delete(e.wants[s.want].short, x.index)
}

// unspec takes back what the stages of x added to the indexes.
func (e *Engine) unspec(x *pipe) {
	for k := range x.stages {
		s := &x.stages[k]
		e.fill(x, s)
		if s.want >= 0 {
			e.unask(s.want)
		}
		if s.name != 0 {
			n := &e.names[s.name]
			if n.stages--; n.stages == 0 {
				e.unused = append(e.unused, s.name)
			}
			if n.pipes[x.index]--; n.pipes[x.index] == 0 {
				delete(n.pipes, x.index)
			}
		}
	}
	x.stages, x.spec, x.order = nil, nil, nil
}

// record takes over what a sidecar has been told. It returns the pipe.
func (e *Engine) record(a *Assignment) int32 {
	i := e.pipeOf(a.Pipeline)
	x := &e.pipes[i]
	at, known := x.find(a.Sidecar)
	if known {
		x.recorded[at] = a
	} else {
		x.recorded = slices.Insert(x.recorded, at, a)
	}
	if a.Revoked {
		e.untie(a.Sidecar, i)
	} else {
		e.tie(a.Sidecar, i)
	}
	return i
}

func (x *pipe) find(sidecar string) (int, bool) {
	return slices.BinarySearchFunc(x.recorded, sidecar, func(a *Assignment, id string) int { return cmp.Compare(a.Sidecar, id) })
}

// tie remembers that a sidecar has a table of pipe i.
func (e *Engine) tie(sidecar string, i int32) {
	if h, ok := e.hostID[sidecar]; !ok {
		if !slices.Contains(e.orphans[sidecar], i) {
			e.orphans[sidecar] = append(e.orphans[sidecar], i)
		}
	} else if x := &e.hosts[h]; !slices.Contains(x.pipes, i) {
		x.pipes = append(x.pipes, i)
	}
}

func (e *Engine) untie(sidecar string, i int32) {
	if h, ok := e.hostID[sidecar]; ok {
		e.hosts[h].pipes = remove(e.hosts[h].pipes, i)
	} else if o := remove(e.orphans[sidecar], i); len(o) == 0 {
		delete(e.orphans, sidecar)
	} else {
		e.orphans[sidecar] = o
	}
}

// carry counts what the recorded assignments of x add to the load.
func (e *Engine) carry(x *pipe) {
	for _, a := range x.recorded {
		h, ok := e.hostID[a.Sidecar]
		if !ok || a.Revoked {
			continue
		}
		n := int32(0)
		for i := range a.Stages {
			if a.Stages[i].Remote == "" {
				n++
			}
		}
		x.held = append(x.held, holding{host: h, n: n})
		e.hosts[h].load += n
	}
}

// touch marks pipe i as to be planned.
func (e *Engine) touch(i int32) {
	if x := &e.pipes[i]; !x.dirty {
		x.dirty = true
		e.dirty = append(e.dirty, i)
	}
}

// bitset is a small set of stages.
type bitset []uint64

func (b bitset) has(i int32) bool { return b[i>>6]&(1<<(i&63)) != 0 }
func (b bitset) add(i int32)      { b[i>>6] |= 1 << (i & 63) }
func (b bitset) del(i int32)      { b[i>>6] &^= 1 << (i & 63) }

func (b bitset) count() (n int32) {
	for _, w := range b {
		n += int32(bits.OnesCount64(w))
	}
	return n
}
