package control

import (
	"cmp"
	"slices"
	"time"
)

// condition is what the leader holds a lease holder for. It mirrors the
// replicated state; services know no suspect.
type condition int8

const (
	alive condition = iota
	suspect
	expired
)

// String returns the condition's name.
func (c condition) String() string { return [...]string{"alive", "suspect", "expired"}[c] }

// lease is what is known of one sidecar or service.
type lease struct {
	link       wheelLink // of leases.wheel
	id         string
	generation uint64        // what the condition belongs to: a sidecar's registration, a service's mod revision
	last       time.Duration // last heard of, or the start of its grace; since leases.origin
	patience   time.Duration // its own longest silence, when that is longer than everybody's
	is         condition     // as replicated
	heard      bool          // a heartbeat came since the condition last changed
	busy       bool          // a transition is on its way
	held       bool          // its expiry is due: it is in leases.waiting
	returning  bool          // it is in leases.back
	silent     bool          // it is counted in leases.silent
	place      int32         // its place in leases.order
}

// transition is one change of condition to propose.
type transition struct {
	id         string
	generation uint64
	from, to   condition
	silent     time.Duration
	last       time.Duration // when it was last heard of, as the decision knew it
}

// leases judges who is still there. It is plain data without clock or
// goroutine; the caller serialises. A heartbeat costs one look-up, a sweep what
// is due (see wheel).
//
// Invariant: a lease that is neither busy nor expired is armed, or held.
type leases struct {
	what string // "sidecars" or "services", for alarms
	// suspectAfter is zero when there is no suspect condition.
	suspectAfter, expireAfter time.Duration
	limits                    massLimits

	origin time.Time // what times are counted from: the first moment told
	all    map[string]*lease
	order  []*lease // all, in no order that means anything: for walks in parts
	wheel  *wheel
	// present counts those that are not expired, silent those of them that are
	// suspect, were not heard of since, and have no transition on its way.
	present, silent int
	// grace is the moment before which nobody is judged.
	grace time.Duration
	// back were heard of while they were not alive; gone or changed ones among
	// them are sorted out by the sweep.
	back []*lease
	// waiting have let their lease run out; those with held unset were heard of
	// meanwhile. sorted says that they are by silence, longest first.
	waiting []*lease
	sorted  bool

	expiry  []time.Duration // when holders were let expire lately, ascending
	holding time.Time       // since when expiries are held back; zero = not
	calm    time.Time       // since when they would no longer be held back; zero = they would
	due     int             // how many are held back
	drained time.Time       // until when the slow release has been used up
}

// massLimits bound how many may expire at once.
type massLimits struct {
	// fraction of all holders that may expire within one window (expireAfter),
	// suspects included; more are held back. A cut network or a leader that was itself
	// asleep looks like the death of everybody, and moving everything then
	// turns a hiccup into an outage.
	fraction float64
	// floor is how many may always expire.
	floor int
	// hold is how long expiries are held back before they are let through
	// slowly.
	hold time.Duration
	// settle is for how long the share has to have been small again before the rest
	// of a mass expiry is let go: the time in which everybody who is back beats. The
	// first to come back of a cut zone would otherwise take the share below the
	// fraction and so have all the others expire, a moment before they beat.
	settle time.Duration
}

func newLeases(what string, suspectAfter, expireAfter time.Duration, limits massLimits) *leases {
	return &leases{
		what: what, suspectAfter: suspectAfter, expireAfter: expireAfter, limits: limits,
		all: make(map[string]*lease), wheel: newWheel(expireAfter),
	}
}

// since returns a moment as leases count it. Differences of moments are
// monotonic when those the caller tells are.
func (l *leases) since(now time.Time) time.Duration {
	if l.origin.IsZero() {
		l.origin = now
	}
	return now.Sub(l.origin)
}

// put takes over a holder as replicated. A new holder, a new registration and
// one that came back to life start a full lease.
func (l *leases) put(now time.Time, id string, is condition, generation uint64, patience time.Duration) {
	at := l.since(now)
	e := l.all[id]
	if e == nil {
		e = &lease{id: id, is: is, generation: generation, last: at, patience: patience, place: int32(len(l.order))}
		l.all[id] = e
		l.order = append(l.order, e)
		if is != expired {
			l.present++
		}
		l.tally(e)
		l.rearm(e)
		return
	}
	if is == alive && (e.generation != generation || e.is != alive) {
		e.last = at
	}
	if e.is != is {
		e.heard = e.heard && is != alive && at-e.last < l.silence(e)
	}
	if e.is != expired {
		l.present--
	}
	if is != expired {
		l.present++
	}
	e.is, e.generation, e.patience = is, generation, patience
	l.tally(e)
	l.rearm(e)
}

