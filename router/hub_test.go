package router

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

func put(id, name string) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{
		Spec: &commandpb.PipelineSpec{Id: id, Name: name},
	}}}
}

// TestSubscriptionHandsOutWholeRevisions of the tables asked for, and moves
// past revisions that changed none of them.
func TestSubscriptionHandsOutWholeRevisions(t *testing.T) {
	s := openMem(t)
	sub, err := s.Hub().Subscribe(0, TablePipelines)
	noError(t, err)
	apply(t, s, put("a", "1"), put("b", "1"), command(t, `register_sidecar { sidecar { sidecar_id: "x" } }`))
	apply(t, s, offsetCommand("s", 1))
	changes, at, err := sub.Next(t.Context())
	noError(t, err)
	if len(changes) != 2 || changes[0].Key != "a" || changes[1].Key != "b" || at != 3 {
		t.Fatalf("got %v up to %d, want a and b of revision 2, up to 3", changes, at)
	}
	apply(t, s, command(t, `register_sidecar { sidecar { sidecar_id: "y" } }`))
	if got := sub.Reached(); got != 4 {
		t.Fatalf("an idle subscription is at %d, want 4", got)
	}
	apply(t, s, put("a", "2"))
	if got := sub.Reached(); got != 4 {
		t.Fatalf("Reached went over a waiting change to %d", got)
	}
	changes, _, err = sub.Next(t.Context())
	noError(t, err)
	if len(changes) != 1 || changes[0].Prev.(*commandpb.Pipeline).Version != 1 || changes[0].Next.(*commandpb.Pipeline).Version != 2 {
		t.Fatalf("got %v", changes)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := sub.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want Canceled", err)
	}
	sub.Close()
	if _, _, err := sub.Next(t.Context()); !errors.Is(err, ErrClosed) {
		t.Fatalf("got %v, want ErrClosed", err)
	}
	if n := s.Hub().Subscribers(); n != 0 {
		t.Fatalf("%d subscriptions are left", n)
	}
}

// TestHistoryIsBounded: what is overrun has to resync, what begins too early
// is told so, and so is who asks for the future. Apply never waits for anyone.
func TestHistoryIsBounded(t *testing.T) {
	s := openMem(t)
	s.hub.maxBytes = 20_000
	slow, err := s.Hub().Subscribe(0)
	noError(t, err)
	for i := range 300 {
		apply(t, s, put(fmt.Sprint(i%3), fmt.Sprint(i)))
	}
	if s.hub.bytes > s.hub.maxBytes || len(s.hub.history) > 400 {
		t.Fatalf("history holds %d bytes in %d sets", s.hub.bytes, len(s.hub.history))
	}
	_, _, err = slow.Next(t.Context())
	var rev *RevisionError
	if !errors.Is(err, ErrResync) || !errors.As(err, &rev) || rev.Current != 301 {
		t.Fatalf("got %v, want ErrResync at 301", err)
	}
	if _, err := s.Hub().Subscribe(5); !errors.Is(err, ErrCompacted) || !errors.As(err, &rev) || rev.Current != 301 {
		t.Fatalf("got %v, want ErrCompacted at 301", err)
	}
	if _, err := s.Hub().Subscribe(302); !errors.Is(err, ErrFutureRevision) {
		t.Fatalf("got %v, want ErrFutureRevision", err)
	}
	sub, err := s.Hub().Subscribe(s.hub.floor)
	noError(t, err)
	want := s.hub.floor + 1
	for want <= 301 {
		changes, _, err := sub.Next(t.Context())
		noError(t, err)
		for _, c := range changes {
			if c.Revision != want {
				t.Fatalf("revision %d after %d", c.Revision, want-1)
			}
			want++
		}
	}
}

// TestViewAndSubscriptionLeaveNoGap: readers that list and then watch, while
// commands are applied, end up with the state, whenever they began.
func TestViewAndSubscriptionLeaveNoGap(t *testing.T) {
	r := randomness(t)
	s := openMem(t)
	const last = 400
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			v := s.View()
			mirror := map[string]*commandpb.Pipeline{}
			err := v.Pipelines("", 0, func(p *commandpb.Pipeline) bool {
				mirror[p.Spec.Id] = p
				return true
			})
			from := v.Revision()
			err = errors.Join(err, v.Close())
			sub, serr := s.Hub().Subscribe(from, TablePipelines)
			if err = errors.Join(err, serr); err != nil {
				t.Error(err)
				return
			}
			defer sub.Close()
			for mirror["end"] == nil {
				changes, _, err := sub.Next(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				for _, c := range changes {
					// Prev must be what was seen last: nothing was missed.
					if old := mirror[c.Key]; (old == nil) != (c.Prev == nil) || old != nil && !proto.Equal(old, c.Prev) {
						t.Errorf("revision %d replaces %s, seen was %s", c.Revision, text(c.Prev), text(old))
						return
					}
					if c.Next == nil {
						delete(mirror, c.Key)
					} else {
						mirror[c.Key] = c.Next.(*commandpb.Pipeline)
					}
				}
			}
		})
	}
	for i := range last {
		id := fmt.Sprint(r.Intn(5))
		if r.Intn(4) == 0 {
			apply(t, s, &commandpb.Command{Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: id}}})
		} else {
			apply(t, s, put(id, fmt.Sprint(i)))
		}
	}
	apply(t, s, put("end", ""))
	wg.Wait()
}
