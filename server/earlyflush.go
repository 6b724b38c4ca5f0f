package server

import (
	"context"
	"errors"
	"time"

	"conveyor.etl/router/router"
)

const (
	// flushEvery is how often it is looked whether there is something to flush.
	flushEvery = time.Second
	// flushLeast is how much must have been written for that: an image whose flush writes
	// less is made in a few hundredths of a second.
	flushLeast = 4 << 20
	// flushCalm is how much may have been written in the last flushEvery. When more is, the
	// log is soon long enough that the state is flushed for its truncation.
	flushCalm = 1 << 20
	// flushPause is for how long nothing is flushed after a flush, unless writes came in
	// a burst meanwhile: each is a file more to compact, and a trickle flushed every 4 MiB
	// makes compactions write twice as much. It is also for how long a flush that failed
	// is not tried again.
	flushPause = time.Minute
)

// earlyFlusher flushes the state when it is calm. Otherwise who asks for a snapshot next
// waits for all that was written since the last flush, up to what the log holds, and a
// node that is killed replays as much.
type earlyFlusher struct {
	state interface {
		Written() (all, unflushed int64)
		Flush() (uint64, error)
	}
}

// run works until ctx is done, or the state can no longer be written.
func (f *earlyFlusher) run(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	before, _ := f.state.Written()
	burst := false
	var last time.Time // of the last flush
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, unflushed := f.state.Written()
		calm := now-before <= flushCalm
		before = now
		burst = burst || !calm
		if !calm || unflushed < flushLeast || !burst && time.Since(last) < flushPause {
			continue
		}
		burst, last = false, time.Now()
		// The state has told what is wrong already.
		if _, err := f.state.Flush(); err != nil && !errors.Is(err, router.ErrNoSpace) {
			return
		}
	}
}
