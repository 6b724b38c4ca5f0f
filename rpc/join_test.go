package rpc

import (
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
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

// Goal: a member whose directory was lost is taken out whole and added again
// under its id; when the second half fails, asking again does it.
func TestRejoin(t *testing.T) {
	g := newGroup(1, 2, 3)
	leader, _ := serveMembers(t, g)
	leader.node.mu.Lock()
	leader.node.peers = []raftnode.PeerStatus{{ID: 2, Answered: true}, {ID: 3, Answered: true, Silent: true}}
	leader.node.mu.Unlock()
	broken := true
	g.fail = func(c raftnode.Change) error {
		if c.Kind == raftnode.AddLearner && broken {
			broken = false
			return fmt.Errorf("%w: leadership was lost", raftnode.ErrAmbiguous)
		}
		return nil
	}
	req := joinRequest(3, 77)
	req.Rejoin = true
	_, err := leader.cluster.JoinMember(leader.ctx(), req)
	wantCode(t, err, codes.Unknown)
	r, err := leader.cluster.JoinMember(leader.ctx(), req)
	noError(t, err)
	if got := g.made(); r.GetNodeId() != 3 || got != "remove 3; add learner 3 at disk77:50052 disk 77 rejoins" {
		t.Fatal(r, got)
	}
	if m, _ := g.pos.Member(3); m.Removed || m.Disk != 77 {
		t.Fatal(m)
	}
}
