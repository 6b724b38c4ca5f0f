package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// role waits until a node has a role in the eyes of another.
func (c *Cluster) role(seenBy *Node, id uint64, want string) {
	c.t.Helper()
	eventually(c.t, 60*time.Second, fmt.Sprintf("node %d is %s", id, want), func(ctx context.Context) error {
		list, err := seenBy.Cluster().ListMembers(ctx, &clusterpb.ListMembersRequest{})
		if err != nil {
			return err
		}
		for _, m := range list.GetMembers() {
			if m.GetNodeId() == id {
				if m.GetRole() == want || want == "voter" && m.GetRole() == "leader" {
					return nil
				}
				return fmt.Errorf("it is %s", m.GetRole())
			}
		}
		if want == "gone" {
			return nil
		}
		return fmt.Errorf("it is no member of %v", list.GetMembers())
	})
}

// remove takes a node out, by asking through.
func (c *Cluster) remove(through *Node, id uint64) {
	c.t.Helper()
	eventually(c.t, 30*time.Second, fmt.Sprintf("node %d is removed", id), func(ctx context.Context) error {
		_, err := through.Cluster().RemoveMember(ctx, &clusterpb.RemoveMemberRequest{NodeId: id})
		if status.Code(err) == codes.NotFound {
			return nil // an earlier attempt got through
		}
		return err
	})
}

// drop forgets a node that is no member any more.
func (c *Cluster) drop(n *Node) {
	n.Kill()
	c.Nodes = slices.DeleteFunc(slices.Clone(c.Nodes), func(o *Node) bool { return o == n })
}

// TestGrowReplaceAndShrinkUnderLoad grows a cluster from one node to five,
// replaces each of the first ones, the leader among them, and shrinks it back to
// one. Goal: no acknowledged write is lost and the histories are linearizable;
// new nodes become voters by themselves; removed ids stay removed. Method: load
// through the nodes of the moment.
func TestGrowReplaceAndShrinkUnderLoad(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Nodes: 1})
	first := c.Nodes[0]
	fill := NewFiller(t, "grow", 64<<10)
	fill.Fill(4<<20, 8, first)
	load := StartLoad(&Cluster{t: t, Nodes: []*Node{first}}, LoadOptions{Seed: seed, Clients: 4})
	for id := uint64(2); id <= 5; id++ {
		n := c.Join(id)
		n.Start()
		c.role(first, id, "voter")
	}
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)

	second := StartLoad(&Cluster{t: t, Nodes: []*Node{c.Nodes[3], c.Nodes[4]}}, LoadOptions{Seed: seed + 1, Clients: 4, Prefix: "second-"})
	// Out with the old ones, in with new: never fewer than four.
	for id := uint64(1); id <= 3; id++ {
		var old *Node
		for _, n := range c.Nodes {
			if n.ID == id {
				old = n
			}
		}
		c.remove(c.Nodes[len(c.Nodes)-1], id)
		c.drop(old)
		n := c.Join(id + 5)
		n.Start()
		c.role(c.Nodes[0], id+5, "voter")
	}
	second.Stop()
	c.WaitServing(c.Nodes...)
	second.FinalReads(c, 8)
	second.Check(c)
	fill.Check(c.Nodes...)
	c.WaitSameState()
	t.Logf("longest time without an acknowledged write: %v, then %v", load.LongestGap(), second.LongestGap())

	list, err := c.Nodes[0].Cluster().ListMembers(t.Context(), &clusterpb.ListMembersRequest{})
	if err != nil || !slices.Equal(list.GetRemoved(), []uint64{1, 2, 3}) {
		t.Fatalf("removed: %v %v", list.GetRemoved(), err)
	}
	_, err = c.Nodes[0].Cluster().AddMember(t.Context(), &clusterpb.AddMemberRequest{NodeId: 2, PeerAddr: "127.0.0.1:9"})
	if status.Code(err) != codes.FailedPrecondition {
		t.Fatalf("a removed id was given again: %v", err)
	}
	for len(c.Nodes) > 1 {
		victim := c.Nodes[0]
		c.remove(c.Nodes[len(c.Nodes)-1], victim.ID)
		c.drop(victim)
	}
	c.WaitServing(c.Nodes...)
	fill.Check(c.Nodes...)
}

