package raftnode

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Result is what a command came to.
type Result struct {
	// Index is the log index of the entry that carried the command.
	Index uint64
	// Value is what the state machine returned for it.
	Value any
}

type outcome struct {
	res Result
	err error
}

// call is one blocked caller. Whoever resolves it sends exactly once; the
// channel has room for that, so a caller that left earlier harms nobody (its
// call is then left to the garbage collector instead of the pool).
type call struct {
	ch chan outcome
}

// callPool recycles calls: the channel is the only allocation of a Propose.
type callPool struct{ p sync.Pool }

func (p *callPool) get() *call {
	if c, _ := p.p.Get().(*call); c != nil {
		return c
	}
	return &call{ch: make(chan outcome, 1)}
}

func (p *callPool) put(c *call) { p.p.Put(c) }

// await blocks until c is resolved or ctx is done. left is the error for a
// caller that leaves: nil passes ctx's on.
func (p *callPool) await(ctx context.Context, c *call, left error) (Result, error) {
	done := ctx.Done()
	if done == nil {
		o := <-c.ch
		p.put(c)
		return o.res, o.err
	}
	select {
	case o := <-c.ch:
		p.put(c)
		return o.res, o.err
	case <-done:
		if left == nil {
			return Result{}, ctx.Err()
		}
		return Result{}, fmt.Errorf("%w: %w", left, ctx.Err())
	}
}

// awaitUntil is await for a caller that also leaves when up delivers.
func (p *callPool) awaitUntil(ctx context.Context, up <-chan time.Time, c *call) (Result, error) {
	if up == nil {
		return p.await(ctx, c, nil)
	}
	select {
	case o := <-c.ch:
		p.put(c)
		return o.res, o.err
	case <-ctx.Done():
		return Result{}, ctx.Err()
	case <-up:
		return Result{}, context.DeadlineExceeded
	}
}

// waiter is one command's claim on a result: a blocked call or a function.
type waiter struct {
	call *call
	done func(Result, error)
}

func (w waiter) finish(r Result, err error) {
	if w.call != nil {
		w.call.ch <- outcome{r, err}
		return
	}
	w.done(r, err)
}

// NotDone reports whether err says that the command certainly has no effect,
// now or later, so that it may be proposed again elsewhere.
func NotDone(err error) bool {
	var notLeader *NotLeaderError
	return errors.As(err, &notLeader) ||
		errors.Is(err, ErrNoLeader) || errors.Is(err, ErrStopping) || errors.Is(err, ErrBusy) ||
		errors.Is(err, ErrTooLarge) || errors.Is(err, ErrOverwritten) ||
		errors.Is(err, ErrMembershipPending) || errors.Is(err, ErrMembershipRefused)
}
