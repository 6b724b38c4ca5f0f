package e2e

import (
	"context"
	"flag"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

var (
	seedFlag     = flag.Uint64("seed", 0, "seed of the random choices; 0 takes a new one")
	durationFlag = flag.Duration("faults-for", 15*time.Second, "how long faults are injected in each random test")
)

// TestMain removes the binaries that were built for the tests.
func TestMain(m *testing.M) {
	code := m.Run()
	removeBuilds()
	os.Exit(code)
}

func newSeed(t *testing.T) uint64 {
	s := *seedFlag
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("replay with: go test ./e2e -run '^%s$' -seed %d -faults-for %v", t.Name(), s, *durationFlag)
	return s
}

// TestRandomKillsLoseNothing kills random processes, up to all of them, at
// random moments under load, and starts them again. Afterwards some sequential
// order explains everything the clients were told, and all replicas have the
// same state.
func TestRandomKillsLoseNothing(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	c := NewCluster(t, Options{})
	load := StartLoad(c, LoadOptions{Seed: seed})
	kills := 0
	for end := time.Now().Add(*durationFlag); time.Now().Before(end); {
		pause(t, time.Duration(200+rng.IntN(1500))*time.Millisecond)
		victims := 1
		if r := rng.IntN(10); r == 0 {
			victims = 3
		} else if r < 3 {
			victims = 2
		}
		perm := rng.Perm(len(c.Nodes))[:victims]
		for _, i := range perm {
			c.Nodes[i].Kill()
			kills++
		}
		pause(t, time.Duration(rng.IntN(600))*time.Millisecond)
		for _, i := range perm {
			c.Nodes[i].Start()
		}
	}
	t.Logf("%d kills", kills)
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
}

// TestRandomPartitionsLoseNothing cuts, silences and heals links and pauses
// processes at random under load.
func TestRandomPartitionsLoseNothing(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 2))
	c := NewCluster(t, Options{Proxied: true})
	load := StartLoad(c, LoadOptions{Seed: seed})
	for end := time.Now().Add(*durationFlag); time.Now().Before(end); {
		n := c.Nodes[rng.IntN(len(c.Nodes))]
		switch rng.IntN(5) {
		case 0:
			c.Isolate(n)
		case 1: // one direction only
			for _, p := range c.Nodes {
				if p != n {
					c.Link(n, p).Silence()
				}
			}
		case 2:
			c.Link(n, c.Nodes[int(n.ID)%len(c.Nodes)]).Silence()
		case 3:
			n.Pause()
		case 4:
			for _, p := range c.Nodes {
				if p != n {
					c.Link(n, p).Delay(time.Duration(rng.IntN(40)) * time.Millisecond)
				}
			}
		}
		pause(t, time.Duration(200+rng.IntN(1500))*time.Millisecond)
		n.Resume()
		c.Heal()
		for _, p := range c.Nodes {
			if p != n {
				c.Link(n, p).Delay(0)
			}
		}
		pause(t, time.Duration(rng.IntN(500))*time.Millisecond)
	}
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
}

// pause lets the load run; the moment of a fault is meant to be arbitrary.
func pause(t *testing.T, d time.Duration) {
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// TestMinorityStaysSilent: a node cut off from the others accepts no write and
// serves no linearizable read; when it comes back it does not depose the
// leader, and it serves again without a restart.
func TestMinorityStaysSilent(t *testing.T) {
	c := NewCluster(t, Options{Proxied: true})
	old := c.Leader()
	rest := c.Followers(old)
	c.Isolate(old)
	leader := c.Leader(rest...)
	if _, known := writeOffset(t, old, "minority", 1); known == Done {
		t.Fatal("a leader without a majority acknowledged a write")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if out, known := readOffset(ctx, old, "minority", 0); known == Done {
		t.Fatalf("a node without a majority served a linearizable read: %+v", out)
	}
	if _, known := writeOffset(t, leader, "majority", 7); known != Done {
		t.Fatal("the majority did not accept a write")
	}
	before := statusOf(t, leader)
	c.Heal()
	c.WaitServing(old)
	after := statusOf(t, leader)
	if after.Term != before.Term || after.LeaderId != before.LeaderId {
		t.Fatalf("the returning node deposed the leader: term %d leader %d became term %d leader %d",
			before.Term, before.LeaderId, after.Term, after.LeaderId)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if out, known := readOffset(ctx, old, "majority", 0); known != Done || out.(OffsetOut).Current != 7 {
		t.Fatalf("the healed node reads %+v, want offset 7", out)
	}
	c.WaitSameState()
}
