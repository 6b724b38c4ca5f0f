package rpc

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func joinRequest(node, disk uint64) *clusterpb.JoinMemberRequest {
	return &clusterpb.JoinMemberRequest{NodeId: node, DiskId: disk, PeerAddr: fmt.Sprintf("disk%d:50052", disk), ClusterName: "test"}
}

// Goal: a node becomes a learner once, however often it asks, and is told where
// its state is.
func TestJoin(t *testing.T) {
	g := newGroup(1, 2, 3)
	_, follower := serveMembers(t, g)
	pending := 2
	g.fail = func(raftnode.Change) error {
		if pending--; pending >= 0 {
			return raftnode.ErrMembershipPending // another node joins; this one waits
		}
		return nil
	}
	r, err := follower.cluster.JoinMember(follower.ctx(), joinRequest(0, 77))
	noError(t, err)
	if r.GetNodeId() != 4 || r.GetClusterId() != 0xc0ffee || r.GetIndex() != 11 || len(r.GetMembers()) != 4 || r.GetMembers()[0].GetPeerAddr() != "n1:50052" {
		t.Fatal(r)
	}
	if got := g.made(); got != "add learner 4 at disk77:50052 disk 77" {
		t.Fatal(got)
	}
	for _, id := range []uint64{0, 4} {
		again, err := follower.cluster.JoinMember(follower.ctx(), joinRequest(id, 77))
		noError(t, err)
		if again.GetNodeId() != 4 || again.GetIndex() < r.GetIndex() || g.made() != "" {
			t.Fatal(again)
		}
	}
	// One that was announced is taken for what it was announced as.
	_, err = follower.cluster.AddMember(follower.ctx(), &clusterpb.AddMemberRequest{NodeId: 9, PeerAddr: "n9:50052", ReadReplica: true})
	noError(t, err)
	r, err = follower.cluster.JoinMember(follower.ctx(), joinRequest(9, 78))
	noError(t, err)
	if got := g.made(); r.GetNodeId() != 9 || got != "add learner 9 at n9:50052 to read; update address of 9 at disk78:50052 disk 78" {
		t.Fatal(r, got)
	}
	if m, _ := g.pos.Member(9); m.Disk != 78 || !m.ReadReplica {
		t.Fatal(m)
	}
}

