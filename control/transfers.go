package control

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"conveyor.etl/router/raftnode"
)

// TransfersConfig wires a Transfers.
type TransfersConfig struct {
	// Self is this node.
	Self   uint64
	State  State
	Submit Submitter
	// Position returns the members as this node knows them.
	Position func() raftnode.Position
	Now      func() time.Time
	Logger   *slog.Logger
	// Interval is how often the bytes are told. Default 1 s.
	Interval time.Duration
	// Look is how often is looked whether the image is to be stopped. Default 200 ms.
	Look time.Duration
}

func (c *TransfersConfig) ensureDefaults() {
	if c.Interval <= 0 {
		c.Interval = time.Second
	}
	if c.Look <= 0 {
		c.Look = 200 * time.Millisecond
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Transfers tells of the images that this node sends how far they are, in the
// operations of the members that get them, and stops those whose operation is
// cancelled. Every node has one: a node that joins takes its image from any member.
// Its methods are safe for concurrent use.
type Transfers struct {
	c   TransfersConfig
	ops catchUps
}

// NewTransfers returns a Transfers.
func NewTransfers(c TransfersConfig) *Transfers {
	c.ensureDefaults()
	return &Transfers{c: c, ops: catchUps{c.State, c.Submit, c.Now}}
}

// rateWindow is how many intervals the rate of a transfer is an average of.
const rateWindow = 5

// transfer is an image on its way.
type transfer struct {
	t      *Transfers
	node   uint64
	total  uint64
	held   atomic.Int64
	cancel context.CancelCauseFunc
	// samples are the newest times and bytes.
	samples []sample
}

type sample struct {
	at   time.Time
	held int64
}

// Begin implements rpc.ImageTransfers. Unless it fails, the caller calls end, which
// waits for what is being recorded.
func (t *Transfers) Begin(ctx context.Context, node uint64, total int64) (context.Context, func(int64), func(error), error) {
	if m, ok := t.member(node); ok {
		op, _, err := t.ops.newest(m)
		if err != nil {
			return nil, nil, nil, err
		}
		if left := t.ops.held(op); left > 0 {
			return nil, nil, nil, held(node, left)
		}
	}
	watched, cancel := context.WithCancelCause(ctx)
	f := &transfer{t: t, node: node, total: uint64(max(0, total)), cancel: cancel}
	ended := make(chan struct{})
	over, stop := context.WithCancel(watched)
	go func() {
		defer close(ended)
		f.follow(over)
	}()
	end := func(err error) {
		stop()
		<-ended
		if err == nil {
			f.held.Store(total)
			// The image is there. That the caller is done does not make it untrue.
			last, cancelLast := context.WithTimeout(context.WithoutCancel(ctx), t.c.Interval)
			defer cancelLast()
			f.tell(last)
		}
		cancel(nil)
	}
	return watched, f.held.Store, end, nil
}

func held(node uint64, left time.Duration) error {
	return fmt.Errorf("%w: the catching up of node %d was cancelled; it is tried again in %v", raftnode.ErrImageHeld, node, left.Round(time.Second))
}

func (t *Transfers) member(node uint64) (raftnode.Member, bool) {
	m, ok := t.c.Position().Member(node)
	return m, ok && !m.Removed
}

// follow tells how far the image is until ctx is done.
func (f *transfer) follow(ctx context.Context) {
	told := f.t.c.Now()
	f.sample(told)
	for sleep(ctx, f.t.c.Look) {
		if f.stopped(ctx) {
			return
		}
		if now := f.t.c.Now(); now.Sub(told) >= f.t.c.Interval {
			told = now
			f.sample(now)
			f.tell(ctx)
		}
	}
}

func (f *transfer) sample(now time.Time) {
	f.samples = append(f.samples, sample{now, f.held.Load()})
	if len(f.samples) > rateWindow {
		f.samples = f.samples[1:]
	}
}

// rate is how many bytes came in a second of late.
func (f *transfer) rate() uint64 {
	first, last := f.samples[0], f.samples[len(f.samples)-1]
	if d := last.at.Sub(first.at).Seconds(); d > 0 && last.held > first.held {
		return uint64(float64(last.held-first.held) / d)
	}
	return 0
}

// stopped looks whether a user wants the image to be stopped, and stops it.
func (f *transfer) stopped(ctx context.Context) bool {
	m, ok := f.t.member(f.node)
	if !ok {
		return false // not known here yet, or taken out: then its connections end
	}
	op, _, err := f.t.ops.newest(m)
	if err != nil || op == nil {
		return false
	}
	left := f.t.ops.held(op)
	if left == 0 && (!running(op) || !op.CancelRequested) {
		return false
	}
	f.t.c.Logger.Warn("an image is no longer sent, because the catching up of its node was cancelled", "event", "catch_up_cancelled",
		"peer", f.node, "operation", op.OperationId, "bytes", f.held.Load(), "of", f.total)
	if left == 0 {
		left = CatchUpHold
		if err := f.t.ops.cancel(ctx, m, op); err != nil && ctx.Err() == nil {
			f.t.c.Logger.Debug("the end of a catch-up was not recorded; the leader records it", "err", err)
		}
	}
	f.cancel(held(f.node, left))
	return true
}

// tell records how far the image is.
func (f *transfer) tell(ctx context.Context) {
	m, ok := f.t.member(f.node)
	if !ok {
		return
	}
	now, next, err := f.t.ops.newest(m)
	if err != nil {
		return
	}
	op := operation(m, now, next)
	op.Phase, op.Unit, op.Done, op.Total = phaseImage, "bytes", uint64(f.held.Load()), f.total
	op.Rate = f.rate()
	op.Message = fmt.Sprintf("node %d sends it an image of the state", f.t.c.Self)
	if err := f.t.ops.put(ctx, op, !running(now)); err != nil && ctx.Err() == nil {
		f.t.c.Logger.Debug("the progress of an image was not recorded", "peer", f.node, "err", err)
	}
}
