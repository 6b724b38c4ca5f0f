package background

import "golang.org/x/sys/unix"

const (
	// niceness is how far other threads are preferred: one of these has a tenth of the
	// share of another when both want a processor, and is interrupted when that one
	// wakes up. Not idle priority, under which a busy machine would never finish.
	niceness = 10
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
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, min(20-was+niceness, mostNice))
}
