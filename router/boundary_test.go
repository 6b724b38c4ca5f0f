package router

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// Goal: replicas that are fed the same log in runs of different lengths hand out
// the same view at a boundary, asked for beforehand. Method: one replica applies
// entries one by one, the other all at once, far past the boundary.
func TestViewAtBoundary(t *testing.T) {
	var entries []Entry
	for i := range 3 * Boundary {
		c := command(t, `commit_source_offset { source_id: "s" partition: 1 offset: 1 }`)
		c.GetCommitSourceOffset().Offset = uint64(i + 1)
		entries = append(entries, Entry{Index: start.Index + 1 + uint64(i), Term: 1, Commands: [][]byte{marshal(t, c)}})
	}
	hashes := make([]StateHash, 2)
	for i := range hashes {
		s := openMem(t)
		var wg sync.WaitGroup
		var err error
		wg.Go(func() { hashes[i], err = s.HashAt(t.Context(), 2*Boundary) })
		awaitRequest(s)
		if i == 0 {
			for _, e := range entries {
				_, aerr := s.Apply([]Entry{e})
				noError(t, aerr)
			}
		} else {
			_, aerr := s.Apply(entries)
			noError(t, aerr)
		}
		wg.Wait()
		noError(t, err)
	}
	if hashes[0].Index != 2*Boundary || hashes[1].Index != 2*Boundary || string(hashes[0].Hash) != string(hashes[1].Hash) {
		t.Fatalf("the hashes at the boundary: %+v and %+v", hashes[0], hashes[1])
	}
}

// awaitRequest returns once s has a view to hand out.
func awaitRequest(s *FSM) {
	for waiting := false; !waiting; {
		s.applyMu.Lock()
		waiting = len(s.awaited) > 0
		s.applyMu.Unlock()
	}
}

func TestViewAtRefusals(t *testing.T) {
	s := openMem(t)
	do(t, s, `commit_source_offset { source_id: "s" partition: 1 offset: 1 }`)
	now := s.Applied().Index
	if _, err := s.ViewAt(t.Context(), now-1); !errors.Is(err, ErrIndexPassed) {
		t.Errorf("an index of the past: %v", err)
	}
	v, err := s.ViewAt(t.Context(), now)
	noError(t, err)
	if v.Applied() != now {
		t.Errorf("the view of %d is of %d", now, v.Applied())
	}
	noError(t, v.Close())

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.ViewAt(ctx, now+1); !errors.Is(err, context.Canceled) {
		t.Errorf("an index that is not reached: %v", err)
	}
	if len(s.awaited) != 0 {
		t.Error("a request outlived its caller")
	}
	// One that is passed inside of a run is refused, not served late.
	passed := make(chan error, 1)
	go func() {
		_, err := s.ViewAt(t.Context(), now+1)
		passed <- err
	}()
	awaitRequest(s)
	empty := []Entry{{Index: now + 1, Term: 1}, {Index: now + 2, Term: 1}}
	_, err = s.Apply(empty)
	noError(t, err)
	if err := <-passed; !errors.Is(err, ErrIndexPassed) {
		t.Errorf("an index inside of a run: %v", err)
	}
	s.hashing.Lock()
	if _, err := s.HashAt(t.Context(), 0); !errors.Is(err, ErrHashBusy) {
		t.Errorf("a second hash: %v", err)
	}
	s.hashing.Unlock()
}
