package control

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", 0, "seed of the random tests; 0 draws one")

func random(t testing.TB) *rand.Rand {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed %d", s)
	return rand.New(rand.NewPCG(s, 1))
}

// Whatever is armed is visited by the first turn at or after its time or
// earlier, never later, and once only.
func TestWheelVisitsInTime(t *testing.T) {
	r := random(t)
	w := newWheel(10 * time.Second)
	due := map[*lease]time.Duration{}
	all := make([]*lease, 200)
	for i := range all {
		all[i] = &lease{id: fmt.Sprint(i)}
	}
	now := time.Duration(0)
	for range 5000 {
		e := all[r.IntN(len(all))]
		switch r.IntN(8) {
		case 0:
			w.disarm(e)
			delete(due, e)
		default:
			due[e] = now + time.Duration(r.Int64N(int64(60*time.Second)))
			w.arm(e, due[e])
		}
		step := time.Duration(r.Int64N(int64(100 * time.Millisecond)))
		if r.IntN(200) == 0 {
			step = time.Duration(r.Int64N(int64(2 * time.Minute))) // a pause
		}
		now += step
		seen := map[*lease]bool{}
		w.turn(now, func(e *lease) {
			if _, armed := due[e]; !armed || seen[e] {
				t.Fatalf("lease %s was visited at %v, armed %v, already visited %v", e.id, now, armed, seen[e])
			}
			seen[e] = true
			if due[e] > now {
				w.arm(e, due[e])
			} else {
				delete(due, e)
			}
		})
		for e, d := range due {
			if d <= now {
				t.Fatalf("lease %s was due at %v and not visited at %v", e.id, d, now)
			}
		}
	}
}

// The wheel decides exactly as looking at everybody each time does, through
// registrations, departures, heartbeats, lost proposals, pauses of the leader
// and mass expiries.
func TestLeasesEqualThePlainWay(t *testing.T) {
	r := random(t)
	for round := range 40 {
		suspectAfter := testSuspect
		if round%2 == 1 {
			suspectAfter = 0 // services
		}
		limits := massLimits{fraction: 0.3, floor: 3, hold: 2 * testExpire, settle: testSuspect / 2}
		l := newLeases("sidecars", suspectAfter, testExpire, limits)
		p := newPlainLeases("sidecars", suspectAfter, testExpire, limits)
		now := time.Unix(1_000_000, 0)
		n := 5 + r.IntN(60)
		id := func() string { return fmt.Sprintf("pod%02d", r.IntN(n)) }
		type pending struct {
			transition
			at time.Time
		}
		var flying []pending
		generation := uint64(1)
		put := func(id string, is condition, g uint64, patience time.Duration) {
			l.put(now, id, is, g, patience)
			p.put(now, id, is, g, patience)
		}
		noisy := r.IntN(100) // how many of a hundred steps bring heartbeats
		for step := range 1500 {
			if step%200 == 0 {
				noisy = r.IntN(100)
			}
			switch k := r.IntN(40); {
			case k == 0:
				generation++
				put(id(), alive, generation, time.Duration(r.IntN(3))*testExpire)
			case k == 1:
				x := id()
				l.drop(x)
				p.drop(x)
			case k == 2:
				put(id(), condition(r.IntN(3)), 1, 0)
			case k == 3:
				d := time.Duration(r.Int64N(int64(time.Minute)))
				now = now.Add(d)
				l.shift(now, d)
				p.shift(now, d)
			case k == 4:
				d := time.Duration(r.Int64N(int64(20 * time.Second)))
				l.pause(now, d)
				p.pause(now, d)
			case k == 5:
				x, at := id(), now.Add(-time.Duration(r.Int64N(int64(time.Minute))))
				l.recall(x, at)
				p.recall(x, at)
			}
			if r.IntN(100) < noisy {
				for range r.IntN(n) {
					x := id()
					if a, b := l.touch(now, x), p.touch(now, x); a != b {
						t.Fatalf("round %d step %d: touch of %s says %v, plainly %v", round, step, x, a, b)
					}
				}
			}
			rest := flying[:0]
			for _, f := range flying {
				if f.at.After(now) {
					rest = append(rest, f)
					continue
				}
				settle := func() {
					is := condition(0)
					if e := p.all[f.id]; e == nil || e.generation != f.generation {
						return
					}
					is = f.to
					put(f.id, is, f.generation, 0)
				}
				took := r.IntN(10) > 0
				early := r.IntN(2) == 0 // the change may be seen before the answer
				if took && early {
					settle()
				}
				l.done(f.id)
				p.done(f.id)
				if took && !early {
					settle()
				}
			}
			flying = rest
			now = now.Add(time.Duration(r.Int64N(int64(3 * time.Second))))
			got, want := l.sweep(now), p.sweep(now)
			for i, e := range l.order {
				if int(e.place) != i || l.all[e.id] != e || len(l.order) != len(l.all) {
					t.Fatalf("round %d step %d: %s is at place %d of %d, not %d", round, step, e.id, i, len(l.order), e.place)
				}
			}
			if show(got) != show(want) || l.due != p.due || l.holding != p.holding {
				t.Fatalf("round %d step %d: %q with %d held since %v, plainly %q with %d held since %v",
					round, step, show(got), l.due, l.holding, show(want), p.due, p.holding)
			}
			for _, m := range got {
				flying = append(flying, pending{m, now.Add(time.Duration(r.Int64N(int64(2 * time.Second))))})
			}
		}
	}
}

