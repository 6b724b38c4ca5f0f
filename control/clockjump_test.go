package control

import (
	"testing"
	"time"
	"unsafe"

	"conveyor.etl/router/router"
)

// machineTime is a moment as the clocks of a machine give it, bubbleTime the one at
// which the clock of every bubble begins.
var machineTime, bubbleTime = time.Now(), time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// setWall returns t as a clock reads it whose time of day was set by d, in whole
// seconds, while the monotonic clock went on: what time.Now gives after an operator or
// NTP has stepped the clock. Package time offers no way to make one, so this writes
// into the seconds of a time.Time with a monotonic reading, above 30 bits of
// nanoseconds; TestSetWall says whether they are still there.
func setWall(t time.Time, d time.Duration) time.Time {
	*(*uint64)(unsafe.Pointer(&t)) += uint64(int64(d/time.Second)) << 30
	return t
}

func TestSetWall(t *testing.T) {
	now := time.Now()
	for _, d := range []time.Duration{0, time.Hour, -time.Hour} {
		set := setWall(now, d)
		if set.Sub(now) != 0 || set.Round(0).Sub(now.Round(0)) != d || set.Add(time.Second).Sub(now) != time.Second {
			t.Errorf("%v became %v", now, set)
		}
	}
}

// TestClockJumps: the leader's time of day is set, while sidecars go on to beat. Goal:
// nobody loses a lease by it, and whoever is gone is given up as early as without it. A
// jump forward may be a machine that slept: then there is a pause in which all who live
// beat, and leases are longer by the sweep in which it was noticed.
func TestClockJumps(t *testing.T) {
	for _, c := range []struct {
		name  string
		jumps []time.Duration // 20 s after the beginning, and then each 2 s
		want  []string
		held  uint64
	}{
		{"forward", []time.Duration{time.Hour}, []string{"34 dead alive>suspect", "46 dead suspect>expired"}, 1},
		{"back", []time.Duration{-time.Hour}, []string{"30 dead alive>suspect", "45 dead suspect>expired"}, 0},
		{"to and fro", []time.Duration{time.Hour, 0, time.Hour, 0}, []string{"38 dead alive>suspect", "47 dead suspect>expired"}, 2},
		{"a little", []time.Duration{2 * time.Second, -2 * time.Second}, []string{"30 dead alive>suspect", "45 dead suspect>expired"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newReplica(t, router.Options{})
			lively := map[string]time.Duration{}
			for i, id := range []string{"one", "two", "three", "four"} {
				r.register(id, "orders:source")
				lively[id] = time.Duration(i) * 2 * time.Second
			}
			r.register("dead", "orders:source")
			r.govern(2, nil, func(t *testing.T, p *parliament) {
				p.elect(p.seats[0], 0)
				p.beats(20*time.Second, lively)
				for i, d := range c.jumps {
					p.seats[0].set(func() { p.seats[0].jump = d })
					p.beats(20*time.Second+time.Duration(i+1)*2*time.Second, lively)
				}
				p.beats(90*time.Second, lively)
				p.expect(c.want...)
				if got := p.seats[0].l.Stats().HeldUp; got != c.held {
					t.Errorf("held up %d times, want %d", got, c.held)
				}
			})
		})
	}
}

// TestClockJumpsAtLeaderChange: the one that takes over has a time of day of its own,
// hours off, and what it was told of the leases is worth the same.
func TestClockJumpsAtLeaderChange(t *testing.T) {
	for _, d := range []time.Duration{3 * time.Hour, -3 * time.Hour} {
		r := newReplica(t, router.Options{})
		r.register("dead", "orders:source")
		r.register("lively", "orders:source")
		r.govern(2, nil, func(t *testing.T, p *parliament) {
			p.seats[1].set(func() { p.seats[1].jump = d })
			p.elect(p.seats[0], 0)
			alive := map[string]time.Duration{"lively": 3 * time.Second}
			p.beats(25100*time.Millisecond, alive)
			p.elect(p.seats[1], time.Second)
			p.beats(100*time.Second, alive)
			p.expect("39 dead alive>suspect", "45 dead suspect>expired")
		})
	}
}
