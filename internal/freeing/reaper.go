package freeing

import (
	"errors"
	"os"
	"sync"
	"time"
)

const (
	// least is the size in bytes from which on a file is freed in steps.
	least = 256 << 10
	// stepBytes is freed at once.
	stepBytes = 1 << 20
	// restTimes is for how long it rests after a step, in times of what that took: of a
	// hundred writes less than one meets a step, also where some nodes share a disk. It
	// rests when no commands are under way as well: on a node that receives an image none
	// are, and others may use the disk.
	restTimes = 200
	// maxRest bounds one rest.
	maxRest = time.Second
	// maxBytes and maxFiles may wait to be freed. More are removed as usual: the disk is
	// not to be full of what nobody needs, nor the process out of file descriptors.
	maxBytes = 1 << 30
	maxFiles = 256
	// spareTimes is how much of the disk has to be free for that, in times of what waits.
	spareTimes = 4
)

// Reaper removes files. It is safe for concurrent use. Close it when it is no longer needed.
type Reaper struct {
	stop chan struct{}
	// restTimes and maxRest are the constants, but in tests.
	restTimes float64
	maxRest   time.Duration

	mu      sync.Mutex
	closed  bool
	waiting []*claim
	bytes   int64 // of those that wait, and what is left of the one being freed
	files   int
	working sync.WaitGroup
	busy    bool // the worker runs
}

// New returns a Reaper that has nothing to do.
func New() *Reaper {
	return &Reaper{stop: make(chan struct{}), restTimes: restTimes, maxRest: maxRest}
}

// Remove removes the file at path as os.Remove does, without waiting until its place on
// the disk is free. Who still has the file open keeps all of it.
func (r *Reaper) Remove(path string) error {
	return r.remove([]string{path}, func() error { return os.Remove(path) })
}

// remove calls do, which removes the names of files, and then frees what they took.
func (r *Reaper) remove(paths []string, do func() error) error {
	var claims []*claim
	for _, path := range paths {
		if c := r.claim(path); c != nil {
			claims = append(claims, c)
		}
	}
	err := do()
	// Those that were not removed after all still have their names, and are let go.
	for _, c := range claims {
		r.free(c)
	}
	return err
}

// claim is a file that is kept open, so that it lasts when its name is removed.
type claim struct {
	f    *os.File
	size int64
}

// claim returns nil for what is to be removed as usual.
func (r *Reaper) claim(path string) *claim {
	c, spare := open(path)
	if c == nil {
		return nil
	}
	r.mu.Lock()
	ok := !r.closed && r.files < maxFiles && r.bytes+c.size <= maxBytes && spare >= spareTimes*(r.bytes+c.size)
	if ok {
		r.files++
		r.bytes += c.size
	}
	r.mu.Unlock()
	if !ok {
		c.f.Close()
		return nil
	}
	return c
}

// free hands c, which is without a name now, to the worker.
func (r *Reaper) free(c *claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || !nameless(c.f) {
		c.f.Close()
		r.files--
		r.bytes -= c.size
		return
	}
	r.waiting = append(r.waiting, c)
	if !r.busy {
		r.busy = true
		r.working.Go(r.work)
	}
}

// work frees what waits, and ends when nothing does.
func (r *Reaper) work() {
	for {
		r.mu.Lock()
		if len(r.waiting) == 0 {
			r.busy, r.waiting = false, nil
			r.mu.Unlock()
			return
		}
		c := r.waiting[0]
		r.waiting = r.waiting[1:]
		r.mu.Unlock()
		left := r.shrink(c)
		c.f.Close()
		r.mu.Lock()
		r.files--
		r.bytes -= left
		r.mu.Unlock()
	}
}

// shrink cuts c, and returns how much of it is left for the system to free.
func (r *Reaper) shrink(c *claim) (left int64) {
	left = c.size
	if !alone(c.f) {
		return left
	}
	for left > 0 {
		if !stillAlone(c.f) {
			return left
		}
		next := max(0, left-stepBytes)
		began := time.Now()
		// The sync makes the file system tell the disk now, and not of all steps of some
		// seconds together.
		if errors.Join(c.f.Truncate(next), c.f.Sync()) != nil {
			return left
		}
		took := time.Since(began)
		r.mu.Lock()
		r.bytes -= left - next
		r.mu.Unlock()
		if left = next; !r.rest(c.f, took) {
			return left
		}
	}
	return left
}

// rest waits after a step of f that took so long; false when the Reaper is being closed. It
// waits the less the more there is to do, and not while the disk is nearly full.
func (r *Reaper) rest(f *os.File, took time.Duration) bool {
	r.mu.Lock()
	bytes := r.bytes
	room := 1 - max(float64(bytes)/maxBytes, float64(r.files)/maxFiles)
	r.mu.Unlock()
	rest := min(time.Duration(r.restTimes*room*room*float64(took)), r.maxRest)
	if n, ok := spare(f); !ok || n < spareTimes*bytes {
		rest = 0
	}
	t := time.NewTimer(rest)
	defer t.Stop()
	select {
	case <-r.stop:
		return false
	case <-t.C:
		return true
	}
}

// Waiting returns how many bytes of removed files have not been freed yet.
func (r *Reaper) Waiting() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes
}

// Close leaves the rest to the system, which frees it at once, and waits for the step
// that is being made. What is removed afterwards is removed as usual.
func (r *Reaper) Close() {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.closed = true
	close(r.stop)
	waiting := r.waiting
	r.waiting = nil
	for _, c := range waiting {
		c.f.Close()
		r.files--
		r.bytes -= c.size
	}
	r.mu.Unlock()
	r.working.Wait()
}
