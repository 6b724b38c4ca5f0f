package raftnode

import (
	"flag"
	"os"
	"testing"
	"time"
)

var (
	simSeed  = flag.Uint64("seed", 0, "first seed of the simulation; 0: the seeds 1 to -seeds")
	simSeeds = flag.Int("seeds", 0, "how many seeds the simulation runs; 0: 1000, or the one -seed names")
	simTell  = flag.Bool("events", false, "print every event of the simulation")
)

// TestSimulation runs whole groups of three and five nodes in a simulated world
// of crashing disks, lossy networks and wrong clocks, one seed after the other,
// and has an oracle look at every step. See sim and simOracle.
func TestSimulation(t *testing.T) {
	first, count := max(1, *simSeed), *simSeeds
	if count == 0 {
		count = 1000
		if *simSeed != 0 {
			count = 1
		}
	}
	if testing.Short() {
		count = min(count, 100)
	}
	var sum simStats
	begin := time.Now()
	for i := range count {
		seed := first + uint64(i)
		s := runSeed(seed, sabotage{})
		if s.violation != nil {
			t.Fatalf("%s\nseed %d: %v\n\nThis replays it exactly:\n\n\tgo test ./raftnode -run 'TestSimulation$' -seed=%d -events\n",
				s.trace, seed, s.violation, seed)
		}
		sum.add(&s.stats)
	}
	t.Logf("seeds %d to %d in %v: %+v", first, first+uint64(count)-1, time.Since(begin).Round(time.Millisecond), sum)
	if count >= 100 {
		sum.mustNotBeVacuous(t)
	}
}

func runSeed(seed uint64, sab sabotage) *sim {
	if *simTell {
		return simulate(seed, sab, os.Stdout)
	}
	return simulate(seed, sab, nil)
}

func (a *simStats) add(b *simStats) {
	a.steps += b.steps
	a.seconds += b.seconds
	a.elections += b.elections
	a.crashes += b.crashes
	a.fuses += b.fuses
	a.installs += b.installs
	a.truncations += b.truncations
	a.dropped += b.dropped
	a.proposed += b.proposed
	a.acked += b.acked
	a.refused += b.refused
	a.ambiguous += b.ambiguous
	a.overwritten += b.overwritten
	a.lost += b.lost
	a.reads += b.reads
	a.readsFailed += b.readsFailed
}

// mustNotBeVacuous: a simulation in which nothing goes wrong proves nothing.
func (a *simStats) mustNotBeVacuous(t *testing.T) {
	t.Helper()
	for _, c := range []struct {
		what string
		n    int
	}{
		{"elections", a.elections}, {"crashes", a.crashes}, {"crashes between durable steps", a.fuses},
		{"installed images", a.installs}, {"truncations", a.truncations}, {"lost messages", a.dropped},
		{"acknowledged commands", a.acked}, {"refused commands", a.refused}, {"commands of unknown outcome", a.ambiguous},
		{"overwritten commands", a.overwritten}, {"reads", a.reads - a.readsFailed}, {"refused reads", a.readsFailed},
	} {
		if c.n == 0 {
			t.Errorf("the simulation saw no %s", c.what)
		}
	}
}

// TestSimulationRepeats shows that a seed says everything: two runs make the
// same events in the same order.
func TestSimulationRepeats(t *testing.T) {
	for seed := uint64(1); seed <= 40; seed++ {
		a, b := runSeed(seed, sabotage{}), runSeed(seed, sabotage{})
		if a.trace.hash != b.trace.hash || a.trace.n != b.trace.n {
			t.Fatalf("seed %d made %d events with hash %x, then %d with %x", seed, a.trace.n, a.trace.hash, b.trace.n, b.trace.hash)
		}
	}
}
