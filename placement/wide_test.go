package placement

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
)

// TestWidePipelines: pipelines of many instances, for which candidates are found
// by heaps and instances by an index, keep every promise that small ones do, by
// every strategy: their tables are sound, the order of the view does not matter,
// planning again changes nothing, and a loss moves what was lost.
func TestWidePipelines(t *testing.T) {
	const n, seed = 200, 3
	for _, sh := range wideShapes {
		for strategy := AnyStrategy; strategy <= ConsistentHash; strategy++ {
			t.Run(fmt.Sprintf("%s/%d", sh.name, strategy), func(t *testing.T) {
				t.Logf("seed %d", seed)
				rng := rand.New(rand.NewPCG(seed, uint64(strategy)))
				m := newModel()
				v := wideView(sh, n, "")
				for k := range v.Pipelines[0].Stages {
					v.Pipelines[0].Stages[k].Strategy = strategy
				}
				for _, s := range v.Sidecars {
					m.putSidecar(s)
				}
				m.putPipeline(v.Pipelines[0])
				for round := range 6 {
					whole := Compute(m.view())
					if other := Compute(m.shuffled(rng.Uint64())); !reflect.DeepEqual(whole, other) {
						t.Fatal("the order of the view changes the plan")
					}
					if round%2 == 0 {
						m.carryOut(m.engine.Plan())
					} else {
						m.carryOut(whole)
					}
					m.check(t)
					if more := m.engine.Plan(); len(more.Steps) > 0 {
						t.Fatalf("round %d: the engine has more to change: %+v", round, more.Steps[0].Changes[0])
					}
					if more := Compute(m.view()); len(more.Steps) > 0 {
						t.Fatalf("round %d: planning again changes more: %+v", round, more.Steps[0].Changes[0])
					}
					q := m.engine.Measure()
					if q.Pending > 0 || q.Placed < q.Asked && sh.fills() {
						t.Fatalf("round %d: %+v", round, q)
					}
					switch round {
					case 0: // a rollout of every tenth
						for i := 0; i < n; i += 10 {
							m.change(v.Sidecars[i].ID, func(s *Sidecar) { s.Generation++; s.Endpoint += "0" })
						}
					case 1, 3:
						for i := range 5 {
							cond := Expired
							if round == 3 {
								cond = Alive
							}
							m.change(v.Sidecars[20+i*7].ID, func(s *Sidecar) { s.Condition = cond })
						}
					case 2:
						for i := range 5 {
							m.change(v.Sidecars[30+i*7].ID, func(s *Sidecar) { s.Condition = Suspect })
						}
					case 4: // all of it under other names
						m.putPipeline(sh.pipeline(n, "x"))
					}
				}
			})
		}
	}
}

// fills is true when every instance asked for has a place, with a few sidecars
// lost as well.
func (sh wideShape) fills() bool { return sh.name == "half" }

// TestWideSpread: of many instances each has its fair part of the hand-overs, and
// most hand-overs stay within a zone where all zones offer the same.
func TestWideSpread(t *testing.T) {
	for _, sh := range wideShapes {
		if sh.name != "apart" && sh.name != "funnel" && sh.name != "uneven" {
			continue
		}
		v := wideView(sh, 900, "")
		e := NewEngine(v)
		e.Plan()
		e.l.reset(&e.pipes[0])
		e.l.solve()
		l := &e.l
		for stg := range l.x.stages {
			froms := len(l.handers(int32(stg)))
			most := int32(0)
			for _, n := range l.at[stg] {
				most = max(most, l.nodes[n].fanIn(int32(stg)))
			}
			if fair := int32((froms + len(l.at[stg]) - 1) / max(1, len(l.at[stg]))); most > 2*fair+1 {
				t.Errorf("%s: %d hand over to %d instances of stage %d, to one of them %d", sh.name, froms, len(l.at[stg]), stg, most)
			}
		}
		f := l.evaluate()
		if local := share(f.zone, f.edges); sh.name != "funnel" && local < 0.85 {
			t.Errorf("%s: %.2f of the edges stay in their zone", sh.name, local)
		}
	}
}
