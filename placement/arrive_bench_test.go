package placement

import (
	"fmt"
	"testing"
)

// BenchmarkFleetArrives measures one sidecar, and then one pipeline, that comes to
// a fleet nobody has asked for anything yet, as when all of it starts at once.
func BenchmarkFleetArrives(b *testing.B) {
	const sidecars, pipelines = 100_000, 10_000
	one := func(i int) *Sidecar {
		s := &Sidecar{ID: fmt.Sprintf("pod-%06d", (i*7919)%sidecars), Endpoint: "10.0.0.1:50053", Generation: 1}
		for k, kind := range []string{"source", "transform", "sink"} {
			name := fmt.Sprintf("%s%d", kind, i%pipelines)
			s.Offers = append(s.Offers, Offer{Name: name, Raw: name, Type: ServiceType(k + 1), Endpoint: "127.0.0.1:1"})
		}
		return s
	}
	b.Run("sidecar", func(b *testing.B) {
		v := View{}
		for i := range sidecars / 2 {
			v.Sidecars = append(v.Sidecars, one(i))
		}
		e := NewEngine(v)
		e.Plan()
		i := sidecars / 2
		b.ResetTimer()
		for range b.N {
			e.PutSidecar(one(i % sidecars))
			i++
		}
	})
	b.Run("pipeline", func(b *testing.B) {
		v := View{}
		for i := range sidecars {
			v.Sidecars = append(v.Sidecars, one(i))
		}
		e := NewEngine(v)
		e.Plan()
		b.ResetTimer()
		for i := range b.N {
			p := &Pipeline{ID: fmt.Sprintf("p%06d", i), Version: 1, Enabled: true}
			for k, kind := range []string{"source", "transform", "sink"} {
				name := fmt.Sprintf("%s%d", kind, i%pipelines)
				p.Stages = append(p.Stages, Stage{ID: kind, Type: StageType(k + 1), Name: name, Raw: name, Parallelism: 1})
			}
			p.Edges = []Edge{{"source", "transform"}, {"transform", "sink"}}
			e.PutPipeline(p)
		}
	})
}
