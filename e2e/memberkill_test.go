package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

var (
	// Where a leader takes a member out that lost its data directory, and in again.
	comeBackPoints = []string{
		"member:remove:before", "member:remove:after", "member:add:before", "member:add:after",
		"member:promote:before", "member:promote:after",
	}
	// Where it exchanges a voter for another node.
	exchangePoints = []string{
		"member:exchange:before", "member:exchange:after", "member:leave:before", "member:leave:after",
	}
	// While a database that a restore has replaced is removed beside what goes on.
	// The first and the last are met by an image that is installed as well.
	retiringPoints = []string{"state:remove:before", "state:remove:half", "state:remove:after"}
)

// arm restarts n so that it dies at point, and waits until it serves.
func (c *Cluster) arm(n *Node, point string) {
	c.t.Helper()
	// Stopped in order: what it applied is durable, so that it does not come by an
	// earlier change once more while it starts.
	n.Stop()
	n.Start("CONVEYOR_CRASH_AT=" + point)
	c.WaitServing(n)
}

// noneRuns waits until no operation of a kind is running.
func (c *Cluster) noneRuns(seenBy *Node, kind string) {
	c.t.Helper()
	eventually(c.t, 60*time.Second, "no "+kind+" runs", func(ctx context.Context) error {
		list, err := seenBy.Cluster().ListOperations(ctx, &clusterpb.ListOperationsRequest{})
		if err != nil {
			return err
		}
		for _, op := range list.GetOperations() {
			if op.GetKind() == kind && op.GetState() == clusterpb.OperationState_OPERATION_STATE_RUNNING {
				return fmt.Errorf("%v", op)
			}
		}
		return nil
	})
}

// TestRejoinSurvivesItsLeader kills the leader for good at each change of the
// membership by which a member that lost its data directory comes back: before and
// after its old self is taken out, it is added, it is made a voter. Goal: the next
// leader goes on by itself, with four nodes of which one has nothing; nothing
// acknowledged is lost, and nothing is left running. Method: five nodes, a binary
// that kills itself at a given point, load, histories and state hashes.
func TestRejoinSurvivesItsLeader(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Nodes: 5, Binary: crashBinary(t)})
	lead, lost, other := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	ct := &crashTest{Cluster: c, t: t, victim: lead}
	for i, point := range comeBackPoints {
		c.arm(lead, point)
		c.makeLeader(lead)
		load := StartLoad(&Cluster{t: t, Nodes: c.Nodes[2:]}, LoadOptions{Seed: seed + uint64(i), Prefix: point + "/", Clients: 4, Keys: 4})
		lost.Kill()
		if err := os.RemoveAll(lost.DataDir); err != nil {
			t.Fatal(err)
		}
		lost.Start()
		ct.mustDie(point)
		c.WaitServing(c.Nodes[1:]...)
		c.role(other, lost.ID, "voter")
		c.noneRuns(other, "rejoin")
		if n := strings.Count(lost.Log(), "event=joined"); n < i+1 {
			t.Fatalf("it came back without joining: %d", n)
		}
		lead.Start()
		c.WaitServing(lead)
		load.Stop()
		load.FinalReads(c, 4)
		load.Check(c)
		c.WaitSameState()
		noTrace(t, lost)
		if t.Failed() {
			t.Fatalf("after dying at %s", point)
		}
		t.Logf("%s: longest time without an acknowledged write: %v", point, load.LongestGap())
	}
}

// TestReplaceSurvivesItsLeader kills the leader at each entry of an exchange of a
// voter for another node. Goal: the next leader brings the operation to its end;
// the old node goes, the new one votes, nothing acknowledged is lost.
func TestReplaceSurvivesItsLeader(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Binary: crashBinary(t)})
	lead, keep, old := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	ct := &crashTest{Cluster: c, t: t, victim: lead}
	for i, point := range exchangePoints {
		next := c.Join(uint64(4+i), "--read-replica")
		next.bin = crashBinary(t)
		next.Start()
		c.WaitServing(next)
		c.arm(lead, point)
		c.makeLeader(lead)
		load := StartLoad(&Cluster{t: t, Nodes: []*Node{keep}}, LoadOptions{Seed: seed + uint64(i), Prefix: point + "/", Clients: 4, Keys: 4})
		var begun *clusterpb.ReplaceMemberResponse
		eventually(t, 30*time.Second, "the exchange begins", func(ctx context.Context) (err error) {
			begun, err = keep.Cluster().ReplaceMember(ctx, &clusterpb.ReplaceMemberRequest{OldNodeId: old.ID, NewNodeId: next.ID, Detach: true})
			return err
		})
		ct.mustDie(point)
		eventually(t, 60*time.Second, "the exchange ends", func(ctx context.Context) error {
			op, err := keep.Cluster().GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: begun.GetOperation().GetOperationId()})
			switch {
			case err != nil:
				return err
			case op.GetState() == clusterpb.OperationState_OPERATION_STATE_RUNNING:
				return fmt.Errorf("%v", op)
			case op.GetState() != clusterpb.OperationState_OPERATION_STATE_DONE:
				t.Fatalf("%v", op)
			}
			return nil
		})
		old.exits(exitRemoved)
		c.drop(old)
		c.role(keep, next.ID, "voter")
		lead.Start()
		c.WaitServing(c.Nodes...)
		load.Stop()
		load.FinalReads(c, 4)
		load.Check(c)
		c.WaitSameState()
		if t.Failed() {
			t.Fatalf("after dying at %s", point)
		}
		t.Logf("%s: longest time without an acknowledged write: %v", point, load.LongestGap())
		old = next
	}
}

