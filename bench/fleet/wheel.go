package fleet

import (
	"sync"
	"time"
)

// The wheel has wheelSlots slots of wheelTick each, so nothing can be due later
// than wheelSpan.
const (
	wheelTick  = 20 * time.Millisecond
	wheelSlots = 4096
	wheelSpan  = (wheelSlots - 1) * wheelTick
)

// wheel says which of n entries are due. It costs a word per entry and a
// constant time per operation; a timer each would be a heap of 100,000 that
// every heartbeat has to push down. Its methods are safe for concurrent use.
type wheel struct {
	mu    sync.Mutex
	heads [wheelSlots]int32 // first entry of each slot, -1 = none
	next  []int32           // by entry: the next of its slot, -1 = none, out = in no slot
	at    int64             // ticks gone by
}

const out = -2

func newWheel(n int) *wheel {
	w := &wheel{next: make([]int32, n)}
	for i := range w.heads {
		w.heads[i] = -1
	}
	for i := range w.next {
		w.next[i] = out
	}
	return w
}

// add makes entry i due in d, at most wheelSpan; one that waits already stays as
// it is.
func (w *wheel) add(i int, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next[i] != out {
		return
	}
	ticks := max(1, min(int64(d/wheelTick), wheelSlots-1))
	slot := (w.at + ticks) % wheelSlots
	w.next[i] = w.heads[slot]
	w.heads[slot] = int32(i)
}

// advance moves on to the time since the start and appends the entries that are
// due by then. They wait no more.
func (w *wheel) advance(since time.Duration, due []int32) []int32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	for to := int64(since / wheelTick); w.at < to; {
		w.at++
		slot := w.at % wheelSlots
		for i := w.heads[slot]; i >= 0; {
			next := w.next[i]
			w.next[i] = out
			due = append(due, i)
			i = next
		}
		w.heads[slot] = -1
	}
	return due
}
