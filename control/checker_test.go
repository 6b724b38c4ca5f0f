package control

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

// group stands for all members as a Checker sees them. Its log moves on only by
// nudges, or by step entries whenever somebody is asked.
type group struct {
	mu      sync.Mutex
	applied uint64
	step    uint64
	wrong   map[uint64]bool // nodes whose state is one of their own
	lags    map[uint64]uint64
	down    map[uint64]bool
	told    map[uint64][]router.Sums // quarantines
	deaf    bool                     // those who are told do not agree
	agreed  map[uint64]router.Sums   // where each node was told that it is right
	nudges  int
	lead    raftnode.Leadership
	changed chan struct{}

	diverged []Finding
	held     []string
	released int
}

func newGroup() *group {
	return &group{
		applied: 1000, wrong: map[uint64]bool{}, lags: map[uint64]uint64{}, down: map[uint64]bool{},
		told: map[uint64][]router.Sums{}, agreed: map[uint64]router.Sums{}, changed: make(chan struct{}), lead: raftnode.Leadership{Leader: 1, Term: 1, Leading: true},
	}
}

// checker returns that of node 1 of voters, over g.
func (g *group) checker(voters ...uint64) *Checker {
	return NewChecker(CheckerConfig{
		Self: 1, Node: g, State: g, Members: members{g},
		Electorate: func() Electorate { return Electorate{Voters: voters} },
		Nudge: func(ctx context.Context) error {
			sleep(ctx, time.Millisecond)
			g.mu.Lock()
			defer g.mu.Unlock()
			g.applied++
			g.nudges++
			return nil
		},
		Diverged: func(_ context.Context, f Finding) { g.diverged = append(g.diverged, f) },
		Agreed:   func(index, epoch uint64) { g.agreed[1] = router.Sums{Index: index, Epoch: epoch} },
		Hold:     func(reason string, _ time.Duration) { g.held = append(g.held, reason) },
		Release:  func() { g.released++ },
	})
}

func (g *group) sums(node uint64) []router.Sums {
	g.applied += g.step
	at := g.applied - g.lags[node]
	var out []router.Sums
	for i := at / router.Boundary * router.Boundary; i > 0 && len(out) < 4; i -= router.Boundary {
		out = append(out, g.sum(node, i))
	}
	slices.Reverse(out)
	if at%router.Boundary != 0 {
		out = append(out, g.sum(node, at))
	}
	return out
}

func (g *group) sum(node, index uint64) router.Sums {
	s := router.Sums{Index: index, Sums: []uint64{index, 2 * index}}
	if g.wrong[node] {
		s.Sums[1] += node
	}
	return s
}

func (g *group) RecentSums() []router.Sums {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sums(1)
}

func (g *group) Applied() router.Position {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.applied += g.step
	return router.Position{Index: g.applied}
}

func (g *group) Sums(_ context.Context, node, agreedIndex, agreedEpoch uint64) ([]router.Sums, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.down[node] {
		return nil, errors.New("it is down")
	}
	g.agreed[node] = router.Sums{Index: agreedIndex, Epoch: agreedEpoch}
	return g.sums(node), nil
}

// hashAt waits for index as a state does: one that is a boundary, and was asked
// for in time, is never missed.
func (g *group) hashAt(ctx context.Context, node, index uint64) (router.StateHash, error) {
	for inTime := false; ; inTime = index%router.Boundary == 0 {
		g.mu.Lock()
		g.applied += g.step
		at, down, wrong := g.applied-g.lags[node], g.down[node], g.wrong[node]
		g.mu.Unlock()
		switch {
		case down:
			return router.StateHash{}, errors.New("it is down")
		case at == index, at > index && inTime:
			h := router.StateHash{Index: index, Hash: fmt.Append(nil, index)}
			if wrong {
				h.Hash = fmt.Append(h.Hash, " of ", node)
			}
			return h, nil
		case at > index:
			return router.StateHash{}, router.ErrIndexPassed
		}
		if !sleep(ctx, time.Millisecond) {
			return router.StateHash{}, ctx.Err()
		}
	}
}

// members is the group as the client that asks the others.
type members struct{ *group }

func (g *group) Quarantine(_ context.Context, node uint64, expected router.Sums, _ string) (bool, string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.down[node] {
		return false, "", errors.New("it is down")
	}
	g.told[node] = append(g.told[node], expected)
	return !g.deaf, "says node " + fmt.Sprint(node), nil
}

