package fleet

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/bench"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// probe measures how the events about one change arrive.
type probe struct {
	// concerns says whether an event is one of those waited for.
	concerns func(ev *sidecarpb.PipelineAssignmentEvent) bool
	want     int // watchers that have to hear of it

	mu      sync.Mutex
	seen    map[int]struct{} // by index of the watcher
	events  int
	receipt *latencies
	last    time.Time
	done    chan struct{}
}

func newProbe(want int, concerns func(*sidecarpb.PipelineAssignmentEvent) bool) *probe {
	return &probe{concerns: concerns, want: want, seen: make(map[int]struct{}), receipt: newLatencies(), done: make(chan struct{})}
}

func (p *probe) note(i int, ev *sidecarpb.PipelineAssignmentEvent, now time.Time) {
	if ev.GetAssignment() == nil || !p.concerns(ev) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events++
	p.last = now
	if at := ev.GetChangedAtMs(); at > 0 {
		p.receipt.record(now.Sub(time.UnixMilli(int64(at))))
	}
	before := len(p.seen)
	p.seen[i] = struct{}{}
	if before < p.want && len(p.seen) == p.want {
		close(p.done)
	}
}

// heard returns how many watchers heard of the change.
func (p *probe) heard() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.seen)
}

// latencies is a histogram in microseconds; not safe for concurrent use.
type latencies struct{ h *bench.Measurement }

func newLatencies() *latencies { return &latencies{&bench.Measurement{Latency: bench.NewHistogram()}} }

func (l *latencies) record(d time.Duration) {
	// A value out of range is counted as the nearest that is in it.
	_ = l.h.Latency.RecordValue(min(max(1, d.Microseconds()), l.h.Latency.HighestTrackableValue()))
}

func (l *latencies) count() int64               { return l.h.Latency.TotalCount() }
func (l *latencies) at(q float64) time.Duration { return l.h.Percentile(q) }
func (l *latencies) max() time.Duration         { return l.h.Max() }
func (l *latencies) merge(o *latencies)         { l.h.Latency.Merge(o.h.Latency) }

// startWatch lets sidecar i, which watches, do so until it is stopped.
func (f *Fleet) startWatch(i int) {
	ctx, cancel := context.WithCancel(f.ctx)
	ended := make(chan struct{})
	s := &f.sidecars[i]
	s.mu.Lock()
	s.view = &view{}
	s.stop = func() { cancel(); <-ended }
	s.mu.Unlock()
	f.running.Go(func() {
		defer close(ended)
		defer cancel()
		f.watch(ctx, i)
	})
}

// watch follows the assignments of sidecar i until ctx is done, over as many
// streams as it takes.
func (f *Fleet) watch(ctx context.Context, i int) {
	for wait := 50 * time.Millisecond; ctx.Err() == nil; {
		synced, err := f.stream(ctx, i)
		if ctx.Err() != nil {
			return
		}
		f.tally.streamEnded(err)
		if synced {
			wait = 50 * time.Millisecond
		}
		// What the server asks for, or else more and more; never all the same.
		d := wait + rand.N(wait)
		if asked, ok := retryDelay(err); ok {
			d = asked
		}
		if !pause(ctx, d) {
			return
		}
		wait = min(2*wait, 2*time.Second)
	}
}

// retryDelay returns the pause that a status asks for.
func retryDelay(err error) (time.Duration, bool) {
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return r.GetRetryDelay().AsDuration(), true
		}
	}
	return 0, false
}

// stream follows one stream to its end and says whether it was synced.
func (f *Fleet) stream(ctx context.Context, i int) (synced bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &f.sidecars[i]
	s.mu.Lock()
	from, epoch := s.view.begin()
	s.mu.Unlock()
	stream, err := f.pool.sidecars(i).WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{
		SidecarId: sidecarID(i), FromRevision: from, FromEpoch: epoch,
	}, grpc.WaitForReady(true))
	if err != nil {
		return false, err
	}
	defer func() {
		if synced {
			f.tally.unsynced()
		}
	}()
	for {
		ev, err := stream.Recv()
		if err != nil {
			return synced, err
		}
		now := time.Now()
		s.mu.Lock()
		fault := s.view.take(ev)
		is := s.view.synced
		s.mu.Unlock()
		if fault != nil {
			f.tally.fault("watch of %s: %v", sidecarID(i), fault)
		}
		switch ev.GetEventType() {
		case sidecarpb.EventType_EVENT_TYPE_RESYNC:
			f.tally.resynced()
		case sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_UPDATED:
			f.tally.assigned()
		}
		if is != synced {
			if synced = is; synced {
				f.tally.synced()
			} else {
				f.tally.unsynced()
			}
		}
		if p := f.probe.Load(); p != nil {
			p.note(i, ev, now)
		}
	}
}
