package rpc

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A call context must be a context like any other, whether or not somebody has
// asked for Done before; only what it costs may differ.
func TestCallContext(t *testing.T) {
	type key struct{}
	for _, armed := range []bool{false, true} {
		name := "untouched"
		if armed {
			name = "armed"
		}
		start := func(parent context.Context) *callContext {
			c := newCallContext(parent, time.Second)
			if armed {
				c.Done()
			}
			return c
		}
		t.Run(name+"/deadline", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := start(context.WithValue(t.Context(), key{}, "v"))
				defer c.end()
				if c.Err() != nil || c.Value(key{}) != "v" {
					t.Fatalf("a fresh context: err %v, value %v", c.Err(), c.Value(key{}))
				}
				if d, ok := c.Deadline(); !ok || time.Until(d) != time.Second {
					t.Fatalf("deadline in %v, %v", time.Until(d), ok)
				}
				child, cancel := context.WithCancel(c)
				defer cancel()
				<-child.Done()
				if !errors.Is(c.Err(), context.DeadlineExceeded) || !errors.Is(child.Err(), context.DeadlineExceeded) {
					t.Fatalf("after the deadline: %v, its child: %v", c.Err(), child.Err())
				}
			})
		})
		t.Run(name+"/deadline without waiting", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := start(t.Context())
				defer c.end()
				<-time.After(time.Second)
				synctest.Wait()
				if !errors.Is(c.Err(), context.DeadlineExceeded) {
					t.Fatalf("after the deadline: %v", c.Err())
				}
			})
		})
		t.Run(name+"/client gone", func(t *testing.T) {
			parent, cancel := context.WithCancel(t.Context())
			c := start(parent)
			defer c.end()
			cancel()
			<-c.Done()
			if !errors.Is(c.Err(), context.Canceled) {
				t.Fatalf("after the client left: %v", c.Err())
			}
		})
		t.Run(name+"/end", func(t *testing.T) {
			c := start(t.Context())
			c.end()
			<-c.Done()
			if !errors.Is(c.Err(), context.Canceled) {
				t.Fatalf("after the end: %v", c.Err())
			}
		})
	}
}

// The server gives up before the client stops listening, by a tenth of the time
// and at most by the margin.
func TestCallContextEndsBeforeTheClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for given, want := range map[time.Duration]time.Duration{
			100 * time.Millisecond: 90 * time.Millisecond,
			2 * time.Second:        2*time.Second - answerMargin,
			time.Hour:              time.Hour - answerMargin,
		} {
			client, cancel := context.WithTimeout(t.Context(), given)
			c := newCallContext(client, time.Second)
			if d, _ := c.Deadline(); time.Until(d) != want {
				t.Errorf("a client that waits %v is answered within %v, want %v", given, time.Until(d), want)
			}
			c.end()
			cancel()
		}
	})
}

// A wait limit must end a wait at the same moments as the context itself.
func TestWaitLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pool timerPool
		for range 3 { // timers come back from the pool
			begun := time.Now()
			l := pool.limit(newCallContext(t.Context(), time.Second))
			select {
			case <-l.done:
				t.Fatal("the client is still there")
			case <-l.up:
			}
			l.end()
			if took := time.Since(begun); took != time.Second {
				t.Fatalf("up after %v", took)
			}
			// Ended early, it must not fire for the next user.
			l = pool.limit(newCallContext(t.Context(), time.Millisecond))
			<-time.After(time.Second)
			l.end()
		}
		parent, cancel := context.WithCancel(t.Context())
		l := pool.limit(newCallContext(parent, time.Hour))
		defer l.end()
		cancel()
		<-l.done
		plain := pool.limit(parent)
		<-plain.done
		plain.end()
	})
}
