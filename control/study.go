package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// StudyConfig holds the parts and limits of a Study; EnsureDefaults fills zero
// limits.
type StudyConfig struct {
	State State
	// Idle is how long after the last question what was read is kept. Default one
	// minute.
	Idle time.Duration
	// Waiting bounds the questions that wait for their turn. Default 64.
	Waiting int64
	// Burst is how long a Study may work at once, Share the part of all time it
	// may work for in the long run. Defaults 5 s and 1/4.
	Burst  time.Duration
	Share  float64
	Logger *slog.Logger
}

// EnsureDefaults fills what is zero.
func (c *StudyConfig) EnsureDefaults() {
	if c.Idle <= 0 {
		c.Idle = time.Minute
	}
	if c.Waiting <= 0 {
		c.Waiting = 64
	}
	if c.Burst <= 0 {
		c.Burst = 5 * time.Second
	}
	if c.Share <= 0 {
		c.Share = 0.25
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Study answers questions about the placement, on any node and from what is applied
// there: why stages run where they do, and what would come of a change. It plans
// like the leader does, and proposes nothing.
//
// It keeps one mirror of the state for all who ask, brought up to date by the
// changes since the last question, and forgets it when nobody has asked for a while.
// Questions are answered one at a time, and all of them together, reading the state
// included, take no more than a share of one processor: however many ask, the node
// goes on with what it is for. Its methods are safe for concurrent use.
type Study struct {
	c StudyConfig
	// turn is held by whoever uses what follows.
	turn   chan struct{}
	mirror *mirror
	sub    *router.Subscription
	pace   pace

	waiting atomic.Int64
	reads   atomic.Int64 // times the state was read

	ctx     context.Context // ends with Close
	stop    context.CancelFunc
	mu      sync.Mutex // guards what follows, and working against Close
	idle    *time.Timer
	last    time.Time // somebody asked
	working sync.WaitGroup
}

// NewStudy returns a Study that has read nothing yet.
func NewStudy(c StudyConfig) *Study {
	c.EnsureDefaults()
	s := &Study{c: c, turn: make(chan struct{}, 1), pace: pace{burst: c.Burst, share: c.Share}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

// Close forgets everything and waits for the question being answered. Questions
// asked afterwards fail.
func (s *Study) Close() {
	s.stop()
	s.mu.Lock()
	if s.idle != nil {
		s.idle.Stop()
	}
	s.mu.Unlock()
	s.working.Wait()
	s.turn <- struct{}{}
	s.forget()
	<-s.turn
}

// Explain tells where the stages of a pipeline run, who else could run them, and
// where they hand records on; see placement.Engine. It blocks until it has its turn,
// and fails with raftnode.ErrBusy when too many others ask. The point is that of the
// state the answer is of.
func (s *Study) Explain(ctx context.Context, pipeline string, q placement.Query) ([]placement.StageStatus, router.Point, error) {
	return ask(ctx, s, func(e *placement.Engine) []placement.StageStatus { return e.Explain(pipeline, q) })
}

// WhatIf tells what would come of losing the sidecars for which lose is true. It
// blocks and fails like Explain; lose may be called after it has returned an error.
func (s *Study) WhatIf(ctx context.Context, lose func(*placement.Sidecar) bool, reasons int) (placement.Outlook, router.Point, error) {
	return ask(ctx, s, func(e *placement.Engine) placement.Outlook { return e.WhatIf(lose, reasons) })
}

// Try tells what would come of declaring pipelines. It blocks and fails like
// Explain. The specs must not change afterwards.
func (s *Study) Try(ctx context.Context, specs []*commandpb.PipelineSpec, reasons int) (placement.Outlook, router.Point, error) {
	declared := make([]*placement.Pipeline, len(specs))
	for i, spec := range specs {
		declared[i] = pipelineOf(&commandpb.Pipeline{Spec: spec})
	}
	return ask(ctx, s, func(e *placement.Engine) placement.Outlook { return e.Try(declared, reasons) })
}

// answer is what came of one question.
type answer[T any] struct {
	value T
	at    router.Point
	err   error
}

// ask lets fn have the engine, up to date and settled. The work is done for all who
// ask, so it goes on when the one who began it has left: reading a large state takes
// longer than many are willing to wait, and the next who asks finds it read.
func ask[T any](ctx context.Context, s *Study, fn func(e *placement.Engine) T) (T, router.Point, error) {
	var none T
	if s.waiting.Add(1) > s.c.Waiting {
		s.waiting.Add(-1)
		return none, router.Point{}, fmt.Errorf("%w: %d others ask this node about the placement; nothing was done", raftnode.ErrBusy, s.c.Waiting)
	}
	defer s.waiting.Add(-1)
	if !s.begin() {
		return none, router.Point{}, raftnode.ErrStopping
	}
	done := make(chan answer[T], 1)
	go func() {
		defer s.working.Done()
		select {
		case s.turn <- struct{}{}:
		case <-ctx.Done():
			done <- answer[T]{err: ctx.Err()}
			return
		case <-s.ctx.Done():
			done <- answer[T]{err: raftnode.ErrStopping}
			return
		}
		defer func() { <-s.turn }()
		done <- turn(ctx, s, fn)
	}()
	select {
	case a := <-done:
		return a.value, a.at, a.err
	case <-ctx.Done():
		return none, router.Point{}, ctx.Err()
	}
}

// begin counts a question in; false when the Study is closed.
func (s *Study) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return false
	}
	s.working.Add(1)
	s.last = time.Now()
	if s.idle == nil {
		s.idle = time.AfterFunc(s.c.Idle, s.rest)
	} else {
		s.idle.Reset(s.c.Idle)
	}
	return true
}

// rest forgets what was read, unless somebody asks or has just asked.
func (s *Study) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil || time.Since(s.last) < s.c.Idle {
		return // Close forgets it, or the timer runs again
	}
	select {
	case s.turn <- struct{}{}:
		s.forget()
		<-s.turn
	default: // a long answer
		s.idle.Reset(s.c.Idle)
	}
}

// forget drops what was read. The caller has the turn.
func (s *Study) forget() {
	if s.sub != nil {
		s.sub.Close()
	}
	s.mirror, s.sub = nil, nil
}

// turn answers one question. The caller has the turn.
func turn[T any](ctx context.Context, s *Study, fn func(e *placement.Engine) T) (a answer[T]) {
	if a.err = s.rested(ctx); a.err != nil {
		return a
	}
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			// A fault of the planner must not end a node that only looks.
			s.c.Logger.Error("a question about the placement panicked", "panic", p, "stack", string(debug.Stack()))
			a.err = fmt.Errorf("control: a question about the placement panicked: %v", p)
			s.forget()
		}
		s.pace.worked(time.Now(), time.Since(start))
	}()
	if a.err = s.catchUp(); a.err != nil {
		s.forget()
		return a
	}
	if a.err = ctx.Err(); a.err != nil {
		return a // nobody waits for it
	}
	a.at = router.Point{Revision: s.mirror.revision, Epoch: s.mirror.epoch}
	a.value = fn(s.mirror.engine)
	return a
}

