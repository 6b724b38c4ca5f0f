package rpc

import (
	"sync"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// toldSidecars remembers what each sidecar that beats at this node was last
// told to run, so that a heartbeat is answered with what changed since.
//
// It is soft state: replies get lost, sidecars restart and move between nodes,
// and none of them acknowledges a command. So a change is repeated with the
// next heartbeat, the full set is sent again now and then and to whoever is not
// remembered, and forgetting an entry is always safe: all commands are
// idempotent.
type toldSidecars struct {
	limit      int
	fullEvery  time.Duration
	staleAfter time.Duration
	now        func() time.Time
	delay      delays // from the commit of a change to its being applied

	mu       sync.Mutex
	by       map[string]*told
	inserted int // since the last sweep
}

// told is what one sidecar was told.
type told struct {
	// Guarded by toldSidecars.mu.
	heard time.Time // its last heartbeat here
	full  time.Time // when it was last told everything
	dirty bool      // its assignments may have changed since
	doubt bool      // it may be registered no more
	// changed is the revision of the newest change that it is not known to have
	// applied, 0 when there is none; changedAt is when the oldest came.
	changed   uint64
	changedAt time.Time
	// member is the sidecar on the stream it beats on; nil when it beats by calls.
	member *streamMember
	// gone: no longer remembered. A stream that still holds the entry has to ask
	// for another one.
	gone bool

	// mu is held while an answer is made: two heartbeats of one sidecar may
	// be in progress at once.
	mu        sync.Mutex
	pipelines map[string]toldPipeline
	unhealthy map[string]struct{} // local services it last called unhealthy
	applied
}

type toldPipeline struct {
	generation uint64 // as it was told
	revoked    bool
	again      bool   // was told once; tell it once more
	telling    uint64 // number of the answer that told it
}

func newToldSidecars(limit int, fullEvery, staleAfter time.Duration) *toldSidecars {
	return &toldSidecars{limit: limit, fullEvery: fullEvery, staleAfter: staleAfter, now: time.Now, by: make(map[string]*told)}
}

// len returns how many sidecars are remembered.
func (t *toldSidecars) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.by)
}

// due is what a heartbeat has to be answered with.
type due int

const (
	nothingDue due = iota
	changesDue
	fullDue
	// firstDue is fullDue for a sidecar this node knows nothing of. Another
	// node may have told it newer things than are applied here.
	firstDue
)

// beat notes a heartbeat and says what has to be told. It returns nil for a
// sidecar that is not known here: one that was deregistered, for the feed drops
// its entry, and one that was silent here for longer than staleAfter, for it has
// probably beaten at another node meanwhile, which may have told it newer things.
// If such a sidecar exists, first is to follow.
func (t *toldSidecars) beat(id string, now time.Time) (*told, due) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.by[id]
	if e == nil || now.Sub(e.heard) > t.staleAfter {
		return nil, nothingDue
	}
	e.heard = now
	if now.Sub(e.full) >= t.fullEvery {
		e.full, e.dirty = now, false
		return e, fullDue
	}
	if e.dirty {
		e.dirty = false
		return e, changesDue
	}
	return e, nothingDue
}

// first notes the first heartbeat of a sidecar here.
func (t *toldSidecars) first(id string, now time.Time) *told {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.insertLocked(id, now)
}

func (t *toldSidecars) insertLocked(id string, now time.Time) *told {
	t.inserted++
	if t.inserted > 1024 && t.inserted > len(t.by)/2 {
		t.inserted = 0
		for k, e := range t.by {
			if now.Sub(e.heard) > t.staleAfter {
				t.dropLocked(k, e, false)
			}
		}
	}
	if len(t.by) >= t.limit {
		t.evictLocked()
	}
	t.dropLocked(id, t.by[id], true)
	e := &told{heard: now, full: now}
	t.by[id] = e
	return e
}

// dropLocked forgets an entry, which may be nil. The stream its sidecar beats on
// looks at that anew with the next heartbeat, with tell at once.
func (t *toldSidecars) dropLocked(id string, e *told, tell bool) {
	if e == nil {
		return
	}
	delete(t.by, id)
	e.gone = true
	if tell && e.member != nil {
		e.member.judgeAgain()
	}
}

// evictLocked drops the longest silent of a few arbitrary entries: exact order
// would cost a list, and a wrong choice costs one full set.
func (t *toldSidecars) evictLocked() {
	var victim string
	var oldest time.Time
	seen := 0
	for k, e := range t.by {
		if seen == 0 || e.heard.Before(oldest) {
			victim, oldest = k, e.heard
		}
		if seen++; seen == 16 {
			break
		}
	}
	t.dropLocked(victim, t.by[victim], false)
}

