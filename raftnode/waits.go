package raftnode

import (
	"container/heap"
	"sync"
	"sync/atomic"
)

// waitGroup is callers that wait for the same applied index.
type waitGroup struct {
	index uint64
	calls []*call
}

type waitHeap []*waitGroup

func (h waitHeap) Len() int           { return len(h) }
func (h waitHeap) Less(i, j int) bool { return h[i].index < h[j].index }
func (h waitHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *waitHeap) Push(x any)        { *h = append(*h, x.(*waitGroup)) }
func (h *waitHeap) Pop() any {
	old := *h
	g := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return g
}

// waits holds the applied index and those who wait for it to reach theirs.
type waits struct {
	applied atomic.Uint64

	mu      sync.Mutex
	groups  waitHeap
	stopped bool
}

// add resolves calls once index is applied, at once if it is.
func (w *waits) add(index uint64, calls []*call) {
	w.mu.Lock()
	switch {
	case w.stopped:
		w.mu.Unlock()
		resolveCalls(calls, outcome{err: ErrStopping})
	case index <= w.applied.Load():
		w.mu.Unlock()
		resolveCalls(calls, outcome{res: Result{Index: index}})
	default:
		heap.Push(&w.groups, &waitGroup{index: index, calls: calls})
		w.mu.Unlock()
	}
}

// drop forgets a caller that left.
func (w *waits) drop(c *call) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, g := range w.groups {
		if len(g.calls) == 1 && g.calls[0] == c {
			heap.Remove(&w.groups, i)
			return
		}
	}
}

// advance raises the applied index.
func (w *waits) advance(index uint64) {
	w.mu.Lock()
	if index > w.applied.Load() {
		w.applied.Store(index)
	}
	var done []*waitGroup
	for len(w.groups) > 0 && w.groups[0].index <= index {
		done = append(done, heap.Pop(&w.groups).(*waitGroup))
	}
	w.mu.Unlock()
	for _, g := range done {
		resolveCalls(g.calls, outcome{res: Result{Index: g.index}})
	}
}

func (w *waits) stop() {
	w.mu.Lock()
	w.stopped = true
	left := w.groups
	w.groups = nil
	w.mu.Unlock()
	for _, g := range left {
		resolveCalls(g.calls, outcome{err: ErrStopping})
	}
}

func resolveCalls(calls []*call, o outcome) {
	for _, c := range calls {
		c.ch <- o
	}
}
