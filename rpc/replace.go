package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	// maxClockSkew is how far the clock of a new voter may be off: commands are
	// stamped by whoever receives them.
	maxClockSkew = time.Second
	// preflightTimeout bounds the question to one node.
	preflightTimeout = 5 * time.Second
)

// ReplaceMember exchanges a voter for another node in one step. The leader checks
// first what can be checked, then records an operation, which whoever leads
// carries out.
func (a *clusterAPI) ReplaceMember(ctx context.Context, req *clusterpb.ReplaceMemberRequest) (*clusterpb.ReplaceMemberResponse, error) {
	if err := checkNodeID("old_node_id", req.GetOldNodeId()); err != nil {
		return nil, err
	}
	if err := checkNodeID("new_node_id", req.GetNewNodeId()); err != nil {
		return nil, err
	}
	if req.OldNodeId == req.NewNodeId {
		return nil, invalid("new_node_id", "is that of the node to be replaced")
	}
	// The leader only begins; the waiting is done here, where leadership may move
	// without anybody noticing.
	begin := proto.CloneOf(req)
	begin.Detach = true
	resp, err := atLeader(ctx, a, func(ctx context.Context) (*clusterpb.ReplaceMemberResponse, error) {
		if l := a.cfg.Node.Leadership(); !l.Leading {
			return nil, &raftnode.NotLeaderError{Leader: l.Leader, Term: l.Term}
		}
		done, err := a.steer(ctx)
		if err != nil {
			return nil, err
		}
		defer done()
		// What was decided before must be applied before it is judged.
		if _, err := a.cfg.Node.ReadIndex(ctx); err != nil {
			return nil, err
		}
		// A preflight shows it among its checks.
		if !begin.PreflightOnly {
			if err := a.mustBeMember(ctx, begin.OldNodeId); err != nil {
				return nil, err
			}
			if err := a.mustBeMember(ctx, begin.NewNodeId); err != nil {
				if st, ok := status.FromError(err); ok && st.Code() == codes.NotFound {
					err = notAMember(begin.NewNodeId, "; start it with --join first")
				}
				return nil, err
			}
		}
		return a.beginReplace(ctx, begin)
	}, func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ReplaceMemberResponse, error) {
		return c.ReplaceMember(ctx, begin)
	})
	if err != nil || req.PreflightOnly || req.Detach {
		return resp, err
	}
	if err := a.reader.Wait(ctx); err != nil {
		return nil, err
	}
	op, err := recovery.Wait(ctx, a.cfg.State, resp.GetOperation().GetOperationId())
	if err != nil {
		return nil, err
	}
	if op != nil {
		resp.Operation = operationToAPI(op)
	}
	return resp, nil
}

func (a *clusterAPI) beginReplace(ctx context.Context, req *clusterpb.ReplaceMemberRequest) (*clusterpb.ReplaceMemberResponse, error) {
	st := a.cfg.Node.Status()
	running, err := a.runningOperation(router.OperationReplace)
	if err != nil {
		return nil, err
	}
	if running != nil {
		return nil, fmt.Errorf("%w: %s (%s); wait for it or cancel it; nothing was begun", ErrOperationRunning, running.OperationId, running.Subject)
	}
	resp := &clusterpb.ReplaceMemberResponse{Checks: a.preflight(ctx, st, req.OldNodeId, req.NewNodeId)}
	if req.PreflightOnly {
		return resp, nil
	}
	var failed []string
	for _, c := range resp.Checks {
		if !c.Ok {
			failed = append(failed, c.Name+": "+c.Detail)
		}
	}
	if len(failed) > 0 {
		return nil, fmt.Errorf("%w: %s; nothing was begun, the cluster is as it was", ErrPreflight, strings.Join(failed, "; "))
	}
	detail, err := router.Replacement{Old: req.OldNodeId, New: req.NewNodeId}.Encode()
	if err != nil {
		return nil, err
	}
	op := &commandpb.Operation{
		OperationId: fmt.Sprintf("replace-%d-%d-%d", req.OldNodeId, req.NewNodeId, st.Applied), Kind: router.OperationReplace,
		State: commandpb.OperationState_OPERATION_STATE_RUNNING, Subject: fmt.Sprintf("node %d by node %d", req.OldNodeId, req.NewNodeId),
		NodeId: st.ID, Phase: "catching up", Unit: "entries", Detail: detail,
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_PutOperation{
		PutOperation: &commandpb.PutOperation{Operation: op, Create: true},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return nil, FromRejection(rej).Err()
	}
	if resp.Operation, err = a.GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: op.OperationId}); err != nil {
		return nil, err
	}
	return resp, nil
}

// runningOperation returns a running operation of a kind, nil when there is none.
func (a *clusterAPI) runningOperation(kind string) (found *commandpb.Operation, err error) {
	v := a.cfg.State.View()
	defer v.Close()
	err = v.Operations(func(op *commandpb.Operation) bool {
		if op.Kind == kind && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
			found = op
		}
		return found == nil
	})
	return found, err
}

