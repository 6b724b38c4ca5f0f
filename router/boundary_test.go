package router

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
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

// Goal: no index has two hashes, not even while a restore replaces the state. Method: one
// who asks for a hash between the record that the swap is due and the swap. It is
// answered at once, or after the swap; with the hash of the index it names.
func TestHashDuringSwap(t *testing.T) {
	mem := vfs.NewMem()
	g := &commands{r: randomness(t), time: 1_000_000}
	withBackup(t, mem, g, 20)
	var s *FSM
	var asked sync.WaitGroup
	var during StateHash
	hooked := false
	fs := faulty(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind != errorfs.OpRename || !strings.Contains(op.Path, undoPrefix) || hooked {
			return nil
		}
		hooked = true
		answered := make(chan struct{})
		asked.Go(func() {
			defer close(answered)
			h, err := s.HashAt(t.Context(), 0)
			if err != nil {
				t.Errorf("the hash: %v", err)
			}
			during = h
		})
		select {
		case <-answered: // before the swap
		case <-time.After(100 * time.Millisecond): // it waits for the swap
		}
		return nil
	}))
	s = open(t, fs, "state")
	accepted(t, s, stageCommands(t, fs, "image", "op")...)
	noError(t, s.Prepare(t.Context(), "op"))
	accepted(t, s, report("op", 1))
	before, err := s.HashAt(t.Context(), 0)
	noError(t, err)
	accepted(t, s, swap("op"))
	asked.Wait()
	after, err := s.HashAt(t.Context(), 0)
	noError(t, err)
	if !hooked {
		t.Fatal("nobody asked in the middle of the swap")
	}
	for _, known := range []StateHash{before, after} {
		if known.Index == during.Index && !bytes.Equal(known.Hash, during.Hash) {
			t.Errorf("index %d has the hashes %x and, for one who asks during the swap, %x", known.Index, known.Hash, during.Hash)
		}
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
