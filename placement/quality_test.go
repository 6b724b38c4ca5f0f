package placement

import (
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
