package placement

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"
)

// BenchmarkBalance evens the load of a fleet of full size after half of it has joined,
// by at most 10,000 moves a call until there is nothing more to do, and then looks once
// more.
func BenchmarkBalance(b *testing.B) {
	for _, parallelism := range []int{1, 10} {
		b.Run(fmt.Sprintf("parallelism=%d", parallelism), func(b *testing.B) {
			size := full
			size.parallelism = parallelism
			whole := bigView(size)
			v := whole
			v.Sidecars = nil
			for i, s := range whole.Sidecars {
				if i/(size.sidecars/100)/5%2 == 0 { // every other five of each family
					v.Sidecars = append(v.Sidecars, s)
				}
			}
			carryOut(&v, Compute(v))
			var calls []time.Duration
			var looks, last time.Duration
			moves, rounds := 0, 0
			var before, after Quality
			for b.Loop() {
				b.StopTimer()
				all := v
				all.Sidecars = whole.Sidecars
				e := NewEngine(all)
				if p := e.Plan(); len(p.Steps) > 0 {
					b.Fatalf("%d steps", len(p.Steps))
				}
				before = e.Measure()
				runtime.GC()
				b.StartTimer()
				for {
					start := spent(b)
					steps := e.Balance(Limits{Moves: 10_000, Whole: true})
					last = spent(b) - start
					if len(steps) == 0 {
						looks += last
						break
					}
					rounds++
					calls = append(calls, last)
					for _, st := range steps {
						moves += st.Moves
					}
					for _, a := range decided(Plan{Steps: steps}) {
						e.PutAssignment(a)
					}
					if p := e.Plan(); len(p.Steps) > 0 {
						b.Fatalf("planned again: %+v", p.Steps[0])
					}
				}
				after = e.Measure()
			}
			slices.Sort(calls)
			if len(calls) > 0 {
				b.ReportMetric(float64(calls[len(calls)-1].Milliseconds()), "cpu-max-ms/call")
			}
			b.ReportMetric(float64(looks.Microseconds())/1000/float64(b.N), "cpu-ms/look")
			b.ReportMetric(float64(moves)/float64(b.N), "moves")
			b.ReportMetric(float64(rounds)/float64(b.N), "calls")
			b.ReportMetric(before.Highest, "highest-before")
			b.ReportMetric(after.Highest, "highest-after")
			b.ReportMetric(after.MaxOverMean(), "max/mean")
			b.ReportMetric(100*before.LocalShare(), "%local-before")
			b.ReportMetric(100*after.LocalShare(), "%local-after")
		})
	}
}