func (g *group) Leadership() raftnode.Leadership {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lead
}

func (g *group) Changed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

func (g *group) ReadIndex(context.Context) (uint64, error) { return 0, nil }

// HashAt of the state, and of the members.
func (g *group) HashAt(ctx context.Context, index uint64) (router.StateHash, error) {
	return g.hashAt(ctx, 1, index)
}

func (m members) HashAt(ctx context.Context, node, index uint64) (router.StateHash, error) {
	return m.hashAt(ctx, node, index)
}

// Goal: each round acts on what the members say, and on nothing else.
func TestCheckerRound(t *testing.T) {
	for _, c := range []struct {
		name   string
		voters []uint64
		set    func(g *group)
		check  func(t *testing.T, g *group, k *Checker)
	}{
		{"all are equal", []uint64{1, 2, 3}, func(*group) {}, func(t *testing.T, g *group, k *Checker) {
			if _, compared, _ := k.Stats(); compared != 1000 {
				t.Errorf("compared up to %d", compared)
			}
		}},
		{"one is down", []uint64{1, 2, 3}, func(g *group) { g.down[3] = true }, func(*testing.T, *group, *Checker) {}},
		{"two of three are down", []uint64{1, 2, 3}, func(g *group) { g.down[2], g.down[3] = true, true }, func(*testing.T, *group, *Checker) {}},
		{"a follower is wrong", []uint64{1, 2, 3}, func(g *group) { g.wrong[3] = true }, func(t *testing.T, g *group, k *Checker) {
			if len(g.told[3]) != 1 || g.told[3][0].Index != 1000 || len(g.told) != 1 {
				t.Errorf("told %v", g.told)
			}
			if a := k.Alarms(); len(a) != 1 || !strings.Contains(a[0], "node 3") || !strings.Contains(a[0], "rebuilds") {
				t.Errorf("alarms %q", a)
			}
			g.wrong[3] = false // rebuilt
			k.round(t.Context())
			if a := k.Alarms(); len(a) != 0 {
				t.Errorf("alarms after the rebuilding: %q", a)
			}
		}},
		{"a wrong follower does not agree", []uint64{1, 2, 3}, func(g *group) { g.wrong[3], g.deaf = true, true }, func(t *testing.T, g *group, k *Checker) {
			if a := k.Alarms(); len(a) != 1 || !strings.Contains(a[0], "says node 3") {
				t.Errorf("alarms %q", a)
			}
			g.told = map[uint64][]router.Sums{}
		}},
		{"a wrong follower lags", []uint64{1, 2, 3}, func(g *group) { g.wrong[3], g.lags[3] = true, 200 }, func(t *testing.T, g *group, k *Checker) {
			if len(g.told[3]) != 1 || g.told[3][0].Index != 768 {
				t.Errorf("told %v", g.told)
			}
		}},
		{"the leader is wrong", []uint64{1, 2, 3}, func(g *group) { g.wrong[1] = true }, func(t *testing.T, g *group, k *Checker) {
			if len(g.diverged) != 1 || !slices.Equal(g.diverged[0].Agreed, []uint64{2, 3}) || g.diverged[0].Own.Sums[1] != 2001 || g.diverged[0].Expected.Sums[1] != 2000 {
				t.Errorf("found %+v", g.diverged)
			}
			g.diverged = nil
		}},
		{"the leader and another are wrong", []uint64{1, 2, 3, 4, 5}, func(g *group) { g.wrong[1], g.wrong[2] = true, true }, func(t *testing.T, g *group, k *Checker) {
			if len(g.diverged) != 1 || len(g.told) != 0 {
				t.Errorf("a leader that is wrong judged others: %+v %v", g.diverged, g.told)
			}
			g.diverged = nil
		}},
		{"two voters differ", []uint64{1, 2}, func(g *group) { g.wrong[2] = true }, func(t *testing.T, g *group, k *Checker) {
			if len(g.held) != 1 || len(g.told[2]) != 1 || len(g.told[2][0].Sums) != 0 {
				t.Errorf("held %q, told %v", g.held, g.told)
			}
			if a := k.Alarms(); len(a) != 1 || !strings.Contains(a[0], "QUARANTINE") {
				t.Errorf("alarms %q", a)
			}
			k.round(t.Context())
			if len(g.held) != 2 || g.released != 0 {
				t.Error("the second round let go")
			}
			g.wrong[2] = false
			k.round(t.Context())
			if g.released != 1 || len(k.Alarms()) != 0 {
				t.Errorf("released %d times, alarms %q", g.released, k.Alarms())
			}
			g.held = nil
		}},
		{"one of three is down, the others differ", []uint64{1, 2, 3}, func(g *group) { g.wrong[2], g.down[3] = true, true }, func(t *testing.T, g *group, k *Checker) {
			if len(g.held) != 1 || g.released != 0 {
				t.Errorf("held %q", g.held)
			}
			g.down[3] = false
			k.round(t.Context())
			if g.released != 1 || len(g.told[2]) != 2 || len(g.told[2][1].Sums) == 0 {
				t.Errorf("the third decided nothing: released %d, told %v", g.released, g.told)
			}
			g.held = nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGroup()
				c.set(g)
				wrong := len(g.wrong)
				k := g.checker(c.voters...)
				k.round(t.Context())
				c.check(t, g, k)
				if wrong == 0 && (len(g.told) > 0 || len(k.Alarms()) > 0) || len(g.diverged) > 0 || len(g.held) > 0 {
					t.Errorf("told %v, alarms %q, diverged %v, held %q", g.told, k.Alarms(), g.diverged, g.held)
				}
			})
		})
	}
}

