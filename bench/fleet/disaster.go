package fleet

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// stopSidecar ends sidecar i as its pod's death does.
func (f *Fleet) stopSidecar(i int) {
	s := &f.sidecars[i]
	s.mu.Lock()
	s.up = false
	stop := s.stop
	s.stop = nil
	s.mu.Unlock()
	f.stopBeating(i)
	if stop != nil {
		stop()
	}
}

// startSidecar starts sidecar i again as a new pod of the same name.
func (f *Fleet) startSidecar(ctx context.Context, i int) error {
	s := &f.sidecars[i]
	s.mu.Lock()
	s.life++
	s.mu.Unlock()
	if err := f.register(ctx, i); err != nil {
		return err
	}
	if f.content.watches(i) {
		f.startWatch(i)
	}
	return nil
}

// rollingShare is how much of the fleet restarts at a time: one of so many parts.
const rollingShare = 20

// rolling restarts all sidecars, some at a time.
func (f *Fleet) rolling(w *window) error {
	for part := range rollingShare {
		var batch []int
		for i := part; i < len(f.sidecars); i += rollingShare {
			batch = append(batch, i)
		}
		if err := forEach(f.ctx, batch, f.c.InFlight, func(ctx context.Context, i int) error {
			f.stopSidecar(i)
			return f.startSidecar(ctx, i)
		}); err != nil {
			return err
		}
	}
	took := time.Since(w.began)
	w.s.figure("restarts", float64(len(f.sidecars))/took.Seconds(), "1/s")
	w.s.quantiles("registration", f.tally.registrations)
	restarted := time.Now()
	if err := f.within("placement of all pipelines", func(ctx context.Context) error {
		return f.placed(ctx, func(int) bool { return true })
	}); err != nil {
		return err
	}
	w.s.figure("all placed after the last restart", time.Since(restarted).Seconds(), "s")
	if err := w.agree(restarted); err != nil {
		return err
	}
	w.unhurt(w.end())
	return nil
}

// zoneLoss lets all sidecars of one zone fall silent, waits until their stages
// run elsewhere, and lets them come back as those of the field do: with the
// next heartbeat, never registering again.
func (f *Fleet) zoneLoss(w *window) error {
	lost := f.inZone(0)
	if len(lost) == len(f.sidecars) {
		w.s.fault("one zone holds all sidecars; more zones, or more sidecars for each pipeline, are needed")
		return nil
	}
	if err := f.silence(lost); err != nil {
		return err
	}
	silent := time.Now()
	if err := f.within("expiry of a silent sidecar", w.expired(1)); err != nil {
		return err
	}
	first := time.Now()
	w.s.figure("first lease expired after", first.Sub(silent).Seconds(), "s")
	if err := f.within("expiry of all silent sidecars", w.expired(len(lost))); err != nil {
		w.s.fault("%v", err)
	}
	all := time.Now()
	w.s.figure("all expired after the first", all.Sub(first).Seconds(), "s")
	err := f.within("placement of all stages outside the zone", func(ctx context.Context) error {
		return f.placed(ctx, func(i int) bool { return f.content.zone(i) != 0 })
	})
	if f.ctx.Err() != nil {
		return f.ctx.Err()
	}
	if err != nil {
		w.s.fault("%v", err)
	} else {
		w.s.figure("all reassigned after the last expired", time.Since(all).Seconds(), "s")
		w.s.figure("all reassigned after the first expired", time.Since(first).Seconds(), "s")
	}
	return w.comeBack(lost)
}

// silence lets sidecars stop as if they were cut off.
func (f *Fleet) silence(lost []int) error {
	for _, i := range lost {
		f.sidecars[i].mu.Lock()
		f.sidecars[i].up = false
		f.sidecars[i].mu.Unlock()
	}
	return forEach(f.ctx, lost, f.c.InFlight, func(_ context.Context, i int) error { f.stopSidecar(i); return nil })
}

// expired is done once n sidecars have expired since the scenario began.
func (w *window) expired(n int) func(context.Context) error {
	return func(context.Context) error {
		if got := w.f.tally.now().Expired - w.counts.Expired; got < int64(n) {
			return fmt.Errorf("%d of %d have expired", got, n)
		}
		return nil
	}
}

// comeBack lets those who were silent send heartbeats again, and ends the scenario.
func (w *window) comeBack(lost []int) error {
	f := w.f
	for _, i := range lost {
		s := &f.sidecars[i]
		s.mu.Lock()
		s.up = true
		s.mu.Unlock()
		f.startBeating(i)
		if f.content.watches(i) {
			f.startWatch(i)
		}
	}
	back := time.Now()
	if err := f.within("return of those who were silent", func(context.Context) error {
		if got := f.tally.now().Revived - w.counts.Revived; got < int64(len(lost)) {
			return fmt.Errorf("%d of %d are back", got, len(lost))
		}
		return nil
	}); err != nil {
		w.s.fault("%v", err)
	}
	w.s.figure("all back after", time.Since(back).Seconds(), "s")
	if err := w.agree(back); err != nil {
		return err
	}
	d := w.end()
	d.Expired = max(0, d.Expired-int64(len(lost)))
	w.unhurt(d)
	return nil
}

