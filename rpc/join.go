package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// joinWait bounds how long a join waits for a change of the membership that is
// under way: nodes that are started together ask at the same time.
const joinWait = 10 * time.Second

// silenceWait is how long a node that asks for the id of a member has to wait for
// that member to fall silent; a live one answers every heartbeat.
const silenceWait = 10 * time.Second

// JoinMember makes a node with an empty directory a learner, and says where it
// gets its state from. A repeat by the same directory, as after a crash, changes
// nothing.
//
// A member whose directory was lost asks with rejoin: its old self is removed,
// which an operation remembers until it is back, with everything the leader believes it to hold, and it is added again.
// Demoting it alone would keep that belief (raft's Match), and the leader would
// wait for ever for entries to be acknowledged that it never sends. Taking out a
// voter that is lost does not make the group weaker: it counted, and could not
// answer.
func (a *clusterAPI) JoinMember(ctx context.Context, req *clusterpb.JoinMemberRequest) (*clusterpb.JoinMemberResponse, error) {
	if req.GetDiskId() == 0 {
		return nil, invalid("disk_id", "is missing")
	}
	if req.GetClusterName() != a.cfg.ClusterName {
		return nil, invalid("cluster_name", "the node was started for cluster %q, this is %q; correct --cluster-name or --join",
			req.GetClusterName(), a.cfg.ClusterName)
	}
	if err := checkText("version", req.GetVersion(), MaxText); err != nil {
		return nil, err
	}
	addr, err := hostPort("peer_addr", req.GetPeerAddr())
	if err != nil {
		return nil, err
	}
	req.PeerAddr = addr
	return atLeader(ctx, a, func(ctx context.Context) (*clusterpb.JoinMemberResponse, error) {
		return a.join(ctx, req)
	}, func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.JoinMemberResponse, error) {
		return c.JoinMember(ctx, req)
	})
}

