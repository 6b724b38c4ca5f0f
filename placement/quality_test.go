package placement

import (
	"math"
	"testing"

	"pgregory.net/rapid"
)

// TestTogetherIsABound: whatever runs where, some sidecar runs at least as many
// stages as Quality.Together says for that many instances and local edges.
func TestTogetherIsABound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPipeline(t, "p", false)
		p.Enabled = true
		e := NewEngine(View{Pipelines: []*Pipeline{p}})
		x := &e.pipes[0]
		most := 0
		for range rapid.IntRange(1, 4).Draw(t, "sidecars") {
			runs, n := rapid.SliceOfN(rapid.Bool(), len(x.stages), len(x.stages)).Draw(t, "runs"), 0
			for i := range x.stages {
				if !runs[i] {
					continue
				}
				n++
				for _, d := range x.stages[i].down {
					if runs[d] {
						x.figures.pod++
					}
				}
			}
			x.figures.placed += n
			most = max(most, n)
		}
		if least := x.together(); least > most {
			t.Fatalf("%d instances with %d local edges run with at most %d on a sidecar, the bound is %d", x.figures.placed, x.figures.pod, most, least)
		}
	})
}

// TestTogetherOfWholePipelines: pipelines that stay whole in pods that outnumber
// them load one pod with all their stages, which is as even as that can be.
func TestTogetherOfWholePipelines(t *testing.T) {
	v := bigView(fleetSize{sidecars: 600, pipelines: 60, parallelism: 1})
	e := NewEngine(v)
	e.Plan()
	if q := e.Measure(); q.Highest != 5 || q.Together != 5 || q.MaxOverMean() != 1 {
		t.Fatalf("%+v: the highest load by what it can be is %.2f", q, q.MaxOverMean())
	}
}

// TestMaxOverMeanIsFinite: a ratio is a number at least 1 while anything runs, also when
// every sidecar is suspect and may be given nothing, so that there is no mean; nothing
// to compare is 0, of all pipelines and of one.
func TestMaxOverMeanIsFinite(t *testing.T) {
	m := newModel()
	if q := m.engine.Measure(); q.MaxOverMean() != 0 {
		t.Fatalf("nothing is there: %+v has the ratio %v", q, q.MaxOverMean())
	}
	for _, id := range []string{"a", "b"} {
		m.putSidecar(&Sidecar{ID: id, Generation: 1, Capacity: 4, Offers: parseOffers(t, []string{"orders:source", "lake:sink"})})
	}
	m.putPipeline(parsePipeline(t, "p", "orders:source -> lake:sink"))
	m.putPipeline(parsePipeline(t, "q", "orders:source"))
	m.carryOut(m.engine.Plan())
	judge := func(id string) Quality {
		var of []*Assignment
		for _, a := range m.sorted() {
			if a.Pipeline == id {
				of = append(of, a)
			}
		}
		return Judge(m.pipelines[id], of, func(id string) (*Sidecar, int) { return m.sidecars[id], int(m.engine.hosts[m.engine.hostID[id]].load) })
	}
	sound := func(what string) {
		t.Helper()
		m.engine.Plan()
		for name, q := range map[string]Quality{"all": m.engine.Measure(), "p": judge("p"), "q": judge("q")} {
			if r := q.MaxOverMean(); r < 1 || math.IsInf(r, 0) || math.IsNaN(r) {
				t.Errorf("%s, of %s: %+v has the ratio %v", what, name, q, r)
			}
		}
	}
	sound("alive")
	for id := range m.sidecars {
		m.change(id, func(s *Sidecar) { s.Condition = Suspect })
	}
	sound("suspect")
	m.removePipeline("p")
	m.removePipeline("q")
	m.carryOut(m.engine.Plan())
	if q := m.engine.Measure(); q.MaxOverMean() != 0 {
		t.Fatalf("nothing runs: %+v has the ratio %v", q, q.MaxOverMean())
	}
}
