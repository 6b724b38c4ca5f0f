package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Pauses between attempts while no leader takes commands. The channel of
// Node.Changed ends them early; the pause covers what it does not tell, such as
// a leader that cannot be reached.
const (
	retryMin = 5 * time.Millisecond
	retryMax = 100 * time.Millisecond
)

// ForwarderConfig wires a Forwarder; EnsureDefaults fills zero limits.
type ForwarderConfig struct {
	// Node proposes commands while this node leads; required.
	Node ProposeNode
	// Transport reaches the leader while it does not; required.
	Transport *PeerTransport
	// Guard refuses commands while the disk is nearly full; nil = never.
	Guard *DiskGuard
	// Gate refuses commands while the state of this node is in doubt; nil =
	// never.
	Gate *StateGate
	// Logger receives connects to leaders. Default: discarded.
	Logger *slog.Logger
	// MaxWait bounds how long a command waits for a leader. Default
	// DefaultMaxWait.
	MaxWait time.Duration
	// MaxWaiting and MaxWaitingBytes bound the commands that wait, for a leader
	// or to be sent; beyond, they are refused as busy. Defaults 65,536 and 64
	// MiB.
	MaxWaiting      int
	MaxWaitingBytes int64
	// RetireGrace is how long a former leader may take to answer what it was
	// sent. Default 300 ms.
	RetireGrace time.Duration
}

// Forwarder is the Submitter of a node: it proposes commands here while this
// node leads, sends them to the leader while not, waits while there is none,
// and repeats what is safe to repeat. Its methods are safe for concurrent use.
type Forwarder struct {
	c       ForwarderConfig
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	buffers sync.Pool // *[]byte
	timers  timerPool
	wake    chan struct{}
	// broken tells Beats that what a stream was given may be lost.
	broken chan struct{}

	mu     sync.Mutex
	closed bool
	// parked wait for a leader. parkedBytes counts them.
	parked      []*operation
	parkedBytes int64
	// stream leads to the current leader, nil when there is none.
	stream *forwardStream
	// holdUntil is when the next attempt to connect may be made, holdPause by
	// how much the one after that is put off.
	holdUntil time.Time
	holdPause time.Duration
}

var _ Submitter = (*Forwarder)(nil)

// NewForwarder returns a forwarder; Close ends its goroutines.
func NewForwarder(c ForwarderConfig) (*Forwarder, error) {
	if c.Node == nil || c.Transport == nil {
		return nil, errors.New("rpc: a forwarder needs Node and Transport")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.MaxWait, DefaultMaxWait)
	setDefault(&c.MaxWaiting, 1<<16)
	setDefault(&c.MaxWaitingBytes, 64<<20)
	setDefault(&c.RetireGrace, 300*time.Millisecond)
	ctx, cancel := context.WithCancel(context.Background())
	f := &Forwarder{
		c:      c,
		ctx:    ctx,
		cancel: cancel,
		wake:   make(chan struct{}, 1),
		broken: make(chan struct{}, 1),
	}
	f.buffers.New = func() any { return new([]byte) }
	f.wg.Go(f.run)
	return f, nil
}

// Close ends the streams and resolves every command: waiting ones as not done,
// those sent to another node as unknown. Commands proposed on this node are the
// node's to resolve.
func (f *Forwarder) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.cancel()
	f.wg.Wait()
	return nil
}

// SubmitFunc implements Submitter.
func (f *Forwarder) SubmitFunc(cmd *commandpb.Command, done func(*commandpb.Result, uint64, error)) {
	f.start(&operation{
		cmd:      cmd,
		size:     cmd.SizeVT(),
		done:     done,
		deadline: time.Now().Add(f.c.MaxWait),
	})
}

// submitted is what Submit waits for.
type submitted struct {
	result *commandpb.Result
	err    error
}

// Submit implements Submitter.
func (f *Forwarder) Submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	answer := make(chan submitted, 1)
	op := &operation{
		cmd:      cmd,
		size:     cmd.SizeVT(),
		done:     func(r *commandpb.Result, _ uint64, err error) { answer <- submitted{r, err} },
		deadline: time.Now().Add(f.c.MaxWait),
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotProposed, err)
	}
	f.start(op)
	limit := f.timers.limit(ctx)
	defer limit.end()
	var over error
	select {
	case a := <-answer:
		return a.result, a.err
	case <-limit.done:
		over = untimed(ctx).Err()
	case <-limit.up:
		over = context.DeadlineExceeded
	}
	// From here on a failed attempt is the answer and not a reason to wait for
	// another: without that, a command might be proposed after we gave up.
	op.left.Store(true)
	givenUp := func() error { // nobody will send it any more
		return op.truthful(fmt.Errorf("%w: %w", ErrNotProposed, over))
	}
	if op.giveUp() {
		return nil, givenUp()
	}
	if client := untimed(ctx); client.Err() == nil && hasDeadline(client) {
		// It is on its way, and the client still listens for a moment.
		select {
		case a := <-answer:
			return a.result, a.err
		case <-client.Done():
		}
		if op.giveUp() { // it was parked just before left was set
			return nil, givenUp()
		}
	}
	select {
	case a := <-answer: // it came at the same moment
		return a.result, a.err
	default:
		return nil, fmt.Errorf("rpc: the command was proposed, its result is not known yet: %w", over)
	}
}

