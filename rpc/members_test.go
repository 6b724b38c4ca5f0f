package rpc

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// group is a membership that the nodes of a test share. It does what it is told:
// what makes sense is raftnode's to judge, and tested there.
type group struct {
	mu      sync.Mutex
	pos     raftnode.Position
	changes []raftnode.Change
	// fail is asked before each change; nil = it is made.
	fail func(c raftnode.Change) error
}

func newGroup(voters ...uint64) *group {
	g := &group{pos: raftnode.Position{Index: 10, ConfState: &raftpb.ConfState{Voters: voters}}}
	for _, id := range voters {
		g.pos.Members = append(g.pos.Members, raftnode.Member{ID: id, Addr: fmt.Sprintf("n%d:50052", id)})
	}
	return g
}

func (g *group) change(c raftnode.Change) (raftnode.Position, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fail != nil {
		if err := g.fail(c); err != nil {
			return raftnode.Position{}, err
		}
	}
	g.changes = append(g.changes, c)
	cs := &raftpb.ConfState{}
	gone := func(id uint64) bool { return id == c.ID }
	cs.Voters = slices.DeleteFunc(slices.Clone(g.pos.ConfState.GetVoters()), gone)
	cs.Learners = slices.DeleteFunc(slices.Clone(g.pos.ConfState.GetLearners()), gone)
	members := slices.DeleteFunc(slices.Clone(g.pos.Members), func(m raftnode.Member) bool { return m.ID == c.ID })
	was, _ := g.pos.Member(c.ID)
	switch c.Kind {
	case raftnode.AddLearner:
		cs.Learners = append(cs.Learners, c.ID)
		was = raftnode.Member{ID: c.ID, Addr: c.Addr, Disk: c.Disk, ReadReplica: c.ReadReplica}
	case raftnode.Promote:
		cs.Voters = append(cs.Voters, c.ID)
	case raftnode.UpdateAddr:
		cs = g.pos.ConfState
		was.Addr = c.Addr
		if was.Disk == 0 {
			was.Disk = c.Disk
		}
	case raftnode.Remove:
		was = raftnode.Member{ID: c.ID, Disk: was.Disk, Removed: true}
	}
	members = append(members, was)
	slices.SortFunc(members, func(a, b raftnode.Member) int { return int(a.ID) - int(b.ID) })
	g.pos = raftnode.Position{Index: g.pos.Index + 1, ConfState: cs, Members: members}
	return g.pos, nil
}

// made returns the changes made since the last call.
func (g *group) made() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []string
	for _, c := range g.changes {
		s := fmt.Sprintf("%v %d", c.Kind, c.ID)
		if c.Addr != "" {
			s += " at " + c.Addr
		}
		if c.Disk != 0 {
			s += fmt.Sprintf(" disk %d", c.Disk)
		}
		if c.Rejoin {
			s += " rejoins"
		}
		if c.ReadReplica {
			s += " to read"
		}
		out = append(out, s)
	}
	g.changes = nil
	return strings.Join(out, "; ")
}

// member is a node of a group.
type member struct {
	*oneNode
	g *group
}

func (m *member) Status() raftnode.Status {
	st := m.oneNode.Status()
	m.g.mu.Lock()
	defer m.g.mu.Unlock()
	st.Position = m.g.pos
	return st
}

func (m *member) ChangeMembership(_ context.Context, c raftnode.Change) (raftnode.Position, error) {
	if l := m.Leadership(); !l.Leading {
		return raftnode.Position{}, &raftnode.NotLeaderError{Leader: l.Leader, Term: l.Term}
	}
	return m.g.change(c)
}

// serveMembers serves a leader, node 1, and a follower, node 2, of a group of
// three.
func serveMembers(t *testing.T, g *group) (leader, follower *api) {
	t.Helper()
	addrs := map[uint64]string{}
	var mu sync.Mutex
	serve := func(id uint64) *api {
		node := newOneNode(t)
		node.id = id
		a := serveAPI(t, node, func(c *ServerConfig) {
			c.Node = &member{node, g}
			c.NodeID = id
			c.ClientAddr = func(id uint64) string {
				mu.Lock()
				defer mu.Unlock()
				return addrs[id]
			}
			c.StoredMembers = func() []raftnode.Member {
				g.mu.Lock()
				defer g.mu.Unlock()
				return g.pos.Members
			}
		})
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		noError(t, err)
		served := make(chan error, 1)
		go func() { served <- a.Serve(lis) }()
		t.Cleanup(func() {
			a.Shutdown(context.Background())
			noError(t, <-served)
		})
		mu.Lock()
		addrs[id] = lis.Addr().String()
		mu.Unlock()
		return a
	}
	return serve(1), serve(2)
}

