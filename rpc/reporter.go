package rpc

import (
	"context"
	"sync"
	"time"
)

// reporter passes on which peers are unreachable, each at most once per
// interval. It has a goroutine of its own because Send is called from raft's
// own loop, which must not call back into itself.
type reporter struct {
	interval time.Duration
	wake     chan struct{}

	mu      sync.Mutex
	node    UnreachableReporter
	pending map[uint64]struct{}
}

func newReporter(interval time.Duration) *reporter {
	return &reporter{interval: interval, wake: make(chan struct{}, 1), pending: map[uint64]struct{}{}}
}

func (r *reporter) attach(node UnreachableReporter) {
	r.mu.Lock()
	r.node = node
	r.mu.Unlock()
	r.poke()
}

// unreachable queues a report; it never blocks.
func (r *reporter) unreachable(id uint64) {
	r.mu.Lock()
	_, known := r.pending[id]
	r.pending[id] = struct{}{}
	r.mu.Unlock()
	if !known {
		r.poke()
	}
}

func (r *reporter) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reporter) run(ctx context.Context) {
	pause := time.NewTimer(r.interval)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		}
		r.mu.Lock()
		node, ids := r.node, r.pending
		if node == nil {
			r.mu.Unlock()
			continue
		}
		r.pending = make(map[uint64]struct{}, len(ids))
		r.mu.Unlock()
		if len(ids) == 0 {
			continue
		}
		for id := range ids {
			node.ReportUnreachable(id)
		}
		pause.Reset(r.interval)
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
	}
}
