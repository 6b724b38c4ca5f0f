package main

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/bench"
)

// sample is one call of a probe.
type sample struct {
	due, ended time.Time
	ok         bool
}

// probe keeps calls going in the background and remembers every one of them,
// so that what happened in any stretch of time can be asked afterwards.
type probe struct {
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	samples []sample
	last    error
}

// startProbe begins calls that are due rate times a second, by as many callers
// as given. What is overdue is made up for at once and measured from when it
// was due: a server that stands still is not spared the calls it held up.
func startProbe(ctx context.Context, rate float64, callers []bench.Call) *probe {
	ctx, cancel := context.WithCancel(ctx)
	p := &probe{cancel: cancel}
	begun := time.Now()
	var ticket atomic.Int64
	for _, call := range callers {
		p.running.Go(func() {
			for {
				due := begun.Add(time.Duration(float64(ticket.Add(1)-1) / rate * float64(time.Second)))
				if !settle(ctx, time.Until(due)) {
					return
				}
				_, err := call(ctx)
				if ctx.Err() != nil {
					return
				}
				p.mu.Lock()
				p.samples = append(p.samples, sample{due, time.Now(), err == nil})
				if err != nil {
					p.last = err
				}
				p.mu.Unlock()
			}
		})
	}
	return p
}

// reach waits until calls due at t have ended, so that what was due before is
// known: a server that stood still has to make up for it first.
func (p *probe) reach(ctx context.Context, t time.Time) {
	for give := time.Now().Add(20 * time.Second); time.Now().Before(give); {
		p.mu.Lock()
		reached := len(p.samples) > 0 && p.samples[len(p.samples)-1].due.After(t)
		p.mu.Unlock()
		if reached || !settle(ctx, 20*time.Millisecond) {
			return
		}
	}
}

// stop ends the calls and waits for them.
func (p *probe) stop() {
	p.cancel()
	p.running.Wait()
}

// span is a stretch of time.
type span struct{ from, to time.Time }

func (s span) took() time.Duration { return s.to.Sub(s.from) }

// took returns how long the successful calls due within spans took.
func (p *probe) took(spans ...span) []time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	var took []time.Duration
	for _, x := range p.samples {
		for _, s := range spans {
			if x.ok && !x.due.Before(s.from) && x.due.Before(s.to) {
				took = append(took, x.ended.Sub(x.due))
				break
			}
		}
	}
	return took
}

// p99 returns the latency, in ms, that 99 % of took do not exceed; it sorts them.
func p99(took []time.Duration) float64 {
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return bench.Millis(took[(len(took)-1)*99/100])
}

// failed returns how many calls due within s failed, and the last reason.
func (p *probe) failed(s span) (n int, last error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.samples {
		if !x.ok && !x.due.Before(s.from) && x.due.Before(s.to) {
			n++
		}
	}
	return n, p.last
}

// gaps returns how long within s no call succeeded: the sum of the gaps between
// answers that are longer than ignore, and the longest gap of all.
func (p *probe) gaps(s span, ignore time.Duration) (sum, longest time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ends := []time.Time{s.from, s.to}
	for _, x := range p.samples {
		if x.ok && x.ended.After(s.from) && x.ended.Before(s.to) {
			ends = append(ends, x.ended)
		}
	}
	slices.SortFunc(ends, time.Time.Compare)
	for i := range ends[1:] {
		gap := ends[i+1].Sub(ends[i])
		longest = max(longest, gap)
		if gap > ignore {
			sum += gap
		}
	}
	return sum, longest
}

// writeProbe writes random keys of the filled ones through member i.
func writeProbe(ctx context.Context, c *cluster, i int) (*probe, func()) {
	return writeProbeAt(ctx, c, i, c.o.writeRate)
}

func writeProbeAt(ctx context.Context, c *cluster, i int, rate float64) (*probe, func()) {
	const callers, conns = 64, 4
	all, closeAll := bench.DialUnary([]string{c.s.endpoint(c.o, i)}, conns)
	var calls []bench.Call
	for w := range callers {
		v := newContent(c.o, 1_000+w)
		calls = append(calls, func(ctx context.Context) (int, error) {
			ctx, done := context.WithTimeout(ctx, 10*time.Second)
			defer done()
			return 1, c.s.put(ctx, all[w%conns], bench.Key(v.IntN(c.o.objects)), v.value())
		})
	}
	p := startProbe(ctx, rate, calls)
	return p, func() { p.stop(); closeAll() }
}

// readProbe reads random keys linearizably through member i.
func readProbe(ctx context.Context, c *cluster, i int) (*probe, func()) {
	conns, closeAll := bench.DialUnary([]string{c.s.endpoint(c.o, i)}, 1)
	var calls []bench.Call
	for w := range 4 {
		v := newContent(c.o, 2_000+4*i+w)
		calls = append(calls, func(ctx context.Context) (int, error) {
			ctx, done := context.WithTimeout(ctx, 10*time.Second)
			defer done()
			return 1, c.s.get(ctx, conns[0], bench.Key(v.IntN(c.o.objects)))
		})
	}
	p := startProbe(ctx, c.o.readRate, calls)
	return p, func() { p.stop(); closeAll() }
}

// closeConn closes a connection nothing is owed to.
func closeConn(conn *grpc.ClientConn) { _ = conn.Close() }