func (f *Fleet) inZone(zone int) []int {
	var out []int
	for i := range f.sidecars {
		if f.content.zone(i) == zone {
			out = append(out, i)
		}
	}
	return out
}

// storm lets the watchers reconnect at once, after the leader's death if it is
// ours to kill, and changes what concerns those left out of it meanwhile.
func (f *Fleet) storm(w *window) error {
	st, err := f.status(f.ctx)
	if err != nil {
		return err
	}
	// One connection to each node that stays is left alone: its watchers show
	// what the storm does to others.
	kept := make(map[int]bool)
	for k, e := range f.c.Endpoints {
		leads := false
		for _, n := range st.GetNodes() {
			leads = leads || n.GetNodeId() == st.GetLeaderId() && n.GetClientAddress() == e
		}
		if (!leads || f.c.Kill == nil) && f.c.Connections > len(f.c.Endpoints) && k < f.c.Connections {
			kept[k] = true
		}
	}
	spared := func(i int) bool { return kept[i%f.c.Connections] }
	before := f.tally.now().StreamsEnded
	began := time.Now()
	if f.c.Kill != nil {
		if err := f.c.Kill(st.GetLeaderId()); err != nil {
			return fmt.Errorf("fleet: kill the leader: %w", err)
		}
	}
	if err := f.pool.cut(func(conn int) bool { return kept[conn] }); err != nil {
		return err
	}
	storming := 0
	for i := range f.sidecars {
		if f.content.watches(i) && !spared(i) {
			storming++
		}
	}
	// Synced says nothing before the streams have noticed that they are cut.
	var deltas sync.WaitGroup
	over := make(chan struct{})
	receipt, rounds := newLatencies(), 0
	var failed error
	deltas.Go(func() { rounds, failed = f.stormDeltas(over, spared, receipt) })
	err = f.within("the end of the streams", func(context.Context) error {
		if n := f.tally.now().StreamsEnded - before; n < int64(storming) {
			return fmt.Errorf("%d of %d have ended", n, storming)
		}
		return nil
	})
	if err == nil {
		err = f.allSynced()
	}
	synced := time.Since(began)
	close(over)
	deltas.Wait()
	if err == nil {
		err = failed
	}
	if err != nil {
		return err
	}
	w.s.figure("watchers that reconnected", float64(storming), "")
	w.s.figure("all watches synced after", synced.Seconds(), "s")
	w.s.figure("changes meanwhile", float64(rounds), "")
	w.s.quantiles("change meanwhile, commit to receipt", receipt)
	if err := w.agree(began); err != nil {
		return err
	}
	d := w.end()
	if f.c.Kill != nil {
		w.leasesKept(d) // calls to the dead node fail, leases must not
		return nil
	}
	w.unhurt(counts{Expired: d.Expired, Unacknowledged: d.Unacknowledged})
	return nil
}

// stormDeltas changes pipelines that a spared watcher runs, one after the other,
// until the storm is over.
func (f *Fleet) stormDeltas(over <-chan struct{}, spared func(i int) bool, receipt *latencies) (rounds int, err error) {
	pipelines, by := f.watched()
	var mine []int
	for k, p := range pipelines {
		if spared(by[k]) {
			mine = append(mine, p)
		}
	}
	for _, p := range mine {
		select {
		case <-over:
			return rounds, nil
		default:
		}
		pr := newProbe(1, about(pipelineID(p)))
		if err := f.change(pr, func(ctx context.Context) error { return f.turnForm(ctx, p) }); err != nil {
			return rounds, err
		}
		pr.mu.Lock()
		receipt.merge(pr.receipt)
		pr.mu.Unlock()
		rounds++
	}
	return rounds, nil
}

// leaderKill ends the leading node as kill -9 does and watches for the time of
// Config.Duration that nobody loses a lease by it.
func (f *Fleet) leaderKill(w *window) error {
	st, err := f.status(f.ctx)
	if err != nil {
		return err
	}
	before := st.GetLeaderId()
	died := time.Now()
	if err := f.c.Kill(before); err != nil {
		return fmt.Errorf("fleet: kill the leader: %w", err)
	}
	if err := f.within("election of another leader", func(ctx context.Context) error {
		st, err := f.status(ctx)
		if err == nil && st.GetLeaderId() == before {
			err = fmt.Errorf("node %d still counts as the leader", before)
		}
		return err
	}); err != nil {
		return err
	}
	w.s.figure("another leader after", time.Since(died).Seconds(), "s")
	if err := f.turnForm(f.ctx, 0); err != nil {
		return err
	}
	w.s.figure("a change committed after", time.Since(died).Seconds(), "s")
	if f.c.Watchers > 0 {
		if err := f.allSynced(); err != nil {
			return err
		}
		w.s.figure("all watches synced after", time.Since(died).Seconds(), "s")
	}
	if !pause(f.ctx, f.c.Duration) {
		return f.ctx.Err()
	}
	if err := w.agree(time.Now()); err != nil {
		return err
	}
	w.leasesKept(w.end()) // calls to the dead node fail, leases must not
	return nil
}
