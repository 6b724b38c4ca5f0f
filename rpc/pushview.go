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
	defer p.mu.Unlock()
	if p.busy--; p.busy == 0 {
		p.forgetLocked()
	}
}

// take returns a view that shows at least all that was applied, and published, when it
// was called. Close gives it back.
func (p *pushViews) take() *pushView {
	p.mu.Lock()
	defer p.mu.Unlock()
	// In this order: a restore between the two is told by the epoch.
	revision, epoch := p.state.Revision(), p.state.Epoch()
	if v := p.cur; v != nil && v.Epoch() == epoch && v.Revision() >= revision {
		v.refs++
		return v
	}
	p.forgetLocked()
	v := &pushView{View: p.state.View(), of: p, refs: 1}
	if p.busy > 0 {
		v.refs++
		p.cur = v
	}
	return v
}

func (p *pushViews) forgetLocked() {
	if v := p.cur; v != nil {
		p.cur = nil
		v.closeLocked()
	}
}

// Close gives the view back. Unlike that of a View it must be called once.
func (v *pushView) Close() {
	v.of.mu.Lock()
	defer v.of.mu.Unlock()
	v.closeLocked()
}

func (v *pushView) closeLocked() {
	if v.refs--; v.refs == 0 {
		_ = v.View.Close() // of a snapshot; it reports what still reads from it, and nobody does
	}
}
