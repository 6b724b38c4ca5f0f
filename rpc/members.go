package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// Only the leader changes the membership. A call that comes to another node is
// passed on, and again when leadership moves meanwhile, which it does by itself
// when the leader is to be removed.

// atLeader runs local when this node leads and remote with the leader's client
// otherwise. An answer that says that nothing was done for want of a leader is
// followed by another attempt until ctx is done or the waiting takes too long.
func atLeader[T any](ctx context.Context, a *clusterAPI, local func(context.Context) (T, error),
	remote func(context.Context, clusterpb.ClusterClient) (T, error)) (T, error) {
	deadline := time.Now().Add(a.cfg.CallTimeout)
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		changed := a.cfg.Node.Changed()
		out, err := local(ctx)
		if !elsewhere(err) || relayed(ctx) != "" {
			return out, err
		}
		if conn, rctx, rerr := a.relay.connect(ctx); rerr == nil {
			out, err = remote(rctx, clusterpb.NewClusterClient(conn))
			err = relayedErr(err)
			if !elsewhere(err) {
				return out, err
			}
		}
		if time.Now().After(deadline) {
			return out, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return out, err
		}
	}
}

// elsewhere says whether err means that nothing was done because another node
// has to be asked, or the same one a little later.
func elsewhere(err error) bool {
	if err == nil {
		return false
	}
	var notLeader *raftnode.NotLeaderError
	if errors.As(err, &notLeader) || errors.Is(err, raftnode.ErrNoLeader) {
		return !errors.Is(err, raftnode.ErrAmbiguous)
	}
	st, ok := status.FromError(err)
	return ok && st.Code() == codes.Unavailable && OutcomeOf(st) == NotDone
}

// ListMembers lists the members as the leader sees them; a node that cannot
// reach the leader answers with what it knows.
func (a *clusterAPI) ListMembers(ctx context.Context, req *clusterpb.ListMembersRequest) (*clusterpb.ListMembersResponse, error) {
	st := a.cfg.Node.Status()
	own := a.listMembers(st)
	if st.Leader == st.ID || relayed(ctx) != "" {
		return own, nil
	}
	conn, rctx, err := a.relay.connect(ctx)
	if err != nil {
		return a.ownMembers(own), nil
	}
	rctx, cancel := context.WithTimeout(rctx, relayTimeout)
	defer cancel()
	theirs, err := clusterpb.NewClusterClient(conn).ListMembers(rctx, req)
	if err != nil || theirs.GetClusterId() != own.ClusterId {
		return a.ownMembers(own), nil
	}
	return theirs, nil
}

// ownMembers says of what this node knows that it may be out of date.
func (a *clusterAPI) ownMembers(own *clusterpb.ListMembersResponse) *clusterpb.ListMembersResponse {
	own.Stale = true
	why := fmt.Sprintf("the leader, node %d, cannot be reached from node %d", own.LeaderId, own.NodeId)
	if own.LeaderId == 0 {
		why = "there is no leader: a majority of the voters must be up and reach each other, nothing can be written and the membership cannot be changed"
		var unreached []string
		for _, m := range own.Members {
			if !m.Healthy {
				unreached = append(unreached, fmt.Sprintf("node %d (%s)", m.NodeId, m.PeerAddr))
			}
		}
		if len(unreached) > 0 {
			why += fmt.Sprintf("; node %d cannot reach %s", own.NodeId, strings.Join(unreached, ", "))
		}
	}
	own.Alarms = append([]string{fmt.Sprintf("%s; what is shown is what node %d knows, and may be out of date", why, own.NodeId)}, own.Alarms...)
	return own
}

func (a *clusterAPI) listMembers(st raftnode.Status) *clusterpb.ListMembersResponse {
	resp := &clusterpb.ListMembersResponse{
		ClusterId: fmt.Sprintf("%016x", a.cfg.ClusterID), ClusterName: a.cfg.ClusterName, LeaderId: st.Leader, Term: st.Term,
		NodeId: st.ID,
	}
	for _, m := range st.Position.Members {
		if m.Removed {
			resp.Removed = append(resp.Removed, m.ID)
			continue
		}
		resp.Members = append(resp.Members, a.describeMember(st, m))
	}
	resp.Alarms = append(resp.Alarms, fragile(st.Position.ConfState.GetVoters())...)
	return resp
}