// Goal: every member is told up to where its state was seen to be right, and a
// wrong one nothing that it was not told before.
func TestCheckerTellsWhoIsRight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		k := g.checker(1, 2, 3)
		k.round(t.Context())
		if at := g.agreed; at[1].Index != 1000 || at[2].Index != 0 || at[3].Index != 0 {
			t.Errorf("in the first round: %v", at)
		}
		g.wrong[3] = true
		g.applied = 1100
		k.round(t.Context())
		if at := g.agreed; at[1].Index != 1100 || at[2].Index != 1000 || at[3].Index != 1000 {
			t.Errorf("in the second round: %v", at)
		}
		g.applied = 1200
		k.round(t.Context())
		if at := g.agreed; at[1].Index != 1200 || at[2].Index != 1100 || at[3].Index != 0 {
			t.Errorf("in the third round: %v", at)
		}
	})
}

// A difference without a majority is acted upon only when it is still there a
// moment later.
func TestCheckerConfirmsSplits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		g.wrong[2], g.down[3] = true, true
		k := g.checker(1, 2, 3)
		done := make(chan struct{})
		go func() { defer close(done); k.round(t.Context()) }()
		synctest.Wait()
		g.mu.Lock()
		g.down[3] = false
		g.mu.Unlock()
		<-done
		if len(g.held) != 0 || len(g.told[2]) != 1 || len(g.told[2][0].Sums) == 0 {
			t.Errorf("held %q, told %v", g.held, g.told)
		}
	})
}

// The loop compares while this node leads, every interval, and forgets what it
// found when it does not lead any more.
func TestCheckerRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		g.wrong[2] = true
		k := g.checker(1, 2)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); k.Run(ctx) }()
		<-time.After(12 * time.Second)
		if n, _, _ := k.Stats(); n != 3 || len(g.held) != 3 {
			t.Errorf("%d rounds and %d holds in 12 s", n, len(g.held))
		}
		g.mu.Lock()
		g.lead = raftnode.Leadership{Leader: 2, Term: 2}
		close(g.changed)
		g.changed = make(chan struct{})
		g.mu.Unlock()
		synctest.Wait()
		<-time.After(12 * time.Second)
		if n, _, _ := k.Stats(); n != 3 || g.released != 1 || len(k.Alarms()) != 0 {
			t.Errorf("as a follower: %d rounds, released %d, alarms %q", n, g.released, k.Alarms())
		}
		cancel()
		<-done
	})
}

