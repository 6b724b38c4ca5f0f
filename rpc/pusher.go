package rpc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// How pushes of one sidecar are gathered: the first change after a calm goes out
// at once, those that follow once nothing has changed for pushQuiet, and after
// pushCeiling in any case. Waiting before the first too would add 20 ms to every
// single change, and most changes are single.
const (
	pushQuiet   = 20 * time.Millisecond
	pushCeiling = 200 * time.Millisecond
)

// pusher is what the watches of a node share when they work out what to send.
//
// That is done by a few goroutines, and those of the streams only wait and send.
// So a push reads the state at the time of its turn: what changes while it waits
// melts into it, and a burst costs each watch one push, not one per change. The
// stacks that reading the state needs exist once for each worker, not for each
// watch, whose goroutine lives as long as its stream. And the first states of new
// watches have workers of their own: while thousands of watches begin, the
// changes of the others wait for none of them.
//
// A worker never sends. A client that does not read blocks the goroutine of its
// own stream, which holds the encoded messages of one push and no view.
type pusher struct {
	first, deltas chan *pushJob
	views         pushViews
	marks         markCache

	waiting atomic.Int64 // first states that wait for their turn
	firsts  atomic.Uint64
	pushes  atomic.Uint64
	events  atomic.Uint64
}

type pushJob struct {
	do       func()
	done     chan struct{}
	panicked any
}

func newPusher(state *router.FSM) *pusher {
	return &pusher{first: make(chan *pushJob), deltas: make(chan *pushJob), views: pushViews{state: state}}
}

// start starts the workers; they end with ctx. Half the processors may be busy
// with first states, which leaves the other half for everything else.
func (p *pusher) start(ctx context.Context, loops *sync.WaitGroup) {
	procs := runtime.GOMAXPROCS(0)
	for range max(1, procs/2) {
		loops.Go(func() { p.work(ctx, p.first) })
	}
	for range procs {
		loops.Go(func() { p.work(ctx, p.deltas) })
	}
}

func (p *pusher) work(ctx context.Context, jobs <-chan *pushJob) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-jobs:
			p.runAll(ctx, j, jobs)
		}
	}
}

// runAll runs j and what waits behind it.
func (p *pusher) runAll(ctx context.Context, j *pushJob, jobs <-chan *pushJob) {
	p.views.begin()
	defer p.views.end()
	for j.run(); ctx.Err() == nil; j.run() {
		select {
		case j = <-jobs:
		default:
			return
		}
	}
}

func (j *pushJob) run() {
	defer close(j.done)
	defer func() {
		if p := recover(); p != nil {
			j.panicked = fmt.Sprintf("%v\n%s", p, debug.Stack())
		}
	}()
	j.do()
}

// turn runs do on a worker and returns when it has ended, or the error of ctx when
// that came first and do was not begun.
func turn(ctx context.Context, jobs chan<- *pushJob, do func()) error {
	j := &pushJob{do: do, done: make(chan struct{})}
	select {
	case jobs <- j:
	case <-ctx.Done():
		return ctx.Err()
	}
	<-j.done // do waits for nobody
	if j.panicked != nil {
		panic(j.panicked) // the caller's own, where it ends one call
	}
	return nil
}

// metrics adds the numbers of p to m.
func (p *pusher) metrics(m map[string]float64) {
	m["push_first_waiting"] = float64(p.waiting.Load())
	m["push_firsts_total"] = float64(p.firsts.Load())
	m["pushes_total"] = float64(p.pushes.Load())
	m["push_events_total"] = float64(p.events.Load())
}

// encoded is a message in its wire form. The bytes are never changed, so that any
// number of streams may send them.
type encoded []byte

func (e encoded) encodeFrame() mem.BufferSlice { return mem.BufferSlice{mem.SliceBuffer(e)} }

// markCache holds the encoded SYNCED of the newest revision: whole fleets of idle
// watches are sent the same one.
type markCache struct {
	mu              sync.Mutex
	revision, epoch uint64
	frame           encoded
}

func (c *markCache) get(revision, epoch uint64) (encoded, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frame == nil || c.revision != revision || c.epoch != epoch {
		frame, err := encodeEvent(&sidecarpb.PipelineAssignmentEvent{
			EventType: sidecarpb.EventType_EVENT_TYPE_SYNCED, Revision: revision, Epoch: epoch,
		})
		if err != nil {
			return nil, err
		}
		c.revision, c.epoch, c.frame = revision, epoch, frame
	}
	return c.frame, nil
}

func encodeEvent(ev *sidecarpb.PipelineAssignmentEvent) (encoded, error) {
	b, err := ev.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("rpc: encode an event: %w", err)
	}
	return b, nil
}

// settle waits, after b has rung, until what rings it has come to rest; last is
// when was pushed before.
func settle(ctx context.Context, b bell, last time.Time) error {
	if time.Since(last) >= pushQuiet {
		return nil
	}
	quiet, ceiling := time.NewTimer(pushQuiet), time.NewTimer(pushCeiling)
	defer quiet.Stop()
	defer ceiling.Stop()
	for {
		select {
		case <-b:
			quiet.Reset(pushQuiet)
		case <-quiet.C:
			return nil
		case <-ceiling.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendAll sends encoded messages in order.
func sendAll(stream grpc.ServerStream, frames []encoded) error {
	for _, f := range frames {
		if err := stream.SendMsg(f); err != nil {
			return err
		}
	}
	return nil
}

// The pause that a node asks of watches it ends is drawn from a time that grows
// with their number, between these bounds: other nodes take them at a pace they
// can keep, and nobody waits long when there are few.
const (
	reconnectEach = time.Millisecond
	reconnectMin  = 100 * time.Millisecond
	reconnectMax  = 10 * time.Second
)

// reconnectAfter returns how long one of so many watches should wait before it
// connects again; every call gives another answer.
func reconnectAfter(watches int64) time.Duration {
	spread := min(max(time.Duration(watches)*reconnectEach, reconnectMin), reconnectMax)
	return rand.N(spread) + 1
}