// preflight looks at everything that could make the exchange fail in the middle.
// It runs on the leader and changes nothing.
func (a *clusterAPI) preflight(ctx context.Context, st raftnode.Status, from, to uint64) []*clusterpb.PreflightCheck {
	var checks []*clusterpb.PreflightCheck
	check := func(name string, ok bool, format string, args ...any) {
		checks = append(checks, &clusterpb.PreflightCheck{Name: name, Ok: ok, Detail: fmt.Sprintf(format, args...)})
	}
	voters := st.Position.ConfState.GetVoters()
	old, oldErr := live(st, from)
	next, nextErr := live(st, to)
	switch {
	case oldErr != nil:
		check("members", false, "%v", oldErr)
	case nextErr != nil:
		check("members", false, "%v: start it with --join first", nextErr)
	case !slices.Contains(voters, from):
		check("members", false, "node %d does not vote: 'router member remove %d' is enough", from, from)
	default:
		check("members", true, "node %d is a voter, node %d a member", old.ID, next.ID)
	}
	if oldErr != nil || nextErr != nil {
		return checks
	}

	var others []raftnode.Member // voters that stay
	alive := 0
	for _, m := range raftnode.Live(st.Position.Members) {
		if m.ID == from || m.ID == to || !slices.Contains(voters, m.ID) {
			continue
		}
		others = append(others, m)
		if m.ID == st.ID || answers(st, m.ID) {
			alive++
		}
	}
	if answers(st, to) || to == st.ID {
		alive++
	}
	need := (len(others)+1)/2 + 1
	check("quorum", alive >= need, "%d of the %d voters after the exchange answer, %d are needed", alive, len(others)+1, need)
	// A node that votes already brings no vote: then the exchange is a removal, and
	// three voters would become two, of which none may fail.
	if before, after := spare(len(voters)), spare(len(others)+1); after < before {
		check("strength", false, "node %d votes already, so that %d voters would be left, of which %d may fail instead of %d: "+
			"let one more node join first; if that is meant, 'router member remove %d' does it", to, len(others)+1, after, before, from)
	}

	asked := a.cfg.Now()
	info, err := a.askPreflight(ctx, to, others)
	if err != nil {
		check("reach", false, "node %d does not answer: %s", to, Plain(err.Error()))
		return checks
	}
	took := a.cfg.Now().Sub(asked)
	check("versions", true, "node %d runs %s, the leader %s", to, info.GetVersion(), a.cfg.Version)
	check("reach", len(info.GetUnreachable()) == 0, "node %d reaches %s", to, reachText(others, info.GetUnreachable()))
	for _, name := range a.reachedBy(ctx, st, others, next) {
		check("reach back", false, "%s", name)
	}
	need64 := 2 * a.cfg.StateBytes()
	check("disk", info.GetFreeBytes() >= need64, "node %d has %d bytes free, %d are needed (twice the state)", to, info.GetFreeBytes(), need64)
	// Its clock was read somewhere in between.
	skew := time.UnixMilli(info.GetTimeUnixMs()).Sub(asked.Add(took/2)).Abs() - took/2
	check("clock", skew <= maxClockSkew, "the clock of node %d differs by %v, at most %v is allowed", to, max(0, skew).Round(time.Millisecond), maxClockSkew)
	return checks
}

// spare is how many of n voters may fail.
func spare(n int) int { return (n - 1) / 2 }

func answers(st raftnode.Status, id uint64) bool {
	for _, p := range st.Peers {
		if p.ID == id {
			return p.Answered && !p.Silent
		}
	}
	return false
}

// live returns member id of st; the error says why there is none.
func live(st raftnode.Status, id uint64) (raftnode.Member, error) {
	m, ok := st.Position.Member(id)
	switch {
	case !ok:
		return m, fmt.Errorf("node %d is no member", id)
	case m.Removed:
		return m, fmt.Errorf("node %d was removed", id)
	}
	return m, nil
}

func reachText(all []raftnode.Member, missing []*peerpb.PeerAddr) string {
	if len(missing) == 0 {
		return fmt.Sprintf("all %d voters that stay", len(all))
	}
	var ids []string
	for _, p := range missing {
		ids = append(ids, fmt.Sprint(p.GetNodeId()))
	}
	return "not node " + strings.Join(ids, ", ")
}

func (a *clusterAPI) askPreflight(ctx context.Context, id uint64, reach []raftnode.Member) (*peerpb.PreflightResponse, error) {
	if id == a.cfg.NodeID {
		return &peerpb.PreflightResponse{Version: a.cfg.Version, TimeUnixMs: a.cfg.Now().UnixMilli(), FreeBytes: ^uint64(0)}, nil
	}
	if a.cfg.Preflight == nil {
		return nil, errors.New("this node cannot ask others")
	}
	ctx, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	return a.cfg.Preflight(ctx, id, reach)
}

// reachedBy asks the voters that stay whether they reach next, and returns what
// is wrong.
func (a *clusterAPI) reachedBy(ctx context.Context, st raftnode.Status, others []raftnode.Member, next raftnode.Member) []string {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var faults []string
	for _, m := range others {
		if m.ID == st.ID || !answers(st, m.ID) {
			continue // the leader has just asked; who is down is counted elsewhere
		}
		wg.Go(func() {
			info, err := a.askPreflight(ctx, m.ID, []raftnode.Member{next})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				faults = append(faults, fmt.Sprintf("node %d does not answer: %s", m.ID, Plain(err.Error())))
			case len(info.GetUnreachable()) > 0:
				faults = append(faults, fmt.Sprintf("node %d does not reach node %d at %s", m.ID, next.ID, next.Addr))
			}
		})
	}
	wg.Wait()
	slices.Sort(faults)
	return faults
}