// start makes the first attempt of op. A command that could not be applied is not
// even sent: see router.CheckCommand.
func (f *Forwarder) start(op *operation) {
	if err := router.CheckCommand(op.cmd); err != nil {
		f.finish(op, nil, 0, fmt.Errorf("%w: %w", ErrInvalidCommand, err))
		return
	}
	f.dispatch(op)
}

// dispatch sends op where the leader is. It must be called without locks: done
// may be called before it returns.
func (f *Forwarder) dispatch(op *operation) {
	if err := f.c.Gate.Err(); err != nil {
		f.finish(op, nil, 0, op.truthful(err))
		return
	}
	lead := f.c.Node.Leadership()
	switch {
	case lead.Leading:
		f.proposeHere(op)
	case lead.Leader == 0 || lead.Leader == f.c.Transport.o.Identity.NodeID:
		f.park(op, raftnode.ErrNoLeader)
	default:
		s := f.streamTo(lead.Leader)
		if s == nil {
			f.park(op, ErrUnreachable)
			return
		}
		s.push(op)
	}
}

// proposeHere proposes op on this node.
func (f *Forwarder) proposeHere(op *operation) {
	if err := f.c.Guard.Admit(op.cmd); err != nil {
		f.finish(op, nil, 0, op.truthful(err))
		return
	}
	if !op.begin() {
		return
	}
	buf := f.buffers.Get().(*[]byte)
	if cap(*buf) < op.size {
		*buf = make([]byte, op.size)
	}
	b := (*buf)[:op.size]
	if _, err := op.cmd.MarshalToSizedBufferVT(b); err != nil {
		f.buffers.Put(buf)
		f.finish(op, nil, 0, op.truthful(fmt.Errorf("rpc: encode a command: %w", err)))
		return
	}
	f.c.Node.ProposeFunc(b, func(r raftnode.Result, err error) {
		if err = f.c.Gate.result(err); err != nil {
			f.answered(op, nil, 0, err)
			return
		}
		result, ok := r.Value.(*commandpb.Result)
		if !ok {
			f.answered(op, nil, 0, fmt.Errorf("%w: the state machine answered a %T", raftnode.ErrAmbiguous, r.Value))
			return
		}
		f.answered(op, result, r.Index, nil)
	})
	const keep = 64 << 10 // a rare large command must not stay in the pool
	if cap(*buf) <= keep {
		f.buffers.Put(buf)
	}
}

// answered takes the outcome of one attempt of op, which is no one else's at
// this moment: the final word is passed on, otherwise op waits for another
// attempt.
func (f *Forwarder) answered(op *operation, result *commandpb.Result, index uint64, err error) {
	switch {
	case err == nil:
		result, err = op.outcome(result)
		f.finish(op, result, index, err)
	case certainlyNotDone(err):
		f.park(op, err)
	case errors.Is(err, raftnode.ErrAmbiguous) && repeatable(op.cmd):
		op.ambiguous.Store(true)
		f.park(op, err)
	default:
		f.finish(op, nil, 0, op.truthful(err))
	}
}

func (f *Forwarder) finish(op *operation, result *commandpb.Result, index uint64, err error) {
	if err != nil {
		result, index = nil, 0
	}
	op.done(result, index, err)
}

// park lets op wait for a leader that can be reached.
func (f *Forwarder) park(op *operation, why error) {
	op.last = why
	f.mu.Lock()
	if op.left.Load() {
		f.mu.Unlock()
		f.finish(op, nil, 0, op.truthful(why))
		return
	}
	full := len(f.parked) >= f.c.MaxWaiting || len(f.parked) > 0 && f.parkedBytes+int64(op.size) > f.c.MaxWaitingBytes
	if f.closed || full {
		f.mu.Unlock()
		err := raftnode.ErrBusy
		if !full {
			err = raftnode.ErrStopping
		}
		f.finish(op, nil, 0, op.truthful(err))
		return
	}
	// Now, not before: from here on the caller may give it up. It may have done
	// so already, when op was not sent in between: then it has been told that
	// nothing will be proposed, and a plain store would take that back.
	if !op.state.CompareAndSwap(opSent, opWaiting) && op.state.Load() == opGivenUp {
		f.mu.Unlock()
		return
	}
	f.parked = append(f.parked, op)
	f.parkedBytes += int64(op.size)
	first := len(f.parked) == 1
	f.mu.Unlock()
	if first {
		f.poke()
	}
}

