package fleet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// bringUp registers all sidecars, makes the pipelines, and opens the watches.
func (f *Fleet) bringUp(r *Report) error {
	if err := f.within("election of a leader", func(ctx context.Context) error { _, err := f.status(ctx); return err }); err != nil {
		return err
	}
	f.running.Go(f.followLiveness)
	f.startBeats()

	// Before the pipelines: a registration waits for its placement if it can
	// have one.
	w := f.begin("register", r)
	if err := forEach(f.ctx, f.all(), f.c.InFlight, f.register); err != nil {
		return err
	}
	w.s.figure("registrations", float64(f.c.Sidecars)/time.Since(w.began).Seconds(), "1/s")
	w.s.quantiles("registration", f.tally.registrations)
	w.leasesKept(w.end())

	w = f.begin("place", r)
	if err := forEach(f.ctx, sequence(f.c.Pipelines), f.c.InFlight, func(ctx context.Context, p int) error {
		return f.put(ctx, f.content.pipeline(p, f.forms[p]))
	}); err != nil {
		return err
	}
	w.s.figure("pipelines written", float64(f.c.Pipelines)/time.Since(w.began).Seconds(), "1/s")
	written := time.Now()
	if err := f.within("placement of all pipelines", func(ctx context.Context) error {
		return f.placed(ctx, func(int) bool { return true })
	}); err != nil {
		return err
	}
	w.s.figure("all placed after the last was written", time.Since(written).Seconds(), "s")
	if f.c.Watchers == 0 {
		w.leasesKept(w.end())
		return nil
	}
	w.leasesKept(w.end())

	w = f.begin("watch", r)
	before, _ := f.resident()
	for i := range f.sidecars {
		if f.content.watches(i) {
			f.startWatch(i)
		}
	}
	if err := f.allSynced(); err != nil {
		return err
	}
	w.s.figure("all watches synced after", time.Since(w.began).Seconds(), "s")
	if err := w.agree(w.began); err != nil {
		return err
	}
	w.leasesKept(w.end())
	if after, _ := f.resident(); before > 0 {
		w.s.figure("memory for each watch", float64(after-before)/1024/float64(f.c.Watchers), "KiB")
	}
	return nil
}