// tally keeps silent right after e has changed.
func (l *leases) tally(e *lease) {
	is := e.is == suspect && !e.busy && !e.heard
	switch {
	case is && !e.silent:
		l.silent++
	case !is && e.silent:
		l.silent--
	}
	e.silent = is
}

// longest is how long a holder may be silent before it expires.
func (l *leases) longest(e *lease) time.Duration { return max(e.patience, l.expireAfter) }

// silence is how long a holder may be silent before it is no longer alive.
func (l *leases) silence(e *lease) time.Duration {
	if l.suspectAfter > 0 {
		return l.suspectAfter
	}
	return l.longest(e)
}

// dueAt says when the next thing will have to be done about a silent e, which is
// not expired.
func (l *leases) dueAt(e *lease) time.Duration {
	if e.is == alive {
		return e.last + l.silence(e)
	}
	return e.last + l.longest(e)
}

// rearm makes sure that e is looked at in time after it has changed.
func (l *leases) rearm(e *lease) {
	if e.busy {
		return // done comes here again
	}
	if e.is != alive && e.heard && !e.returning {
		e.returning = true
		l.back = append(l.back, e)
	}
	if e.is == expired {
		e.held = false
		l.wheel.disarm(e)
		return
	}
	due := l.dueAt(e)
	// Later than it was armed for is left to the visit.
	if e.held || !e.link.armed() || due < e.link.due {
		e.held = false
		l.wheel.arm(e, due)
	}
}

// drop forgets a holder that deregistered.
func (l *leases) drop(id string) {
	e := l.all[id]
	if e == nil {
		return
	}
	if e.is != expired {
		l.present--
	}
	// Whoever still holds on to e finds nothing left to do.
	e.held, e.heard, e.busy = false, false, true
	l.tally(e)
	l.wheel.disarm(e)
	delete(l.all, id)
	last := len(l.order) - 1
	moved := l.order[last]
	l.order[e.place], moved.place = moved, e.place
	l.order[last] = nil
	l.order = l.order[:last]
}

// touch notes a heartbeat. It returns true when the holder is to be brought
// back to life, which should not wait for the next sweep.
func (l *leases) touch(now time.Time, id string) bool {
	e := l.all[id]
	if e == nil {
		return false // not registered, or not applied here yet: its lease is about to start anyway
	}
	return l.renew(e, l.since(now))
}

// touchBytes is touch for an id that is not a string of its own.
func (l *leases) touchBytes(now time.Time, id []byte) bool {
	e := l.all[string(id)]
	if e == nil {
		return false
	}
	return l.renew(e, l.since(now))
}

func (l *leases) renew(e *lease, at time.Duration) bool {
	e.last, e.heard = max(e.last, at), true
	if e.is == alive && !e.held {
		return false
	}
	l.tally(e)
	l.rearm(e)
	return e.is != alive && !e.busy
}

// shift extends all leases by d: nobody could be heard for that long.
func (l *leases) shift(now time.Time, d time.Duration) {
	at := l.since(now)
	for _, e := range l.all {
		e.last = min(e.last+d, at)
		if e.held || (e.is != alive && e.heard) {
			l.rearm(e)
		}
	}
}

// pause lets nobody be judged for d from now; who comes back is let back.
func (l *leases) pause(now time.Time, d time.Duration) { l.grace = max(l.grace, l.since(now)+d) }

// recall moves the moment a holder was last heard of back to at, which a leader
// before knew. Its lease does not run out sooner than the grace.
func (l *leases) recall(id string, at time.Time) {
	if e := l.all[id]; e != nil && e.is != expired {
		e.last = min(e.last, at.Sub(l.origin))
		l.rearm(e)
	}
}

// stands reports whether t, which sweep returned, is still what is to be done:
// nobody heard of the holder meanwhile.
func (l *leases) stands(t transition) bool {
	e := l.all[t.id]
	return e != nil && e.busy && e.generation == t.generation && e.last == t.last
}

