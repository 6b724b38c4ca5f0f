package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// writtenState is a state of which only is known how much was written.
type writtenState struct {
	unflushed, flushes int64
	failure            error
}

func (s *writtenState) Unflushed() int64 { return s.unflushed }

func (s *writtenState) Flush() (uint64, error) {
	s.flushes++
	if s.failure != nil {
		return 0, s.failure
	}
	s.unflushed = 0
	return 1, nil
}

// Goal: the state is flushed once a burst of writes is over, and while few come; not in a
// burst, not for little, and not again and again when it fails.
func TestEarlyFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &writtenState{}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			(&earlyFlusher{s}).run(ctx)
		}()
		defer func() {
			cancel()
			<-ended
		}()
		// Every step falls between two looks at the state.
		<-time.NewTimer(flushEvery / 2).C
		write := func(seconds int, perSecond int64) {
			for range seconds {
				s.unflushed += perSecond
				<-time.NewTimer(time.Second).C
			}
		}
		expect := func(what string, flushes int64) {
			t.Helper()
			if s.flushes != flushes {
				t.Errorf("%s: %d flushes, want %d", what, s.flushes, flushes)
			}
			s.flushes = 0
		}
		write(5, 8<<20)
		expect("in a burst", 0)
		write(3, 0)
		expect("once it is over", 1)
		write(60, 0)
		expect("while nothing is written", 0)
		write(60, 400<<10)
		expect("while 24 MB are written in a minute", 5)
		s.unflushed = 0
		write(10, flushLeast/20)
		expect("for little", 0)
		s.failure = errors.New("no space")
		write(1, flushLeast)
		write(59, 0)
		expect("in a minute in which it fails", 1)
		s.failure = nil
		write(60, 0)
		expect("once it does not fail", 1)
	})
}
