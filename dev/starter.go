package dev

import (
	"os/exec"
	"runtime"
	"sync"
)

// starter starts child processes from one thread that lives until close: a
// child that asks to be killed with its parent is killed with the thread that
// started it, and the threads of a Go program come and go.
type starter struct {
	work chan func()
	done sync.WaitGroup
}

func newStarter() *starter {
	s := &starter{work: make(chan func())}
	s.done.Go(func() {
		// Never unlocked: the thread ends with this goroutine.
		runtime.LockOSThread()
		for f := range s.work {
			f()
		}
	})
	return s
}

func (s *starter) start(cmd *exec.Cmd) error {
	err := make(chan error, 1)
	s.work <- func() { err <- cmd.Start() }
	return <-err
}

// close ends the thread; children that still run are killed.
func (s *starter) close() {
	close(s.work)
	s.done.Wait()
}
