package placement

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// peakMiB is the most memory this process has had, as the kernel counts it.
func peakMiB(b *testing.B) float64 {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Skip(err)
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmHWM:" {
			kb, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				b.Fatal(err)
			}
			return kb / 1024
		}
	}
	b.Fatal("the kernel does not say how much memory there was")
	return 0
}

// spent is how much processor time this process has had.
func spent(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Skip(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func reportQuality(b *testing.B, e *Engine) {
	q := e.Measure()
	b.ReportMetric(q.MaxOverMean(), "max/mean")
	b.ReportMetric(100*q.LocalShare(), "%local")
	b.ReportMetric(100*share(q.InZone, q.Edges), "%zone")
	b.ReportMetric(float64(q.Pending), "pending")
	if q.Placed < q.Asked {
		b.Errorf("%d of %d instances placed", q.Placed, q.Asked)
	}
}

// BenchmarkFullPlan plans 100,000 sidecars x 10,000 pipelines of five stages, with
// parallelism 1 and 10: from nothing, and with everything in place. Building the
// indexes is part of it.
func BenchmarkFullPlan(b *testing.B) {
	for _, parallelism := range []int{1, 10} {
		size := full
		size.parallelism = parallelism
		v := bigView(size)
		b.Run(fmt.Sprintf("parallelism=%d/first", parallelism), func(b *testing.B) {
			var e *Engine
			runtime.GC()
			before := spent(b)
			for b.Loop() {
				e = NewEngine(v)
				if p := e.Plan(); len(p.Steps) != size.pipelines {
					b.Fatalf("%d steps", len(p.Steps))
				}
			}
			b.ReportMetric(float64((spent(b)-before).Milliseconds())/float64(b.N), "cpu-ms/op")
			reportQuality(b, e)
			b.ReportMetric(peakMiB(b), "peak-MiB")
		})
		carryOut(&v, Compute(v))
		b.Run(fmt.Sprintf("parallelism=%d/again", parallelism), func(b *testing.B) {
			runtime.GC()
			before := spent(b)
			for b.Loop() {
				if p := Compute(v); len(p.Steps) != 0 {
					b.Fatalf("%d steps", len(p.Steps))
				}
			}
			b.ReportMetric(float64((spent(b)-before).Milliseconds())/float64(b.N), "cpu-ms/op")
			b.ReportMetric(peakMiB(b), "peak-MiB")
		})
	}
}

// BenchmarkOneEvent lets one sidecar expire, come back, drain, be gone and be
// registered anew in a fleet of full size, with a plan after each event, and the
// plan carried out.
func BenchmarkOneEvent(b *testing.B) {
	v := bigView(full)
	carryOut(&v, Compute(v))
	e := NewEngine(v)
	e.Plan()
	took := make([]time.Duration, 0, 1<<16)
	worked := make([]time.Duration, 0, 1<<16)
	moves, least, n := 0, 0, 0
	runtime.GC()
	for b.Loop() {
		s := *v.Sidecars[n*7919%len(v.Sidecars)]
		n++
		for kind := range 6 {
			switch kind {
			case 0:
				s.Condition = Expired
			case 1:
				s.Condition = Alive
			case 2:
				s.Draining = true
			case 4:
				s.Draining = false
				s.Generation++
				s.Endpoint += "0"
			}
			c := s
			start, before := time.Now(), spent(b)
			if kind == 3 {
				e.RemoveSidecar(c.ID)
			} else {
				e.PutSidecar(&c)
			}
			p := e.Plan()
			took = append(took, time.Since(start))
			worked = append(worked, spent(b)-before)
			moves += p.Quality.Moves
			least += p.Quality.Least
			for _, a := range decided(p) {
				e.PutAssignment(a)
			}
			if again := e.Plan(); len(again.Steps) != 0 {
				b.Fatalf("planned again after event %d: %+v", kind, again.Steps[0])
			}
		}
	}
	at := func(d []time.Duration, q float64) float64 {
		slices.Sort(d)
		return float64(d[min(len(d)-1, int(q*float64(len(d))))].Microseconds())
	}
	b.ReportMetric(at(took, 0.5), "p50-µs")
	b.ReportMetric(at(took, 0.99), "p99-µs")
	b.ReportMetric(at(took, 1), "max-µs")
	// The processor time of a run on a busy machine says what an idle one would
	// take.
	b.ReportMetric(at(worked, 0.99), "cpu-p99-µs")
	b.ReportMetric(at(worked, 1), "cpu-max-µs")
	b.ReportMetric(float64(moves)/float64(max(1, least)), "moves/least")
	reportQuality(b, e)
	b.ReportMetric(peakMiB(b), "peak-MiB")
}

// BenchmarkQuestions asks an engine of full size, with everything in place, what a
// pipeline is like, what another one would come to, and what the loss of one sidecar
// and of one zone in ten would.
func BenchmarkQuestions(b *testing.B) {
	v := bigView(full)
	carryOut(&v, Compute(v))
	e := NewEngine(v)
	e.Plan()
	p := *v.Pipelines[0]
	p.ID = "another"
	for name, ask := range map[string]func(){
		"explain": func() { e.Explain(v.Pipelines[0].ID, Query{Candidates: 20, NextHops: 20}) },
		"try":     func() { e.Try([]*Pipeline{&p}, 100) },
		"sidecar": func() { e.WhatIf(func(s *Sidecar) bool { return s == v.Sidecars[7] }, 100) },
		"zone":    func() { e.WhatIf(func(s *Sidecar) bool { return s.Zone == "zone-3" }, 100) },
	} {
		b.Run(name, func(b *testing.B) {
			before := spent(b)
			for b.Loop() {
				ask()
			}
			b.ReportMetric(float64((spent(b)-before).Microseconds())/float64(b.N)/1000, "cpu-ms/op")
		})
	}
	b.ReportMetric(peakMiB(b), "peak-MiB")
}
