package snap

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestRateLimit sends an image at a set pace, on a clock that only the limit
// moves.
func TestRateLimit(t *testing.T) {
	r := source(t)
	synctest.Test(t, func(t *testing.T) {
		const perSecond, burst = 50, 20
		l := NewRateLimit(perSecond, burst)
		begun := time.Now()
		sent := int64(0)
		for {
			c, err := l.ReadChunk(t.Context(), r, sent, 33)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			sent += int64(len(c.Data))
			if most := int64(time.Since(begun).Seconds()*perSecond+0.5) + burst; sent > most {
				t.Fatalf("%d bytes after %v, at most %d may be", sent, time.Since(begun), most)
			}
		}
		if sent != r.Size() {
			t.Fatalf("sent %d of %d bytes", sent, r.Size())
		}
	})
}

// TestRateLimitIsShared: two senders with one limit are no faster than one.
func TestRateLimitIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewRateLimit(1000, 100)
		begun := time.Now()
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for range 10 {
					if err := l.Wait(t.Context(), 500); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if took := time.Since(begun).Round(10 * time.Millisecond); took != 9900*time.Millisecond {
			t.Fatalf("10,000 bytes at 1,000 per second, 100 of them at once, took %v", took)
		}
	})
}

func TestRateLimitEnds(t *testing.T) {
	r := source(t)
	synctest.Test(t, func(t *testing.T) {
		l := NewRateLimit(1, 1)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(3*time.Second, cancel)
		if err := l.Wait(ctx, 100); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		// Set to no limit, it lets everything pass at once.
		l.SetRate(0)
		begun := time.Now()
		if err := l.Wait(t.Context(), 1<<30); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took != 0 {
			t.Fatalf("without a limit it took %v", took)
		}
		var none *RateLimit
		if _, err := none.ReadChunk(t.Context(), r, 0, 10); err != nil {
			t.Fatal(err)
		}
	})
}