func sequence(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

// allSynced waits until every watch of a sidecar that is up is synced.
func (f *Fleet) allSynced() error {
	want := int64(f.c.Watchers)
	return f.within("the first state of all watches", func(context.Context) error {
		if n := f.tally.syncedNow.Load(); n != want {
			return fmt.Errorf("%d of %d are synced", n, want)
		}
		return nil
	})
}

// scenario runs one scenario.
func (f *Fleet) scenario(name string, r *Report) error {
	w := f.begin(name, r)
	switch name {
	case Steady:
		if !pause(f.ctx, f.c.Duration) {
			w.end()
			return f.ctx.Err()
		}
		w.unhurt(w.end())
		return w.agree(time.Now())
	case One:
		return f.one(w)
	case Wide:
		return f.wideChange(w)
	case Mass:
		return f.mass(w)
	case Rolling:
		return f.rolling(w)
	case Zone:
		return f.zoneLoss(w)
	case Expiry:
		return f.expiry(w)
	case Storm:
		return f.storm(w)
	case Leader:
		return f.leaderKill(w)
	}
	return fmt.Errorf("fleet: unknown scenario %q", name)
}

// about returns what tells the events about a pipeline from others.
func about(pipeline string) func(*sidecarpb.PipelineAssignmentEvent) bool {
	return func(ev *sidecarpb.PipelineAssignmentEvent) bool {
		return ev.GetAssignment().GetPipelineId() == pipeline
	}
}

// change does one change and waits until all watchers that it concerns heard of
// it.
func (f *Fleet) change(p *probe, do func(ctx context.Context) error) error {
	f.probe.Store(p)
	defer f.probe.Store(nil)
	if err := do(f.ctx); err != nil {
		return err
	}
	limit := time.NewTimer(f.c.Settle)
	defer limit.Stop()
	select {
	case <-p.done:
		return nil
	case <-f.ctx.Done():
		return f.ctx.Err()
	case <-limit.C:
		f.tally.fault("a change reached %d of %d watchers within %v", p.heard(), p.want, f.c.Settle)
		return nil
	}
}

// watched returns pipelines that exactly one watcher runs, with that watcher.
func (f *Fleet) watched() (pipelines, by []int) {
	runs := make(map[int][]int)
	for i := range f.sidecars {
		s := &f.sidecars[i]
		s.mu.Lock()
		if s.view != nil {
			for id := range s.view.held {
				if p, ours := pipelineIndex(id); ours && p < f.c.Pipelines {
					runs[p] = append(runs[p], i)
				}
			}
		}
		s.mu.Unlock()
	}
	for p := range f.c.Pipelines {
		if len(runs[p]) == 1 {
			pipelines, by = append(pipelines, p), append(by, runs[p][0])
		}
	}
	return pipelines, by
}

// calm is the least time between two single changes: those that follow each other
// at once are put together, and this is about those that come alone.
const calm = 50 * time.Millisecond

// one changes pipelines that one watcher runs, one after the other.
func (f *Fleet) one(w *window) error {
	receipt, call := newLatencies(), newLatencies()
	for round := range f.c.Rounds {
		pipelines, _ := f.watched()
		if len(pipelines) == 0 {
			w.s.fault("no pipeline is run by exactly one watcher; more watchers or pipelines are needed")
			break
		}
		p := pipelines[(int(f.c.Seed)+round*7919)%len(pipelines)]
		if !pause(f.ctx, calm+rand.N(calm)) {
			return f.ctx.Err()
		}
		pr := newProbe(1, about(pipelineID(p)))
		began := time.Now()
		if err := f.change(pr, func(ctx context.Context) error { return f.turnForm(ctx, p) }); err != nil {
			return err
		}
		pr.mu.Lock()
		receipt.merge(pr.receipt)
		if pr.events > 0 {
			call.record(pr.last.Sub(began))
		}
		pr.mu.Unlock()
	}
	w.s.quantiles("commit to receipt", receipt)
	w.s.quantiles("call to receipt", call)
	w.unhurt(w.end())
	return w.agree(time.Now())
}

// wideChange makes, changes and removes a pipeline that every watcher runs.
func (f *Fleet) wideChange(w *window) error {
	if _, err := f.status(f.ctx); err != nil {
		return err
	}
	measure := func(what string, do func(ctx context.Context) error) error {
		pr := newProbe(f.c.Watchers, about(widePipeline))
		began := time.Now()
		if err := f.change(pr, do); err != nil {
			return err
		}
		pr.mu.Lock()
		defer pr.mu.Unlock()
		w.s.quantiles(what+", commit to receipt", pr.receipt)
		w.s.figure(what+", call to the last receipt", pr.last.Sub(began).Seconds(), "s")
		if len(pr.seen) > 0 {
			w.s.figure(what+", events for each watcher", float64(pr.events)/float64(len(pr.seen)), "")
		}
		return nil
	}
	err := measure("creation", func(ctx context.Context) error { return f.put(ctx, f.content.wide(f.wide)) })
	for round := 1; err == nil && round <= min(3, f.c.Rounds); round++ {
		f.wide++
		err = measure(fmt.Sprintf("change %d", round), func(ctx context.Context) error { return f.put(ctx, f.content.wide(f.wide)) })
	}
	if err == nil {
		err = measure("deletion", func(ctx context.Context) error { return f.deletePipeline(ctx, widePipeline) })
	}
	if err != nil {
		return err
	}
	w.unhurt(w.end())
	return w.agree(time.Now())
}

// mass changes every pipeline at once.
func (f *Fleet) mass(w *window) error {
	pr := newProbe(f.c.Watchers+1, func(*sidecarpb.PipelineAssignmentEvent) bool { return true }) // never done
	f.probe.Store(pr)
	defer f.probe.Store(nil)
	began := time.Now()
	if err := forEach(f.ctx, sequence(f.c.Pipelines), f.c.InFlight, f.turnForm); err != nil {
		return err
	}
	w.s.figure("pipelines written", float64(f.c.Pipelines)/time.Since(began).Seconds(), "1/s")
	written := time.Now()
	if err := f.within("placement of all pipelines", func(ctx context.Context) error {
		return f.placed(ctx, func(int) bool { return true })
	}); err != nil {
		return err
	}
	w.s.figure("all placed after the last was written", time.Since(written).Seconds(), "s")
	if err := f.within("agreement of the watchers", func(ctx context.Context) error { return f.agreed(ctx, true) }); err != nil {
		f.tally.fault("%v", err)
	}
	w.s.figure("all watchers agree after the last was written", time.Since(written).Seconds(), "s")
	if err := w.agree(written); err != nil {
		return err
	}
	pr.mu.Lock()
	w.s.quantiles("commit to receipt", pr.receipt)
	w.s.figure("events", float64(pr.events), "")
	pr.mu.Unlock()
	w.unhurt(w.end())
	return nil
}