// join runs on the leader.
func (a *clusterAPI) join(ctx context.Context, req *clusterpb.JoinMemberRequest) (*clusterpb.JoinMemberResponse, error) {
	if l := a.cfg.Node.Leadership(); !l.Leading {
		return nil, &raftnode.NotLeaderError{Leader: l.Leader, Term: l.Term}
	}
	// Nodes that are started together must not be given one id.
	done, err := a.steer(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	// Everything decided before must be applied before it is judged.
	if _, err := a.cfg.Node.ReadIndex(ctx); err != nil {
		return nil, err
	}
	if err := a.tellAddresses(ctx); err != nil {
		return nil, err
	}
	pos := a.cfg.Node.Status().Position
	id := req.GetNodeId()
	for _, m := range raftnode.Live(pos.Members) {
		if m.Disk == req.DiskId && (id == 0 || id == m.ID) {
			if m.Addr != req.PeerAddr {
				if pos, err = a.await(ctx, raftnode.Change{Kind: raftnode.UpdateAddr, ID: m.ID, Addr: req.PeerAddr}); err != nil {
					return nil, err
				}
			}
			return a.joined(pos, m.ID, pos.Index), nil // it has asked before
		}
	}
	if id == 0 {
		id = nextID(pos)
	}
	if err := checkNodeID("node_id", id); err != nil {
		return nil, err
	}
	add := raftnode.Change{
		Kind: raftnode.AddLearner, ID: id, Addr: req.PeerAddr, Disk: req.DiskId, ReadReplica: req.GetReadReplica(), Rejoin: req.GetRejoin(),
	}
	// rejoin names the operation that is ended when the node is back.
	rejoin := ""
	m, ok := pos.Member(id)
	if ok && m.Removed {
		// Taken out by an operator it stays out; taken out to come back it comes
		// back.
		if rejoin, err = a.rejoining(ctx, m); err != nil {
			return nil, err
		}
		switch {
		case rejoin == "" && req.GetRejoin():
			return nil, fmt.Errorf("%w: node %d; ids are not reused: let it join with another id, or with none to be given one",
				ErrMemberRemoved, id)
		case rejoin != "" && !req.GetRejoin():
			return nil, fmt.Errorf("%w: node %d, which was taken out to come back", ErrOtherDisk, id)
		}
		add.ReadReplica = add.ReadReplica || m.ReadReplica
	} else if ok {
		expected := m.Disk == 0 && a.isLearner(pos, id)
		switch {
		case expected:
			// It was announced with AddMember.
			add = raftnode.Change{Kind: raftnode.UpdateAddr, ID: id, Addr: req.PeerAddr, Disk: req.DiskId}
		case !req.GetRejoin():
			return nil, fmt.Errorf("%w: node %d; give a new node an id of its own, or none to have one chosen", ErrOtherDisk, id)
		case !a.fallsSilent(ctx, id):
			return nil, fmt.Errorf("%w: node %d is alive with another data directory; two nodes were given one id",
				raftnode.ErrMembershipRefused, id)
		default:
			a.log.Warn("a member has lost its data directory; it is taken out and comes back as a learner", "event", "member_rejoins", "node_changed", id)
			if rejoin, err = a.rejoining(ctx, m); err != nil {
				return nil, err
			}
			if rejoin == "" {
				rejoin = fmt.Sprintf("rejoin-%d-%016x-%d", id, req.DiskId, pos.Index)
				if err := a.noteRejoin(ctx, m, rejoin, commandpb.OperationState_OPERATION_STATE_RUNNING); err != nil {
					return nil, err
				}
			}
			if _, err := a.await(ctx, raftnode.Change{Kind: raftnode.Remove, ID: id}); err != nil {
				return nil, err
			}
			add.ReadReplica = add.ReadReplica || m.ReadReplica
		}
	}
	if pos, err = a.await(ctx, add); err != nil {
		if rejoin != "" {
			err = fmt.Errorf("%w: its old self was taken out, ask again: %w", raftnode.ErrAmbiguous, err)
		}
		return nil, err
	}
	if rejoin != "" {
		if err := a.noteRejoin(ctx, m, rejoin, commandpb.OperationState_OPERATION_STATE_DONE); err != nil {
			a.log.Warn("that a member has come back was not recorded", "node_changed", id, "err", err)
		}
	}
	a.log.Info("a node joins", "event", "member_joins", "node_changed", id, "addr", req.PeerAddr, "version", req.GetVersion(), "index", pos.Index)
	return a.joined(pos, id, pos.Index), nil
}

func (a *clusterAPI) joined(pos raftnode.Position, id, index uint64) *clusterpb.JoinMemberResponse {
	resp := &clusterpb.JoinMemberResponse{ClusterId: a.cfg.ClusterID, NodeId: id, Index: index}
	st := a.cfg.Node.Status()
	for _, m := range raftnode.Live(pos.Members) {
		d := a.describeMember(st, m)
		if d.PeerAddr == "" {
			if known, ok := st.Position.Member(m.ID); ok {
				d.PeerAddr = known.Addr
			}
		}
		resp.Members = append(resp.Members, d)
	}
	return resp
}

// rejoining returns the running operation, "" when there is none, that remembers
// across changes of leader that this self of a member was, or is about to be, taken
// out only to come back. One that an operator has cancelled is ended. With which
// directory it comes back does not matter: that of a node whose disk lasts no longer
// than its process is another at each start, and one that dies in the middle must
// not be locked out for ever.
func (a *clusterAPI) rejoining(ctx context.Context, m raftnode.Member) (string, error) {
	var found *commandpb.Operation
	v := a.cfg.State.Latest()
	defer v.Close()
	err := v.Operations(func(op *commandpb.Operation) bool {
		if op.Kind == router.OperationRejoin && op.NodeId == m.ID && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING &&
			bytes.Equal(op.Detail, router.RejoinDetail(m.Disk)) {
			found = op
		}
		return found == nil
	})
	if err == nil && found.GetCancelRequested() {
		return "", a.noteRejoin(ctx, m, found.OperationId, commandpb.OperationState_OPERATION_STATE_CANCELLED)
	}
	return found.GetOperationId(), err
}

// endRejoins ends what would let node id come back: it is to go for good.
func (a *clusterAPI) endRejoins(ctx context.Context, id uint64) error {
	var left []*commandpb.Operation
	v := a.cfg.State.Latest()
	defer v.Close()
	err := v.Operations(func(op *commandpb.Operation) bool {
		if op.Kind == router.OperationRejoin && op.NodeId == id && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
			left = append(left, op)
		}
		return true
	})
	for _, op := range left {
		if err == nil {
			err = a.noteRejoin(ctx, raftnode.Member{ID: id}, op.OperationId, commandpb.OperationState_OPERATION_STATE_CANCELLED)
		}
	}
	return err
}

