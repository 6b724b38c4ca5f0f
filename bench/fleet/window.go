package fleet

import (
	"context"
	"time"

	"conveyor.etl/router/bench"
)

// window is what was used and counted since the beginning of a scenario.
type window struct {
	f       *Fleet
	s       *Section
	began   time.Time
	counts  counts
	cpu     map[int]time.Duration // by pid
	applied uint64
	took    time.Duration
}

// begin starts a scenario.
func (f *Fleet) begin(name string, r *Report) *window {
	f.c.Progress(name)
	f.tally.fresh()
	w := &window{f: f, s: &Section{Scenario: name}, counts: f.tally.now(), cpu: f.cpu()}
	if st, err := f.status(f.ctx); err == nil {
		w.applied = st.GetAppliedIndex()
	}
	r.Sections = append(r.Sections, w.s)
	w.began = time.Now()
	return w
}

func (f *Fleet) cpu() map[int]time.Duration {
	out := make(map[int]time.Duration)
	for _, pid := range f.c.Pids() {
		if p, err := bench.ReadProcess(pid); err == nil {
			out[pid] = p.CPU
		}
	}
	return out
}

// resident returns the memory of the server processes, in all and of the largest.
func (f *Fleet) resident() (all, largest int64) {
	for _, pid := range f.c.Pids() {
		if p, err := bench.ReadProcess(pid); err == nil {
			all += p.Resident
			largest = max(largest, p.Resident)
		}
	}
	return all, largest
}

// end ends the measurement and returns what happened. It adds what every
// scenario shows.
func (w *window) end() counts {
	w.took = time.Since(w.began)
	f, s := w.f, w.s
	s.Seconds = w.took.Seconds()
	d := f.tally.now().minus(w.counts)
	if after := f.cpu(); len(after) > 0 {
		var used time.Duration
		for pid, cpu := range after {
			used += cpu - w.cpu[pid] // a new process began at zero
		}
		s.figure("CPU of all servers", used.Seconds()/s.Seconds, "cores")
		all, largest := f.resident()
		s.figure("memory of all servers", float64(all)/(1<<20), "MiB")
		s.figure("memory of the largest", float64(largest)/(1<<20), "MiB")
	}
	ctx, cancel := context.WithTimeout(f.ctx, askTimeout)
	defer cancel()
	if st, err := f.status(ctx); err == nil {
		if st.GetAppliedIndex() >= w.applied {
			s.figure("log entries", float64(st.GetAppliedIndex()-w.applied)/s.Seconds, "1/s")
		}
		for _, a := range st.GetAlarms() {
			s.Notes = append(s.Notes, "alarm of the cluster: "+a)
		}
	}
	f.tally.mu.Lock()
	defer f.tally.mu.Unlock()
	s.figure("heartbeats", float64(d.Beats)/s.Seconds, "1/s")
	s.quantiles("heartbeat", f.tally.beats)
	s.millis("heartbeat sent late at most", f.tally.mostLate)
	for _, c := range []struct {
		name string
		n    int64
	}{
		{"heartbeats that failed", d.BeatErrors}, {"heartbeats not acknowledged", d.Unacknowledged},
		{"heartbeat streams ended", d.BeatStreamsEnded},
		{"sidecars suspected", d.Suspected}, {"sidecars expired", d.Expired}, {"sidecars back", d.Revived},
		{"registrations repeated", d.RegistrationsRepeated}, {"watches ended", d.StreamsEnded}, {"watches begun anew (RESYNC)", d.Resyncs},
	} {
		if c.n != 0 {
			s.figure(c.name, float64(c.n), "")
		}
	}
	if f.tally.lastError != "" {
		s.Notes = append(s.Notes, "the last error: "+f.tally.lastError)
	}
	s.Faults = append(s.Faults, f.tally.faults...)
	if n := d.Faults - int64(len(f.tally.faults)); n > 0 {
		s.fault("and %d more", n)
	}
	return d
}

// unhurt adds faults for what must not happen while all nodes and sidecars are
// well.
func (w *window) unhurt(d counts) {
	if d.BeatErrors > 0 {
		w.s.fault("%d heartbeats failed", d.BeatErrors)
	}
	if d.BeatStreamsEnded > 0 {
		w.s.fault("%d heartbeat streams ended", d.BeatStreamsEnded)
	}
	w.leasesKept(d)
}

// leasesKept adds faults for leases lost by sidecars that send heartbeats.
func (w *window) leasesKept(d counts) {
	if d.Unacknowledged > 0 {
		w.s.fault("%d heartbeats of registered sidecars were not acknowledged", d.Unacknowledged)
	}
	if d.Expired > 0 {
		w.s.fault("%d sidecars expired although they were sending heartbeats", d.Expired)
	}
}

// agree adds how long it takes until all sidecars were told what the cluster
// holds, and a fault when they are not. since is when the change began.
func (w *window) agree(since time.Time) error {
	err := w.f.within("agreement of all sidecars with the cluster", func(ctx context.Context) error { return w.f.agreed(ctx, false) })
	if w.f.ctx.Err() != nil {
		return w.f.ctx.Err()
	}
	if err != nil {
		w.s.fault("%v", err)
		return nil
	}
	w.s.figure("all sidecars agree with the cluster after", time.Since(since).Seconds(), "s")
	return nil
}
