package control

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

// seat is one node of a cluster that shares the state of a replica: what its
// liveness sees of raft.
type seat struct {
	*replica
	l *Liveness
	// moves are the transitions it carried out, with the seconds since the
	// beginning.
	moves []string

	mu      sync.Mutex
	lead    raftnode.Leadership
	changed chan struct{}
	cut     error         // what its quorum answers
	asked   func()        // runs once, while the quorum is asked next
	slow    time.Duration // how long its quorum takes
	skew    time.Duration // by how much its clock is ahead
	jump    time.Duration // by how much its time of day was set, in whole seconds
}

func (s *seat) Leadership() raftnode.Leadership {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lead
}

func (s *seat) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *seat) ReadIndex(ctx context.Context) (uint64, error) {
	s.mu.Lock()
	asked, slow := s.asked, s.slow
	s.asked = nil
	s.mu.Unlock()
	if slow > 0 && !sleep(ctx, slow) {
		return 0, ctx.Err()
	}
	if asked != nil {
		asked()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fsm.Applied().Index, s.cut
}

func (s *seat) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *seat) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	// The clock of a bubble has no monotonic reading; that of a machine has.
	return setWall(machineTime.Add(time.Since(bubbleTime)+s.skew), s.jump)
}

// parliament is seats of which one leads at most.
type parliament struct {
	t       *testing.T
	seats   []*seat
	term    uint64
	leader  *seat
	start   time.Time
	digests int
	worst   int // silences in the largest digest
}

// elect lets nobody lead for some time, then s.
func (p *parliament) elect(s *seat, after time.Duration) {
	p.leader = nil
	p.tell(0)
	pass(after)
	p.term++
	p.leader = s
	p.tell(p.term)
	synctest.Wait()
}

func (p *parliament) tell(term uint64) {
	r := p.seats[0].replica
	r.mu.Lock()
	r.lead.Term = p.term
	r.mu.Unlock()
	for _, s := range p.seats {
		s.set(func() {
			s.lead = raftnode.Leadership{Term: p.term, Leading: term != 0 && s == p.leader}
			if term != 0 {
				s.lead.Leader = uint64(slices.Index(p.seats, p.leader) + 1)
			}
			close(s.changed)
			s.changed = make(chan struct{})
		})
	}
}

// beats lets each id beat every 10 s, at its own moment, until the time comes to
// until after the beginning. A beat goes to the leader; without one it waits for
// the next, as with the nodes that receive them.
func (p *parliament) beats(until time.Duration, ids map[string]time.Duration) {
	var waiting []string
	for {
		at := time.Since(p.start)
		if at >= until {
			synctest.Wait()
			return
		}
		for id, phase := range ids {
			if (at-phase)%(10*time.Second) == 0 {
				waiting = append(waiting, id)
			}
		}
		if p.leader != nil {
			for _, id := range waiting {
				p.leader.l.Touch(id, "")
			}
			waiting = nil
		}
		pass(100 * time.Millisecond)
	}
}

func (p *parliament) moves() []string {
	var out []string
	for _, s := range p.seats {
		s.set(func() { out = append(out, s.moves...) })
	}
	return out
}

func (p *parliament) expect(want ...string) {
	p.t.Helper()
	if got := p.moves(); !slices.Equal(got, want) {
		p.t.Fatalf("transitions %q, want %q", got, want)
	}
}

// govern runs the liveness of n nodes over the state of r, on a fake clock.
func (r *replica) govern(n int, set func(c *LivenessConfig), test func(t *testing.T, p *parliament)) {
	synctest.Test(r.t, func(t *testing.T) {
		r.enter()
		ctx, cancel := context.WithCancel(context.Background())
		p := &parliament{t: t, start: time.Now()}
		var loops sync.WaitGroup
		for range n {
			s := &seat{replica: r, changed: make(chan struct{})}
			c := LivenessConfig{Node: s, State: r, Submit: r, Logger: slog.New(slog.DiscardHandler), Now: s.now}
			c.Transitioned = func(i TransitionInfo) {
				s.set(func() {
					s.moves = append(s.moves, fmt.Sprintf("%.0f %s %s>%s", time.Since(p.start).Seconds(), i.ID, i.From, i.To))
				})
			}
			c.Share = func(_ context.Context, d Digest) error {
				p.digests++
				p.worst = max(p.worst, len(d.Sidecars)+len(d.Services))
				for _, other := range p.seats {
					if other != s {
						if err := other.l.TakeDigest(d); err != nil {
							return err
						}
					}
				}
				return nil
			}
			if set != nil {
				set(&c)
			}
			l, err := NewLiveness(c)
			if err != nil {
				t.Fatal(err)
			}
			s.l = l
			p.seats = append(p.seats, s)
			loops.Go(func() { l.Run(ctx) })
		}
		defer func() {
			go func() { <-r.closed }()
			defer close(r.closed)
			if err := r.fsm.Close(); err != nil {
				t.Error(err)
			}
		}()
		defer loops.Wait()
		defer cancel()
		test(t, p)
	})
}

