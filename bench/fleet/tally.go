package fleet

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/status"
)

// maxFaults bounds the faults that are kept; more are only counted.
const maxFaults = 20

// counts only grow; what happened in a while is the difference of two.
type counts struct {
	Beats, BeatErrors, Unacknowledged int64
	BeatStreamsEnded                  int64
	StreamsEnded, Resyncs             int64
	Suspected, Expired, Revived       int64
	Registered, RegistrationsRepeated int64
	Assigned                          int64 // times that a sidecar was told to run something
	Faults                            int64
}

func (c counts) minus(o counts) counts {
	return counts{
		c.Beats - o.Beats, c.BeatErrors - o.BeatErrors, c.Unacknowledged - o.Unacknowledged,
		c.BeatStreamsEnded - o.BeatStreamsEnded,
		c.StreamsEnded - o.StreamsEnded, c.Resyncs - o.Resyncs,
		c.Suspected - o.Suspected, c.Expired - o.Expired, c.Revived - o.Revived,
		c.Registered - o.Registered, c.RegistrationsRepeated - o.RegistrationsRepeated,
		c.Assigned - o.Assigned,
		c.Faults - o.Faults,
	}
}

// tally gathers what happens to all sidecars. Its methods are safe for
// concurrent use.
type tally struct {
	// syncedNow is how many watches have all they have to be told.
	syncedNow atomic.Int64

	mu        sync.Mutex
	counts    counts
	faults    []string
	lastError string // of a heartbeat or a stream
	// When a sidecar last was told to run something, and when one last expired.
	lastAssigned, lastExpired time.Time
	// Of the running scenario.
	beats, registrations *latencies
	mostLate             time.Duration
}

func (t *tally) init() { t.beats, t.registrations = newLatencies(), newLatencies() }

func (t *tally) add(change func(c *counts)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.counts)
}

func (t *tally) registered(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Registered++
	t.registrations.record(d)
}

func (t *tally) registrationRepeated() { t.add(func(c *counts) { c.RegistrationsRepeated++ }) }

// late notes how long what was due had to wait for a worker.
func (t *tally) late(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mostLate = max(t.mostLate, d)
}

func (t *tally) beat(d time.Duration, err error, acknowledged bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err != nil:
		t.counts.BeatErrors++
		t.lastError = "heartbeat: " + status.Convert(err).Message()
	case !acknowledged:
		t.counts.Unacknowledged++
	default:
		t.counts.Beats++
		t.beats.record(d)
	}
}

// streamed notes heartbeats that were sent on a stream, where nobody answers them
// as a rule.
func (t *tally) streamed(n int) { t.add(func(c *counts) { c.Beats += int64(n) }) }

// answered notes an answer on a heartbeat stream.
func (t *tally) answered(acknowledged bool, reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !acknowledged {
		t.counts.Unacknowledged++
	}
	if reason != "" {
		t.lastError = "answer to a heartbeat: " + reason
	}
}

func (t *tally) beatStreamEnded(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.BeatStreamsEnded++
	t.lastError = "heartbeat stream: " + status.Convert(err).Message()
}

func (t *tally) streamEnded(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.StreamsEnded++
	t.lastError = "watch: " + status.Convert(err).Message()
}

func (t *tally) resynced() { t.add(func(c *counts) { c.Resyncs++ }) }
func (t *tally) synced()   { t.syncedNow.Add(1) }
func (t *tally) unsynced() { t.syncedNow.Add(-1) }

// assigned notes that a sidecar was told to run something.
func (t *tally) assigned() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lastAssigned = time.Now()
	t.counts.Assigned++
}

// last returns when a sidecar last was told to run something, and when one last
// expired; zero = never.
func (t *tally) last() (assigned, expired time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lastAssigned, t.lastExpired
}

// changed notes that the cluster changed its mind about a sidecar's liveness.
func (t *tally) changed(state string) {
	t.add(func(c *counts) {
		switch state {
		case "suspect":
			c.Suspected++
		case "expired":
			c.Expired++
			t.lastExpired = time.Now()
		case "alive":
			c.Revived++
		}
	})
}

// fault notes something that must never happen.
func (t *tally) fault(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Faults++
	if len(t.faults) < maxFaults {
		t.faults = append(t.faults, fmt.Sprintf(format, args...))
	}
}

func (t *tally) now() counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts
}

// fresh begins the histograms and faults anew.
func (t *tally) fresh() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.init()
	t.mostLate, t.faults, t.lastError = 0, nil, ""
}
