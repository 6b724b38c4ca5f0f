package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Boundary is the distance of the log indexes between which a run of entries is
// cut: at multiples of it the state can be looked at on every replica.
const Boundary = sumEvery

// maxAwaitedViews bounds the views that wait for their index; each is asked for
// by somebody who compares replicas, one at a time.
const maxAwaitedViews = 16

var (
	// ErrIndexPassed: the state is past the index that was asked for. Nothing
	// was read; ask for a later one.
	ErrIndexPassed = errors.New("router: the state is past the requested index")
	// ErrHashBusy: the state is being hashed for somebody else. Nothing was
	// read; ask again later.
	ErrHashBusy = errors.New("router: another hash of the whole state is being made")
)

// StateHash is a hash over all of a state at one index, as of View.Hash.
type StateHash struct {
	Index, Epoch uint64
	Hash         []byte
}

// awaitedView is a request for the view of one index.
type awaitedView struct {
	index uint64
	ready chan *View // of one; nil when the state went past the index
}

// SettledView returns a view of what its index is of on every replica. That of View
// need not be: a restore is recorded in the state it replaces, at the index of the
// state that replaces it, and until that one is there a view shows the old one under
// the new one's index. It waits for the run that is being applied, which may be such a
// swap, whatever becomes of ctx, and fails when ctx is done by then, or when this replica
// must stop. The caller closes the view.
func (s *FSM) SettledView(ctx context.Context) (*View, error) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err // nobody waits for what would be read
	}
	return s.settledView()
}

// settledView is SettledView for one who holds applyMu.
func (s *FSM) settledView() (*View, error) {
	if s.broken != nil { // perhaps in the middle of a swap
		return nil, s.broken
	}
	return s.View(), nil
}

// ViewAt returns a view of the state at exactly index. It waits, until ctx is
// done, for the state to get there; ErrIndexPassed means that it is further, or
// went past in one step: only an index at which a run ends is seen for certain,
// which are the multiples of Boundary and the newest of a log that stands still. Other
// errors are as with SettledView. The caller closes the view.
func (s *FSM) ViewAt(ctx context.Context, index uint64) (*View, error) {
	w := &awaitedView{index: index, ready: make(chan *View, 1)}
	s.applyMu.Lock()
	at := s.Applied().Index
	switch {
	case at == index:
		v, err := s.settledView()
		s.applyMu.Unlock()
		return v, err
	case at > index:
		s.applyMu.Unlock()
		return nil, fmt.Errorf("%w: it is at %d, asked was for %d", ErrIndexPassed, at, index)
	case len(s.awaited) >= maxAwaitedViews:
		s.applyMu.Unlock()
		return nil, fmt.Errorf("%w: %d views are waited for already", ErrHashBusy, maxAwaitedViews)
	}
	s.awaited = append(s.awaited, w)
	s.applyMu.Unlock()
	select {
	case v := <-w.ready:
		if v == nil {
			return nil, fmt.Errorf("%w, %d", ErrIndexPassed, index)
		}
		return v, nil
	case <-ctx.Done():
	}
	s.applyMu.Lock()
	s.awaited = slices.DeleteFunc(s.awaited, func(o *awaitedView) bool { return o == w })
	s.applyMu.Unlock()
	select {
	case v := <-w.ready: // it came at the same moment
		if v != nil {
			_ = v.Close()
		}
	default:
	}
	return nil, fmt.Errorf("router: the state has not reached index %d: %w", index, ctx.Err())
}

// serveAwaited hands out the views whose index is reached. It is called with
// applyMu held, whenever the position has moved.
func (s *FSM) serveAwaited() {
	if len(s.awaited) == 0 {
		return
	}
	at := s.Applied().Index
	s.awaited = slices.DeleteFunc(s.awaited, func(w *awaitedView) bool {
		switch {
		case w.index > at:
			return false
		case w.index == at:
			w.ready <- s.View()
		default:
			w.ready <- nil
		}
		return true
	})
}

// HashAt hashes all of the state as it is at exactly index, 0 for as it is now,
// and checks it against the sums kept of it (ErrCorrupt). It waits as ViewAt does
// and then reads everything twice: so only one hash is made at a time, and
// ErrHashBusy refuses the others.
func (s *FSM) HashAt(ctx context.Context, index uint64) (StateHash, error) {
	if !s.hashing.TryLock() {
		return StateHash{}, ErrHashBusy
	}
	defer s.hashing.Unlock()
	var v *View
	var err error
	if index == 0 {
		v, err = s.SettledView(ctx)
	} else {
		v, err = s.ViewAt(ctx, index)
	}
	if err != nil {
		return StateHash{}, err
	}
	defer v.Close()
	// A record that is not what was written differs from nobody's as long as
	// there is nobody to compare with, but from the sums kept here.
	if err := v.CheckSums(ctx); err != nil {
		return StateHash{}, err
	}
	h, err := v.Hash()
	return StateHash{Index: v.Applied(), Epoch: v.Epoch(), Hash: h}, err
}
