package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// noticedWithin is how long a wrong state may stay unnoticed under load: two
// intervals of the comparison.
const noticedWithin = 10 * time.Second

// divergeSoon restarts n so that it applies one of the next entries other than
// all the others do.
func (c *Cluster) divergeSoon(n *Node, env ...string) {
	c.t.Helper()
	at := statusOf(c.t, n).AppliedIndex + 150
	n.Stop()
	n.Start(append(env, fmt.Sprintf("CONVEYOR_DIVERGE_AT=%d", at))...)
}

// says waits until n has logged what.
func (c *Cluster) says(n *Node, what string, bound time.Duration) {
	c.t.Helper()
	eventually(c.t, bound, fmt.Sprintf("node %d logs %q", n.ID, what), func(context.Context) error {
		if !strings.Contains(n.Log(), what) {
			return errors.New("it has not")
		}
		return nil
	})
}

// forgot checks that nothing of the divergence is left on any node but the copy
// that n keeps.
func (c *Cluster) forgot(n *Node) {
	c.t.Helper()
	for _, m := range c.Nodes {
		ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
		res, err := m.Checkpoints().GetSourceOffset(ctx, &checkpointpb.GetOffsetRequest{SourceId: "diverged"})
		cancel()
		if err != nil || len(res.GetOffsets()) != 0 {
			c.t.Errorf("node %d still has what no command wrote: %v %v", m.ID, res.GetOffsets(), err)
		}
	}
	if _, err := os.Stat(filepath.Join(n.DataDir, "QUARANTINE")); !os.IsNotExist(err) {
		c.t.Errorf("the note of the wrong state is still there: %v", err)
	}
	if kept, _ := filepath.Glob(filepath.Join(n.DataDir, "state.diverged-*")); len(kept) != 1 {
		c.t.Errorf("copies of the wrong state: %v, want one", kept)
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	for _, full := range []bool{false, true} {
		r, err := n.Cluster().CheckState(ctx, &clusterpb.CheckStateRequest{Full: full})
		if err != nil || !r.GetEqual() || len(r.GetMembers()) != len(c.Nodes) {
			c.t.Errorf("check (full %v): %v %v", full, r, err)
		}
	}
}

// TestDivergedFollowerRebuilds lets a follower apply one entry wrongly, under
// load. Goal: the cluster notices within two intervals, the follower answers
// nobody from then on, rebuilds its state by itself and is equal to the others;
// nothing acknowledged is lost.
func TestDivergedFollowerRebuilds(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Binary: crashBinary(t)})
	victim := c.Followers(c.Leader())[0]
	c.divergeSoon(victim)
	c.WaitServing(victim)
	load := StartLoad(c, LoadOptions{Seed: seed})
	c.says(victim, "diverged at index", 30*time.Second)
	begin := time.Now()
	c.says(victim, "event=quarantined", noticedWithin)
	t.Logf("noticed after %v", time.Since(begin).Round(10*time.Millisecond))
	c.says(victim, "event=rebuilt", 30*time.Second)
	t.Logf("rebuilt after %v", time.Since(begin).Round(10*time.Millisecond))
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
	c.forgot(victim)
}

// TestDivergedLeaderHandsOver is the same for a leader. It must take no command
// and answer no read once it knows, and another node leads then.
func TestDivergedLeaderHandsOver(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Binary: crashBinary(t)})
	victim := c.Nodes[0]
	c.divergeSoon(victim)
	c.WaitServing(victim)
	c.makeLeader(victim)
	load := StartLoad(c, LoadOptions{Seed: seed})
	c.says(victim, "diverged at index", 30*time.Second)
	begin := time.Now()
	c.says(victim, "event=leader_diverged", noticedWithin)
	t.Logf("noticed after %v", time.Since(begin).Round(10*time.Millisecond))
	if next := c.Leader(c.Followers(victim)...); next == victim {
		t.Error("the node with the wrong state still leads")
	}
	t.Logf("another leader after %v", time.Since(begin).Round(10*time.Millisecond))
	c.says(victim, "event=rebuilt", 30*time.Second)
	t.Logf("rebuilt after %v", time.Since(begin).Round(10*time.Millisecond))
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
	c.forgot(victim)
	t.Logf("longest time without an acknowledged write: %v", load.LongestGap())
}

