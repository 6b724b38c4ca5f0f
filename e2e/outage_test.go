package e2e

import (
	"math/rand/v2"
	"testing"
	"time"
)

// Outage says how long clients were without an acknowledged write while a fault
// was repeated.
type Outage struct {
	Longest time.Duration
	Faults  int
}

// MeasureOutage starts clients that retry with short deadlines, lets fault
// happen the given number of times, and checks the histories. Durations are for
// the log: they belong to the machine, correctness does not.
func MeasureOutage(t *testing.T, c *Cluster, seed uint64, times int, fault func()) Outage {
	t.Helper()
	load := StartLoad(c, LoadOptions{Seed: seed, Deadline: 100 * time.Millisecond})
	for range times {
		fault()
	}
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
	return Outage{Longest: load.LongestGap(), Faults: times}
}

// TestOutageOfALeaderKill kills the leader again and again under load. Goal: no
// acknowledged write is lost however short the deadlines of its callers, and
// the outage is known. Method: MeasureOutage; the time is logged, not judged.
func TestOutageOfALeaderKill(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 4))
	c := NewCluster(t, Options{})
	o := MeasureOutage(t, c, seed, 4, func() {
		leader := c.Leader()
		pause(t, time.Duration(300+rng.IntN(200))*time.Millisecond)
		leader.Kill()
		c.WaitServing(c.running()...)
		leader.Start()
		c.WaitServing(leader)
	})
	t.Logf("longest time without an acknowledged write over %d kills of the leader: %v", o.Faults, o.Longest)
}
