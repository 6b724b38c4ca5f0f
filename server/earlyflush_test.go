package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/router"
)

// writtenState is a state of which only is known how much was written.
type writtenState struct {
	all, unflushed, flushes int64
	failure                 error
}

func (s *writtenState) Written() (all, unflushed int64) { return s.all, s.unflushed }

func (s *writtenState) Flush() (uint64, error) {
	s.flushes++
	if s.failure != nil {
		return 0, s.failure
	}
	s.unflushed = 0
	return 1, nil
}

// Goal: the state is flushed once a burst of writes is over, and now and then while few come;
// not in a burst, not for little, and not again and again when it fails.
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
				s.all += perSecond
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
		s.unflushed = 0 // for the truncation of the log
		write(5, 8<<20)
		expect("in a burst", 0)
		write(3, 0)
		expect("once it is over", 1)
		write(60, 0)
		expect("while nothing is written", 0)
		write(600, 400<<10)
		expect("in ten minutes in which few write", 10)
		write(1, 8<<20)
		write(2, 400<<10)
		expect("after a second in which many did", 1)
		s.unflushed = 0
		write(200, flushLeast/400)
		expect("for little", 0)
		s.failure = router.ErrNoSpace
		write(1, flushLeast)
		write(60, 0)
		expect("in a minute in which the disk is full", 1)
		s.failure = nil
		write(60, 0)
		expect("once it is not", 1)
		s.failure = errors.New("broken")
		write(1, flushLeast)
		write(600, 0)
		expect("when it can never be written again", 1)
	})
}