// rested waits until there may be more work.
func (s *Study) rested(ctx context.Context) error {
	wait := s.pace.wait(time.Now())
	if wait <= 0 {
		return nil
	}
	if end, ok := ctx.Deadline(); ok && time.Until(end) < wait {
		return fmt.Errorf("%w: this node has worked enough on questions about the placement for now; nothing was done: ask again in %v, or another node",
			raftnode.ErrBusy, wait.Round(100*time.Millisecond)+100*time.Millisecond)
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ctx.Done():
		return raftnode.ErrStopping
	}
}

// catchUp brings the mirror to the newest state whose changes are published, which
// holds everything whose result anybody was told here. It plans what is to be
// planned, so that answers are about where things will be left as they are.
func (s *Study) catchUp() error {
	if s.mirror != nil {
		_, err := drain(s.mirror, s.sub, nil)
		if err == nil {
			s.mirror.revision = max(s.mirror.revision, s.sub.Reached())
			s.mirror.engine.Plan()
			return nil
		}
		s.forget()
		if !errors.Is(err, router.ErrResync) {
			return err
		}
	}
	for range readAttempts {
		s.reads.Add(1)
		v := s.c.State.View()
		m, err := newMirror(v)
		if err = errors.Join(err, v.Close()); err != nil {
			return err
		}
		m.replaced = nil
		sub, err := s.c.State.Hub().Subscribe(m.revision, placementTables()...)
		if errors.Is(err, router.ErrCompacted) || errors.Is(err, router.ErrFutureRevision) {
			continue // it was replaced, or changed much, while it was read
		}
		if err != nil {
			return err
		}
		m.engine.Plan()
		s.mirror, s.sub = m, sub
		return nil
	}
	return fmt.Errorf("%w: the state changes faster than this node can read it; nothing was done: ask again", raftnode.ErrBusy)
}

// readAttempts is how often the state is read for one question.
const readAttempts = 3

// placementTables are those a plan depends on.
func placementTables() []router.Table {
	return []router.Table{router.TablePipelines, router.TableSidecars, router.TableServices, router.TableAssignments, router.TableHandovers}
}

// pace keeps work within a share of the time, but for bursts.
type pace struct {
	burst time.Duration
	share float64

	debt time.Duration // work not made up for by time yet, at since
	at   time.Time
}

// worked counts work that ended now.
func (p *pace) worked(now time.Time, took time.Duration) {
	p.debt = p.left(now) + took
	p.at = now
}

// left is the debt as of now.
func (p *pace) left(now time.Time) time.Duration {
	if p.at.IsZero() {
		return 0
	}
	return max(0, p.debt-time.Duration(float64(now.Sub(p.at))*p.share))
}

// wait is how long there must be no work from now on.
func (p *pace) wait(now time.Time) time.Duration {
	return time.Duration(float64(max(0, p.left(now)-p.burst)) / p.share)
}
