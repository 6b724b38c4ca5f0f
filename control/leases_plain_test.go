package control

import (
	"cmp"
	"slices"
	"time"
)

// plainLease is what is known of one sidecar or service.
type plainLease struct {
	id         string
	is         condition // as replicated
	generation uint64    // what the condition belongs to: a sidecar's registration, a service's mod revision
	last       time.Time // last heard of, or the start of its grace
	heard      bool      // a heartbeat came since the condition last changed
	patience   time.Duration
	busy       bool // a transition is on its way
}

// plainLeases is leases told plainly: every sweep looks at everybody. It is what
// the wheel is checked against, and what its speed is compared with.
type plainLeases struct {
	what string // "sidecars" or "services", for alarms
	// suspectAfter is zero when there is no suspect condition.
	suspectAfter, expireAfter time.Duration
	limits                    massLimits

	all     map[string]*plainLease
	expiry  []time.Time // when holders were let expire lately
	holding time.Time   // since when expiries are held back; zero = not
	calm    time.Time   // since when they would no longer be held back; zero = they would
	due     int         // how many are held back
	drained time.Time   // until when the slow release has been used up
	grace   time.Time   // nobody is judged before
}

func newPlainLeases(what string, suspectAfter, expireAfter time.Duration, limits massLimits) *plainLeases {
	return &plainLeases{what: what, suspectAfter: suspectAfter, expireAfter: expireAfter, limits: limits, all: make(map[string]*plainLease)}
}

// put takes over a holder as replicated. A new holder, a new registration and
// one that came back to life start a full plainLease.
func (l *plainLeases) put(now time.Time, id string, is condition, generation uint64, patience time.Duration) {
	e := l.all[id]
	if e == nil {
		l.all[id] = &plainLease{id: id, is: is, generation: generation, last: now, patience: max(patience, l.expireAfter)}
		return
	}
	if is == alive && (e.generation != generation || e.is != alive) {
		e.last = now
	}
	if e.is != is {
		e.heard = e.heard && is != alive && now.Sub(e.last) < l.silence(e)
	}
	e.is, e.generation, e.patience = is, generation, max(patience, l.expireAfter)
}

// silence is how long a holder may be silent before it is no longer alive.
func (l *plainLeases) silence(e *plainLease) time.Duration {
	if l.suspectAfter > 0 {
		return l.suspectAfter
	}
	return e.patience
}

// drop forgets a holder that deregistered.
func (l *plainLeases) drop(id string) { delete(l.all, id) }

// touch notes a heartbeat. It returns true when the holder is to be brought
// back to life, which should not wait for the next sweep.
func (l *plainLeases) touch(now time.Time, id string) bool {
	e := l.all[id]
	if e == nil {
		return false // not registered, or not applied here yet: its plainLease is about to start anyway
	}
	e.last, e.heard = now, true
	return e.is != alive && !e.busy
}

// shift extends all plainLeases by d: nobody could be heard for that long.
func (l *plainLeases) shift(now time.Time, d time.Duration) {
	for _, e := range l.all {
		if e.last = e.last.Add(d); e.last.After(now) {
			e.last = now
		}
	}
}

func (l *plainLeases) pause(now time.Time, d time.Duration) {
	if until := now.Add(d); until.After(l.grace) {
		l.grace = until
	}
}

func (l *plainLeases) recall(id string, at time.Time) {
	if e := l.all[id]; e != nil && e.is != expired && at.Before(e.last) {
		e.last = at
	}
}

// sweep returns the transitions that are due, by id, and marks them busy.
func (l *plainLeases) sweep(now time.Time) []transition {
	var out []transition
	var expiring []*plainLease
	for _, e := range l.all {
		if e.busy {
			continue
		}
		silent := now.Sub(e.last)
		switch {
		case e.is != alive && e.heard && silent < l.silence(e):
			out = append(out, l.move(e, alive, silent))
		case now.Before(l.grace):
		case e.is == alive && l.suspectAfter > 0 && silent >= l.suspectAfter:
			out = append(out, l.move(e, suspect, silent))
		case e.is != expired && silent >= e.patience && (e.is == suspect || l.suspectAfter == 0):
			expiring = append(expiring, e)
		}
	}
	slices.SortFunc(expiring, func(a, b *plainLease) int {
		return cmp.Or(a.last.Compare(b.last), cmp.Compare(a.id, b.id))
	})
	due := 0
	if !now.Before(l.grace) {
		due = l.admit(now, len(expiring))
	}
	for _, e := range expiring[:due] {
		l.expiry = append(l.expiry, now)
		out = append(out, l.move(e, expired, now.Sub(e.last)))
	}
	slices.SortFunc(out, func(a, b transition) int { return cmp.Compare(a.id, b.id) })
	return out
}

func (l *plainLeases) move(e *plainLease, to condition, silent time.Duration) transition {
	e.busy = true
	return transition{id: e.id, generation: e.generation, from: e.is, to: to, silent: silent}
}

// admit says how many of due expiries go ahead.
func (l *plainLeases) admit(now time.Time, due int) int {
	l.expiry = slices.DeleteFunc(l.expiry, func(t time.Time) bool { return now.Sub(t) >= l.expireAfter })
	l.due = 0
	if due == 0 {
		l.holding, l.calm = time.Time{}, time.Time{}
		return 0
	}
	present := len(l.expiry) // those that were there at the window's start
	silent := 0
	for _, e := range l.all {
		if e.is != expired {
			present++
		}
		if e.is == suspect && !e.busy && !e.heard {
			silent++
		}
	}
	window := max(l.limits.floor, int(l.limits.fraction*float64(present)))
	if len(l.expiry)+max(due, silent) <= window {
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
			n += max(1, present/100)
			l.drained = l.drained.Add(time.Second)
		}
		n = min(n, due)
	}
	l.due = due - n
	return n
}

// done takes back the mark of a transition. The replicated state comes through
// put; failed means that nothing changed.
func (l *plainLeases) done(id string) {
	if e := l.all[id]; e != nil {
		e.busy = false
	}
}
