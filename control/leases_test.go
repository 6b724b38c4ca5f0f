package control

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	testSuspect = 30 * time.Second
	testExpire  = 45 * time.Second
)

func testLeases(n int) (*leases, time.Time) {
	l := newLeases("sidecars", testSuspect, testExpire, massLimits{fraction: 0.5, floor: 10, hold: 10 * testExpire})
	now := time.Unix(1_000_000, 0)
	for i := range n {
		l.put(now, fmt.Sprintf("pod%03d", i), alive, 1, 0)
	}
	return l, now
}

// settleAll applies transitions as the state machine would.
func (l *leases) settleAll(now time.Time, ts []transition) {
	for _, t := range ts {
		l.done(t.id)
		l.put(now, t.id, t.to, t.generation, 0)
	}
}

func show(ts []transition) string {
	var out []string
	for _, t := range ts {
		out = append(out, fmt.Sprintf("%s %v>%v", t.id, t.from, t.to))
	}
	return strings.Join(out, ", ")
}

func expectMoves(t *testing.T, got []transition, want string) {
	t.Helper()
	if s := show(got); s != want {
		t.Fatalf("transitions %q, want %q", s, want)
	}
}

// A silent sidecar is suspect, then expired; a heartbeat revives it from both.
func TestLeaseRunsOut(t *testing.T) {
	l, now := testLeases(1)
	expectMoves(t, l.sweep(now.Add(testSuspect-1)), "")
	now = now.Add(testSuspect)
	ts := l.sweep(now)
	expectMoves(t, ts, "pod000 alive>suspect")
	expectMoves(t, l.sweep(now.Add(time.Hour)), "") // on its way: not proposed twice
	l.settleAll(now, ts)
	expectMoves(t, l.sweep(now.Add(time.Second)), "")
	if !l.touch(now.Add(2*time.Second), "pod000") {
		t.Fatal("a heartbeat of a suspect calls for its revival")
	}
	now = now.Add(2 * time.Second)
	ts = l.sweep(now)
	expectMoves(t, ts, "pod000 suspect>alive")
	l.settleAll(now, ts)
	if l.touch(now, "pod000") || l.touch(now, "unknown") {
		t.Fatal("only the dead are revived")
	}
	for _, step := range []struct {
		after time.Duration
		want  string
	}{{testSuspect, "pod000 alive>suspect"}, {testExpire, "pod000 suspect>expired"}, {10 * testExpire, ""}} {
		ts = l.sweep(now.Add(step.after))
		expectMoves(t, ts, step.want)
		l.settleAll(now.Add(step.after), ts)
	}
	now = now.Add(time.Hour)
	l.touch(now, "pod000")
	expectMoves(t, l.sweep(now), "pod000 expired>alive")
}

// A transition that could not be replicated is proposed again.
func TestLeaseFailedProposal(t *testing.T) {
	l, now := testLeases(1)
	now = now.Add(testSuspect)
	expectMoves(t, l.sweep(now), "pod000 alive>suspect")
	l.done("pod000")
	expectMoves(t, l.sweep(now), "pod000 alive>suspect")
}

// A heartbeat that arrives while the suspicion is being replicated must not be
// forgotten when that takes effect.
func TestLeaseHeartbeatInFlight(t *testing.T) {
	l, now := testLeases(1)
	now = now.Add(testSuspect)
	ts := l.sweep(now)
	l.touch(now.Add(time.Second), "pod000")
	l.settleAll(now.Add(2*time.Second), ts)
	expectMoves(t, l.sweep(now.Add(2*time.Second)), "pod000 suspect>alive")
}

// A new leader finds suspects and expired ones in the state. It has heard from
// nobody, so it neither revives them nor judges the others for a full lease.
func TestLeaseGraceAfterLeaderChange(t *testing.T) {
	l, now := testLeases(2)
	l.put(now, "suspect", suspect, 1, 0)
	l.put(now, "expired", expired, 1, 0)
	expectMoves(t, l.sweep(now.Add(testSuspect-1)), "")
	expectMoves(t, l.sweep(now.Add(testExpire-1)), "pod000 alive>suspect, pod001 alive>suspect")
	expectMoves(t, l.sweep(now.Add(testExpire)), "suspect suspect>expired")
}