// TestLeaderChangeKeepsLeases: the next leader neither forgets how long a sidecar
// has been silent, nor holds one for silent whose last beats died with the leader
// before.
func TestLeaderChangeKeepsLeases(t *testing.T) {
	r := newReplica(t, router.Options{})
	for _, id := range []string{"dead", "lively", "late", "lost"} {
		r.register(id, "orders:source")
	}
	r.govern(2, nil, func(t *testing.T, p *parliament) {
		p.elect(p.seats[0], 0)
		alive := map[string]time.Duration{"lively": 3 * time.Second, "lost": 4900 * time.Millisecond}
		p.beats(25100*time.Millisecond, alive) // the second digest was made at 25 s
		if p.digests != 2 || p.worst != 2 {
			t.Fatalf("%d digests of at most %d silences", p.digests, p.worst)
		}
		// These two die with the leader: nobody else hears of them.
		p.leader.l.Touch("late", "")
		p.elect(p.seats[1], time.Second)
		alive["late"] = 5100 * time.Millisecond
		p.beats(100*time.Second, alive)
		// It has been silent for 30 s 4 s after the election, but for all the new
		// leader knows it might have beaten at the old one after the digest.
		p.expect("39 dead alive>suspect", "45 dead suspect>expired")
	})
}

// TestBeatsBeforeTheReign: a node that was just elected and is still catching up hears
// heartbeats already; they count once it judges. Method: a sidecar that was silent under
// the leader before beats once in that time, and never again.
func TestBeatsBeforeTheReign(t *testing.T) {
	for _, batch := range []bool{false, true} {
		r := newReplica(t, router.Options{})
		r.register("late", "orders:source")
		r.register("dead", "orders:source")
		r.govern(2, nil, func(t *testing.T, p *parliament) {
			p.elect(p.seats[0], 0)
			p.beats(25100*time.Millisecond, nil)
			next := p.seats[1]
			next.set(func() { next.cut = raftnode.ErrNoLeader })
			p.elect(next, 0)
			pass(900 * time.Millisecond)
			if batch {
				next.l.TouchAll([][]byte{[]byte("late")}, nil)
			} else {
				next.l.Touch("late", "")
			}
			pass(time.Second)
			next.set(func() { next.cut = nil })
			p.beats(100*time.Second, nil)
			p.expect("40 dead alive>suspect", "45 dead suspect>expired", "56 late alive>suspect", "71 late suspect>expired")
		})
	}
}

// TestLeaderChangesInARow: a digest is of use to the second leader after the one
// that made it, and of none once it is old; then everybody has a full lease.
func TestLeaderChangesInARow(t *testing.T) {
	for _, c := range []struct {
		name   string
		outage time.Duration
		want   []string
	}{
		{"soon", 2 * time.Second, []string{"41 dead alive>suspect", "45 dead suspect>expired"}},
		{"late", 30 * time.Second, []string{"100 dead alive>suspect", "115 dead suspect>expired"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newReplica(t, router.Options{})
			r.register("dead", "orders:source")
			r.register("lively", "orders:source")
			r.govern(3, nil, func(t *testing.T, p *parliament) {
				p.elect(p.seats[0], 0)
				alive := map[string]time.Duration{"lively": 0}
				p.beats(25100*time.Millisecond, alive)
				p.elect(p.seats[1], c.outage/2)
				p.beats(time.Since(p.start)+100*time.Millisecond, alive)
				p.elect(p.seats[2], c.outage)
				p.beats(120*time.Second, alive)
				p.expect(c.want...)
			})
		})
	}
}

