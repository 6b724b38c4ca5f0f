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

// TestSlowStart: a limit with a slow start begins at a quarter, comes to its rate,
// and begins anew after a rest.
func TestSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewRateLimit(1000, 1)
		l.SlowStart(4 * time.Second)
		passed := func(d time.Duration) (n int) {
			for end := time.Now().Add(d); time.Now().Before(end); n++ {
				if err := l.Wait(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
			}
			return n
		}
		for _, s := range []struct {
			part        string
			least, most int
		}{{"first", 300, 400}, {"second", 480, 580}, {"third", 680, 770}, {"fourth", 860, 960}, {"fifth", 990, 1010}} {
			if n := passed(time.Second); n < s.least || n > s.most {
				t.Errorf("in the %s second %d bytes passed, %d to %d should", s.part, n, s.least, s.most)
			}
		}
		<-time.After(restIdle)
		if n := passed(time.Second); n > 400 {
			t.Errorf("%d bytes passed in a second after a rest", n)
		}
	})
}

// TestBeside: a limit goes down while others are busy, comes back when they are not any
// more, and does not go down for ever.
func TestBeside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewRateLimit(1000, 10)
		busy := true
		l.Beside(100, 5*time.Second, func() bool { return busy })
		passed := func(d time.Duration) (n int) {
			for end := time.Now().Add(d); time.Now().Before(end); n += 10 {
				if err := l.Wait(t.Context(), 10); err != nil {
					t.Fatal(err)
				}
			}
			return n
		}
		want := func(when string, least, most int) {
			t.Helper()
			if n := passed(time.Second); n < least || n > most {
				t.Errorf("%s %d bytes passed in a second, %d to %d should", when, n, least, most)
			}
		}
		want("beside others", 90, 120)
		busy = false
		want("alone", 900, 1020)
		busy = true
		want("beside others again", 90, 120)
		passed(2 * time.Second)
		want("after some time beside others", 900, 1020)
		<-time.After(longIdle - 100*time.Millisecond)
		want("after a short rest", 900, 1020)
		<-time.After(longIdle)
		want("after a long one", 90, 120)

		l.SetRate(50)
		want("with a lower rate than beside others", 45, 60)
	})
	synctest.Test(t, func(t *testing.T) {
		l := NewRateLimit(0, 10)
		busy := false
		l.Beside(100, time.Minute, func() bool { return busy })
		begun := time.Now()
		if err := l.Wait(t.Context(), 1000); err != nil || time.Since(begun) > 0 {
			t.Errorf("without a limit, alone: %v after %v", err, time.Since(begun))
		}
		busy = true
		if err := l.Wait(t.Context(), 1000); err != nil || time.Since(begun) < 9*time.Second {
			t.Errorf("beside others: %v after %v", err, time.Since(begun))
		}
	})
}
