package fleet

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// sidecar is the state of one simulated sidecar. What it holds is a map only
// while it holds something.
type sidecar struct {
	mu   sync.Mutex
	held map[string]holding // of one that does not watch: told by heartbeats
	// view is that of a watcher, nil for others.
	view *view
	life int
	up   bool // registered and sending heartbeats
	// stop ends the watch and waits for that; nil when there is none.
	stop func()
}

// Fleet is the simulated sidecars and what they measure.
type Fleet struct {
	c        Config
	content  content
	sidecars []sidecar
	// carriers are the heartbeat streams; carriedBy says on which a sidecar
	// beats, nil = by calls.
	carriers, carriedBy []*carrier
	pool                *pool
	ask                 *grpc.ClientConn // for what a sidecar does not ask
	wheel               *wheel
	due                 chan []int32
	interval            atomic.Int64 // ns between heartbeats
	ttl                 atomic.Int64 // ns of silence after which a lease ends, as the cluster says
	tally               tally
	probe               atomic.Pointer[probe]
	// forms are the forms the pipelines are in; of the goroutine of Run.
	forms []int
	wide  int

	ctx     context.Context // ends with Run
	running sync.WaitGroup
}

// Run simulates the fleet until all scenarios are through and returns what was
// measured. A report with faults is no error: look at Report.Failed. An error
// means that the fleet could not be brought up or ctx ended; with the latter comes a
// report when something was measured before.
func Run(ctx context.Context, c Config) (*Report, error) {
	c.EnsureDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := &Fleet{
		c: c, content: content{c.Sidecars, c.Pipelines, c.Watchers, c.Zones},
		sidecars: make([]sidecar, c.Sidecars), due: make(chan []int32, c.Workers),
		forms: make([]int, c.Pipelines), ctx: ctx,
	}
	f.carriers, f.carriedBy = carriersOf(f)
	f.wheel = newWheel(len(f.sidecars) + len(f.carriers)) // a carrier's entry is behind those of the sidecars
	f.tally.init()
	var err error
	if f.pool, err = newPool(c.Endpoints, c.Connections); err != nil {
		return nil, err
	}
	defer f.pool.close()
	// One connection to whichever node answers, for questions and changes.
	asking := &pool{endpoints: c.Endpoints}
	if f.ask, err = asking.dial(0); err != nil {
		return nil, err
	}
	defer f.ask.Close()
	defer f.running.Wait()
	defer cancel() // before the wait
	r := &Report{Config: c}
	if err := f.bringUp(r); err != nil {
		return r.soFar(ctx), err
	}
	for _, name := range c.Scenarios {
		if err := f.scenario(name, r); err != nil {
			return r.soFar(ctx), err
		}
	}
	return r, nil
}

// pause waits for d; it returns false when ctx is done first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// forEach calls do for every one of items, at most inFlight at a time, and
// returns the first error, after which no more are begun.
func forEach(ctx context.Context, items []int, inFlight int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var at atomic.Int64
	var wg sync.WaitGroup
	for range min(inFlight, len(items)) {
		wg.Go(func() {
			for ctx.Err() == nil {
				k := int(at.Add(1)) - 1
				if k >= len(items) {
					return
				}
				if err := do(ctx, items[k]); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

func (f *Fleet) all() []int {
	out := make([]int, len(f.sidecars))
	for i := range out {
		out[i] = i
	}
	return out
}

// within repeats do until it succeeds, for at most Settle.
func (f *Fleet) within(what string, do func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(f.ctx, f.c.Settle)
	defer cancel()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := do(ctx)
		if err == nil {
			return nil
		}
		if !pause(ctx, wait) {
			if f.ctx.Err() != nil {
				return f.ctx.Err()
			}
			return fmt.Errorf("fleet: %s did not happen within %v: %w", what, f.c.Settle, err)
		}
	}
}

// register registers sidecar i until it is accepted, and starts its heartbeats.
func (f *Fleet) register(ctx context.Context, i int) error {
	s := &f.sidecars[i]
	s.mu.Lock()
	life := s.life
	s.mu.Unlock()
	req := f.content.registration(i, life)
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		began := time.Now()
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		reply, err := f.pool.sidecars(i).RegisterSidecar(call, req, grpc.WaitForReady(true))
		cancel()
		if err == nil && !reply.GetSuccess() {
			return fmt.Errorf("fleet: %s was refused: %s", req.SidecarId, reply.GetError())
		}
		if err == nil {
			f.tally.registered(time.Since(began))
			return f.registered(i, reply)
		}
		f.tally.registrationRepeated()
		if !pause(ctx, wait+rand.N(wait)) {
			return errors.Join(ctx.Err(), err)
		}
	}
}

// registered begins the heartbeats of a sidecar that was accepted.
func (f *Fleet) registered(i int, reply *sidecarpb.RegisterSidecarResponse) error {
	if f.c.Heartbeat == 0 && reply.GetHeartbeatIntervalMs() > 0 {
		f.interval.Store(int64(time.Duration(reply.GetHeartbeatIntervalMs()) * time.Millisecond))
	}
	f.ttl.Store(int64(time.Duration(reply.GetTtlMs()) * time.Millisecond))
	s := &f.sidecars[i]
	s.mu.Lock()
	s.up = true
	if s.view == nil {
		s.held = nil
		for _, a := range reply.GetInitialAssignments() {
			if err := s.hold(a); err != nil {
				s.mu.Unlock()
				return err
			}
		}
	}
	s.mu.Unlock()
	f.startBeating(i)
	return nil
}

// hold notes what a sidecar that does not watch has been told to run. The caller
// holds s.mu.
func (s *sidecar) hold(a *sidecarpb.PipelineAssignment) error {
	h, err := holdingOf(a)
	if err != nil {
		return err
	}
	if s.held == nil {
		s.held = make(map[string]holding, 1)
	}
	s.held[a.GetPipelineId()] = h
	return nil
}

// every is the pause between the heartbeats of one sidecar.
func (f *Fleet) every() time.Duration {
	if f.c.Heartbeat > 0 {
		return f.c.Heartbeat
	}
	if d := time.Duration(f.interval.Load()); d > 0 {
		return min(d, wheelSpan)
	}
	return 10 * time.Second
}
