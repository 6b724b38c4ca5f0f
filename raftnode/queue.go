package raftnode

import (
	"sync"
	"time"
)

// queue hands work from the loop to one storage goroutine. push never blocks;
// what bounds it is raft's own limits on entries in flight.
type queue[T any] struct {
	clock Clock

	mu    sync.Mutex
	items []T
	spare []T
	// since is when items[0] was pushed, busySince when the oldest item of the
	// work now in progress was pushed (zero: idle).
	since     time.Time
	busySince time.Time

	// wake receives when the queue stops being empty.
	wake chan struct{}
}

func newQueue[T any](clock Clock) *queue[T] {
	return &queue[T]{clock: clock, wake: make(chan struct{}, 1)}
}

func (q *queue[T]) push(item T) {
	q.mu.Lock()
	first := len(q.items) == 0
	if first {
		q.since = q.clock.Now()
	}
	q.items = append(q.items, item)
	q.mu.Unlock()
	if first {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
}

// take returns everything queued, in order; the caller owns the slice until it
// calls done.
func (q *queue[T]) take() []T {
	q.mu.Lock()
	defer q.mu.Unlock()
	items := q.items
	if len(items) == 0 {
		return nil
	}
	q.items, q.spare = q.spare[:0], nil
	q.busySince = q.since
	return items
}

// done ends the work on a slice returned by take.
func (q *queue[T]) done(items []T) {
	clear(items)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busySince = time.Time{}
	const keep = 1024
	if q.spare == nil && cap(items) <= keep {
		q.spare = items[:0]
	}
}

// age returns how long the oldest unfinished item has been waiting.
func (q *queue[T]) age(now time.Time) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case !q.busySince.IsZero():
		return now.Sub(q.busySince)
	case len(q.items) > 0:
		return now.Sub(q.since)
	}
	return 0
}

// len returns how many items wait, not counting those being worked on.
func (q *queue[T]) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items)
}
