package fleet

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"
)

// expiredShare is how much of the fleet expires together: one of so many parts.
const expiredShare = 10

// expiry lets a tenth of all sidecars fall silent right after a heartbeat that all
// of them send at the same time, so that their leases end together, and measures
// from when the first of them is due until the last has expired in the state, and
// until the last sidecar has heard of what it now has to run instead. They are those
// that run the most: what nobody runs would not have to move.
func (f *Fleet) expiry(w *window) error {
	ttl := time.Duration(f.ttl.Load())
	if ttl <= 0 {
		w.s.fault("the cluster does not say how long a lease is")
		return nil
	}
	lost := f.busiest(max(1, len(f.sidecars)/expiredShare))
	gone := make(map[int]bool, len(lost))
	held := 0
	for _, i := range lost {
		gone[i] = true
		held += f.holds(i)
	}
	began := time.Now()
	if err := f.beatTogether(lost); err != nil {
		return err
	}
	if err := f.silence(lost); err != nil {
		return err
	}
	due := began.Add(ttl)
	w.s.figure("sidecars that fell silent", float64(len(lost)), "")
	w.s.figure("pipelines that they ran", float64(held), "")
	w.s.figure("they fell silent within", time.Since(began).Seconds(), "s")
	told := f.tally.now().Assigned
	err := f.within("expiry of all silent sidecars", w.expired(len(lost)))
	if err == nil {
		err = f.within("placement of all stages elsewhere", func(ctx context.Context) error {
			return f.placed(ctx, func(i int) bool { return !gone[i] })
		})
	}
	if err == nil {
		err = f.within("agreement of all sidecars with the cluster", func(ctx context.Context) error { return f.agreed(ctx, false) })
	}
	if f.ctx.Err() != nil {
		return f.ctx.Err()
	}
	if err != nil {
		w.s.fault("%v", err)
	} else {
		assigned, expired := f.tally.last()
		w.s.figure("all expired after the first was due", expired.Sub(due).Seconds(), "s")
		w.s.figure("all told after the first was due", assigned.Sub(due).Seconds(), "s")
		w.s.figure("assignments told", float64(f.tally.now().Assigned-told), "")
	}
	return w.comeBack(lost)
}

// holds is of how many pipelines sidecar i runs something, as it was told.
func (f *Fleet) holds(i int) int {
	s := &f.sidecars[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view != nil {
		return len(s.view.held)
	}
	return len(s.held)
}

// busiest returns n sidecars that run something of the most pipelines, in order.
func (f *Fleet) busiest(n int) []int {
	all := f.all()
	held := make([]int, len(all))
	for i := range held {
		held[i] = f.holds(i)
	}
	slices.SortStableFunc(all, func(a, b int) int { return cmp.Compare(held[b], held[a]) })
	return slices.Sorted(slices.Values(all[:n]))
}

// beatTogether lets each of some send a heartbeat now.
func (f *Fleet) beatTogether(some []int) error {
	var carriers []*carrier
	var alone []int
	for _, i := range some {
		if k := f.carriedBy[i]; k == nil {
			alone = append(alone, i)
		} else if len(carriers) == 0 || carriers[len(carriers)-1] != k {
			carriers = append(carriers, k)
		}
	}
	slices.SortFunc(carriers, func(a, b *carrier) int { return cmp.Compare(a.index, b.index) })
	var sent sync.WaitGroup
	for _, k := range slices.Compact(carriers) {
		sent.Go(k.beat)
	}
	err := forEach(f.ctx, alone, f.c.InFlight, func(_ context.Context, i int) error { f.beat(i); return nil })
	sent.Wait()
	return err
}
