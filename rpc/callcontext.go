package rpc

import (
	"context"
	"sync"
	"time"
)

// callContext is the context of a call whose client set no deadline, with one
// of ours. The timer, and the link to the client's context that ends it early,
// are made when somebody asks for Done: a call that does not wait never does,
// and one that waits in this package does so with a timer from a pool. What
// context.WithTimeout makes for every call was six percent of all memory a
// commit took.
type callContext struct {
	context.Context // the client's
	deadline        time.Time

	mu     sync.Mutex
	timed  context.Context // nil until somebody asked for Done
	cancel context.CancelFunc
	ended  bool
}

func newCallContext(parent context.Context, timeout time.Duration) *callContext {
	return &callContext{Context: parent, deadline: time.Now().Add(timeout)}
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
	c.mu.Lock()
	timed := c.timed
	c.mu.Unlock()
	if timed != nil {
		return timed.Value(key)
	}
	return c.Context.Value(key)
}

// untimed returns ctx without a deadline of ours: what to derive a context with
// an earlier deadline from.
func untimed(ctx context.Context) context.Context {
	if c, ok := ctx.(*callContext); ok {
		return c.Context
	}
	return ctx
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