// TestWipedMemberRejoins empties the data directory of a member, a follower and
// then the leader, and starts it as before. Goal: it does not vote; it comes back
// as a learner under its id, is promoted, and nothing acknowledged is lost.
func TestWipedMemberRejoins(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{})
	load := StartLoad(c, LoadOptions{Seed: seed, Clients: 4})
	for round, pick := range []func() *Node{
		func() *Node { return c.Followers(c.Leader())[0] },
		func() *Node { return c.Leader() },
	} {
		victim := pick()
		victim.Kill()
		if err := os.RemoveAll(victim.DataDir); err != nil {
			t.Fatal(err)
		}
		victim.Start()
		eventually(t, 60*time.Second, "it joins again", func(context.Context) error {
			if n := strings.Count(victim.Log(), "event=joined"); n <= round && !strings.Contains(victim.Log(), "event=joined") {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		c.role(c.Followers(victim)[0], victim.ID, "voter")
		c.WaitServing(c.Nodes...)
	}
	load.Stop()
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
}

// TestWipedMemberDoesNotElectALaggard is the case in which an empty voter would
// lose data: node A lags, B, which has everything, is down, and C, which had
// everything, comes back empty. Goal: A and C do not elect a leader; with B
// everything is there.
func TestWipedMemberDoesNotElectALaggard(t *testing.T) {
	c := NewCluster(t, Options{})
	leader := c.Leader()
	rest := c.Followers(leader)
	laggard, wiped := rest[0], rest[1]
	laggard.Kill()
	if _, known := writeOffset(t, leader, "precious", 41); known != Done {
		t.Fatal("the write was not acknowledged")
	}
	leader.Kill()
	wiped.Kill()
	if err := os.RemoveAll(wiped.DataDir); err != nil {
		t.Fatal(err)
	}
	laggard.Start()
	wiped.Start()
	// Long enough for many elections.
	pause(t, 4*time.Second)
	for _, n := range []*Node{laggard, wiped} {
		if strings.Contains(n.Log(), "leading=true") && n == wiped {
			t.Fatalf("node %d led without what was acknowledged", n.ID)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if out, known := readOffset(ctx, laggard, "precious", 0); known == Done {
		t.Fatalf("a leader was elected by an empty voter: it reads %+v", out)
	}
	leader.Start()
	c.role(leader, wiped.ID, "voter")
	c.WaitServing(c.Nodes...)
	for _, n := range c.Nodes {
		eventually(t, 30*time.Second, "the write is there", func(ctx context.Context) error {
			out, known := readOffset(ctx, n, "precious", 0)
			if known != Done || out.(OffsetOut).Current != 41 {
				return fmt.Errorf("node %d reads %+v", n.ID, out)
			}
			return nil
		})
	}
	c.WaitSameState()
}

// TestReadReplica: a learner on purpose serves linearizable and stale reads and
// is not promoted; it comes back after a restart.
func TestReadReplica(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 1})
	if _, known := writeOffset(t, c.Nodes[0], "r", 7); known != Done {
		t.Fatal("not written")
	}
	replica := c.Join(0, "--read-replica")
	replica.Start()
	c.WaitServing(replica)
	c.role(c.Nodes[0], 2, "learner")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if out, known := readOffset(ctx, replica, "r", 0); known != Done || out.(OffsetOut).Current != 7 {
		t.Fatalf("the replica reads %+v", out)
	}
	stale := metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
	got, err := replica.Checkpoints().GetSourceOffset(stale, &checkpointpb.GetOffsetRequest{SourceId: "r"})
	if err != nil || got.GetOffsets()[0] != 7 {
		t.Fatalf("a stale read: %v %v", got, err)
	}
	replica.Kill()
	replica.Start()
	c.WaitServing(replica)
	pause(t, time.Second) // the leader looks ten times a second
	c.role(c.Nodes[0], 2, "learner")
	c.WaitSameState()
}