// TestHeartbeatsCostNoEntries: a fleet that beats for ten minutes, and the digests
// of its leases, leave the log as it was.
func TestHeartbeatsCostNoEntries(t *testing.T) {
	r := newReplica(t, router.Options{})
	ids := map[string]time.Duration{}
	for i := range 20 {
		id := fmt.Sprintf("s%02d", i)
		r.register(id, "orders:source")
		ids[id] = time.Duration(i) * 500 * time.Millisecond
	}
	before := r.fsm.Applied().Index
	r.govern(2, nil, func(t *testing.T, p *parliament) {
		p.elect(p.seats[0], 0)
		p.beats(10*time.Minute, ids)
		if got := r.fsm.Applied().Index; got != before {
			t.Fatalf("%d entries", got-before)
		}
		if p.digests < 45 || p.worst != 0 {
			t.Fatalf("%d digests, of at most %d silences", p.digests, p.worst)
		}
	})
}

// TestUnconfirmedLeaderJudgesNobody: while no majority confirms that a node leads
// it gives nobody up, however long they are silent.
func TestUnconfirmedLeaderJudgesNobody(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.govern(1, nil, func(t *testing.T, p *parliament) {
		s := p.seats[0]
		p.elect(s, 0)
		pass(time.Second)
		s.set(func() { s.cut = raftnode.ErrNoLeader })
		p.beats(100*time.Second, nil)
		p.expect()
		if s.l.Stats().Unconfirmed == 0 {
			t.Error("nothing was dropped")
		}
		s.set(func() { s.cut = nil })
		p.beats(103*time.Second, nil)
		p.expect("101 a alive>suspect", "102 a suspect>expired")
	})
}

// TestDecisionOfAnEarlierTerm: what a leader decided does nothing when it reaches
// the log of the one that took its place.
func TestDecisionOfAnEarlierTerm(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.govern(2, nil, func(t *testing.T, p *parliament) {
		p.elect(p.seats[0], 0)
		var once atomic.Bool
		r.mu.Lock()
		r.before = func() {
			once.Store(true)
			r.mu.Lock()
			r.lead.Term++
			r.mu.Unlock()
		}
		r.mu.Unlock()
		p.beats(30500*time.Millisecond, nil)
		if !once.Load() {
			t.Fatal("nothing was proposed")
		}
		if got := r.state("a"); got != "alive" {
			t.Fatalf("a is %s", got)
		}
		p.expect()
	})
}

// TestPausedLeader: a leader that was stopped for longer than a heartbeat interval
// takes that time for its own silence, and then lets everybody beat before it
// judges.
func TestPausedLeader(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("dead", "orders:source")
	r.register("lively", "orders:source")
	r.govern(1, nil, func(t *testing.T, p *parliament) {
		s := p.seats[0]
		p.elect(s, 0)
		p.beats(29*time.Second, map[string]time.Duration{"lively": 100 * time.Millisecond})
		// What it heard last is 8.9 s old: were the pause counted, it would be
		// suspect.
		s.set(func() { s.skew = time.Minute })
		p.beats(60*time.Second, map[string]time.Duration{"lively": 8900 * time.Millisecond})
		p.expect("43 dead alive>suspect", "46 dead suspect>expired")
		if s.l.Stats().HeldUp != 1 {
			t.Errorf("held up %d times", s.l.Stats().HeldUp)
		}
	})
}

// TestLeaderPausedWhileItAsks: a leader that was stopped while it waited for the
// word of its quorum, or for room among what it had proposed, takes that time for
// its own silence too, also when the word is good.
func TestLeaderPausedWhileItAsks(t *testing.T) {
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprintf("fails=%v", fails), func(t *testing.T) {
			r := newReplica(t, router.Options{})
			r.register("dead", "orders:source")
			r.register("lively", "orders:source")
			r.govern(1, nil, func(t *testing.T, p *parliament) {
				s := p.seats[0]
				p.elect(s, 0)
				p.beats(29*time.Second, map[string]time.Duration{"lively": 100 * time.Millisecond})
				s.set(func() {
					// At 30 s "dead" is to become suspect, and the quorum is asked.
					s.asked = func() {
						s.set(func() {
							s.skew = time.Minute
							if fails {
								s.cut = raftnode.ErrNoLeader
							}
						})
					}
				})
				p.beats(35*time.Second, nil)
				s.set(func() { s.cut = nil })
				// What was heard of "lively" before is 9.9 s old, and 69.9 s with the
				// pause.
				p.beats(60*time.Second, map[string]time.Duration{"lively": 8900 * time.Millisecond})
				p.expect("43 dead alive>suspect", "45 dead suspect>expired")
				if s.l.Stats().HeldUp != 1 {
					t.Errorf("held up %d times", s.l.Stats().HeldUp)
				}
			})
		})
	}
}