// Goal: an id that belongs to another data directory is not given away unasked,
// and a request that cannot be meant for this cluster is refused.
func TestJoinRefusals(t *testing.T) {
	g := newGroup(1, 2, 3)
	leader, _ := serveMembers(t, g)
	for _, node := range []uint64{1, 3} {
		_, err := leader.cluster.JoinMember(leader.ctx(), joinRequest(node, 77))
		wantCode(t, err, codes.FailedPrecondition)
		if st := status.Convert(err); ReasonOf(st) != ReasonOtherDisk || OutcomeOf(st) != NotDone {
			t.Fatal(st)
		}
	}
	for name, spoil := range map[string]func(*clusterpb.JoinMemberRequest){
		"no disk":       func(r *clusterpb.JoinMemberRequest) { r.DiskId = 0 },
		"other cluster": func(r *clusterpb.JoinMemberRequest) { r.ClusterName = "other" },
		"no address":    func(r *clusterpb.JoinMemberRequest) { r.PeerAddr = "" },
		"local id":      func(r *clusterpb.JoinMemberRequest) { r.NodeId = 1<<64 - 1 },
	} {
		req := joinRequest(7, 77)
		spoil(req)
		if _, err := leader.cluster.JoinMember(leader.ctx(), req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := g.made(); got != "" {
		t.Fatal(got)
	}
}

// rejoins returns the operations that bring members back, as far as they run.
func rejoins(t *testing.T, a *api) []string {
	t.Helper()
	ops, err := a.cluster.ListOperations(a.ctx(), &clusterpb.ListOperationsRequest{Kind: "rejoin", RunningOnly: true})
	noError(t, err)
	var ids []string
	for _, op := range ops.GetOperations() {
		ids = append(ids, op.GetOperationId())
	}
	return ids
}

// lose makes node 3 of the group silent.
func lose(a *api) {
	a.node.mu.Lock()
	defer a.node.mu.Unlock()
	a.node.peers = []raftnode.PeerStatus{{ID: 2, Answered: true}, {ID: 3, Answered: true, Silent: true}}
}

func rejoinRequest(node, disk uint64) *clusterpb.JoinMemberRequest {
	req := joinRequest(node, disk)
	req.Rejoin = true
	return req
}

// Goal: a member whose directory was lost is taken out whole and added again
// under its id; when the second half fails, asking again does it, also with yet
// another directory, as a node asks whose disk lasts no longer than its process.
func TestRejoin(t *testing.T) {
	for _, second := range []uint64{77, 78} {
		g := newGroup(1, 2, 3)
		leader, _ := serveMembers(t, g)
		lose(leader)
		broken := true
		g.fail = func(c raftnode.Change) error {
			if c.Kind == raftnode.AddLearner && broken {
				broken = false
				return fmt.Errorf("%w: leadership was lost", raftnode.ErrAmbiguous)
			}
			return nil
		}
		_, err := leader.cluster.JoinMember(leader.ctx(), rejoinRequest(3, 77))
		wantCode(t, err, codes.Unknown)
		if ops := rejoins(t, leader); len(ops) != 1 {
			t.Fatalf("in the middle of a rejoin: operations %v", ops)
		}
		// One that was told its id and knows nothing else is told to come back.
		_, err = leader.cluster.JoinMember(leader.ctx(), joinRequest(3, second))
		wantCode(t, err, codes.FailedPrecondition)
		if st := status.Convert(err); ReasonOf(st) != ReasonOtherDisk {
			t.Fatal(st)
		}
		r, err := leader.cluster.JoinMember(leader.ctx(), rejoinRequest(3, second))
		noError(t, err)
		if got := g.made(); r.GetNodeId() != 3 || got != fmt.Sprintf("remove 3; add learner 3 at disk%d:50052 disk %d rejoins", second, second) {
			t.Fatal(r, got)
		}
		if m, _ := g.pos.Member(3); m.Removed || m.Disk != second {
			t.Fatal(m)
		}
		if ops := rejoins(t, leader); len(ops) != 0 {
			t.Fatalf("after the rejoin: operations %v", ops)
		}
	}
}

// Goal: a member that an operator has removed does not come back by losing its
// directory, also when it was on its way back before, and is told so for good.
func TestRemovedDoesNotRejoin(t *testing.T) {
	refused := func(t *testing.T, a *api, g *group) {
		t.Helper()
		g.made()
		_, err := a.cluster.JoinMember(a.ctx(), rejoinRequest(3, 99))
		wantCode(t, err, codes.FailedPrecondition)
		if st := status.Convert(err); ReasonOf(st) != ReasonMemberRemoved || OutcomeOf(st) != NotDone {
			t.Fatal(st)
		}
		if got := g.made(); got != "" {
			t.Fatal(got)
		}
	}
	t.Run("removed", func(t *testing.T) {
		g := newGroup(1, 2, 3)
		leader, _ := serveMembers(t, g)
		_, err := leader.cluster.RemoveMember(leader.ctx(), &clusterpb.RemoveMemberRequest{NodeId: 3})
		noError(t, err)
		refused(t, leader, g)
	})
	t.Run("removed after a rejoin that came to nothing", func(t *testing.T) {
		g := newGroup(1, 2, 3)
		leader, _ := serveMembers(t, g)
		lose(leader)
		g.fail = func(c raftnode.Change) error {
			return fmt.Errorf("%w: leadership was lost", raftnode.ErrAmbiguous)
		}
		_, err := leader.cluster.JoinMember(leader.ctx(), rejoinRequest(3, 77))
		wantCode(t, err, codes.Unknown)
		if ops := rejoins(t, leader); len(ops) != 1 {
			t.Fatal(ops)
		}
		g.fail = nil // and the member comes back with the directory it had
		_, err = leader.cluster.RemoveMember(leader.ctx(), &clusterpb.RemoveMemberRequest{NodeId: 3})
		noError(t, err)
		if ops := rejoins(t, leader); len(ops) != 0 {
			t.Error(ops)
		}
		refused(t, leader, g)
	})
	t.Run("removed after a rejoin whose end was not recorded", func(t *testing.T) {
		g := newGroup(1, 2, 3)
		leader, _ := serveMembers(t, g)
		leader.node.must(t, &commandpb.Command{Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
			Create: true, Operation: &commandpb.Operation{
				OperationId: "rejoin-3", Kind: "rejoin", State: commandpb.OperationState_OPERATION_STATE_RUNNING, NodeId: 3,
				Detail: router.RejoinDetail(0),
			},
		}}})
		for _, c := range []raftnode.Change{
			{Kind: raftnode.Remove, ID: 3}, {Kind: raftnode.AddLearner, ID: 3, Addr: "n3:1", Disk: 77, Rejoin: true},
		} {
			_, err := g.change(c)
			noError(t, err)
		}
		_, err := leader.cluster.RemoveMember(leader.ctx(), &clusterpb.RemoveMemberRequest{NodeId: 3})
		noError(t, err)
		refused(t, leader, g)
	})
	t.Run("its rejoin was cancelled", func(t *testing.T) {
		g := newGroup(1, 2, 3)
		leader, _ := serveMembers(t, g)
		lose(leader)
		g.fail = func(c raftnode.Change) error {
			if c.Kind == raftnode.AddLearner {
				return raftnode.ErrNoLeader
			}
			return nil
		}
		req := rejoinRequest(3, 77)
		ctx, cancel := context.WithTimeout(leader.ctx(), time.Second)
		defer cancel()
		_, err := leader.cluster.JoinMember(ctx, req)
		if err == nil {
			t.Fatal("joined")
		}
		g.fail = nil
		for _, id := range rejoins(t, leader) {
			_, err := leader.cluster.CancelOperation(leader.ctx(), &clusterpb.CancelOperationRequest{OperationId: id})
			noError(t, err)
		}
		refused(t, leader, g)
		if ops := rejoins(t, leader); len(ops) != 0 {
			t.Fatalf("operations %v", ops)
		}
	})
}