// fragile says of a group that no voter of it may fail.
func fragile(voters []uint64) []string {
	if len(voters) != 2 {
		return nil // of one, everybody knows
	}
	return []string{fmt.Sprintf("there are two voters, %d and %d: losing either one stops the cluster; let a third node join", voters[0], voters[1])}
}

func (a *clusterAPI) describeMember(st raftnode.Status, m raftnode.Member) *clusterpb.Member {
	out := &clusterpb.Member{
		NodeId: m.ID, PeerAddr: m.Addr, ClientAddr: a.cfg.ClientAddr(m.ID), Role: "voter", ReadReplica: m.ReadReplica,
	}
	if m.Disk != 0 {
		out.DiskId = fmt.Sprintf("%016x", m.Disk)
	}
	cs := st.Position.ConfState
	switch {
	case m.ID == st.Leader:
		out.Role = "leader"
	case slices.Contains(cs.GetLearners(), m.ID) || slices.Contains(cs.GetLearnersNext(), m.ID):
		out.Role = "learner"
	}
	if m.ID == st.ID {
		out.Healthy, out.MatchIndex, out.Version = true, st.LastIndex, a.cfg.Version
		return out
	}
	for _, p := range st.Peers {
		if p.ID == m.ID {
			out.Healthy, out.MatchIndex, out.State = p.Answered && !p.Silent, p.Match, p.State
			out.HealthUnknown = !p.Answered && !p.Silent
			if p.Match < st.Commit {
				out.Lag = st.Commit - p.Match
			}
			return out
		}
	}
	out.Healthy = m.ID == st.Leader || a.cfg.Reachable(m.ID)
	return out
}

// change makes one change of the membership on this node, which has to lead.
func (a *clusterAPI) change(ctx context.Context, c raftnode.Change) (*clusterpb.ChangeMemberResponse, error) {
	a.heardOf(ctx)
	before := a.cfg.Node.Status()
	pos, err := a.cfg.Node.ChangeMembership(ctx, c)
	if err != nil {
		return nil, err
	}
	a.log.Info("the membership was changed", "event", "membership_asked", "change", c.Kind.String(), "node_changed", c.ID, "index", pos.Index)
	after := a.cfg.Node.Status()
	after.Position = pos
	resp := &clusterpb.ChangeMemberResponse{
		Index: pos.Index, Voters: pos.ConfState.GetVoters(), Learners: pos.ConfState.GetLearners(),
	}
	if m, ok := pos.Member(c.ID); ok && !m.Removed {
		resp.Member = a.describeMember(after, m)
	} else if m, ok := before.Position.Member(c.ID); ok {
		resp.Member = a.describeMember(before, m)
	}
	return resp, nil
}

// steer admits one caller at a time to what looks at the membership and then
// changes it. The caller calls what it returns.
func (a *clusterAPI) steer(ctx context.Context) (func(), error) {
	select {
	case a.steering <- struct{}{}:
		return func() { <-a.steering }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: another change of the membership is being made: %w", ErrNotProposed, ctx.Err())
	}
}

