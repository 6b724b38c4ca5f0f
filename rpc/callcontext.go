package rpc

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// callContext is the context of a unary call with a deadline of ours: a fixed
// time when the client set none, otherwise a little before the client's, so that
// the client still hears what became of the call. At its own deadline gRPC stops
// listening and says DEADLINE_EXCEEDED, which means "perhaps", where the server
// could have said "certainly not".
//
// The timer, and the link to the client's context that ends it early, are made
// when somebody asks for Done: a call that does not wait never does, and one that
// waits in this package does so with a timer from a pool. What
// context.WithTimeout makes for every call was six percent of all memory a
// commit took.
type callContext struct {
	context.Context // the client's
	deadline        time.Time

	mu     sync.Mutex
	timed  context.Context // nil until somebody asked for Done
	cancel context.CancelFunc
	ended  bool
	header metadata.MD // of the reply; nil for none
}

// callKey finds the callContext a context was derived from.
type callKey struct{}

// setHeader notes the headers of the reply, which nobody may change any more.
func (c *callContext) setHeader(md metadata.MD) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.header = md
}

// sendHeader sends what was noted, right before the reply. grpc.SetHeader, which could be
// called with each, copies it, and joins what it is given.
func (c *callContext) sendHeader() {
	c.mu.Lock()
	md := c.header
	c.mu.Unlock()
	if md != nil {
		_ = grpc.SendHeader(c.Context, md) // it fails if the call has ended: nobody listens
	}
}

// answerMargin is how long before the client's deadline a call that waits is
// given up, as far as a tenth of the time allows: long enough for the answer to
// travel.
const answerMargin = 50 * time.Millisecond

// newCallContext returns a context that ends before parent's deadline, or after
// timeout when it has none.
func newCallContext(parent context.Context, timeout time.Duration) *callContext {
	now := time.Now()
	if deadline, ok := parent.Deadline(); ok {
		left := deadline.Sub(now)
		timeout = left - min(left/10, answerMargin)
	}
	return &callContext{Context: parent, deadline: now.Add(timeout)}
}

// end releases the timer; the call is over.
func (c *callContext) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.cancel != nil {
		c.cancel()
	}
}

// Deadline implements context.Context.
func (c *callContext) Deadline() (time.Time, bool) { return c.deadline, true }

// Done implements context.Context.
func (c *callContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timed == nil {
		c.timed, c.cancel = context.WithDeadline(c.Context, c.deadline)
		if c.ended {
			c.cancel()
		}
	}
	return c.timed.Done()
}

// Err implements context.Context.
func (c *callContext) Err() error {
	c.mu.Lock()
	timed, ended := c.timed, c.ended
	c.mu.Unlock()
	switch {
	case timed != nil:
		return timed.Err()
	case c.Context.Err() != nil:
		return c.Context.Err()
	case ended:
		return context.Canceled
	case !time.Now().Before(c.deadline):
		return context.DeadlineExceeded
	}
	return nil
}

// Value implements context.Context. Once there is a timer it is asked first, so
// that the context package finds it and links children to it directly instead
// of with a goroutine.
func (c *callContext) Value(key any) any {
	if _, ok := key.(callKey); ok {
		return c
	}
	c.mu.Lock()
	timed := c.timed
	c.mu.Unlock()
	if timed != nil {
		return timed.Value(key)
	}
	return c.Context.Value(key)
}

// untimed returns ctx without the deadline of ours: what tells whether the client
// is still there, and what to derive a context with an earlier deadline from.
func untimed(ctx context.Context) context.Context {
	if c, ok := ctx.(*callContext); ok {
		return c.Context
	}
	return ctx
}

func hasDeadline(ctx context.Context) bool {
	_, ok := ctx.Deadline()
	return ok
}

// timerPool holds stopped timers. Since Go 1.23 a stopped timer delivers nothing
// any more, so one can be used again.
type timerPool struct{ p sync.Pool }

func (p *timerPool) start(d time.Duration) *time.Timer {
	t, _ := p.p.Get().(*time.Timer)
	if t == nil {
		return time.NewTimer(d)
	}
	t.Reset(d)
	return t
}

func (p *timerPool) put(t *time.Timer) {
	t.Stop()
	p.p.Put(t)
}

// waitLimit is how long a caller waits: until its context is done, or time is up.
type waitLimit struct {
	done <-chan struct{}
	up   <-chan time.Time

	timer *time.Timer
	pool  *timerPool
}

// limit returns what to select on while ctx waits. The caller calls end
// afterwards.
func (p *timerPool) limit(ctx context.Context) waitLimit {
	c, ok := ctx.(*callContext)
	if !ok {
		return waitLimit{done: ctx.Done()}
	}
	t := p.start(time.Until(c.deadline))
	return waitLimit{done: c.Context.Done(), up: t.C, timer: t, pool: p}
}

func (l *waitLimit) end() {
	if l.timer != nil {
		l.pool.put(l.timer)
	}
}