// Goal: every change works on every node, and answers what the members are then;
// an id the cluster chooses was never used.
func TestMembersAreChangedThroughAnyNode(t *testing.T) {
	g := newGroup(1, 2, 3)
	_, follower := serveMembers(t, g)
	ctx := follower.ctx()
	r, err := follower.cluster.AddMember(ctx, &clusterpb.AddMemberRequest{PeerAddr: "n4:50052", ReadReplica: true})
	noError(t, err)
	if r.GetMember().GetNodeId() != 4 || r.GetMember().GetRole() != "learner" || !r.GetMember().GetReadReplica() || !slices.Equal(r.GetLearners(), []uint64{4}) {
		t.Fatal(r)
	}
	r, err = follower.cluster.PromoteMember(ctx, &clusterpb.PromoteMemberRequest{NodeId: 4})
	noError(t, err)
	if r.GetMember().GetRole() != "voter" || len(r.GetVoters()) != 4 {
		t.Fatal(r)
	}
	_, err = follower.cluster.UpdateMember(ctx, &clusterpb.UpdateMemberRequest{NodeId: 4, PeerAddr: "m4:50052"})
	noError(t, err)
	r, err = follower.cluster.RemoveMember(ctx, &clusterpb.RemoveMemberRequest{NodeId: 4})
	noError(t, err)
	if r.GetMember().GetPeerAddr() != "m4:50052" || len(r.GetVoters()) != 3 {
		t.Fatal(r)
	}
	list, err := follower.cluster.ListMembers(ctx, &clusterpb.ListMembersRequest{})
	noError(t, err)
	if len(list.GetMembers()) != 3 || !slices.Equal(list.GetRemoved(), []uint64{4}) || list.GetLeaderId() != 1 || list.GetMembers()[0].GetRole() != "leader" {
		t.Fatal(list)
	}
	r, err = follower.cluster.AddMember(ctx, &clusterpb.AddMemberRequest{PeerAddr: "n5:50052"})
	noError(t, err)
	if r.GetMember().GetNodeId() != 5 {
		t.Fatalf("the id of a removed member was given again: %v", r)
	}
	want := "add learner 4 at n4:50052 to read; promote 4; update address of 4 at m4:50052; remove 4; add learner 5 at n5:50052"
	if got := g.made(); got != want {
		t.Fatalf("made: %s\nwant: %s", got, want)
	}
}

// Goal: what makes no sense is refused before anything is asked of anybody, and a
// refusal of the group keeps its reason on the way through another node.
func TestMembersRefusals(t *testing.T) {
	g := newGroup(1, 2, 3)
	g.fail = func(c raftnode.Change) error {
		return fmt.Errorf("%w: cannot %v node %d: it is the last voter", raftnode.ErrMembershipRefused, c.Kind, c.ID)
	}
	_, follower := serveMembers(t, g)
	ctx := follower.ctx()
	_, err := follower.cluster.AddMember(ctx, &clusterpb.AddMemberRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = follower.cluster.AddMember(ctx, &clusterpb.AddMemberRequest{PeerAddr: "no port"})
	wantCode(t, err, codes.InvalidArgument)
	_, err = follower.cluster.PromoteMember(ctx, &clusterpb.PromoteMemberRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = follower.cluster.UpdateMember(ctx, &clusterpb.UpdateMemberRequest{NodeId: 1})
	wantCode(t, err, codes.InvalidArgument)
	_, err = follower.cluster.RemoveMember(ctx, &clusterpb.RemoveMemberRequest{NodeId: 1})
	wantCode(t, err, codes.FailedPrecondition)
	if st := status.Convert(err); ReasonOf(st) != "MEMBERSHIP_REFUSED" || OutcomeOf(st) != NotDone || !strings.Contains(st.Message(), "last voter") {
		t.Fatal(st)
	}
}

// Goal: a leader that hands over before it is removed names its successor, and
// the call follows it there.
func TestRemovingTheLeaderFollowsTheSuccessor(t *testing.T) {
	g := newGroup(1, 2, 3)
	leader, follower := serveMembers(t, g)
	g.fail = func(c raftnode.Change) error {
		if leader.node.Leadership().Leading {
			leader.node.setLeader(2, nil)
			follower.node.setLeader(2, nil)
			return &raftnode.NotLeaderError{Leader: 2, Term: 2}
		}
		return nil
	}
	r, err := leader.cluster.RemoveMember(leader.ctx(), &clusterpb.RemoveMemberRequest{NodeId: 1})
	noError(t, err)
	if !slices.Equal(r.GetVoters(), []uint64{2, 3}) || g.made() != "remove 1" {
		t.Fatal(r)
	}
}
