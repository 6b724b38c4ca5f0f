package placement

import "math"

// Quality says how good the layouts are that a plan leads to. Counts of moves
// and what they are compared with are those of the plan; all else is of all
// pipelines there are.
type Quality struct {
	// Moves are the stages that sidecars are newly given, Least the fewest that
	// any plan could do with: instances that nobody runs and somebody can.
	Moves, Least int
	// Asked and Placed count instances of stages of enabled pipelines; Pending
	// the stages of them that run nowhere.
	Asked, Placed, Pending int
	// Edges counts where records are handed on, one for each downstream stage of
	// each instance; those within a pod, within a node and within a zone are
	// parts of the ones after.
	Edges, InPod, InNode, InZone int
	// Highest is the load by capacity of the most loaded sidecar, Mean that of all
	// that take stages and offer what any pipeline asks for; Bound is the least
	// that Highest could be, whatever the edges: that of the sidecars that must
	// carry most, rounded up to whole stages.
	Highest, Mean, Bound float64
	// Together is the least that Highest could be in any plan that keeps as many
	// edges of each pipeline within pods: what hangs together is load of one
	// sidecar. Where there are more sidecars than stages it says what Mean, a
	// fraction of a stage then, does not.
	Together float64
}

// MaxOverMean is Highest by the largest of Mean, Bound and Together, which it cannot
// be below. 1 is perfect; 0 = nothing to compare, as when nothing runs.
func (q *Quality) MaxOverMean() float64 {
	least := max(q.Mean, q.Bound, q.Together)
	if q.Highest == 0 || least == 0 {
		return 0
	}
	return q.Highest / least
}

// SetLoad takes over the load of another measurement.
func (q *Quality) SetLoad(of *Quality) {
	q.Highest, q.Mean, q.Bound, q.Together = of.Highest, of.Mean, of.Bound, of.Together
}

// LocalShare is the share of edges that stay within a pod.
func (q *Quality) LocalShare() float64 { return share(q.InPod, q.Edges) }

func share(n, of int) float64 {
	if of == 0 {
		return 1
	}
	return float64(n) / float64(of)
}

// count adds the figures of one plan's pipeline.
func (q *Quality) count(x *pipe) {
	q.Moves += x.figures.moves
	q.Least += x.figures.least
}

// sum fills in what is known of all pipelines together.
func (e *Engine) sum(q *Quality) {
	t := &e.totals
	q.Asked, q.Placed, q.Pending = t.asked, t.placed, t.pending
	q.Edges, q.InPod, q.InNode, q.InZone = t.edges, t.pod, t.node, t.zone
}

// Judge tells how good the present place of one pipeline is, from its assignments
// and what is known of the sidecars that hold them: at returns one of them and how
// many stages it runs, of all pipelines, or nil. Load is that of these sidecars
// alone. It needs no engine.
func Judge(p *Pipeline, recorded []*Assignment, at func(sidecar string) (*Sidecar, int)) Quality {
	var q Quality
	if !p.Enabled {
		return q
	}
	x := pipe{spec: p, recorded: recorded}
	x.declare()
	runs := make(map[string]int, len(x.stages)) // instances, by stage
	load, capacity, hosts := 0, int64(0), 0
	largest := int64(1)
	for _, a := range recorded {
		s, n := at(a.Sidecar)
		if a.Revoked || s == nil {
			continue
		}
		here := make(map[string]*Assigned, len(a.Stages))
		for i := range a.Stages {
			here[a.Stages[i].Stage] = &a.Stages[i]
		}
		some := false
		for k := range x.stages {
			st := here[x.stages[k].ID]
			if st == nil || st.Remote != "" {
				continue
			}
			some = true
			runs[st.Stage]++
			for _, d := range x.stages[k].down {
				q.Edges++
				to := here[x.stages[d].ID]
				if to == nil {
					continue
				}
				far := int8(0)
				if to.Remote != "" {
					t, _ := at(to.Remote)
					far = distance(s, t)
				}
				q.near(far)
			}
		}
		if some {
			hosts++
			load += n
			capacity += s.capacity()
			largest = max(largest, s.capacity())
			q.Highest = max(q.Highest, float64(n)/float64(s.capacity()))
		}
	}
	for k := range x.stages {
		n, want := runs[x.stages[k].ID], int(x.stages[k].count)
		q.Asked += want
		q.Placed += min(n, want)
		if n == 0 {
			q.Pending++
		}
	}
	if hosts > 0 {
		q.Mean = float64(load) / float64(capacity)
		c := float64(capacity) / float64(hosts)
		q.Bound = min(q.Highest, math.Ceil(q.Mean*c-1e-3)/c)
		x.figures = figures{placed: q.Placed, pod: q.InPod}
		q.Together = min(q.Highest, float64(x.together())/float64(largest))
	}
	return q
}

