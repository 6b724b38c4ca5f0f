package placement

import (
	"math/rand/v2"
	"testing"
)

// greedy places every stage of every pipeline of v in a random order of
// pipelines, each where most of its neighbours run, near to them otherwise, on
// the least loaded of equals, ties thrown. It returns the share of edges that stay
// within a pod.
func greedy(v View, rng *rand.Rand) float64 {
	offers := make(map[string][]int)
	for i, s := range v.Sidecars {
		for _, o := range s.Offers {
			offers[o.Name] = append(offers[o.Name], i)
		}
	}
	load := make([]int, len(v.Sidecars))
	edges, local := 0, 0
	for _, k := range rng.Perm(len(v.Pipelines)) {
		p := v.Pipelines[k]
		runs := make([]map[int]bool, len(p.Stages)) // stages form a chain
		for i := range p.Stages {
			runs[i] = make(map[int]bool)
			hosts := offers[p.Stages[i].Name]
			for range min(int(p.Stages[i].Parallelism), len(hosts)) {
				best, score := -1, 0
				for _, j := range rng.Perm(len(hosts)) {
					h := hosts[j]
					if runs[i][h] {
						continue
					}
					s := -load[h]
					if i > 0 && runs[i-1][h] {
						s += 1 << 20
					}
					if best < 0 || s > score {
						best, score = h, s
					}
				}
				runs[i][best] = true
				load[best]++
			}
			if i > 0 {
				for h := range runs[i-1] {
					edges++
					if runs[i][h] {
						local++
					}
				}
			}
		}
	}
	return share(local, edges)
}

// mixedView is bigView with pods that hold any two or three services of their
// family, so that which of them are taken together matters.
func mixedView(size fleetSize, rng *rand.Rand) View {
	v := bigView(size)
	for i, s := range v.Sidecars {
		if len(s.Offers) < 5 {
			continue
		}
		from := rng.IntN(4)
		s.Offers = s.Offers[from:min(5, from+2+rng.IntN(2))]
		if i < size.sidecars/10 { // every family has each service somewhere
			s.Offers = bigView(fleetSize{sidecars: size.sidecars}).Sidecars[i].Offers
		}
	}
	return v
}

// TestLocalityAgainstGreedy: no more than two per cent of the edges leave their
// pod beyond the best of 100 randomised greedy runs, however the pods are cut,
// and the load is even where that is possible.
func TestLocalityAgainstGreedy(t *testing.T) {
	const seed = 11
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for name, v := range map[string]View{
		"whole pods": bigView(fleetSize{sidecars: 600, pipelines: 60, parallelism: 10}),
		"one each":   bigView(fleetSize{sidecars: 600, pipelines: 60, parallelism: 1}),
		"mixed pods": mixedView(fleetSize{sidecars: 600, pipelines: 60, parallelism: 5}, rng),
	} {
		best := 0.0
		for range 100 {
			best = max(best, greedy(v, rng))
		}
		e := NewEngine(v)
		e.Plan()
		q := e.Measure()
		t.Logf("%s: %.4f of the edges are local, best greedy %.4f, max/mean %.3f, %+v", name, q.LocalShare(), best, q.MaxOverMean(), q)
		if q.LocalShare() < best-0.02 {
			t.Errorf("%s: %.4f of the edges are local, a greedy run reached %.4f", name, q.LocalShare(), best)
		}
		if q.Placed < q.Asked || q.Pending > 0 {
			t.Errorf("%s: %d of %d instances are placed", name, q.Placed, q.Asked)
		}
		if name == "whole pods" && q.MaxOverMean() > 1.05 {
			t.Errorf("%s: the most loaded sidecar has %.3f times the mean", name, q.MaxOverMean())
		}
	}
}
