package router

import (
	"context"
	"slices"
	"sort"
	"sync"
)

// Hub fans changes out to subscribers in revision order.
//
// It keeps one history, bounded in bytes, and no queue per subscriber: a
// subscriber is a place in the history. So a slow one costs nothing, holds
// nothing up, and is told to resync once the history has moved past it.
type Hub struct {
	mu       sync.Mutex
	maxBytes int64
	bytes    int64
	// history holds the newest change sets, revisions ascending, from first on.
	history []*changeSet
	first   int
	// floor is the revision after which history is complete.
	floor uint64
	// reached is the newest revision whose changes are in history (or that had
	// none); announced may be ahead of it while a batch is being committed.
	reached   uint64
	announced uint64
	subs      map[*Subscription]struct{}
	closed    bool
}

func newHub(maxBytes int64, revision uint64) *Hub {
	return &Hub{
		maxBytes: maxBytes, floor: revision, reached: revision, announced: revision,
		subs: map[*Subscription]struct{}{},
	}
}

// Subscription delivers the changes of some tables after a revision. It is
// meant for one goroutine; Close may be called from any.
type Subscription struct {
	hub    *Hub
	tables uint32
	wake   chan struct{}
	// at, lost and closed are guarded by hub.mu.
	at     uint64
	lost   bool
	closed bool
}

// Subscribe starts a subscription to the changes after revision from, of the
// given tables or of all. To follow a state without a gap take a View, read
// it, and subscribe from its revision. It fails with a *RevisionError that
// unwraps to ErrCompacted or ErrFutureRevision, or with ErrClosed.
func (h *Hub) Subscribe(from uint64, tables ...Table) (*Subscription, error) {
	var mask uint32
	for _, t := range tables {
		mask |= 1 << t
	}
	if len(tables) == 0 {
		mask = ^uint32(0)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, ErrClosed
	case from < h.floor:
		return nil, &RevisionError{Kind: ErrCompacted, Requested: from, Current: h.reached}
	case from > h.announced:
		return nil, &RevisionError{Kind: ErrFutureRevision, Requested: from, Current: h.reached}
	}
	s := &Subscription{hub: h, tables: mask, at: from, wake: make(chan struct{}, 1)}
	h.subs[s] = struct{}{}
	return s, nil
}

// Revision returns the newest revision subscribers can have been told about.
func (h *Hub) Revision() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reached
}

// Subscribers returns how many subscriptions are open.
func (h *Hub) Subscribers() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs)
}

// nextChanges bounds how many changes Next hands out at once; a revision is
// never cut, so one large revision may exceed it.
const nextChanges = 1024

// Next blocks until there are changes and returns those of one or more whole
// revisions, in order, with the revision reached by them. It fails with
// ErrResync (as a *RevisionError) when changes were missed, ErrClosed, or the
// error of ctx; after any but the last the subscription is of no more use.
func (s *Subscription) Next(ctx context.Context) ([]Change, uint64, error) {
	for {
		out, at, err := s.take()
		if err != nil || len(out) > 0 {
			return out, at, err
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil, at, ctx.Err()
		}
	}
}

// Reached returns the revision up to which nothing is waiting to be taken: a
// progress mark for an idle subscriber. It never passes over changes.
func (s *Subscription) Reached() uint64 {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if !s.lost && !s.closed && s.at >= h.floor {
		s.skipLocked()
	}
	return s.at
}

// skipLocked moves the place over change sets that hold none of the tables.
func (s *Subscription) skipLocked() {
	h := s.hub
	for i := h.searchLocked(s.at); i < len(h.history); i++ {
		if h.history[i].tables&s.tables != 0 {
			return
		}
		s.at = h.history[i].revision
	}
	s.at = max(s.at, h.reached)
}

func (s *Subscription) take() ([]Change, uint64, error) {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.closed || h.closed {
		return nil, s.at, ErrClosed
	}
	if s.lost || s.at < h.floor {
		s.lost = true
		return nil, s.at, &RevisionError{Kind: ErrResync, Requested: s.at, Current: h.reached}
	}
	var out []Change
	i := h.searchLocked(s.at)
	for ; i < len(h.history) && len(out) < nextChanges; i++ {
		set := h.history[i]
		if set.tables&s.tables != 0 {
			if len(set.changes) >= nextChanges && set.tables&^s.tables == 0 {
				// All of it: at once instead of by doubling.
				out = slices.Grow(out, len(set.changes))
			}
			for _, c := range set.changes {
				if s.tables&(1<<c.Table) != 0 {
					out = append(out, c)
				}
			}
		}
		s.at = set.revision
	}
	if i == len(h.history) {
		// at may already be past reached: it was taken from a View of a batch
		// whose changes are about to be published.
		s.at = max(s.at, h.reached)
	}
	return out, s.at, nil
}

// Close ends the subscription and makes a waiting Next return ErrClosed.
func (s *Subscription) Close() {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	s.closed = true
	delete(h.subs, s)
	s.signal()
}

func (s *Subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// searchLocked returns the position of the first change set after revision.
func (h *Hub) searchLocked(revision uint64) int {
	live := h.history[h.first:]
	return h.first + sort.Search(len(live), func(i int) bool { return live[i].revision > revision })
}

// announce allows subscriptions from revision before its changes are here.
// Without it a reader who takes a View between the commit of a batch and the
// publication of its changes is refused its own revision.
func (h *Hub) announce(revision uint64) {
	h.mu.Lock()
	h.announced = max(h.announced, revision)
	h.mu.Unlock()
}

// publish appends change sets, revisions ascending, and wakes who waits for
// them. reached is the newest revision, which may have no changes.
func (h *Hub) publish(sets []*changeSet, reached uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var tables uint32
	for _, set := range sets {
		h.history = append(h.history, set)
		h.bytes += set.bytes
		tables |= set.tables
	}
	h.reached = max(h.reached, reached)
	h.announced = max(h.announced, h.reached)
	for h.bytes > h.maxBytes && h.first < len(h.history) {
		set := h.history[h.first]
		h.bytes -= set.bytes
		h.floor = set.revision
		h.history[h.first] = nil
		h.first++
	}
	// Move the tail down only when half is dead, so that publishing stays
	// constant time on average.
	if h.first > 64 && h.first > len(h.history)/2 {
		n := copy(h.history, h.history[h.first:])
		clear(h.history[n:])
		h.history, h.first = h.history[:n], 0
	}
	if tables == 0 {
		return
	}
	for s := range h.subs {
		if s.tables&tables != 0 {
			s.signal()
		}
	}
}

// reset forgets everything, because the state now is another one.
func (h *Hub) reset(revision uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.history, h.first, h.bytes = nil, 0, 0
	h.floor, h.reached, h.announced = revision, revision, revision
	for s := range h.subs {
		s.lost = true
		s.signal()
	}
}

func (h *Hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.subs {
		s.signal()
	}
}
