package control

import (
	"container/heap"
	"time"

	"conveyor.etl/router/router/commandpb"
)

// waits is what the placer waits for by the clock. Times are measured with the
// monotonic clock from when a thing was first seen, and never with that of the day:
// if that jumps, a sidecar must not lose its time to let go.
//
// Releases are taken over as they begin and end. There may be ten thousand, and to note
// all of them anew with each plan, while one sidecar drains, takes as long as a plan.
type waits struct {
	// due is by when each release is over, fresh are those whose time was not measured
	// yet, and queue has those of due, the first first.
	due   map[waitKey]time.Time
	fresh map[waitKey]struct{}
	queue dueQueue
	// look are the sidecars that have to be looked at for handovers that end since they
	// are gone: it changed, or a handover began.
	look map[string]struct{}
	// others are by when something is due with a sidecar or a service. They are few, and
	// worked out anew by each plan.
	others map[waitKey]time.Time

	// next is when something has to be looked at again; zero = never.
	next time.Time
	// first is when the first of all that is due is, or was of something that is over
	// since; zero = nothing is due.
	first time.Time
	// more is when the budget allows another move; zero = nothing waits for it.
	more time.Time
	// heard is when a sidecar must have heard of a change that another's waits for;
	// zero = none waits.
	heard time.Time
	// even is when load is evened next; zero = never.
	even time.Time
}

// waitKey is a release, or with an empty pipeline a sidecar, or a service. ms is the
// time it is about, in that of the state.
type waitKey struct {
	pipeline, sidecar, service string
	ms                         uint64
}

// newWaits returns the waits for what m holds, which tells it from now on of what
// begins and ends.
func newWaits(m *mirror) *waits {
	w := &waits{
		due: make(map[waitKey]time.Time), fresh: make(map[waitKey]struct{}),
		look: make(map[string]struct{}), others: make(map[waitKey]time.Time),
	}
	for _, hs := range m.handovers {
		for _, h := range hs {
			w.handover(nil, h)
		}
	}
	m.waits = w
	return w
}

// handover takes over that a handover changed; prev is nil when it began, next when it
// is over.
func (w *waits) handover(prev, next *commandpb.Handover) {
	if next != nil {
		w.look[next.SidecarId] = struct{}{}
	}
	for _, r := range prev.GetReleases() {
		k := waitKey{pipeline: prev.PipelineId, sidecar: prev.SidecarId, ms: r.DeadlineMs}
		if !waitsUntil(next, r.DeadlineMs) {
			delete(w.due, k)
			delete(w.fresh, k)
		}
	}
	for _, r := range next.GetReleases() {
		k := waitKey{pipeline: next.PipelineId, sidecar: next.SidecarId, ms: r.DeadlineMs}
		if _, known := w.due[k]; !known && k.ms > 0 {
			w.fresh[k] = struct{}{}
		}
	}
}

func waitsUntil(h *commandpb.Handover, ms uint64) bool {
	for _, r := range h.GetReleases() {
		if r.DeadlineMs == ms {
			return true
		}
	}
	return false
}

// past is true for what is due at now.
func (w *waits) past(k waitKey, now time.Time) bool {
	at, ok := w.due[k]
	if k.pipeline == "" {
		at, ok = w.others[k]
	}
	return ok && !now.Before(at)
}

// late lists the releases that are due at now. They stay until they are over.
func (w *waits) late(now time.Time) []waitKey {
	var late []waitKey
	for {
		d, ok := w.queue.first(w.due)
		if !ok || now.Before(d.at) {
			break
		}
		heap.Pop(&w.queue)
		late = append(late, d.key)
	}
	for _, k := range late {
		heap.Push(&w.queue, dueRelease{w.due[k], k})
	}
	return late
}

// measure notes that fresh ones have until they are due; left says how long each has.
func (w *waits) measure(now time.Time, left func(ms uint64) time.Duration) {
	for k := range w.fresh {
		at := now.Add(left(k.ms))
		w.due[k] = at
		heap.Push(&w.queue, dueRelease{at, k})
	}
	clear(w.fresh)
	// Of what is over the queue knows nothing until it would have been due.
	if len(w.queue) > 2*len(w.due)+1024 {
		w.queue = w.queue[:0]
		for k, at := range w.due {
			w.queue = append(w.queue, dueRelease{at, k})
		}
		heap.Init(&w.queue)
	}
}

// soonest returns when the first of all that is due is; zero = nothing is.
func (w *waits) soonest() time.Time {
	var first time.Time
	if d, ok := w.queue.first(w.due); ok {
		first = d.at
	}
	for _, at := range w.others {
		if first.IsZero() || at.Before(first) {
			first = at
		}
	}
	return first
}

// dueRelease is a release and when it is due.
type dueRelease struct {
	at  time.Time
	key waitKey
}

// dueQueue is a heap of them.
type dueQueue []dueRelease

func (q dueQueue) Len() int           { return len(q) }
func (q dueQueue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q dueQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *dueQueue) Push(x any)        { *q = append(*q, x.(dueRelease)) }
func (q *dueQueue) Pop() any {
	last := len(*q) - 1
	d := (*q)[last]
	(*q)[last] = dueRelease{}
	*q = (*q)[:last]
	return d
}

// first returns the first that is still in due, and drops what is over before it.
func (q *dueQueue) first(due map[waitKey]time.Time) (dueRelease, bool) {
	for len(*q) > 0 {
		d := (*q)[0]
		if at, ok := due[d.key]; ok && at.Equal(d.at) {
			return d, true
		}
		heap.Pop(q)
	}
	return dueRelease{}, false
}
