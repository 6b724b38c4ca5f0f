package snap

import (
	"sync"

	"conveyor.etl/router/internal/background"
)

// aside does work in order, beside whoever gives it, and keeps the first error. It
// is for one giver at a time. The zero value is ready; end must be called.
type aside struct {
	// inline makes do work at once, for tests that count what is done.
	inline bool
	jobs   chan func() error
	done   sync.WaitGroup

	mu  sync.Mutex
	err error
}

// asideJobs bounds how much work waits: what is received must not run away from
// what is made durable.
const asideJobs = 2

// do has job done after all that came before, unless that has failed, and returns
// the first error so far. It blocks while too much waits.
func (a *aside) do(job func() error) error {
	if err := a.failed(); err != nil {
		return err
	}
	if a.inline {
		a.note(job())
		return a.failed()
	}
	if a.jobs == nil {
		jobs := make(chan func() error, asideJobs)
		a.jobs = jobs
		a.done.Go(func() {
			background.Thread()
			for job := range jobs {
				if a.failed() == nil {
					a.note(job())
				}
			}
		})
	}
	a.jobs <- job
	return a.failed()
}

func (a *aside) note(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
	}
}

func (a *aside) failed() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// end waits until everything is done and returns the first error.
func (a *aside) end() error {
	if a.jobs != nil {
		close(a.jobs)
		a.jobs = nil
	}
	a.done.Wait()
	return a.failed()
}
