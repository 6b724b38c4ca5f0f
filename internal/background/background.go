// Package background has work done that nobody waits for closely, without taking the
// processors from work that somebody does wait for.
//
// A node that receives an image of a state is busy for seconds, with copying for the
// most part. The kernel shares the processors fairly among threads: one that wakes up to
// pass on a client's write waits until one that copies has had its slice, which is some
// milliseconds, and a write is passed on by several threads, of several processes where
// nodes share a machine.
//
// It is for who receives, and for who starts: that node's state is behind what clients ask
// it for anyway. In the node that sends, which leads for the most part, a thread that waits for its turn
// keeps one of Go's processors from its other goroutines, and holds up each garbage
// collection: there it makes the slowest writes slower.
package background

import "runtime"

// Thread makes the calling goroutine run on a thread of its own, which others are
// preferred to, until the goroutine ends; the thread ends with it. It is for goroutines
// that do such work and nothing else. Where the system cannot prefer others it changes nothing.
func Thread() {
	runtime.LockOSThread() // never unlocked: the thread cannot become what it was again
	lower()
}

// Do calls work on such a thread, and returns when work does.
func Do(work func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		Thread()
		work()
	}()
	<-done
}
