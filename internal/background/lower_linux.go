package background

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// niceness is how far other threads are preferred: one of these has two fifths of
	// the share of another when both want a processor, and is interrupted sooner when
	// that one wakes up. With ten in its place, on a machine that was busy, an image took
	// half as long again.
	niceness = 4
	// slice is what such a thread asks for at a time, the most there is. It is no more of
	// the processor for that: who asks for less is let in at once when it wakes up, instead of
	// after the slice that was begun. Since Linux 6.12; before, it is not looked at.
	slice = 100 * time.Millisecond
	// mostNice is the lowest priority there is.
	mostNice = 19
)

// lower makes the system prefer others to the calling thread. Who may not ask for
// that, as in some sandboxes, goes on as before.
func lower() {
	// The system call returns 20 for the usual priority, and less for who is nicer.
	was, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return
	}
	// Relative, and never the other way: a process may be nice as a whole.
	lowered := min(20-was+niceness, mostNice)
	err = unix.SchedSetAttr(0, &unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Flags: unix.SCHED_FLAG_KEEP_POLICY, Nice: int32(lowered), Runtime: uint64(slice),
	}, 0)
	if err != nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, lowered)
	}
}