const fleetSize = 100_000

type judge interface {
	put(now time.Time, id string, is condition, generation uint64, patience time.Duration)
	touch(now time.Time, id string) bool
	sweep(now time.Time) []transition
}

// BenchmarkLeases measures one second of a fleet whose members beat every ten:
// a tenth of them, and one sweep.
func BenchmarkLeases(b *testing.B) {
	limits := massLimits{fraction: 0.5, floor: 10, hold: time.Hour}
	for _, c := range []struct {
		name string
		of   func() judge
	}{
		{"wheel", func() judge { return newLeases("sidecars", testSuspect, testExpire, limits) }},
		{"everybody", func() judge { return newPlainLeases("sidecars", testSuspect, testExpire, limits) }},
	} {
		ids := make([]string, fleetSize)
		for i := range ids {
			ids[i] = fmt.Sprintf("namespace-%02d/sidecar-%06d", i%100, i)
		}
		fill := func() (judge, time.Time) {
			l, now := c.of(), time.Unix(1_000_000, 0)
			for _, id := range ids {
				l.put(now, id, alive, 1, 0)
			}
			return l, now
		}
		b.Run("second/"+c.name, func(b *testing.B) {
			l, now := fill()
			next := 0
			b.ReportAllocs()
			for b.Loop() {
				for range fleetSize / 10 {
					l.touch(now, ids[next])
					next = (next + 1) % fleetSize
				}
				now = now.Add(time.Second)
				if ts := l.sweep(now); len(ts) > 0 {
					b.Fatal(show(ts[:1]))
				}
			}
		})
		b.Run("sweep/"+c.name, func(b *testing.B) {
			l, now := fill()
			b.ReportAllocs()
			for b.Loop() {
				now = now.Add(time.Microsecond) // nobody is due within the run
				l.sweep(now)
			}
		})
	}
}

// BenchmarkLeaseMemory measures the memory one lease takes in a fleet of 100,000,
// its id included, and what a digest of it costs while all beat.
func BenchmarkLeaseMemory(b *testing.B) {
	limits := massLimits{fraction: 0.5, floor: 10, hold: time.Hour}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	l, now := newLeases("sidecars", testSuspect, testExpire, limits), time.Unix(1_000_000, 0)
	for i := range fleetSize {
		l.put(now, fmt.Sprintf("namespace-%02d/sidecar-%06d", i%100, i), alive, 1, 0)
	}
	perLease := float64(heap()-before) / fleetSize
	for b.Loop() {
		if late := l.late(nil, now.Add(time.Second), 10*time.Second, 0, fleetSize); len(late) != 0 {
			b.Fatal(late[0])
		}
	}
	b.ReportMetric(perLease, "B/lease")
	runtime.KeepAlive(l)
}