// noteRejoin records the beginning or the end of the rejoin of m.
func (a *clusterAPI) noteRejoin(ctx context.Context, m raftnode.Member, id string, state commandpb.OperationState) error {
	res, err := a.cfg.Submitter.Submit(ctx, &commandpb.Command{
		TimeMs: uint64(a.cfg.Now().UnixMilli()),
		Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
			Create: state == commandpb.OperationState_OPERATION_STATE_RUNNING,
			Operation: &commandpb.Operation{
				OperationId: id, Kind: router.OperationRejoin, State: state, NodeId: m.ID, Detail: router.RejoinDetail(m.Disk),
				Subject: fmt.Sprintf("node %d", m.ID), Phase: "exchange of its old self", Message: "its data directory was lost",
			},
		}},
	})
	if err != nil {
		return err
	}
	if r := res.GetRejection(); r != nil && r.GetCode() != commandpb.Code_CODE_EXISTS {
		return FromRejection(r).Err()
	}
	return nil
}

// await makes a change, after the one that is under way.
func (a *clusterAPI) await(ctx context.Context, c raftnode.Change) (raftnode.Position, error) {
	deadline := time.Now().Add(joinWait)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		pos, err := a.cfg.Node.ChangeMembership(ctx, c)
		pending := errors.Is(err, raftnode.ErrMembershipPending) || errors.Is(err, raftnode.ErrBusy)
		if !pending || time.Now().After(deadline) {
			return pos, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return pos, err
		}
	}
}

func (a *clusterAPI) isLearner(pos raftnode.Position, id uint64) bool {
	for _, l := range pos.ConfState.GetLearners() {
		if l == id {
			return true
		}
	}
	return false
}

// fallsSilent says whether the member with an id is not heard of. One that has
// just died still counts as alive for some heartbeats, and for longer when the
// cluster is idle, so it waits a little.
func (a *clusterAPI) fallsSilent(ctx context.Context, id uint64) bool {
	deadline := time.Now().Add(silenceWait)
	for {
		alive := false
		for _, p := range a.cfg.Node.Status().Peers {
			// Right after an election nobody has answered yet: that is no
			// silence. Taken for one, a live voter would be removed.
			alive = alive || p.ID == id && !p.Silent
		}
		if !alive {
			return true
		}
		timer := time.NewTimer(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil || time.Now().After(deadline) {
			return false
		}
	}
}

// tellAddresses puts the addresses of the members into the replicated list as
// far as it lacks them: the first members know each other from their settings,
// and a node that joins has none.
func (a *clusterAPI) tellAddresses(ctx context.Context) error {
	if a.cfg.StoredMembers == nil {
		return nil
	}
	known := a.cfg.Node.Status().Position
	for _, m := range a.cfg.StoredMembers() {
		if m.Removed || m.Addr != "" {
			continue
		}
		full, ok := known.Member(m.ID)
		if !ok || full.Addr == "" {
			continue
		}
		if _, err := a.await(ctx, raftnode.Change{Kind: raftnode.UpdateAddr, ID: m.ID, Addr: full.Addr}); err != nil {
			return err
		}
	}
	return nil
}