// TestLeaderWaitsForItsQuorum: a leader that only waits, however often, was not
// held up: it hears who beats.
func TestLeaderWaitsForItsQuorum(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("dead", "orders:source")
	r.govern(1, nil, func(t *testing.T, p *parliament) {
		s := p.seats[0]
		p.elect(s, 0)
		pass(time.Second)
		s.set(func() {
			s.cut = raftnode.ErrNoLeader
			s.slow = 10 * time.Second
		})
		p.beats(100*time.Second, nil)
		p.expect()
		s.set(func() { s.cut, s.slow = nil, 9*time.Second })
		p.beats(130*time.Second, nil)
		if got := r.state("dead"); got != "expired" {
			t.Errorf("dead is %s: %q", got, p.moves())
		}
		if st := s.l.Stats(); st.HeldUp != 0 || st.Unconfirmed == 0 {
			t.Errorf("held up %d times, unconfirmed %d", st.HeldUp, st.Unconfirmed)
		}
	})
}

// TestDigestOfAnEarlierLeader: a digest that comes late takes no place of a newer
// one, and a leader takes none.
func TestDigestOfAnEarlierLeader(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.govern(2, nil, func(t *testing.T, p *parliament) {
		p.elect(p.seats[0], 0)
		p.elect(p.seats[0], 0)
		one, two := p.seats[0].l, p.seats[1].l
		for _, c := range []struct {
			l    *Liveness
			term uint64
			ok   bool
		}{{two, 1, false}, {two, 2, true}, {two, 3, true}, {one, 2, false}} {
			if err := c.l.TakeDigest(Digest{Term: c.term}); (err == nil) != c.ok {
				t.Errorf("term %d: %v", c.term, err)
			}
		}
		if err := two.TakeDigest(Digest{Term: 9, Sidecars: make([]Silence, maxDigest+1)}); err == nil {
			t.Error("it has no limit")
		}
	})
}

// TestMassExpiryIsShown: more than the share falls silent; nobody is given up, the
// alarm and the numbers say so, and both are gone once they are back.
func TestMassExpiryIsShown(t *testing.T) {
	r := newReplica(t, router.Options{})
	const fleet = 40
	for i := range fleet {
		r.register(fmt.Sprintf("s%02d", i), "orders:source")
	}
	r.govern(1, func(c *LivenessConfig) { c.MassFraction = 0.3 }, func(t *testing.T, p *parliament) {
		l := p.seats[0].l
		p.elect(p.seats[0], 0)
		lively := map[string]time.Duration{}
		for i := range fleet - 13 {
			lively[fmt.Sprintf("s%02d", i)] = 0
		}
		p.beats(70*time.Second, lively)
		st := l.Stats()
		if st.Sidecars != (LeaseStats{Present: fleet, Silent: 13, Held: 13}) || len(l.Alarms()) != 1 {
			t.Fatalf("%+v, alarms %q", st.Sidecars, l.Alarms())
		}
		n, from, last := l.HeldExpiries()
		if n != 13 || !from.After(time.Now()) || !last.After(from) {
			t.Fatalf("%d are held until %v, %v", n, from, last)
		}
		for _, say := range []string{"13 of 40 sidecars have been silent", from.UTC().Format(time.RFC3339), "the last by " + last.UTC().Format(time.RFC3339)} {
			if a := l.Alarms()[0]; !strings.Contains(a, say) {
				t.Fatalf("the alarm does not say %q: %s", say, a)
			}
		}
		for i := range fleet {
			lively[fmt.Sprintf("s%02d", i)] = 0
		}
		p.beats(80*time.Second, lively)
		st = l.Stats()
		if st.Sidecars != (LeaseStats{Present: fleet}) || len(l.Alarms()) != 0 || st.Expired != 0 || st.Revived != 13 {
			t.Fatalf("%+v, alarms %q", st, l.Alarms())
		}
	})
}