func (f *Forwarder) poke() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// run gives waiting operations another try at every change of leadership and,
// while there are any, after a growing pause.
func (f *Forwarder) run() {
	timer := time.NewTimer(retryMin)
	timer.Stop()
	pause := retryMin
	for {
		// Taken first, so that a change during the attempts is not missed.
		changed := f.c.Node.Changed()
		f.followLeader()
		for _, op := range f.takeParked() {
			switch {
			case op.state.Load() == opGivenUp:
			case time.Now().After(op.deadline):
				f.expire(op)
			default:
				f.dispatch(op)
			}
		}
		if f.waiting() {
			timer.Reset(pause/2 + rand.N(pause/2))
			pause = min(2*pause, retryMax)
		} else {
			pause = retryMin
		}
		for again := false; !again; {
			select {
			case <-f.ctx.Done():
				timer.Stop()
				f.stop()
				return
			case <-changed:
				pause, again = retryMin, true
			case <-timer.C:
				again = true
			case <-f.wake:
				// Something began to wait. Not tried at once: what has just
				// failed would fail again.
				timer.Reset(pause)
			}
		}
	}
}

func (f *Forwarder) takeParked() []*operation {
	f.mu.Lock()
	defer f.mu.Unlock()
	ops := f.parked
	f.parked, f.parkedBytes = nil, 0
	return ops
}

func (f *Forwarder) waiting() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.parked) > 0
}

// expire ends an operation that has waited long enough.
func (f *Forwarder) expire(op *operation) {
	if !op.giveUp() {
		return
	}
	err := op.last
	if !certainlyNotDone(err) { // it waits because of an unknown outcome
		err = raftnode.ErrNoLeader
	}
	f.finish(op, nil, 0, op.truthful(fmt.Errorf("%w (waited %v)", err, f.c.MaxWait)))
}

// stop resolves what waits; the streams resolve what is theirs.
func (f *Forwarder) stop() {
	for _, op := range f.takeParked() {
		if op.giveUp() {
			f.finish(op, nil, 0, op.truthful(raftnode.ErrStopping))
		}
	}
}

// streamTo returns the stream to leader, begun now when there is none, or nil
// when the last attempt has only just failed.
func (f *Forwarder) streamTo(leader uint64) *forwardStream {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.stream; s != nil {
		if s.to == leader && s.open() {
			return s
		}
		s.retire()
		f.stream = nil
	}
	if f.closed || time.Now().Before(f.holdUntil) {
		return nil
	}
	s := newForwardStream(f, leader)
	f.stream = s
	f.wg.Go(s.run)
	return s
}

// followLeader ends the stream to a node that does not lead any more.
func (f *Forwarder) followLeader() {
	lead := f.c.Node.Leadership()
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stream
	if s == nil {
		return
	}
	// Without a leader the old one may be it again after all, or answer what it
	// was sent.
	if lead.Leading || lead.Leader != 0 && lead.Leader != s.to {
		s.retire()
		f.stream = nil
		f.holdUntil, f.holdPause = time.Time{}, 0
	}
}

// connected and failed keep the pace of attempts to reach a leader.
func (f *Forwarder) connected() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holdUntil, f.holdPause = time.Time{}, 0
}

func (f *Forwarder) failed(s *forwardStream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stream == s {
		f.stream = nil
	}
	f.holdPause = min(max(2*f.holdPause, f.c.Transport.o.BackoffMin), f.c.Transport.o.BackoffMax)
	f.holdUntil = time.Now().Add(f.holdPause)
	select {
	case f.broken <- struct{}{}:
	default:
	}
}

// sendBeats passes heartbeats on to the leader and reports whether they are on
// their way. They are lost with the stream, of which Beats is told.
func (f *Forwarder) sendBeats(beats beatBatch) bool {
	lead := f.c.Node.Leadership()
	if lead.Leading || lead.Leader == 0 || lead.Leader == f.c.Transport.o.Identity.NodeID {
		return false
	}
	s := f.streamTo(lead.Leader)
	return s != nil && s.pushBeats(beats)
}