// near counts an edge between sidecars so far apart.
func (q *Quality) near(far int8) {
	if far <= 2 {
		q.InZone++
	}
	if far <= 1 {
		q.InNode++
	}
	if far == 0 {
		q.InPod++
	}
}

// distance is that of Engine, of two sidecars that are not the same; b may be nil.
func distance(a, b *Sidecar) int8 {
	switch {
	case b == nil || a.Zone != b.Zone:
		return 3
	case a.Node != "" && a.Node == b.Node:
		return 1
	case a.Zone != "":
		return 2
	}
	return 3
}

// Measure returns the quality of the newest layouts with the load, which takes a
// look at every sidecar.
func (e *Engine) Measure() Quality {
	var q Quality
	e.sum(&q)
	wanted := make([]bool, len(e.profiles))
	for i := range e.profiles {
		p := &e.profiles[i]
		for _, f := range p.fits {
			wanted[i] = wanted[i] || (f.fit == fresh && e.wants[f.want].stages > 0)
		}
		if !wanted[i] || p.open == 0 {
			continue
		}
		c := float64(p.capacity) / float64(p.open)
		q.Bound = max(q.Bound, math.Ceil(float64(p.share)/unit*c-1e-3)/c)
	}
	var load, capacity int64
	largest := int64(1)
	for i := range e.hosts {
		x := &e.hosts[i]
		if x.profile < 0 || (!wanted[x.profile] && x.load == 0) {
			continue
		}
		c := x.capacity
		q.Highest = max(q.Highest, float64(x.load)/float64(c))
		largest = max(largest, c)
		if x.takes {
			load += int64(x.load)
			capacity += c
		}
	}
	for i := range e.pipes {
		q.Together = max(q.Together, float64(e.pipes[i].together())/float64(largest))
	}
	// Rounding goes by the mean capacity; a stage may run on sidecars that take none.
	q.Bound, q.Together = min(q.Bound, q.Highest), min(q.Together, q.Highest)
	if capacity > 0 {
		q.Mean = float64(load) / float64(capacity)
	}
	return q
}

// together is how many stages of x at least one sidecar has to run in any layout
// with as many instances and as many edges within pods.
//
// Among k stages of a graph there are at most k-1 edges and one more for each edge
// that closes a ring in it, so that on sidecars with at most m stages each, p
// instances have at most p times the best ratio of edges to stages up to m.
func (x *pipe) together() int {
	edges := 0
	for i := range x.stages {
		edges += len(x.stages[i].down)
	}
	rings := edges - len(x.stages) + x.parts()
	best := 0.0
	for m := 1; m < len(x.stages); m++ {
		best = max(best, float64(min(m*(m-1)/2, m-1+rings))/float64(m))
		if best*float64(x.figures.placed) >= float64(x.figures.pod) {
			return min(m, x.figures.placed)
		}
	}
	return min(len(x.stages), x.figures.placed)
}

// parts counts the parts of x that no edge connects.
func (x *pipe) parts() (n int) {
	seen := make([]bool, len(x.stages))
	var way []int32
	for i := range x.stages {
		if seen[i] {
			continue
		}
		n++
		seen[i] = true
		for way = append(way, int32(i)); len(way) > 0; {
			s := &x.stages[way[len(way)-1]]
			way = way[:len(way)-1]
			for _, next := range [...][]int32{s.up, s.down} {
				for _, d := range next {
					if !seen[d] {
						seen[d] = true
						way = append(way, d)
					}
				}
			}
		}
	}
	return n
}

// evaluate computes the figures of the layout.
func (l *layout) evaluate() figures {
	var f figures
	x := l.x
	if x.spec == nil || !x.spec.Enabled {
		return f
	}
	for i := range x.stages {
		s := &x.stages[i]
		stay := 0
		for n := range l.nodes {
			if had := l.nodes[n].bound.has(int32(i)); had && l.mayKeep(int32(i), int32(n)) {
				stay++
			}
		}
		f.asked += int(s.count)
		f.placed += len(l.at[i])
		if len(l.at[i]) == 0 {
			f.pending++
		}
		f.least += max(0, len(l.at[i])-stay)
		for _, n := range l.at[i] {
			from := &l.nodes[n]
			if !from.bound.has(int32(i)) {
				f.moves++
			}
			for _, d := range s.down {
				f.edges++
				if from.local.has(d) {
					f.pod++
					f.node++
					f.zone++
					continue
				}
				to, ok := from.next(d)
				if !ok {
					continue
				}
				switch l.e.distance(from.host, l.nodes[to].host) {
				case 1:
					f.node++
					f.zone++
				case 2:
					f.zone++
				}
			}
		}
	}
	return f
}