// heardOf waits, for a moment, until every member has answered this leader or owes
// it too many answers. Right after an election nobody has answered yet, and a
// change is refused for want of live voters who are all there.
func (a *clusterAPI) heardOf(ctx context.Context) {
	deadline := time.Now().Add(2 * time.Second)
	for time.Now().Before(deadline) && ctx.Err() == nil {
		open := false
		for _, p := range a.cfg.Node.Status().Peers {
			open = open || !p.Answered && !p.Silent
		}
		if !open {
			return
		}
		timer := time.NewTimer(10 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// notAMember is the answer to a question about a node that is no member, whatever was
// to be done with it; advice may follow.
func notAMember(id uint64, advice string) error {
	return newStatus(codes.NotFound, fmt.Sprintf("node %d is no member of the cluster; nothing was changed: 'router cluster members' shows them%s", id, advice),
		"NOT_A_MEMBER", NotDone, 0, nil).Err()
}

// mustBeMember refuses a node that is no member. Who does not lead lets it pass: the
// leader knows better, and the change is refused here for want of leadership.
func (a *clusterAPI) mustBeMember(ctx context.Context, id uint64) error {
	for looks := 0; ; looks++ {
		st := a.cfg.Node.Status()
		m, ok := st.Position.Member(id)
		switch {
		case st.Leader != st.ID || ok && !m.Removed:
			return nil
		case looks > 0:
			return notAMember(id, "")
		}
		// A leader that was just elected may not have applied its being added.
		if _, err := a.cfg.Node.ReadIndex(ctx); err != nil {
			return err
		}
	}
}

func checkNodeID(field string, id uint64) error {
	if id == 0 || id > 1<<63 {
		return invalid(field, "%d is no node id", id)
	}
	return nil
}

// nextID returns an id that no node of the cluster has or has had.
func nextID(p raftnode.Position) uint64 {
	var highest uint64
	for _, m := range p.Members {
		highest = max(highest, m.ID)
	}
	return highest + 1
}

// AddMember makes room for a node that is not started yet: it becomes a learner.
func (a *clusterAPI) AddMember(ctx context.Context, req *clusterpb.AddMemberRequest) (*clusterpb.ChangeMemberResponse, error) {
	addr, err := hostPort("peer_addr", req.GetPeerAddr())
	if err != nil {
		return nil, err
	}
	return atLeader(ctx, a, func(ctx context.Context) (*clusterpb.ChangeMemberResponse, error) {
		done, err := a.steer(ctx)
		if err != nil {
			return nil, err
		}
		defer done()
		id := req.GetNodeId()
		if id == 0 {
			id = nextID(a.cfg.Node.Status().Position)
		}
		if err := checkNodeID("node_id", id); err != nil {
			return nil, err
		}
		return a.change(ctx, raftnode.Change{Kind: raftnode.AddLearner, ID: id, Addr: addr, ReadReplica: req.GetReadReplica()})
	}, func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
		return c.AddMember(ctx, req)
	})
}

// PromoteMember makes a learner that has caught up a voter.
func (a *clusterAPI) PromoteMember(ctx context.Context, req *clusterpb.PromoteMemberRequest) (*clusterpb.ChangeMemberResponse, error) {
	if err := checkNodeID("node_id", req.GetNodeId()); err != nil {
		return nil, err
	}
	return atLeader(ctx, a, func(ctx context.Context) (*clusterpb.ChangeMemberResponse, error) {
		if err := a.mustBeMember(ctx, req.NodeId); err != nil {
			return nil, err
		}
		return a.change(ctx, raftnode.Change{Kind: raftnode.Promote, ID: req.NodeId})
	}, func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
		return c.PromoteMember(ctx, req)
	})
}

// RemoveMember takes a node out for good. A leader hands leadership over first.
func (a *clusterAPI) RemoveMember(ctx context.Context, req *clusterpb.RemoveMemberRequest) (*clusterpb.ChangeMemberResponse, error) {
	if err := checkNodeID("node_id", req.GetNodeId()); err != nil {
		return nil, err
	}
	return atLeader(ctx, a, func(ctx context.Context) (*clusterpb.ChangeMemberResponse, error) {
		// One that was begun and came to nothing would let the node back in.
		if err := a.endRejoins(ctx, req.NodeId); err != nil {
			return nil, err
		}
		if err := a.mustBeMember(ctx, req.NodeId); err != nil {
			return nil, err
		}
		return a.change(ctx, raftnode.Change{Kind: raftnode.Remove, ID: req.NodeId})
	}, func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
		return c.RemoveMember(ctx, req)
	})
}

// UpdateMember changes where the others reach a member.
func (a *clusterAPI) UpdateMember(ctx context.Context, req *clusterpb.UpdateMemberRequest) (*clusterpb.ChangeMemberResponse, error) {
	if err := checkNodeID("node_id", req.GetNodeId()); err != nil {
		return nil, err
	}
	addr, err := hostPort("peer_addr", req.GetPeerAddr())
	if err != nil {
		return nil, err
	}
	return atLeader(ctx, a, func(ctx context.Context) (*clusterpb.ChangeMemberResponse, error) {
		if err := a.mustBeMember(ctx, req.NodeId); err != nil {
			return nil, err
		}
		return a.change(ctx, raftnode.Change{Kind: raftnode.UpdateAddr, ID: req.NodeId, Addr: addr})
	}, func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
		return c.UpdateMember(ctx, req)
	})
}
