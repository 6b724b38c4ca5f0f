package rpc

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/raftnode"
)

// readNode answers reads as the test says.
type readNode struct {
	mu      sync.Mutex
	changed chan struct{}
	index   func(context.Context) (uint64, error)
	applied uint64
	waiters chan struct{}
	reads   int
}

func newReadNode() *readNode {
	return &readNode{changed: make(chan struct{}), waiters: make(chan struct{})}
}

func (n *readNode) ReadIndexUntil(ctx context.Context, up <-chan time.Time) (uint64, error) {
	n.mu.Lock()
	n.reads++
	f := n.index
	n.mu.Unlock()
	return readUntil(ctx, up, f)
}

func (n *readNode) ReadIndex(ctx context.Context) (uint64, error) {
	return n.ReadIndexUntil(ctx, nil)
}

// readUntil calls read with a context that also ends when up delivers.
func readUntil(ctx context.Context, up <-chan time.Time, read func(context.Context) (uint64, error)) (uint64, error) {
	ctx, cancel := context.WithCancel(ctx)
	late, watched := false, make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-up:
			late = true
			cancel()
		case <-ctx.Done():
		}
	}()
	index, err := read(ctx)
	cancel()
	<-watched
	if late && err != nil {
		err = context.DeadlineExceeded
	}
	return index, err
}

func (n *readNode) WaitApplied(ctx context.Context, index uint64) error {
	for {
		n.mu.Lock()
		applied, w := n.applied, n.waiters
		n.mu.Unlock()
		if applied >= index {
			return nil
		}
		select {
		case <-w:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (n *readNode) apply(index uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.applied = index
	close(n.waiters)
	n.waiters = make(chan struct{})
}

func (n *readNode) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

func request(ctx context.Context, pairs ...string) context.Context {
	return metadata.NewIncomingContext(ctx, metadata.Pairs(pairs...))
}

func TestReaderLevels(t *testing.T) {
	n := newReadNode()
	n.index = func(context.Context) (uint64, error) { return 10, nil }
	n.applied = 10
	r := NewReader(n, 1, time.Second)
	cases := []struct {
		name  string
		pairs []string
		want  error
		reads int
	}{
		{"default", nil, nil, 1},
		{"linearizable", []string{MetadataConsistency, "linearizable"}, nil, 1},
		{"stale", []string{MetadataConsistency, "stale"}, nil, 0},
		{"unknown level", []string{MetadataConsistency, "sloppy"}, ErrInvalidMetadata, 0},
		{"two levels", []string{MetadataConsistency, "stale", MetadataConsistency, "linearizable"}, ErrInvalidMetadata, 0},
		{"revision", []string{MetadataMinRevision, "10"}, nil, 1},
		{"future revision", []string{MetadataMinRevision, "11"}, ErrFutureRevision, 1},
		{"not a revision", []string{MetadataMinRevision, "-1"}, ErrInvalidMetadata, 0},
		{"stale at a revision", []string{MetadataConsistency, "stale", MetadataMinRevision, "9"}, nil, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			n.reads = 0
			if err := r.Wait(request(t.Context(), c.pairs...)); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if n.reads != c.reads {
				t.Errorf("%d read indexes, want %d", n.reads, c.reads)
			}
		})
	}
}

// A read during an election waits for the new leader; it is bounded.
func TestReaderWaitsForLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newReadNode()
		begun := time.Now()
		failures := []error{raftnode.ErrNoLeader, &raftnode.NotLeaderError{Leader: 2}, raftnode.ErrAmbiguous, raftnode.ErrBusy}
		n.index = func(context.Context) (uint64, error) {
			if d := time.Since(begun); d < time.Second {
				return 0, failures[n.reads%len(failures)]
			}
			return 10, nil
		}
		r := NewReader(n, 1, 0)
		if err := r.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.index = func(context.Context) (uint64, error) { return 0, raftnode.ErrNoLeader }
		begun = time.Now()
		if err := r.Wait(t.Context()); !errors.Is(err, raftnode.ErrNoLeader) {
			t.Fatal(err)
		}
		if d := time.Since(begun); d != DefaultMaxWait {
			t.Errorf("failed after %v, want %v", d, DefaultMaxWait)
		}
		// A node that never answers counts as no leader, too.
		n.index = func(ctx context.Context) (uint64, error) { <-ctx.Done(); return 0, ctx.Err() }
		if err := r.Wait(t.Context()); !errors.Is(err, raftnode.ErrNoLeader) {
			t.Fatal(err)
		}
		// The caller's own end is reported as such.
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := r.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, raftnode.ErrNoLeader) {
			t.Fatal(err)
		}
		n.index = func(context.Context) (uint64, error) { return 0, raftnode.ErrStopping }
		if err := r.Wait(t.Context()); !errors.Is(err, raftnode.ErrStopping) {
			t.Fatal(err)
		}
	})
}

// A leadership change ends the pause between attempts at once.
func TestReaderNoticesTheChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newReadNode()
		n.index = func(context.Context) (uint64, error) {
			if n.reads == 20 { // pauses are at their longest now
				n.mu.Lock()
				close(n.changed)
				n.changed = make(chan struct{})
				n.mu.Unlock()
			}
			if n.reads > 20 {
				return 1, nil
			}
			return 0, raftnode.ErrNoLeader
		}
		r := NewReader(n, 1, 0)
		if err := r.Wait(t.Context()); err != nil || n.reads != 21 {
			t.Fatalf("%v after %d attempts", err, n.reads)
		}
	})
}

// Read your writes on any node: a stale read at a revision waits until it is
// applied here.
func TestReaderMinRevisionStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newReadNode()
		r := NewReader(n, 1, time.Second)
		ctx := request(t.Context(), MetadataConsistency, "stale", MetadataMinRevision, "42")
		done := make(chan error, 1)
		go func() { done <- r.Wait(ctx) }()
		n.apply(41)
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("answered before the revision was there: %v", err)
		default:
		}
		n.apply(42)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		ctx = request(t.Context(), MetadataConsistency, "stale", MetadataMinRevision, "43")
		if err := r.Wait(ctx); !errors.Is(err, ErrBehind) {
			t.Fatal(err)
		}
	})
}

// rebased is a state whose restores are made by hand.
type rebased struct{ atomic.Uint64 }

func (b *rebased) RevisionBase() uint64 { return b.Load() }
func (b *rebased) Epoch() uint64        { return 0 }
func (b *rebased) Revision() uint64     { return 0 }

// After a restore revisions are ahead of log indexes: what is compared with an
// index is translated, also while a reader waits for the swap itself.
func TestReaderRevisionBase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newReadNode()
		var base rebased
		r := NewReader(n, 1, time.Second).WithEpochs(&base)
		n.index = func(context.Context) (uint64, error) { return 10, nil }
		n.apply(10)
		if err := r.Wait(request(t.Context(), MetadataMinRevision, "110")); !errors.Is(err, ErrFutureRevision) {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- r.Wait(request(t.Context(), MetadataConsistency, "stale", MetadataMinRevision, "110")) }()
		synctest.Wait()
		base.Store(100) // the swap is applied
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if err := r.Wait(request(t.Context(), MetadataMinRevision, "110")); err != nil {
			t.Fatal(err)
		}
		var future *FutureRevisionError
		err := r.Wait(request(t.Context(), MetadataMinRevision, "111"))
		if !errors.As(err, &future) || future.Current != 110 {
			t.Fatal(err)
		}
		// A revision of before the restore is long reached.
		if err := r.Wait(request(t.Context(), MetadataConsistency, "stale", MetadataMinRevision, "99")); err != nil {
			t.Fatal(err)
		}
	})
}
