package server

import "sync"

// plannedRevision is the revision up to which the placement of this node has decided
// and recorded everything; 0 while it does not lead. Its methods are safe for
// concurrent use.
type plannedRevision struct {
	mu       sync.Mutex
	revision uint64
	changed  chan struct{}
}

func newPlannedRevision() *plannedRevision { return &plannedRevision{changed: make(chan struct{})} }

func (p *plannedRevision) set(revision uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revision = revision
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *plannedRevision) get() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.revision
}

// next returns a channel that is closed when it is set next.
func (p *plannedRevision) next() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}