// TestReplacedDatabaseDiesWithItsNode kills a node, the leader and a follower, while
// the database that a restore has replaced is removed beside what goes on. Goal: the
// node starts on the restored state, the rest of the old one goes, nothing
// acknowledged afterwards is lost, and the undo point is whole. Method: a binary that
// kills itself before, in the middle of and after the removal; the restore is undone
// at the end, which brings back what was there.
func TestReplacedDatabaseDiesWithItsNode(t *testing.T) {
	c := NewCluster(t, Options{Binary: crashBinary(t)})
	fill := NewFiller(t, "restored", 64<<10)
	fill.Fill(4<<20, 8, c.Nodes...)
	snapshot, err := c.Nodes[1].Backups().CreateSnapshot(longCall(t), &backuppb.CreateSnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	victim, owner := c.Nodes[0], c.Nodes[1]
	ct := &crashTest{Cluster: c, t: t, victim: victim}
	round := uint64(0)
	for _, leads := range []bool{true, false} {
		for _, point := range retiringPoints {
			round++
			at := fmt.Sprintf("%s, leading: %v", point, leads)
			if _, known := writeOffset(t, owner, "undone", round); known != Done {
				t.Fatal("not written")
			}
			c.arm(victim, point)
			if leads {
				c.makeLeader(victim)
			} else {
				c.makeLeader(c.Nodes[2])
			}
			detached, err := owner.Backups().RestoreSnapshot(longCall(t), &backuppb.RestoreSnapshotRequest{SnapshotId: snapshot.GetSnapshotId(), Detach: true})
			if err != nil {
				t.Fatal(err)
			}
			ct.mustDie(point)
			after := NewFiller(t, fmt.Sprintf("after-%d", round), 4<<10)
			after.Run(&Cluster{t: t, Nodes: c.Nodes[1:]})
			victim.Start()
			c.WaitServing(c.Nodes...)
			c.noneRuns(owner, "restore")
			op, err := owner.Cluster().GetOperation(longCall(t), &clusterpb.GetOperationRequest{OperationId: detached.GetOperationId()})
			if err != nil || op.GetState() != clusterpb.OperationState_OPERATION_STATE_DONE {
				t.Fatalf("%s: the restore: %v %v", at, op, err)
			}
			after.Stop()
			after.Check(c.Nodes...)
			fill.Check(c.Nodes...)
			c.WaitSameState()
			oneDatabase(t, victim)
			undone, err := victim.Cluster().UndoRestore(longCall(t), &clusterpb.UndoRestoreRequest{})
			if err != nil || undone.GetOperation().GetState() != clusterpb.OperationState_OPERATION_STATE_DONE {
				t.Fatalf("%s: undo: %v %v", at, undone, err)
			}
			for _, n := range c.Nodes {
				eventually(t, 30*time.Second, "what was there before", func(ctx context.Context) error {
					if out, known := readOffset(ctx, n, "undone", 0); known != Done || out.(OffsetOut).Current != round {
						return fmt.Errorf("node %d reads %+v, want %d", n.ID, out, round)
					}
					return nil
				})
			}
			c.WaitSameState()
			if t.Failed() {
				t.Fatalf("after dying at %s", at)
			}
		}
	}
}

// oneDatabase waits until nothing of a replaced database of n is left.
func oneDatabase(t *testing.T, n *Node) {
	t.Helper()
	eventually(t, 30*time.Second, "one database is left", func(context.Context) error {
		left, err := filepath.Glob(filepath.Join(n.DataDir, "state", "db-*"))
		if err == nil && len(left) != 1 {
			slices.Sort(left)
			err = errors.New(strings.Join(left, ", "))
		}
		return err
	})
}
