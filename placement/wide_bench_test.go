package placement

import (
	"fmt"
	"runtime"
	"testing"
)

// wideShape is a pipeline of many instances: what sidecar i of n offers of its
// services, and how many instances each stage asks for.
type wideShape struct {
	name   string
	stages int
	offers func(i, stage int) bool
	count  func(n, stage int) int
}

var wideShapes = []wideShape{
	{"whole", 2, func(int, int) bool { return true }, func(n, _ int) int { return n }},
	{"half", 3, func(int, int) bool { return true }, func(n, _ int) int { return n / 2 }},
	{"apart", 3, func(i, s int) bool { return i%3 == s }, func(n, _ int) int { return n / 3 }},
	{"uneven", 3, func(i, s int) bool { return i%6 < 3-s || i%6 == 5 }, func(n, s int) int { return n }},
	{"funnel", 3, func(i, s int) bool { return (s == 1) == (i < 4) }, func(n, s int) int { return n }},
	{"fan", 3, func(i, s int) bool { return (s == 0) == (i < 4) }, func(n, s int) int { return n }},
	{"shared", 2, func(i, s int) bool { return s == 0 || i == 0 }, func(n, s int) int { return n }},
}

// wideView makes n sidecars, in ten zones and on nodes of ten, and one pipeline of
// a shape over them.
func wideView(sh wideShape, n int, form string) View {
	var v View
	for i := range n {
		s := &Sidecar{
			ID: fmt.Sprintf("wide/pod-%06d", i), Endpoint: fmt.Sprintf("10.1.%d.%d:50053", i>>8, i&255), Generation: 1,
			Zone: fmt.Sprintf("zone-%d", i%10), Node: fmt.Sprintf("node-%05d", i/100*10+i%10),
		}
		for k := range sh.stages {
			if sh.offers(i, k) {
				s.Offers = append(s.Offers, Offer{
					Name: fmt.Sprintf("svc%d", k), Raw: fmt.Sprintf("svc%d", k), Type: sh.service(k), Endpoint: fmt.Sprintf("127.0.0.1:%d", 9001+k),
				})
			}
		}
		v.Sidecars = append(v.Sidecars, s)
	}
	v.Pipelines = []*Pipeline{sh.pipeline(n, form)}
	return v
}

func (sh wideShape) pipeline(n int, form string) *Pipeline {
	p := &Pipeline{ID: "wide", Version: 1, Enabled: true}
	for k := range sh.stages {
		p.Stages = append(p.Stages, Stage{
			ID: fmt.Sprintf("stage-%d%s", k, form), Type: StageType(sh.service(k)), Parallelism: uint32(sh.count(n, k)),
			Name: fmt.Sprintf("svc%d", k), Raw: fmt.Sprintf("svc%d", k),
		})
		if k > 0 {
			p.Edges = append(p.Edges, Edge{p.Stages[k-1].ID, p.Stages[k].ID})
		}
	}
	return p
}

func (sh wideShape) service(k int) ServiceType {
	switch k {
	case 0:
		return SourceService
	case sh.stages - 1:
		return SinkService
	}
	return TransformService
}

// BenchmarkWide plans one pipeline that concerns every sidecar: from nothing, with
// other stage ids as after a change of all of it, and after the loss of one
// sidecar. The plan is carried out each time.
func BenchmarkWide(b *testing.B) {
	for _, n := range []int{1000, 2000, 4000, 10_000} {
		for _, sh := range wideShapes {
			v := wideView(sh, n, "")
			run := func(name string, prepare func() *Engine, steps int) {
				b.Run(fmt.Sprintf("sidecars=%d/%s/%s", n, sh.name, name), func(b *testing.B) {
					var e *Engine
					var total, changes int64
					for b.Loop() {
						b.StopTimer()
						e = prepare()
						runtime.GC()
						before := spent(b)
						b.StartTimer()
						p := e.Plan()
						total += (spent(b) - before).Microseconds()
						b.StopTimer()
						if len(p.Steps) != steps {
							b.Fatalf("%d steps", len(p.Steps))
						}
						for i := range p.Steps {
							changes += int64(len(p.Steps[i].Changes))
						}
						b.StartTimer()
					}
					b.ReportMetric(float64(total)/1000/float64(b.N), "cpu-ms/op")
					b.ReportMetric(float64(changes)/float64(b.N), "changes")
					q := e.Measure()
					b.ReportMetric(float64(q.Placed)/float64(q.Asked), "placed/asked")
					b.ReportMetric(100*q.LocalShare(), "%local")
					b.ReportMetric(100*share(q.InZone, q.Edges), "%zone")
				})
			}
			run("first", func() *Engine { return NewEngine(v) }, 1)
			placed := v
			carryOut(&placed, Compute(placed))
			run("again", func() *Engine { return NewEngine(placed) }, 0)
			ready := func() *Engine {
				e := NewEngine(placed)
				e.Plan()
				return e
			}
			run("other-form", func() *Engine {
				e := ready()
				p := sh.pipeline(n, "x")
				p.Version = 2
				e.PutPipeline(p)
				return e
			}, 1)
			run("one-lost", func() *Engine {
				e := ready()
				gone := *placed.Sidecars[n/2]
				gone.Condition = Expired
				e.PutSidecar(&gone)
				return e
			}, 1)
		}
	}
}
