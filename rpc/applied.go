package rpc

import (
	"context"
	"fmt"
	"time"

	grpcpeer "google.golang.org/grpc/peer"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// What a sidecar has applied is known in one of two ways.
//
// A sidecar that says so sends the revision with its heartbeats. For one that does
// not, as all in the field, there is this: it makes one call at a time, without a
// deadline. So when its next heartbeat comes over the connection on which the last
// was answered, it has read that answer, and it has done what the answer said
// before it went on. Over another connection nothing follows: the answer may have
// been lost with the old one.

// applied is what is known of one sidecar; part of told, guarded by its mu.
type applied struct {
	// tellings counts the answers that told something; confirmed is the number of
	// the newest that was read.
	tellings, confirmed uint64
	// unread is the number of the last answer, 0 once it is known to be read or
	// lost, and over the address of the connection it went to.
	unread uint64
	over   string
	// shown is the revision of the newest state that it was compared with, of
	// shownEpoch, and shownTelling the number of the newest answer then: once that is
	// read, the sidecar has applied what that state asks of it. proved is the newest
	// one for which this is so.
	shown, shownEpoch, shownTelling uint64
	proved, provedEpoch             uint64
	// says: the sidecar sends what it has applied, which is revision of epoch.
	says            bool
	revision, epoch uint64
}

// telling notes that an answer to the heartbeat of ctx tells something.
func (e *told) telling(ctx context.Context) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unread, e.over = e.tellings, remoteAddr(ctx)
}

func remoteAddr(ctx context.Context) string {
	if p, ok := grpcpeer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}

// appliedWait bounds how long the answer to a heartbeat waits to learn what exists.
const appliedWait = 250 * time.Millisecond

// appliedFuture says why what a heartbeat says was applied cannot be so, "" when it
// can: a sidecar that was in another cluster before, or counts wrongly, may name what
// was never decided here. Taken at its word it would count as having applied
// everything, for ever. This node may merely be behind, so it asks first; when it
// cannot, the word waits for the next heartbeat.
func (a *sidecarAPI) appliedFuture(ctx context.Context, c appliedClaim) (reason string, counts bool) {
	if !a.ahead(c) {
		return "", true
	}
	if !a.learnWhatExists(ctx) {
		return "", false
	}
	if !a.ahead(c) {
		return "", true
	}
	return a.neverDecided(c), false
}

// neverDecided says that a claim is of what does not exist.
func (a *sidecarAPI) neverDecided(c appliedClaim) string {
	return fmt.Sprintf("revision %d of restore epoch %d, said to be applied, does not exist in this cluster, whose newest is %d of epoch %d; it does not count: watch the assignments again, from the beginning",
		c.revision, c.epoch, a.cfg.State.Revision(), a.cfg.State.Epoch())
}

// heardBack takes from a heartbeat what it says, or shows, of what was applied. What
// it says is left out unless it counts.
func (t *toldSidecars) heardBack(ctx context.Context, e *told, c appliedClaim, counts bool) {
	revision := c.revision
	e.mu.Lock()
	confirms := e.unread != 0 && e.over == remoteAddr(ctx)
	switch {
	case revision > 0:
		e.says = true
		// Heartbeats of one sidecar may overtake each other.
		if counts && c.beyond(appliedClaim{e.revision, e.epoch}) {
			e.revision, e.epoch = revision, c.epoch
		}
	case confirms:
		e.confirmed = e.unread
		if e.confirmed >= e.shownTelling {
			e.proved, e.provedEpoch = e.shown, e.shownEpoch
		}
	}
	e.unread = 0
	done, upTo := !e.says && confirms && e.confirmed == e.tellings, e.revision
	e.mu.Unlock()
	if !done && revision == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.changed != 0 && ((done && !e.dirty) || upTo >= e.changed) {
		t.delay.observe(t.now().Sub(e.changedAt))
		e.changed = 0
	}
}

// upTo returns up to which revision the sidecar is known to have applied what it
// was told, and the epoch of that; zero when nothing is known.
func (e *told) upTo() (revision, epoch uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.says {
		return e.revision, e.epoch
	}
	return e.proved, e.provedEpoch
}

// comparedUpTo returns up to which revision of epoch it is known what a sidecar to
// which nothing is due has to run: that it was compared with, or the one up to which
// changes were noted. It is 0 when it was not compared with a state of that epoch.
func (e *told) comparedUpTo(noted, epoch uint64) uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.shown == 0 || e.shownEpoch != epoch {
		return 0
	}
	return max(e.shown, noted)
}

// hasApplied says whether a sidecar is known here to have applied a, which is of a
// state of the given epoch.
func (t *toldSidecars) hasApplied(a *commandpb.Assignment, epoch uint64) bool {
	t.mu.Lock()
	e := t.by[a.SidecarId]
	t.mu.Unlock()
	if e == nil {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.says {
		return e.epoch == epoch && e.revision >= a.ModRevision
	}
	p, ok := e.pipelines[a.PipelineId]
	return ok && p.generation == router.Ordered(epoch, a.Generation) && p.revoked == a.Revoked && p.telling != 0 && p.telling <= e.confirmed
}
