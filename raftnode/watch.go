package raftnode

import (
	"fmt"
)

// checkDisk watches the age of the append queue's head.
//
// The loop does no IO, so a leader whose disk hangs keeps sending heartbeats and
// keeps its quorum: without this it would lead for ever while none of its own
// callers gets an answer. First it hands leadership over, then the node gives
// up, which ends the process: a disk that has not answered for so long is not
// trusted to remember what it was told.
//
// Waiting for a received image is not waiting for the disk of the log. Nor is the
// time in which the whole process stood still: the disk could not be heard then,
// so it gets its full time once the process runs again.
func (l *loop) checkDisk() error {
	if l.tickLag >= l.cfg.StallTransfer/2 {
		l.awake = l.now
	}
	age := l.appendQ.age(l.now)
	if !l.awake.IsZero() {
		age = min(age, l.now.Sub(l.awake))
	}
	if l.diskBusy() {
		return nil
	}
	if age < l.cfg.StallTransfer {
		l.stalled = false
		return nil
	}
	if age >= l.cfg.StallFail {
		return fmt.Errorf("%w: an append has been waiting for %v; check the disk, then start the node again", ErrDiskStalled, age)
	}
	if !l.stalled {
		l.stalled = true
		l.cfg.Logger.Warn("the disk of the log is not answering", "age", age)
		l.cfg.Events.DiskStalled(age)
	}
	// Tried again after each attempt raft gives up.
	if l.leading() && l.transferTicks == 0 {
		if to := l.bestTransferee(); to != 0 {
			l.cfg.Logger.Warn("handing leadership over because of the stalled disk", "to", to)
			l.startTransfer(to)
		}
	}
	return nil
}
