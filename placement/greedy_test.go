package placement

import (
	"maps"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
)

// greedy is a view as the randomised greedy sees it. It shares nothing with the
// planner: what it knows are names of services and a count of stages on each
// sidecar.
type greedy struct {
	offers [][]int32 // per sidecar: names it offers
	able   [][]int32 // per name: sidecars that offer it
	asks   []ask     // per pipeline
}

// ask is a pipeline.
type ask struct {
	names []int32
	count []int32
	near  []uint64 // per stage: those it has an edge with
	edges [][2]int32
}

func newGreedy(v View) *greedy {
	g := &greedy{offers: make([][]int32, len(v.Sidecars))}
	ids := make(map[string]int32)
	name := func(s string) int32 {
		id, ok := ids[s]
		if !ok {
			id = int32(len(ids))
			ids[s] = id
			g.able = append(g.able, nil)
		}
		return id
	}
	for i, s := range v.Sidecars {
		for _, o := range s.Offers {
			n := name(o.Name)
			g.offers[i] = append(g.offers[i], n)
			g.able[n] = append(g.able[n], int32(i))
		}
	}
	for _, p := range v.Pipelines {
		var a ask
		at := make(map[string]int32)
		for i := range p.Stages {
			at[p.Stages[i].ID] = int32(i)
			a.names = append(a.names, name(p.Stages[i].Name))
			a.count = append(a.count, int32(max(1, p.Stages[i].Parallelism)))
		}
		a.near = make([]uint64, len(p.Stages))
		for _, e := range p.Edges {
			from, to := at[e.From], at[e.To]
			a.edges = append(a.edges, [2]int32{from, to})
			a.near[from] |= 1 << to
			a.near[to] |= 1 << from
		}
		g.asks = append(g.asks, a)
	}
	return g
}

// flavour is how a greedy run decides.
type flavour struct {
	name string
	// foresee lets it prefer, after those that run a neighbouring stage, sidecars
	// that could run more of what hangs together with the stage.
	foresee bool
	// even keeps it from sidecars that would run more than a limit with it, as long as
	// others are left. Without it a few sidecars that offer everything run everything.
	even bool
}

var flavours = []flavour{
	{name: "neighbours"},
	{name: "foresight", foresee: true, even: true},
}

// run places every stage of every pipeline in a random order of pipelines, each
// instance where most of its neighbours run, on the least loaded of equals, ties
// thrown. It returns the share of edges that stay within a pod, and the highest
// load.
func (g *greedy) run(f flavour, limit int, rng *rand.Rand) (local float64, highest int) {
	load := make([]int32, len(g.offers))
	runs := make([]uint64, len(g.offers)) // of the pipeline at hand, by stage
	var touched []int32
	type candidate struct {
		host  int32
		score int64
	}
	var best []candidate
	inside, edges := 0, 0
	for _, k := range rng.Perm(len(g.asks)) {
		p := &g.asks[k]
		instances := make([][]int32, len(p.names))
		missing := uint64(1)<<len(p.names) - 1
		for i := range p.names {
			best = best[:0]
			for _, h := range g.able[p.names[i]] {
				s := -int64(load[h])<<16 + int64(rng.Uint32()&0xffff)
				s += int64(bits.OnesCount64(runs[h]&p.near[i])) << 48
				more := 0
				if f.foresee {
					more = g.reach(p, h, i, missing)
					s += int64(more) << 40
				}
				if f.even && int(load[h])+bits.OnesCount64(runs[h])+1+more > limit {
					s -= 1 << 56
				}
				// The best of them, the best first.
				at := len(best)
				for at > 0 && best[at-1].score < s {
					at--
				}
				if at < int(p.count[i]) {
					best = slices.Insert(best[:min(len(best), int(p.count[i])-1)], at, candidate{h, s})
				}
			}
			for _, c := range best {
				if runs[c.host] == 0 {
					touched = append(touched, c.host)
				}
				runs[c.host] |= 1 << i
				instances[i] = append(instances[i], c.host)
			}
			missing &^= 1 << i
		}
		for _, e := range p.edges {
			for _, h := range instances[e[0]] {
				edges++
				if runs[h]&(1<<e[1]) != 0 {
					inside++
				}
			}
		}
		for _, h := range touched {
			load[h] += int32(bits.OnesCount64(runs[h]))
			runs[h] = 0
		}
		touched = touched[:0]
	}
	return share(inside, edges), int(slices.Max(load))
}

// reach counts the stages of p that lack instances and that hang together with
// stage i by edges all of whose ends h could run.
func (g *greedy) reach(p *ask, h int32, i int, missing uint64) int {
	can := uint64(0)
	for k, n := range p.names {
		if slices.Contains(g.offers[h], n) {
			can |= 1 << k
		}
	}
	can &= missing
	in := uint64(1) << i
	for todo := in; todo != 0; {
		k := bits.TrailingZeros64(todo)
		more := p.near[k] & can &^ in
		in |= more
		todo = todo&^(1<<k) | more
	}
	return bits.OnesCount64(in) - 1
}

