package control

import "time"

// wheelSlots is the number of slots of a wheel, a power of two. What is due
// further ahead than a whole turn waits in the last slot and is put on from
// there.
const wheelSlots = 256

// wheel holds leases by when they have to be looked at. Arming and disarming
// cost the same however many there are, and a turn costs what is due, not what
// is there: a heap would pay a logarithm for each heartbeat, a sweep of all
// leases an amount for each lease a second.
//
// It is lazy: a heartbeat does not move its lease. The lease is looked at when
// it would have been due without that heartbeat, and armed anew then, so it
// costs one visit a lease and not one a heartbeat. Whoever is visited must
// therefore be asked when it is due; being visited says only that the time to
// ask has come, and it may come early.
//
// Times count from an origin the owner chooses. Plain data: the owner
// serialises.
type wheel struct {
	grain time.Duration // the time one slot stands for
	slots [wheelSlots]wheelLink
	// at is the tick up to which everything was taken out. Invariant: nothing
	// is armed for an earlier tick.
	at int64
}

// wheelLink makes a lease a member of one slot's ring.
type wheelLink struct {
	prev, next *wheelLink
	of         *lease        // nil in the head of a slot
	due        time.Duration // what it was armed for
}

func (k *wheelLink) armed() bool { return k.next != nil }

// newWheel returns a wheel for leases that are due at most about horizon ahead.
func newWheel(horizon time.Duration) *wheel {
	return &wheel{grain: max(horizon/(wheelSlots/2), time.Microsecond)}
}

// arm has e visited by the first turn at or after due. It replaces an earlier
// arming.
func (w *wheel) arm(e *lease, due time.Duration) {
	w.disarm(e)
	tick := min(max(int64(due/w.grain), w.at), w.at+wheelSlots-1)
	head := &w.slots[tick&(wheelSlots-1)]
	if head.next == nil {
		head.prev, head.next = head, head
	}
	k := &e.link
	k.of, k.due = e, due
	k.prev, k.next = head, head.next
	head.next.prev = k
	head.next = k
}

// disarm takes e out.
func (w *wheel) disarm(e *lease) {
	if k := &e.link; k.armed() {
		k.prev.next, k.next.prev = k.next, k.prev
		k.prev, k.next = nil, nil
	}
}

// turn takes out all that is due at now, and some that is not, and visits each
// once; visit may arm it again.
func (w *wheel) turn(now time.Duration, visit func(e *lease)) {
	to := int64(now / w.grain)
	// The slot of now is emptied at every turn: part of what is in it is due.
	// After a long pause every slot is visited once and not once a round.
	first := max(w.at, to-wheelSlots+1)
	w.at = to // before visiting: what is armed again belongs to what comes
	// All of it is taken out before the first visit: what is armed again may go
	// into a slot that this turn comes to.
	var taken *wheelLink
	for tick := first; tick <= to; tick++ {
		head := &w.slots[tick&(wheelSlots-1)]
		if head.next == nil || head.next == head {
			continue
		}
		head.prev.next = taken
		taken = head.next
		head.prev, head.next = head, head
	}
	for k := taken; k != nil; {
		next := k.next
		k.prev, k.next = nil, nil
		visit(k.of)
		k = next
	}
}
