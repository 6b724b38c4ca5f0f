// Package pace has work that nobody waits for rest again and again, so that work that
// somebody does wait for gets its turns.
//
// A flush or a compaction of a state is a tenth of a second to some seconds of computing
// without a pause. Go lets a goroutine have a processor for 10 ms, the kernel shares the
// processors fairly among threads, and the nodes of a group, which apply the same
// commands, flush at the same time: where they share a machine, or have one or two
// processors each, a client's write that needs a dozen short turns one after the other
// then takes three times as long. To yield to other goroutines of the process is not
// enough, for it leaves out other processes, and threads of a low priority keep a
// processor of Go's from the goroutines that wait for one, and hold up each garbage collection.
package pace

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// stint is for how long work goes on before it rests: less costs more in switching
	// to and fro than it gives others.
	stint = time.Millisecond
	// maxRest bounds one rest. Work that was kept from its processor looks as if it had
	// used it, and would rest ever longer the less it gets done.
	maxRest = 20 * time.Millisecond
	// useFor is how long others count as busy after their last turn: a batch of commands
	// spends most of its time on its way to other nodes and back, and needs the processors
	// in between.
	useFor = 50 * time.Millisecond
)

// Pace is shared by work and by those who go first. It ends all rests when somebody waits
// for that work after all. It is safe for concurrent use. The zero value is not valid: use New.
type Pace struct {
	origin time.Time
	// used is when the last of those who go first had a turn, in nanoseconds since origin.
	used atomic.Int64

	mu sync.Mutex
	// hurried counts those who are in a hurry; hurry is closed while there are any.
	hurried int
	hurry   chan struct{}
}

// New returns a pace at which nobody is in a hurry, and nobody goes first so far.
func New() *Pace {
	p := &Pace{origin: time.Now(), hurry: make(chan struct{})}
	p.used.Store(-int64(useFor))
	return p
}

// Used is called by those who go first, with each of their turns. Work that has the
// processors for itself does not rest.
func (p *Pace) Used() { p.used.Store(int64(time.Since(p.origin))) }

// Hurry ends all rests, and lets none begin until done is called, once or more.
func (p *Pace) Hurry() (done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hurried++; p.hurried == 1 {
		close(p.hurry)
	}
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.hurried--; p.hurried == 0 {
			p.hurry = make(chan struct{})
		}
	})
}

func (p *Pace) hurrying() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hurry
}

// Work is one piece of work, of one goroutine at a time.
type Work struct {
	p     *Pace
	since time.Time // of the last rest
}

// Begin returns work that begins now.
func (p *Pace) Begin() *Work { return &Work{p: p, since: time.Now()} }

// Rest blocks for so many times as long as the work went on since its last rest, if that
// was a millisecond or more, and for 20 ms at most. It does not if nobody has used the
// processors for a while, or somebody is in a hurry. It is meant to be called after each small step.
func (w *Work) Rest(times func() float64) {
	now := time.Now()
	worked := now.Sub(w.since)
	if worked < stint {
		return
	}
	idle := now.Sub(w.p.origin) - time.Duration(w.p.used.Load())
	rest := min(time.Duration(times()*float64(worked)), maxRest)
	if rest > 0 && idle < useFor {
		t := time.NewTimer(rest)
		select {
		case <-t.C:
		case <-w.p.hurrying():
			t.Stop()
		}
	}
	w.since = time.Now()
}