// changed notes that an assignment of a sidecar has changed.
func (t *toldSidecars) changed(id string, revision uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.by[id]
	if e == nil {
		return
	}
	if e.dirty = true; e.changed == 0 {
		e.changedAt = t.now()
	}
	e.changed = max(e.changed, revision)
	if e.member != nil {
		e.member.changed()
	}
}

// expired notes that the lease of a sidecar has run out.
func (t *toldSidecars) expired(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.by[id]; e != nil && e.member != nil {
		e.member.leaseLost()
	}
}

// again notes that a sidecar has to be told something once more.
func (t *toldSidecars) again(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.by[id]; e != nil {
		e.dirty = true
	}
}

// forget drops what is known of a sidecar: its next heartbeat is answered with
// everything.
func (t *toldSidecars) forget(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropLocked(id, t.by[id], true)
}

// takeDoubt says whether a sidecar has to be looked for in the state, and takes that
// as done.
func (t *toldSidecars) takeDoubt(e *told) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	doubt := e.doubt
	e.doubt = false
	return doubt
}

// giveBackDoubt undoes takeDoubt, and the beat before, of a heartbeat that failed.
func (t *toldSidecars) giveBackDoubt(e *told) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e.doubt, e.dirty = true, true
}

// reset notes that anything may have changed, also that a sidecar is registered no
// more. What each was told stays: a state that was restored may know nothing of what
// it has to let go of.
func (t *toldSidecars) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.by {
		e.dirty, e.doubt = true, true
		if e.member != nil {
			e.member.check()
		}
	}
}

// registered notes that a sidecar was told assignments in the answer to its
// registration.
func (t *toldSidecars) registered(id string, now time.Time, assignments []*commandpb.Assignment, epoch uint64) {
	t.mu.Lock()
	e := t.insertLocked(id, now)
	e.dirty = true // repeats them with the first heartbeat
	t.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pipelines = make(map[string]toldPipeline, len(assignments))
	for _, a := range assignments {
		e.pipelines[a.PipelineId] = toldPipeline{generation: router.Ordered(epoch, a.Generation), again: true}
	}
}

// commands compares what the sidecar was told with its assignments in v and
// returns what to tell it, and whether its next heartbeat has to be told
// something again. With once nothing has to, for the answer cannot be lost alone.
func (e *told) commands(v *router.View, sidecar string, what due, once bool) (cmds []*sidecarpb.SidecarCommand, again bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.pipelines == nil {
		e.pipelines = make(map[string]toldPipeline)
	}
	telling := e.tellings + 1
	defer func() {
		if err != nil {
			return
		}
		if len(cmds) > 0 {
			e.tellings = telling
		}
		e.shown, e.shownEpoch, e.shownTelling = v.Revision(), v.Epoch(), e.tellings
	}()
	present := make(map[string]struct{})
	err = v.Assignments(sidecar, func(a *commandpb.Assignment) bool {
		present[a.PipelineId] = struct{}{}
		was, known := e.pipelines[a.PipelineId]
		now := toldPipeline{generation: router.Ordered(v.Epoch(), a.Generation), revoked: a.Revoked}
		change := !known || was.generation != now.generation || was.revoked != a.Revoked
		if !change && !was.again && what == changesDue {
			return true
		}
		// The first telling of anything is repeated once: its reply may be lost.
		now.again, now.telling = change && !once, telling
		if !change && was.telling != 0 && was.telling <= e.confirmed {
			now.telling = was.telling // it is known to have read that one
		}
		again = again || now.again
		e.pipelines[a.PipelineId] = now
		if a.Revoked {
			var drain bool
			if drain, err = drainFirst(v, a.PipelineId); err != nil {
				return false
			}
			cmds = append(cmds, revokeCommand(a.PipelineId, drain))
		} else {
			cmds = append(cmds, assignCommand(a, v.Epoch()))
		}
		return true
	})
	if err != nil {
		return nil, true, err
	}
	for pipeline, was := range e.pipelines {
		if _, ok := present[pipeline]; ok {
			continue
		}
		// Its revocation has been forgotten by the state already.
		if was.revoked && !was.again {
			delete(e.pipelines, pipeline)
			continue
		}
		if once {
			delete(e.pipelines, pipeline)
		} else {
			e.pipelines[pipeline] = toldPipeline{revoked: true, again: !was.revoked, telling: telling}
			again = true
		}
		drain, err := drainFirst(v, pipeline)
		if err != nil {
			return nil, true, err
		}
		cmds = append(cmds, revokeCommand(pipeline, drain))
	}
	return cmds, again, nil
}

// drainFirst says whether a sidecar should finish what it holds of a pipeline
// it loses: a pipeline that was moved or disabled, yes; one that is gone has
// nowhere to deliver to, and one that was disabled without a drain is to stop.
func drainFirst(v *router.View, pipeline string) (bool, error) {
	p, err := v.Pipeline(pipeline)
	return p != nil && !p.Abrupt, err
}