// A registration starts a full lease, a repeated record of the same one does
// not.
func TestLeaseRegistrationRenews(t *testing.T) {
	l, now := testLeases(1)
	at := now.Add(testSuspect - time.Second)
	l.put(at, "pod000", alive, 1, 0)
	expectMoves(t, l.sweep(now.Add(testSuspect)), "pod000 alive>suspect")
	l, now = testLeases(1)
	l.put(at, "pod000", alive, 2, 0)
	expectMoves(t, l.sweep(now.Add(testSuspect)), "")
	expectMoves(t, l.sweep(at.Add(testSuspect)), "pod000 alive>suspect")
}

// Services know no suspicion, and one that announced a long interval is given
// three of them.
func TestLeaseServices(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	l := newLeases("services", 0, testExpire, massLimits{fraction: 0.5, floor: 10, hold: time.Hour})
	l.put(now, "quick", alive, 1, 3*time.Second)
	l.put(now, "slow", alive, 1, 3*time.Minute)
	expectMoves(t, l.sweep(now.Add(testExpire-1)), "")
	ts := l.sweep(now.Add(testExpire))
	expectMoves(t, ts, "quick alive>expired")
	l.settleAll(now, ts)
	expectMoves(t, l.sweep(now.Add(3*time.Minute)), "slow alive>expired")
	l.touch(now.Add(4*time.Minute), "quick")
	expectMoves(t, l.sweep(now.Add(4*time.Minute)), "quick expired>alive")
}

// The silence of a leader that was itself stopped is nobody's fault.
func TestLeaseShift(t *testing.T) {
	l, now := testLeases(2)
	l.touch(now.Add(10*time.Second), "pod001")
	now = now.Add(70 * time.Second)
	l.shift(now, time.Minute) // pod000 silent for 10 s, pod001 for none
	expectMoves(t, l.sweep(now.Add(testSuspect-10*time.Second)), "pod000 alive>suspect")
	expectMoves(t, l.sweep(now.Add(testSuspect)), "pod001 alive>suspect")
}

// expireAll lets all sidecars of l run out at once and returns how many were
// expired at each sweep.
func expireAll(l *leases, now time.Time, sweeps int) []int {
	ts := l.sweep(now.Add(testSuspect))
	l.settleAll(now.Add(testSuspect), ts)
	var out []int
	for i := range sweeps {
		at := now.Add(testExpire + time.Duration(i)*time.Second)
		ts := l.sweep(at)
		l.settleAll(at, ts)
		out = append(out, len(ts))
	}
	return out
}

// Up to half of a fleet may expire at once; more are held back, raise an alarm,
// and are let go slowly only after a long time.
func TestMassExpiryIsHeld(t *testing.T) {
	l, now := testLeases(100)
	for i := 50; i < 100; i++ {
		l.touch(now.Add(testSuspect), fmt.Sprintf("pod%03d", i))
	}
	if got := expireAll(l, now, 1); got[0] != 50 || l.due != 0 {
		t.Fatalf("half of the fleet: %v expired, %d held", got, l.due)
	}

	l, now = testLeases(100)
	hold := int(l.limits.hold / time.Second)
	got := expireAll(l, now, hold+2)
	for i, n := range got[:hold] {
		if n != 0 {
			t.Fatalf("%d expired %d s into the hold", n, i)
		}
	}
	if l.due == 0 {
		t.Fatal("nothing is reported as held")
	}
	if sum := got[hold] + got[hold+1]; sum < 1 || sum > 2 {
		t.Fatalf("%d of 100 were let go in the first two seconds after the hold", sum)
	}

	// Those that come back during the hold have lost nothing.
	l, now = testLeases(100)
	expireAll(l, now, 10)
	at := now.Add(testExpire + 11*time.Second)
	for i := range 100 {
		l.touch(at, fmt.Sprintf("pod%03d", i))
	}
	ts := l.sweep(at)
	if len(ts) != 100 || ts[0].to != alive || l.due != 0 {
		t.Fatalf("%d transitions, first %v, %d held", len(ts), show(ts[:1]), l.due)
	}
}

