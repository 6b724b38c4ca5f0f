package server

import (
	"context"
	"time"
)

const (
	// flushEvery is how often it is looked whether there is something to flush.
	flushEvery = time.Second
	// flushLeast is how much must have been written for that: an image whose flush writes
	// less is made in a few hundredths of a second, and each flush is a file more to
	// compact.
	flushLeast = 4 << 20
	// flushCalm is how much may have been written in the last flushEvery. When more is, the
	// log is soon long enough that the state is flushed for its truncation.
	flushCalm = 1 << 20
	// flushPause is for how long a flush that failed is not tried again, as on a full disk.
	flushPause = time.Minute
)

// earlyFlusher flushes the state when it is calm. Otherwise who asks for a snapshot next
// waits for all that was written since the last flush, up to what the log holds, and a
// node that is killed replays as much.
type earlyFlusher struct {
	state interface {
		Unflushed() int64
		Flush() (uint64, error)
	}
}

// run works until ctx is done.
func (f *earlyFlusher) run(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	before := f.state.Unflushed()
	var notBefore time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := f.state.Unflushed()
		// A flush by somebody else makes it less, which is calm as well.
		if now >= flushLeast && now-before <= flushCalm && !time.Now().Before(notBefore) {
			if _, err := f.state.Flush(); err != nil {
				// The state has told it already.
				notBefore = time.Now().Add(flushPause)
			}
			now = f.state.Unflushed()
		}
		before = now
	}
}
