package rpc

import (
	"sync"

	"conveyor.etl/router/router"
)

// pushViews lends the workers of the pusher views of the newest state. After one change
// of ten thousand sidecars a node works out ten thousand pushes of one revision, and a
// view for each, which is a snapshot and two reads, costs as much as to read what the
// sidecar runs.
//
// A view is lent for as long as there is nothing newer and workers have pushes to do
// one after another. Nothing is kept while they idle, for what a snapshot shows cannot
// be compacted away.
type pushViews struct {
	state *router.FSM

	mu   sync.Mutex
	busy int // workers in a run of pushes
	cur  *pushView
}

// pushView is a view with the number of those who hold it.
type pushView struct {
	*router.View
	of   *pushViews
	refs int // guarded by of.mu; that of the cache counts too
}

// begin is called by a worker before the first push of a run, end after the last.
func (p *pushViews) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.busy++
}

func (p *pushViews) end() {
	p.mu.Lock()
	var last *pushView
	if p.busy--; p.busy == 0 {
		last = p.forgetLocked()
	}
	p.mu.Unlock()
	last.closed()
}

// take returns a view that shows at least all that was applied, and published, when it
// was called. Close gives it back.
func (p *pushViews) take() *pushView {
	v, last := p.takeLocked()
	last.closed()
	return v
}

func (p *pushViews) takeLocked() (taken, last *pushView) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// In this order: a restore between the two is told by the epoch.
	revision, epoch := p.state.Revision(), p.state.Epoch()
	if v := p.cur; v != nil && v.Epoch() == epoch && v.Revision() >= revision {
		v.refs++
		return v, nil
	}
	last = p.forgetLocked()
	v := &pushView{View: p.state.View(), of: p, refs: 1}
	if p.busy > 0 {
		v.refs++
		p.cur = v
	}
	return v, last
}

// forgetLocked drops the cached view. What it returns has to be closed, without the
// mutex: it may be the last to hold a database that was replaced, which is then closed
// and removed, for a second or more.
func (p *pushViews) forgetLocked() (last *pushView) {
	v := p.cur
	p.cur = nil
	if v != nil && v.dropLocked() {
		return v
	}
	return nil
}

// Close gives the view back. Unlike that of a View it must be called once.
func (v *pushView) Close() {
	v.of.mu.Lock()
	last := v.dropLocked()
	v.of.mu.Unlock()
	if last {
		v.closed()
	}
}

// dropLocked reports whether nobody holds v any more.
func (v *pushView) dropLocked() bool {
	v.refs--
	return v.refs == 0
}

// closed closes a view that nobody holds; v may be nil.
func (v *pushView) closed() {
	if v != nil {
		_ = v.View.Close() // of a snapshot; it reports what still reads from it, and nobody does
	}
}