// sweep returns the transitions that are due, by id, and marks them busy.
func (l *leases) sweep(now time.Time) []transition {
	at := l.since(now)
	var out []transition
	for _, e := range l.back {
		e.returning = false
		if silent := at - e.last; !e.busy && e.is != alive && e.heard && silent < l.silence(e) {
			out = append(out, l.move(e, alive, silent))
		}
	}
	l.back = l.back[:0]
	if at < l.grace {
		slices.SortFunc(out, func(a, b transition) int { return cmp.Compare(a.id, b.id) })
		return out
	}
	l.waiting = slices.DeleteFunc(l.waiting, func(e *lease) bool { return !e.held })
	l.wheel.turn(at, func(e *lease) {
		switch due := l.dueAt(e); {
		case due > at:
			l.wheel.arm(e, due)
		case e.is == alive && l.suspectAfter > 0:
			out = append(out, l.move(e, suspect, at-e.last))
		default:
			e.held, l.sorted = true, false
			l.waiting = append(l.waiting, e)
		}
	})
	out = l.release(now, out)
	slices.SortFunc(out, func(a, b transition) int { return cmp.Compare(a.id, b.id) })
	return out
}

// release lets go as many of those that wait as admit says, the longest silent
// first, and appends their transitions to out.
func (l *leases) release(now time.Time, out []transition) []transition {
	n := l.admit(now, len(l.waiting))
	if n == 0 {
		return out
	}
	if n < len(l.waiting) && !l.sorted {
		slices.SortFunc(l.waiting, func(a, b *lease) int {
			return cmp.Or(cmp.Compare(a.last, b.last), cmp.Compare(a.id, b.id))
		})
		l.sorted = true
	}
	at := l.since(now)
	for _, e := range l.waiting[:n] {
		l.expiry = append(l.expiry, at)
		out = append(out, l.move(e, expired, at-e.last))
	}
	l.waiting = slices.Delete(l.waiting, 0, n)
	return out
}

func (l *leases) move(e *lease, to condition, silent time.Duration) transition {
	e.busy, e.held = true, false
	l.tally(e)
	l.wheel.disarm(e)
	return transition{id: e.id, generation: e.generation, from: e.is, to: to, silent: silent, last: e.last}
}

// admit says how many of due expiries go ahead.
func (l *leases) admit(now time.Time, due int) int {
	old, at := 0, l.since(now)
	for old < len(l.expiry) && at-l.expiry[old] >= l.expireAfter {
		old++
	}
	l.expiry = l.expiry[old:]
	l.due = 0
	if due == 0 {
		l.holding, l.calm = time.Time{}, time.Time{}
		return 0
	}
	present := l.present + len(l.expiry) // those that were there at the window's start
	window := max(l.limits.floor, int(l.limits.fraction*float64(present)))
	// Suspects count already: the leases of a fleet that is cut off run out over
	// a whole heartbeat interval, and the first half of it would be moved before
	// the due ones alone were too many.
	if len(l.expiry)+max(due, l.silent) <= window {
		if l.calm.IsZero() {
			l.calm = now
		}
		if !l.holding.IsZero() && now.Sub(l.calm) < l.limits.settle {
			l.due = due
			return 0
		}
		l.holding, l.calm = time.Time{}, time.Time{}
		return due
	}
	l.calm = time.Time{}
	if l.holding.IsZero() {
		l.holding = now
	}
	n := 0
	if released := l.holding.Add(l.limits.hold); !now.Before(released) {
		// They have been gone for long: let them go, a hundredth of the fleet a
		// second, so that placement keeps up and somebody can still step in.
		if l.drained.Before(released) {
			l.drained = released
		}
		for n < due && l.drained.Before(now) {
			n += releasedASecond(present)
			l.drained = l.drained.Add(time.Second)
		}
		n = min(n, due)
	}
	l.due = due - n
	return n
}

// releasedASecond is how many of a mass expiry are let go each second, once that has
// been held back for long, of as many as were there before.
func releasedASecond(present int) int { return max(1, present/100) }

// heldUntil returns from when on those that are held back are let go one after another,
// and by when the last of them is; sooner when so many are heard of again that the rest
// is no mass any more.
func (l *leases) heldUntil() (from, last time.Time) {
	from = l.holding.Add(l.limits.hold)
	last = from
	if l.drained.After(from) {
		last = l.drained // some are let go already
	}
	for left, there := l.due, l.present; left > releasedASecond(there); last = last.Add(time.Second) {
		n := releasedASecond(there)
		left, there = left-n, there-n
	}
	// The rest may be no mass any more, and has to settle before all of it is let go.
	return from, last.Add(l.limits.settle)
}

// done takes back the mark of a transition. The replicated state comes through
// put; failed means that nothing changed.
func (l *leases) done(id string) {
	if e := l.all[id]; e != nil && e.busy {
		e.busy = false
		l.tally(e)
		l.rearm(e)
	}
}