// best is the best of n runs of each flavour, by flavour, with the highest load that
// came with it.
func (g *greedy) best(n, limit int, seed uint64) (local []float64, highest []int) {
	local, highest = make([]float64, len(flavours)), make([]int, len(flavours))
	var mu sync.Mutex
	var runs sync.WaitGroup
	turn := make(chan int)
	for range runtime.GOMAXPROCS(0) {
		runs.Go(func() {
			for k := range turn {
				share, most := g.run(flavours[k%len(flavours)], limit, rand.New(rand.NewPCG(seed, uint64(k))))
				mu.Lock()
				if f := k % len(flavours); share > local[f] {
					local[f], highest[f] = share, most
				}
				mu.Unlock()
			}
		})
	}
	for k := range n * len(flavours) {
		turn <- k
	}
	close(turn)
	runs.Wait()
	return local, highest
}

// mixedView is bigView with pods that hold any two or three services of their
// family, so that which of them are taken together matters.
func mixedView(size fleetSize, rng *rand.Rand) View {
	v := bigView(size)
	whole := bigView(fleetSize{sidecars: size.sidecars}).Sidecars
	for i, s := range v.Sidecars {
		if len(s.Offers) < 5 {
			continue
		}
		from := rng.IntN(4)
		s.Offers = s.Offers[from:min(5, from+2+rng.IntN(2))]
		if i < size.sidecars/10 { // every family has each service somewhere
			s.Offers = whole[i].Offers
		}
	}
	return v
}

// localityWorlds are fleets that differ in how the pods are cut.
func localityWorlds(sidecars, pipelines int, rng *rand.Rand) map[string]View {
	return map[string]View{
		"whole pods": bigView(fleetSize{sidecars: sidecars, pipelines: pipelines, parallelism: 10}),
		"one each":   bigView(fleetSize{sidecars: sidecars, pipelines: pipelines, parallelism: 1}),
		"mixed pods": mixedView(fleetSize{sidecars: sidecars, pipelines: pipelines, parallelism: 5}, rng),
	}
}

// checkLocality compares the planner with the best of n randomised greedy runs of
// each flavour, the even one of which loads no sidecar more than the planner does as
// long as that is possible. It returns the share of local edges, and by it that of
// the greedy ones.
func checkLocality(t testing.TB, name string, v View, n int, seed uint64) (planned, greedy float64) {
	e := NewEngine(v)
	e.Plan()
	q := e.Measure()
	local, highest := newGreedy(v).best(n, int(q.Highest), seed)
	t.Logf("%s: %.4f of the edges are local, max/mean %.3f, %+v", name, q.LocalShare(), q.MaxOverMean(), q)
	for k, f := range flavours {
		t.Logf("%s: %.4f in the best of %d greedy runs by %s, at most %d stages on a sidecar", name, local[k], n, f.name, highest[k])
	}
	best := slices.Max(local)
	if q.LocalShare() < 0.98*best {
		t.Errorf("%s: %.4f of the edges are local, a greedy run reached %.4f", name, q.LocalShare(), best)
	}
	if q.Placed < q.Asked || q.Pending > 0 {
		t.Errorf("%s: %d of %d instances are placed", name, q.Placed, q.Asked)
	}
	if name == "whole pods" && q.MaxOverMean() > 1.05 {
		t.Errorf("%s: the most loaded sidecar has %.3f times the mean", name, q.MaxOverMean())
	}
	return q.LocalShare(), best
}

// TestLocalityAgainstGreedy: no more than two per cent of the edges leave their
// pod beyond the best of 100 randomised greedy runs, however the pods are cut,
// and the load is even where that is possible.
func TestLocalityAgainstGreedy(t *testing.T) {
	const seed = 11
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for name, v := range localityWorlds(600, 60, rng) {
		checkLocality(t, name, v, 100, seed)
	}
}

// BenchmarkLocality is the same at full size. It takes some minutes.
func BenchmarkLocality(b *testing.B) {
	const seed = 11
	rng := rand.New(rand.NewPCG(seed, 0))
	worlds := localityWorlds(full.sidecars, full.pipelines, rng)
	for _, name := range slices.Sorted(maps.Keys(worlds)) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				planned, greedy := checkLocality(b, name, worlds[name], 100, seed)
				b.ReportMetric(100*planned, "%local")
				b.ReportMetric(100*greedy, "%greedy")
				b.ReportMetric(planned/greedy, "local/greedy")
			}
		})
	}
}