// The first to come back of a fleet that was cut off does not have the others
// expire a moment before they beat; who stays away does expire.
func TestMassExpirySettles(t *testing.T) {
	const settle = 10 * time.Second
	l, now := testLeases(100)
	l.limits.settle = settle
	for i := range 49 {
		l.touch(now.Add(testSuspect), fmt.Sprintf("pod%03d", i))
	}
	if got := expireAll(l, now, 3); slices.Max(got) != 0 || l.due != 51 {
		t.Fatalf("%v expired of 51 silent, %d held", got, l.due)
	}
	gone := func(from, upTo time.Duration) (n int) {
		for at := from; at < upTo; at += time.Second {
			ts := l.sweep(now.Add(at))
			l.settleAll(now.Add(at), ts)
			for _, tr := range ts {
				if tr.to == expired {
					n++
				}
			}
		}
		return n
	}
	for i := range 49 {
		l.touch(now.Add(50*time.Second), fmt.Sprintf("pod%03d", i))
	}
	back := 50 * time.Second
	l.touch(now.Add(back), "pod060") // 50 of 100 are left: no mass any more
	if n := gone(back, back+settle); n != 0 {
		t.Fatalf("%d expired within the time they have to come back too", n)
	}
	for i := 61; i < 90; i++ {
		l.touch(now.Add(back+settle), fmt.Sprintf("pod%03d", i))
	}
	if n := gone(back+settle, back+settle+2*time.Second); n != 21 || l.due != 0 {
		t.Fatalf("%d of the 21 that stayed away expired, %d held", n, l.due)
	}
}

// Small fleets are not held: the only sidecar of a cluster may die.
func TestMassExpiryFloor(t *testing.T) {
	l, now := testLeases(10)
	if got := expireAll(l, now, 1); got[0] != 10 {
		t.Fatalf("%v expired", got)
	}
}

// Losing a fleet in slices within one window counts as a mass expiry too, and is
// known for one while the first slices are only suspect: none is let go.
func TestMassExpiryInSlices(t *testing.T) {
	l, now := testLeases(100)
	for i := range 100 {
		l.touch(now.Add(time.Duration(i)*100*time.Millisecond), fmt.Sprintf("pod%03d", i))
	}
	for i := range 60 {
		at := now.Add(time.Duration(i) * time.Second)
		ts := l.sweep(at)
		for _, tr := range ts {
			if tr.to == expired {
				t.Fatalf("after %d s: %s", i, show(ts))
			}
		}
		l.settleAll(at, ts)
	}
	if l.due != 100 {
		t.Fatalf("%d are held", l.due)
	}
}

// Without suspects to tell, a window's worth is let go before the rest is held.
func TestMassExpiryOfServicesInSlices(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	l := newLeases("services", 0, testExpire, massLimits{fraction: 0.5, floor: 10, hold: time.Hour})
	for i := range 100 {
		l.put(now.Add(time.Duration(i)*100*time.Millisecond), fmt.Sprintf("svc%03d", i), alive, 1, 0)
	}
	expired := 0
	for i := range 20 {
		at := now.Add(testExpire + time.Duration(i)*time.Second)
		ts := l.sweep(at)
		l.settleAll(at, ts)
		expired += len(ts)
	}
	if expired < 40 || expired > 50 || expired+l.due != 100 {
		t.Fatalf("%d expired within one window and %d are held", expired, l.due)
	}
}

// A third of the fleet that is lost at once goes, in time.
func TestALostZoneIsNoMassExpiry(t *testing.T) {
	l, now := testLeases(99)
	gone := 0
	for i := range 60 {
		at := now.Add(time.Duration(i) * time.Second)
		for k := range 66 {
			l.touch(at, fmt.Sprintf("pod%03d", k))
		}
		ts := l.sweep(at)
		l.settleAll(at, ts)
		for _, tr := range ts {
			if tr.to == expired {
				gone++
			}
		}
	}
	if gone != 33 || l.due != 0 {
		t.Fatalf("%d expired, %d held", gone, l.due)
	}
}

