package recovery

import "time"

// busyFor is for how long commands count as being under way after the last one was
// applied: a batch of them spends most of its time on its way to other nodes and back,
// and needs the processors in between.
const busyFor = 50 * time.Millisecond

// spareProcessors returns what says how many of so many processors the making of an
// archive may take: all of them, or while commands are under way a quarter, one at least.
// On two processors, writes beside a download that took both had three times the p99, and
// beside one that takes one no other than before. To lower the priority of
// its threads instead holds up the garbage collector (see package background).
//
// written counts what commands write. What is returned is for one goroutine at a time.
func spareProcessors(processors int, written func() int64) func() int {
	before, at := written(), time.Time{}
	return func() int {
		now := time.Now()
		if w := written(); w != before {
			before, at = w, now
		}
		if now.Sub(at) < busyFor {
			return max(1, processors/4)
		}
		return processors + 1 // one waits to be sent
	}
}