// TestDivergedNodeDiesRebuilding ends a node at each step of its rebuilding. The
// next start goes on with it; without a node that is right it waits, refuses
// every call and says so.
func TestDivergedNodeDiesRebuilding(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Binary: crashBinary(t), Args: []string{"--check-interval", "500ms"}})
	victim := c.Nodes[2]
	others := c.Nodes[:2]
	for i, point := range rebuildPoints {
		t.Logf("%s", point)
		c.divergeSoon(victim, "CONVEYOR_CRASH_AT="+point)
		load := StartLoad(c, LoadOptions{Seed: seed, Prefix: point + "/", Clients: 4, Keys: 4})
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		if err := victim.WaitExit(ctx); err == nil || err.Error() != "signal: killed" {
			t.Fatalf("the node ended otherwise than at %s: %v\n%s", point, err, victim.Log())
		}
		cancel()
		load.Stop()
		if i == 0 {
			for _, n := range others {
				n.Stop()
			}
			victim.Start()
			c.says(victim, "event=rebuild_waits", 20*time.Second)
			c.refuses(victim)
			for _, n := range others {
				n.Start()
			}
		} else {
			victim.Start()
		}
		c.WaitServing(c.Nodes...)
		load.FinalReads(c, 4)
		load.Check(c)
		c.WaitSameState()
		c.forgot(victim)
		if t.Failed() {
			t.Fatalf("after dying at %s", point)
		}
	}
}

// refuses checks that n answers no read, not even a stale one, and says so to
// probes.
func (c *Cluster) refuses(n *Node) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
	defer cancel()
	h, err := healthgrpc.NewHealthClient(n.Conn()).Check(ctx, &healthgrpc.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil || h.GetStatus() != healthgrpc.HealthCheckResponse_NOT_SERVING {
		c.t.Errorf("the health of a node without a right state: %v %v", h, err)
	}
	_, err = n.Admin().ListPipelines(ctx, &adminpb.ListPipelinesRequest{}, grpc.WaitForReady(true))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "does not answer") {
		c.t.Errorf("a read of a node without a right state: %v", err)
	}
}

// TestTwoVotersThatDiffer: with two voters nobody knows who is right. Neither
// answers; an operator who decides for one of them lets the other rebuild.
func TestTwoVotersThatDiffer(t *testing.T) {
	c := NewCluster(t, Options{Binary: crashBinary(t), Nodes: 2, Args: []string{"--check-interval", "500ms"}})
	leader := c.Leader()
	victim := c.Followers(leader)[0]
	if _, known := writeOffset(t, leader, "before", 7); known != Done {
		t.Fatal("a healthy cluster did not accept a write")
	}
	c.divergeSoon(victim)
	c.WaitServing(victim)
	filler := NewFiller(t, "fill", 1<<10)
	filler.Run(c)
	c.says(victim, "diverged at index", 30*time.Second)
	for _, n := range c.Nodes {
		eventually(t, noticedWithin, fmt.Sprintf("node %d answers nobody", n.ID), func(ctx context.Context) error {
			_, err := n.Admin().ListPipelines(ctx, &adminpb.ListPipelinesRequest{})
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no majority says") {
				return fmt.Errorf("a read: %v", err)
			}
			st, err := n.Admin().GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
			if err != nil || !strings.Contains(strings.Join(st.GetAlarms(), "\n"), "QUARANTINE") {
				return fmt.Errorf("no alarm says what to do: %v %v", st.GetAlarms(), err)
			}
			return nil
		})
	}
	filler.Stop()
	if _, known := writeOffset(t, leader, "split", 1); known == Done {
		t.Error("a write was acknowledged by members that differ")
	}
	victim.Kill()
	if err := os.WriteFile(filepath.Join(victim.DataDir, "QUARANTINE"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	victim.Start()
	c.says(victim, "event=rebuilt", 30*time.Second)
	c.WaitServing(c.Nodes...)
	filler.Check(c.Nodes...)
	c.WaitSameState()
	c.forgot(victim)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if out, known := readOffset(ctx, victim, "before", 0); known != Done || out.(OffsetOut).Current != 7 {
		t.Errorf("the rebuilt node reads %+v, want 7", out)
	}
}