// A pause lets nobody go, but lets those in that come back; what has piled up is
// judged at its end.
func TestLeasePause(t *testing.T) {
	l, now := testLeases(3)
	l.put(now, "back", expired, 1, 0)
	l.pause(now, time.Minute)
	l.touch(now.Add(40*time.Second), "back")
	l.touch(now.Add(40*time.Second), "pod001")
	expectMoves(t, l.sweep(now.Add(40*time.Second)), "back expired>alive")
	expectMoves(t, l.sweep(now.Add(time.Minute-1)), "")
	expectMoves(t, l.sweep(now.Add(time.Minute)), "pod000 alive>suspect, pod002 alive>suspect")
}

// What an earlier leader knew shortens a lease, never beyond the pause, and says
// nothing about those that are expired.
func TestLeaseRecall(t *testing.T) {
	l, now := testLeases(3)
	l.put(now, "gone", expired, 1, 0)
	l.recall("pod000", now.Add(-25*time.Second))
	l.recall("pod001", now.Add(-time.Hour))
	l.recall("pod002", now.Add(time.Hour)) // no lease grows by it
	l.recall("gone", now.Add(-time.Hour))
	l.pause(now, 4*time.Second)
	expectMoves(t, l.sweep(now.Add(4*time.Second-1)), "")
	ts := l.sweep(now.Add(4 * time.Second))
	expectMoves(t, ts, "pod001 alive>suspect")
	l.settleAll(now.Add(4*time.Second), ts)
	expectMoves(t, l.sweep(now.Add(5*time.Second)), "pod000 alive>suspect, pod001 suspect>expired")
	expectMoves(t, l.sweep(now.Add(testSuspect)), "pod002 alive>suspect")
}

// A decision whose holder was heard of, or registered again, before it could be
// carried out does not stand.
func TestLeaseStands(t *testing.T) {
	l, now := testLeases(3)
	now = now.Add(testSuspect)
	ts := l.sweep(now)
	l.touch(now.Add(1), "pod000")
	l.put(now, "pod001", alive, 2, 0)
	for i, want := range []bool{false, false, true} {
		if got := l.stands(ts[i]); got != want {
			t.Errorf("%s stands: %v", ts[i].id, got)
		}
	}
}

// What is said of when a mass expiry is let go is kept: nobody before, one after another
// from then on, and the last by the time that was named in the beginning, and later on.
func TestMassExpiryKeepsItsTimes(t *testing.T) {
	for _, silent := range []int{3, 60, 150, 190, 300} {
		l := newLeases("sidecars", testSuspect, testExpire, massLimits{fraction: 0.2, floor: 1, hold: 10 * testExpire, settle: 12 * time.Second})
		now := time.Unix(1_000_000, 0)
		for i := range 300 {
			l.put(now, fmt.Sprintf("pod%03d", i), alive, 1, 0)
		}
		var from, last, end time.Time
		gone := 0
		for i := 0; gone < silent; i++ {
			now = now.Add(time.Second)
			for k := silent; k < 300; k++ {
				l.touch(now, fmt.Sprintf("pod%03d", k))
			}
			ts := l.sweep(now)
			for _, tr := range ts {
				if tr.to != expired {
					continue
				}
				if gone++; !from.IsZero() && now.Before(from) {
					t.Fatalf("%d silent: %s is given up at %v, before %v", silent, tr.id, now, from)
				}
			}
			l.settleAll(now, ts)
			if l.due == 0 {
				continue
			}
			f, e := l.heldUntil()
			if from.IsZero() {
				from, last = f, e
			}
			if !f.Equal(from) || e.After(last.Add(2*time.Second)) {
				t.Fatalf("%d silent: from %v to %v was said, now from %v to %v", silent, from, last, f, e)
			}
			words := l.alarm(now)
			if begun := strings.Contains(words, "; since "); begun == now.Before(from) || !strings.Contains(words, f.UTC().Format(time.RFC3339)) {
				t.Fatalf("at %v: %s", now, words)
			}
			if end = now; i > 3600 {
				t.Fatalf("%d silent: %d are gone after an hour", silent, gone)
			}
		}
		if held := silent > 60; held != !from.IsZero() {
			t.Fatalf("%d silent: held back from %v", silent, from)
		}
		if end.After(last.Add(2 * time.Second)) {
			t.Errorf("%d silent: the last is given up at %v, %v was said", silent, end, last)
		}
	}
}