// What another node says is a reason to look, not more.
func TestVerifyFindsForItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		k := g.checker(1, 2, 3)
		lie := router.Sums{Index: 896, Sums: []uint64{1, 2}}
		if _, differs, why := k.Verify(t.Context(), lie); differs || why == "" {
			t.Errorf("a node that is right believed another: %q", why)
		}
		if _, differs, why := k.Verify(t.Context(), g.sum(1, 896)); differs || !strings.Contains(why, "as expected") {
			t.Errorf("what is so was disputed: %q", why)
		}
		g.wrong[1] = true
		for _, index := range []uint64{896, 999} { // also one that is not remembered
			f, differs, why := k.Verify(t.Context(), g.sum(2, index))
			if !differs || !slices.Equal(f.Agreed, []uint64{2, 3}) || f.Expected.Index != 1000 {
				t.Errorf("a node that is wrong does not see it: %+v %q", f, why)
			}
		}
		g.down[3] = true
		if _, differs, why := k.Verify(t.Context(), g.sum(2, 896)); differs || !strings.Contains(why, "no majority") {
			t.Errorf("one other node convinced it: %q", why)
		}
	})
}

// Goal: a check that is asked for compares all at one index, whether the log
// stands still, moves, or moves fast.
func TestCheckOnDemand(t *testing.T) {
	for _, full := range []bool{false, true} {
		for _, step := range []uint64{0, 1, 40} {
			t.Run(fmt.Sprintf("full %v, step %d", full, step), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGroup()
					g.step = step
					k := g.checker(1, 2, 3)
					r, err := k.Check(t.Context(), full)
					if err != nil || !r.Equal || len(r.Members) != 3 || r.Index == 0 {
						t.Fatalf("all equal: %+v %v", r, err)
					}
					g.wrong[3] = true
					r, err = k.Check(t.Context(), full)
					if err != nil || r.Equal || !r.Members[1].Equal || r.Members[2].Equal || !strings.Contains(r.Message, "nodes 3") {
						t.Fatalf("one differs: %+v %v", r, err)
					}
					g.down[3] = true
					r, err = k.Check(t.Context(), full)
					if err != nil || r.Equal || r.Members[2].Err == nil || !r.Members[0].Equal || !strings.Contains(r.Message, "could not") {
						t.Fatalf("one is down: %+v %v", r, err)
					}
					g.down[3], g.wrong[2] = false, true
					r, err = k.Check(t.Context(), full)
					if err != nil || r.Equal || r.Members[0].Equal || !strings.Contains(r.Message, "nobody knows") {
						t.Fatalf("all differ: %+v %v", r, err)
					}
				})
			})
		}
	}
	g := newGroup()
	g.lead = raftnode.Leadership{Leader: 2, Term: 4}
	var elsewhere *raftnode.NotLeaderError
	if _, err := g.checker(1, 2, 3).Check(t.Context(), false); !errors.As(err, &elsewhere) || elsewhere.Leader != 2 {
		t.Errorf("on a follower: %v", err)
	}
	g.lead = raftnode.Leadership{}
	if _, err := g.checker(1, 2, 3).Check(t.Context(), false); !errors.Is(err, raftnode.ErrNoLeader) {
		t.Errorf("without a leader: %v", err)
	}
}

// Sums that do not know the chain of the checkpoints are compared in the rest.
func TestUnknownCheckpoints(t *testing.T) {
	n := len(router.SumTables())
	chain := slices.Index(router.SumTables(), "checkpoints")
	if chain < 0 {
		t.Fatalf("no checkpoints among %q", router.SumTables())
	}
	make3 := func(chains ...uint64) map[uint64][]router.Sums {
		reports := map[uint64][]router.Sums{}
		for i, c := range chains {
			s := router.Sums{Index: 128, Sums: make([]uint64, n)}
			s.Sums[chain], s.Sums[n-1] = c, c // the clock holds the chain
			reports[uint64(i+1)] = []router.Sums{s}
		}
		return reports
	}
	three := Electorate{Voters: []uint64{1, 2, 3}}
	if v := Judge(three, make3(7, 0, 8)); !reflect.DeepEqual(v.Agree, []uint64{1, 2, 3}) {
		t.Errorf("one does not know it: %+v", v)
	}
	if v := Judge(three, make3(7, 7, 8)); !reflect.DeepEqual(v.Agree, []uint64{1, 2}) || len(v.Differ) != 1 {
		t.Errorf("all know it: %+v", v)
	}
	if contradict(make3(7)[1], make3(0)[1]) || !contradict(make3(7)[1], make3(8)[1]) {
		t.Error("contradict")
	}
}
