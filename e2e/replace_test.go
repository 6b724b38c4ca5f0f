package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// exitRemoved is the exit code of a node that was removed from its cluster.
const exitRemoved = 9

// exits waits until the process of n ends by itself, and checks its exit code.
func (n *Node) exits(code int) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := n.WaitExit(ctx)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code {
		n.t.Fatalf("node %d ended with %v, want exit code %d\n%s", n.ID, err, code, n.log)
	}
}

func longCall(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestReplaceEachMember exchanges every node of three for a new one under load,
// the leader among them. Goal: each exchange is one operation that ends well
// whoever leads, nothing acknowledged is lost, the old node stops by itself and
// does not start again. Method: new nodes join as learners that nobody promotes,
// so that one change makes each exchange; histories and state hashes.
func TestReplaceEachMember(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{})
	leader := c.Leader()
	// The leader second: the first exchange then goes through a follower that
	// passes it on, the second hands leadership over.
	order := []*Node{c.Followers(leader)[0], leader, c.Followers(leader)[1]}
	keep := order[2]
	load := StartLoad(&Cluster{t: t, Nodes: []*Node{keep}}, LoadOptions{Seed: seed, Clients: 4})
	for i, old := range order[:2] {
		id := uint64(4 + i)
		next := c.Join(id, "--read-replica")
		next.Start()
		c.WaitServing(next)
		check, err := keep.Cluster().ReplaceMember(longCall(t), &clusterpb.ReplaceMemberRequest{OldNodeId: old.ID, NewNodeId: id, PreflightOnly: true})
		if err != nil || len(check.GetChecks()) < 5 || check.GetOperation() != nil {
			t.Fatalf("the preflight: %v %v", check, err)
		}
		for _, one := range check.GetChecks() {
			if !one.GetOk() {
				t.Errorf("%s: %s", one.GetName(), one.GetDetail())
			}
		}
		done, err := keep.Cluster().ReplaceMember(longCall(t), &clusterpb.ReplaceMemberRequest{OldNodeId: old.ID, NewNodeId: id})
		if err != nil || done.GetOperation().GetState() != clusterpb.OperationState_OPERATION_STATE_DONE {
			t.Fatalf("node %d by node %d: %v %v", old.ID, id, done, err)
		}
		old.exits(exitRemoved)
		mustRefuse(t, old, exitRemoved, []string{"was removed from the cluster", fmt.Sprintf("node %d is no member", old.ID), "--join"}, nil)
		c.Nodes = slices.DeleteFunc(c.Nodes, func(n *Node) bool { return n == old })
		c.role(keep, id, "voter")
	}
	load.Stop()
	c.WaitServing(c.Nodes...)
	load.FinalReads(c, 8)
	load.Check(c)
	c.WaitSameState()
	t.Logf("longest time without an acknowledged write: %v", load.LongestGap())

	// What cannot be done is refused before anything is begun.
	refuse := func(old, next uint64, code codes.Code, text string) {
		t.Helper()
		_, err := keep.Cluster().ReplaceMember(longCall(t), &clusterpb.ReplaceMemberRequest{OldNodeId: old, NewNodeId: next})
		if status.Code(err) != code || !strings.Contains(err.Error(), text) {
			t.Errorf("%d by %d: %v, want %q", old, next, err, text)
		}
	}
	refuse(keep.ID, 99, codes.NotFound, "node 99 is no member")
	refuse(order[0].ID, keep.ID, codes.NotFound, fmt.Sprintf("node %d is no member", order[0].ID))
	absent := c.Join(6, "--read-replica")
	absent.Start()
	c.WaitServing(absent)
	absent.Kill()
	refuse(keep.ID, 6, codes.FailedPrecondition, "does not answer")

	members, err := keep.Cluster().ListMembers(t.Context(), &clusterpb.ListMembersRequest{})
	if err != nil || len(members.GetMembers()) != 4 || !slices.Equal(members.GetRemoved(), sorted(order[0].ID, order[1].ID)) {
		t.Fatalf("members %v, removed %v: %v", members.GetMembers(), members.GetRemoved(), err)
	}
}

func sorted(ids ...uint64) []uint64 {
	slices.Sort(ids)
	return ids
}

// TestRemovedWhileDown removes a node that does not run. Goal: when it comes back
// nobody talks to it, and it stops for good and says why. A new id on the same
// machine is welcome.
func TestRemovedWhileDown(t *testing.T) {
	c := NewCluster(t, Options{})
	rest := c.Followers(c.Leader())
	gone, through := rest[0], rest[1]
	gone.Kill()
	c.remove(through, gone.ID)
	gone.Start()
	gone.exits(exitRemoved)
	mustRefuse(t, gone, exitRemoved, []string{"was removed from the cluster"}, nil)
	// Not even on an empty directory: the id is spent.
	if err := os.RemoveAll(gone.DataDir); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, gone, exitRemoved, []string{"was removed from the cluster"}, nil)
	c.drop(gone)
	fresh := c.Join(0)
	fresh.Start()
	c.WaitServing(fresh)
	c.role(through, 4, "voter")
}

// TestNodesThatJoinTogether starts two nodes at once that leave their ids to the
// cluster of one. Goal: both get in, with different ids, and vote.
func TestNodesThatJoinTogether(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 1})
	first := c.Nodes[0]
	a, b := c.Join(0), c.Join(0)
	a.Start()
	b.Start()
	c.WaitServing(a, b)
	c.role(first, 2, "voter")
	c.role(first, 3, "voter")
	c.WaitSameState()
}

