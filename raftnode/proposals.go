package raftnode

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// batch is the commands of this node that travel in one entry, and who waits
// for them. It is owned in turn by the inbox (gathering), the loop (proposing)
// and proposals (waiting to be applied).
type batch struct {
	id uint64
	// data is the envelope; raft copies it when it is proposed.
	data    []byte
	waiters []waiter
	// bytes is what the commands count for in the admission limit.
	bytes int64
	// conf marks a membership change, which has one waiter and no envelope.
	conf bool

	// index and term are where a leader put the entry.
	index, term uint64
	// claimed: the applier has reached the entry and will finish the batch.
	claimed bool
	// expires is when an undecided batch of a lost leadership is given up.
	expires time.Time
}

func (b *batch) fail(err error) {
	for _, w := range b.waiters {
		w.finish(Result{}, err)
	}
}

// proposals holds the batches of this node that are in the log and not applied
// here yet, and decides what became of them.
//
// What decides. A leader of term t put our batch at index i. Terms have one
// leader, and a leader writes each index of its term once, so (i, t) names this
// entry and no other, in every log; and we propose it once. So the batch takes
// effect exactly if the committed entry at i has term t. Terms never decrease
// along a log. Hence, when the entry (j, u) is applied here:
//
//   - j = i, u = t: this is the batch; its result is the caller's.
//   - j = i, u != t: another entry is committed in its place. Never done.
//   - j < i, u > t: the committed log holds u at j, so at i > j it holds a term
//     of at least u > t. Never done.
//
// And when a snapshot at (s, u) replaces the log up to s:
//
//   - t > u: were (i, t) committed, then i <= s would make u >= t. So it could
//     only be committed behind s; still undecided if i > s, never done if i <= s.
//   - t < u and i > s: terms behind s are at least u. Never done.
//   - otherwise i <= s and t <= u: it may be inside; nobody here knows the
//     result. Unknown.
//   - i > s and t = u: undecided.
//
// So losing leadership decides nothing and nobody is told anything then: the new
// leader's first entry, applied here a moment later, decides all of them. Only a
// node that hears of no new entry (cut off, removed) has to give up, after
// Config.AmbiguousAfter.
type proposals struct {
	release func(*batch)

	// n mirrors len(pending), so that a follower's applier need not lock.
	n atomic.Int32

	mu      sync.Mutex
	pending []*batch
	stopped bool
}

// add registers a batch whose index and term are set; false after stop.
func (p *proposals) add(b *batch) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return false
	}
	p.pending = append(p.pending, b)
	p.n.Store(int32(len(p.pending)))
	return true
}

// inFlight counts the batches of commands of the leadership of term. Membership
// changes do not count: a joint one takes several rounds, and commands go on.
func (p *proposals) inFlight(term uint64) int {
	if p.n.Load() == 0 {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, b := range p.pending {
		if b.term == term && !b.conf {
			n++
		}
	}
	return n
}

// removeLocked takes out the batches drop says so, keeping order.
func (p *proposals) removeLocked(drop func(*batch) bool) (out []*batch) {
	kept := p.pending[:0]
	for _, b := range p.pending {
		if drop(b) {
			out = append(out, b)
		} else {
			kept = append(kept, b)
		}
	}
	clear(p.pending[len(kept):])
	p.pending = kept
	p.n.Store(int32(len(kept)))
	return out
}

// observe is told of every entry the applier reaches, in order. It returns the
// batch that the entry carries, if it is one of ours, and those it rules out.
// The former stays registered until finish.
func (p *proposals) observe(index, term uint64) (mine *batch, lost []*batch) {
	if p.n.Load() == 0 {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	any := false
	for _, b := range p.pending {
		if b.index == index && b.term == term {
			b.claimed = true
			mine = b
		} else if overwrittenBy(b, index, term) {
			any = true
		}
	}
	if any {
		lost = p.removeLocked(func(b *batch) bool { return overwrittenBy(b, index, term) })
	}
	return mine, lost
}

func overwrittenBy(b *batch, index, term uint64) bool {
	return !b.claimed && (b.index == index && b.term != term || b.index > index && b.term < term)
}

// finish takes b out and hands its waiters the results; the caller passes one
// result per waiter. False when someone else already resolved it.
func (p *proposals) finish(b *batch, results []any, err error) bool {
	p.mu.Lock()
	found := p.removeLocked(func(x *batch) bool { return x == b })
	p.mu.Unlock()
	if len(found) == 0 {
		return false
	}
	if err != nil {
		b.fail(err)
	} else {
		for i, w := range b.waiters {
			w.finish(Result{Index: b.index, Value: results[i]}, nil)
		}
	}
	p.release(b)
	return true
}

// overtaken is told of a snapshot that replaced the log up to index.
func (p *proposals) overtaken(index, term uint64) (lost, unknown []*batch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	isLost := func(b *batch) bool {
		return !b.claimed && (b.term > term && b.index <= index || b.term < term && b.index > index)
	}
	lost = p.removeLocked(isLost)
	unknown = p.removeLocked(func(b *batch) bool { return !b.claimed && b.index <= index })
	return lost, unknown
}

// expire gives up batches not of term that have been undecided for too long.
func (p *proposals) expire(now time.Time, leading bool, term uint64, after time.Duration) (out []*batch) {
	if p.n.Load() == 0 {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.removeLocked(func(b *batch) bool {
		if b.claimed || leading && b.term == term {
			return false
		}
		if b.expires.IsZero() {
			b.expires = now.Add(after)
			return false
		}
		return now.After(b.expires)
	})
}

// stop resolves everything left; later adds are refused.
func (p *proposals) stop() {
	p.mu.Lock()
	p.stopped = true
	left := p.removeLocked(func(*batch) bool { return true })
	p.mu.Unlock()
	for _, b := range left {
		b.fail(fmt.Errorf("%w: the node stopped before the result was known", ErrAmbiguous))
	}
}