// TestMemberMoves starts a follower under another peer address, which nobody was
// told of. Goal: it reports the address itself, the others find it, and it takes
// part: with another node gone the cluster goes on.
func TestMemberMoves(t *testing.T) {
	c := NewCluster(t, Options{})
	leader := c.Leader()
	rest := c.Followers(leader)
	mover, other := rest[0], rest[1]
	mover.Kill()
	port := freePorts(t, 1)[0]
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	for i, arg := range mover.args {
		if arg == mover.Raft || arg == fmt.Sprintf("%d:%s", mover.ID, mover.Raft) {
			mover.args[i] = strings.ReplaceAll(arg, mover.Raft, addr)
		}
	}
	mover.Start()
	eventually(t, 30*time.Second, "the new address is known", func(ctx context.Context) error {
		list, err := leader.Cluster().ListMembers(ctx, &clusterpb.ListMembersRequest{})
		if err != nil {
			return err
		}
		for _, m := range list.GetMembers() {
			if m.GetNodeId() == mover.ID && m.GetHealthy() {
				return nil
			}
		}
		return fmt.Errorf("%v", list.GetMembers())
	})
	c.WaitServing(mover)
	eventually(t, 30*time.Second, "the node reports its address", func(context.Context) error {
		if !strings.Contains(mover.Log(), "event=address_reported") {
			return errors.New("it did not")
		}
		return nil
	})
	other.Kill()
	eventually(t, 30*time.Second, "the cluster goes on with the node that moved", func(ctx context.Context) error {
		if _, known := writeOffset(t, mover, "moved", 5); known != Done {
			return errors.New("not written")
		}
		return nil
	})
	other.Start()
	c.WaitServing(c.Nodes...)
	c.WaitSameState()
}

// TestLaggardListensToALeaderThatRejoined: node A is down while C loses its data
// directory, joins again and becomes the leader. Goal: A, which remembers the old
// directory of C, takes C's word that the cluster has taken it in again, and
// follows it.
func TestLaggardListensToALeaderThatRejoined(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 5})
	rest := c.Followers(c.Leader())
	laggard, wiped := rest[0], rest[1]
	laggard.Kill()
	wiped.Kill()
	if err := os.RemoveAll(wiped.DataDir); err != nil {
		t.Fatal(err)
	}
	wiped.Start()
	c.role(rest[2], wiped.ID, "voter")
	c.makeLeader(wiped)
	laggard.Start()
	c.WaitServing(laggard)
	if lead := c.Leader(); lead != wiped {
		t.Logf("node %d leads by now", lead.ID)
	}
	c.WaitSameState()
}

// TestLaggardAmongRejoinedMembers: of five nodes one is down while two others lose
// their data directories, one after the other, and join again; then the two that
// knew all of them die. Goal: the three that are left are a majority and go on,
// though the one that was down knows the other two by other directories, and nobody
// else is there to ask.
func TestLaggardAmongRejoinedMembers(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 5})
	leader := c.Leader()
	rest := c.Followers(leader)
	laggard, wiped := rest[0], rest[1:3:3]
	laggard.Kill()
	for _, n := range wiped {
		n.Kill()
		if err := os.RemoveAll(n.DataDir); err != nil {
			t.Fatal(err)
		}
		n.Start()
		eventually(t, 30*time.Second, "it joins again", func(context.Context) error {
			if !strings.Contains(n.Log(), "event=joined") {
				return errors.New("not yet")
			}
			return nil
		})
		c.WaitServing(n)
		c.role(rest[3], n.ID, "voter")
	}
	if _, known := writeOffset(t, leader, "before", 7); known != Done {
		t.Fatal("not written")
	}
	c.makeLeader(wiped[0])
	leader.Kill()
	rest[3].Kill()
	laggard.Start()
	c.WaitServing(laggard)
	for i, n := range append(wiped, laggard) {
		eventually(t, 30*time.Second, "the three go on", func(ctx context.Context) error {
			if out, known := readOffset(ctx, n, "before", 0); known != Done || out.(OffsetOut).Current != 7 {
				return fmt.Errorf("node %d reads %+v", n.ID, out)
			}
			if _, known := writeOffset(t, n, "after", uint64(i+1)); known != Done {
				return errors.New("not written")
			}
			return nil
		})
	}
	leader.Start()
	rest[3].Start()
	c.WaitServing(c.Nodes...)
	c.WaitSameState()
}

// TestReadReplicaWatches: a watch on a read replica shows what is written
// elsewhere.
func TestReadReplicaWatches(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 1})
	replica := c.Join(2, "--read-replica")
	replica.Start()
	c.WaitServing(replica)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch, err := replica.Cluster().WatchChanges(ctx, &clusterpb.WatchChangesRequest{Tables: []string{"pipelines"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Header(); err != nil {
		t.Fatal(err)
	}
	_, err = c.Nodes[0].Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: testPipeline("default/watched", "x")})
	if err != nil {
		t.Fatal(err)
	}
	ev, err := watch.Recv()
	if err != nil || ev.GetTable() != "pipelines" || !strings.Contains(ev.GetSummary(), "created") {
		t.Fatalf("%v %v", ev, err)
	}
}
