package rpc

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// relayTimeout bounds how long a follower waits for the leader's picture of the
// cluster before it answers with its own.
const relayTimeout = time.Second

const (
	// askedAtOnce bounds how many nodes are asked about themselves at a time.
	askedAtOnce = 16
	// askedWithin bounds how long all of them are waited for: less than the half second
	// after which a client turns to another node, for one that hangs is no fault of
	// this one.
	askedWithin = 400 * time.Millisecond
)

// GetClusterStatus describes the cluster as the leader sees it; a node that
// cannot reach the leader in time answers with what it knows itself. What only each
// node knows of itself it is asked for. It works without a leader.
func (a *adminAPI) GetClusterStatus(ctx context.Context, _ *adminpb.GetClusterStatusRequest) (*adminpb.GetClusterStatusResponse, error) {
	st := a.cfg.Node.Status()
	own := a.clusterStatus(st)
	a.reader.SetHeader(ctx, own.Revision, a.cfg.State.Epoch())
	if len(metadata.ValueFromIncomingContext(ctx, metadataRelayed)) > 0 {
		return own, nil
	}
	if st.Leader != st.ID {
		own = a.asTheLeaderSees(ctx, st, own)
		a.reader.SetHeader(ctx, own.Revision, a.cfg.State.Epoch())
	}
	a.askNodes(ctx, own)
	return own, nil
}

// askNodes fills in what the nodes of resp say of themselves. What one does not say in
// time stays unknown.
func (a *adminAPI) askNodes(ctx context.Context, resp *adminpb.GetClusterStatusResponse) {
	ctx, cancel := context.WithTimeout(ctx, askedWithin)
	defer cancel()
	slots := make(chan struct{}, askedAtOnce)
	var asking sync.WaitGroup
	for _, n := range resp.Nodes {
		if n.Version != "" || n.NodeId == a.cfg.NodeID {
			continue
		}
		asking.Go(func() {
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
			case <-ctx.Done():
				return
			}
			conn, rctx, err := a.relay.to(ctx, n.NodeId)
			if err != nil {
				return
			}
			theirs, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(rctx, &adminpb.GetClusterStatusRequest{})
			if err != nil || theirs.GetClusterId() != resp.ClusterId || theirs.GetNodeId() != n.NodeId {
				return
			}
			n.AppliedIndex, n.Version = theirs.GetAppliedIndex(), theirs.GetVersion()
		})
	}
	asking.Wait()
}

// asTheLeaderSees returns own with what the leader knows better.
func (a *adminAPI) asTheLeaderSees(ctx context.Context, st raftnode.Status, own *adminpb.GetClusterStatusResponse) *adminpb.GetClusterStatusResponse {
	conn, rctx, err := a.relay.connect(ctx)
	if err != nil {
		return onlyOwn(own)
	}
	rctx, cancel := context.WithTimeout(rctx, relayTimeout)
	defer cancel()
	theirs, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(rctx, &adminpb.GetClusterStatusRequest{})
	if err != nil || theirs.GetClusterId() != own.ClusterId {
		return onlyOwn(own)
	}
	// The indexes stay those of the node that was asked.
	own.LeaderId, own.Term = theirs.GetLeaderId(), max(theirs.GetTerm(), own.Term)
	own.Health = theirs.GetHealth()
	own.HeldMoves, own.PendingHandovers, own.DrainingSidecars = theirs.GetHeldMoves(), theirs.GetPendingHandovers(), theirs.GetDrainingSidecars()
	for _, alarm := range theirs.GetAlarms() {
		if !slices.Contains(own.Alarms, alarm) {
			own.Alarms = append(own.Alarms, alarm)
		}
	}
	mine := own.Nodes
	own.Nodes = theirs.GetNodes()
	for _, n := range own.Nodes {
		for _, m := range mine {
			if m.NodeId != n.NodeId {
				continue
			}
			if m.NodeId == st.ID {
				n.AppliedIndex, n.Version = m.AppliedIndex, m.Version
			}
			if n.ClientAddress == "" {
				n.ClientAddress = m.ClientAddress
			}
		}
	}
	return own
}

// onlyOwn says of what this node knows that the leader has not confirmed it: it
// is not enough to call the cluster healthy.
func onlyOwn(own *adminpb.GetClusterStatusResponse) *adminpb.GetClusterStatusResponse {
	if own.LeaderId == 0 {
		return own // the alarms say so
	}
	if own.Health == adminpb.ClusterHealth_CLUSTER_HEALTH_HEALTHY {
		own.Health = adminpb.ClusterHealth_CLUSTER_HEALTH_DEGRADED
	}
	own.Alarms = append([]string{fmt.Sprintf("the leader, node %d, cannot be reached from node %d; what is shown is what node %d knows, and may be out of date",
		own.LeaderId, own.NodeId, own.NodeId)}, own.Alarms...)
	return own
}

// clusterStatus is what this node knows.
func (a *adminAPI) clusterStatus(st raftnode.Status) *adminpb.GetClusterStatusResponse {
	now := a.cfg.Now()
	resp := &adminpb.GetClusterStatusResponse{
		NodeId:       st.ID,
		LeaderId:     st.Leader,
		Term:         st.Term,
		CommitIndex:  st.Commit,
		AppliedIndex: st.Applied,
		ClusterId:    fmt.Sprintf("%016x", a.cfg.ClusterID),
		ClusterName:  a.cfg.ClusterName,
		Revision:     a.cfg.State.Revision(),
		Version:      a.cfg.Version,
	}
	held, handovers, draining := a.cfg.Waiting()
	resp.HeldMoves, resp.PendingHandovers, resp.DrainingSidecars = uint32(held), uint32(handovers), uint32(draining)
	for _, alarm := range slices.Concat(a.cfg.Alarms(), a.rivals.alarms(now)) {
		resp.Alarms = append(resp.Alarms, Plain(alarm))
	}
	learners := st.Position.ConfState.GetLearners()
	silent := 0 // voters
	var unreached []string
	for _, m := range raftnode.Live(st.Position.Members) {
		n := &adminpb.NodeStatus{
			NodeId:        m.ID,
			Address:       m.Addr,
			ClientAddress: a.cfg.ClientAddr(m.ID),
			Role:          adminpb.NodeRole_NODE_ROLE_FOLLOWER,
		}
		learner := slices.Contains(learners, m.ID)
		if learner {
			n.Role = adminpb.NodeRole_NODE_ROLE_LEARNER
		}
		if m.ID == st.Leader {
			n.Role = adminpb.NodeRole_NODE_ROLE_LEADER
		}
		a.describeNode(n, st, now)
		resp.Nodes = append(resp.Nodes, n)
		if n.Healthy {
			continue
		}
		if !learner {
			silent++
		}
		if st.Leader == st.ID {
			resp.Alarms = append(resp.Alarms, silence(n, now))
		} else {
			unreached = append(unreached, fmt.Sprintf("node %d (%s)", n.NodeId, n.Address))
		}
	}
	resp.Alarms = append(resp.Alarms, fragile(st.Position.ConfState.GetVoters())...)
	switch {
	case st.Leader == 0:
		resp.Health = adminpb.ClusterHealth_CLUSTER_HEALTH_UNHEALTHY
		alarm := "there is no leader: writes wait; a majority of the voters must be up and reach each other"
		if len(unreached) > 0 {
			alarm += fmt.Sprintf("; node %d cannot reach %s", st.ID, strings.Join(unreached, ", "))
		}
		resp.Alarms = append(resp.Alarms, alarm)
	case a.cfg.Gate.Reason() != "": // the alarms say why
		resp.Health = adminpb.ClusterHealth_CLUSTER_HEALTH_UNHEALTHY
	case silent > 0:
		resp.Health = adminpb.ClusterHealth_CLUSTER_HEALTH_DEGRADED
	default:
		resp.Health = adminpb.ClusterHealth_CLUSTER_HEALTH_HEALTHY
	}
	return resp
}

// describeNode fills in what st says of one node.
func (a *adminAPI) describeNode(n *adminpb.NodeStatus, st raftnode.Status, now time.Time) {
	if n.NodeId == st.ID {
		n.Healthy = true
		n.AppliedIndex, n.MatchIndex, n.Version = st.Applied, st.LastIndex, a.cfg.Version
		n.LastContact = timestamppb.New(now)
		if st.Role == raftnode.RoleCandidate || st.Role == raftnode.RolePreCandidate {
			n.Role = adminpb.NodeRole_NODE_ROLE_CANDIDATE
		}
		return
	}
	for _, p := range st.Peers {
		if p.ID != n.NodeId {
			continue
		}
		n.Healthy, n.HealthUnknown, n.MatchIndex = p.Answered && !p.Silent, !p.Answered && !p.Silent, p.Match
		if p.Answered {
			n.LastContact = timestamppb.New(now.Add(-p.Silence))
		}
		return
	}
	// Not leading: a leader is known only while it is heard of.
	n.Healthy = n.NodeId == st.Leader || a.cfg.Reachable(n.NodeId)
}

func silence(n *adminpb.NodeStatus, now time.Time) string {
	if n.HealthUnknown {
		return fmt.Sprintf("node %d (%s) has not answered the new leader yet", n.NodeId, n.Address)
	}
	since := "since it began to lead"
	if n.LastContact != nil {
		since = "for " + now.Sub(n.LastContact.AsTime()).Round(time.Second).String()
	}
	return fmt.Sprintf("node %d (%s) has not answered the leader %s: start it again or see to the network between them", n.NodeId, n.Address, since)
}

// metricPrefix is that of the original's metrics.
const metricPrefix = "conveyor_etl_router_"

// GetMetrics returns numbers of this node, all or those named. A name may be
// given with or without the prefix.
func (a *adminAPI) GetMetrics(_ context.Context, req *adminpb.GetMetricsRequest) (*adminpb.GetMetricsResponse, error) {
	if err := checkTexts("metric_names", req.GetMetricNames(), 1000, MaxText); err != nil {
		return nil, err
	}
	all, err := a.metrics()
	if err != nil {
		return nil, err
	}
	resp := &adminpb.GetMetricsResponse{Metrics: make(map[string]float64, len(all))}
	if len(req.GetMetricNames()) == 0 {
		for name, v := range all {
			resp.Metrics[metricPrefix+name] = v
		}
		return resp, nil
	}
	for _, name := range req.GetMetricNames() {
		if v, ok := all[strings.TrimPrefix(name, metricPrefix)]; ok {
			resp.Metrics[name] = v
		}
	}
	return resp, nil
}

func (a *adminAPI) metrics() (map[string]float64, error) {
	st := a.cfg.Node.Status()
	v := a.cfg.State.Latest()
	defer v.Close()
	counts, err := v.Counts()
	if err != nil {
		return nil, err
	}
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	leading := 0.0
	if st.Leader == st.ID {
		leading = 1
	}
	m := map[string]float64{
		"raft_is_leader":           leading,
		"raft_leader_id":           float64(st.Leader),
		"raft_term":                float64(st.Term),
		"raft_commit_index":        float64(st.Commit),
		"raft_applied_index":       float64(st.Applied),
		"raft_durable_index":       float64(st.Durable),
		"raft_first_index":         float64(st.FirstIndex),
		"raft_last_index":          float64(st.LastIndex),
		"raft_log_bytes":           float64(st.LogBytes),
		"raft_waiting_proposals":   float64(st.WaitingProposals),
		"raft_waiting_bytes":       float64(st.WaitingBytes),
		"raft_append_queue":        float64(st.AppendQueue),
		"raft_apply_queue":         float64(st.ApplyQueue),
		"wal_syncs_total":          float64(st.Syncs),
		"wal_sync_seconds_total":   st.SyncTime.Seconds(),
		"revision":                 float64(v.Revision()),
		"pipelines":                float64(counts.Pipelines),
		"sidecars":                 float64(counts.Sidecars),
		"services":                 float64(counts.Services),
		"groups":                   float64(counts.Groups),
		"assignments":              float64(counts.Assignments),
		"watches":                  float64(a.watches.Load()),
		"stream_commits_total":     float64(a.commits.Load()),
		"panics_total":             float64(a.panics.Load()),
		"told_sidecars":            float64(a.told.len()),
		"streamed_sidecars":        float64(a.streamed.Load()),
		"process_goroutines":       float64(runtime.NumGoroutine()),
		"process_heap_bytes":       float64(mem.HeapAlloc),
		"process_memory_bytes":     float64(mem.Sys),
		"process_gc_seconds_total": time.Duration(mem.PauseTotalNs).Seconds(),
	}
	a.push.metrics(m)
	a.told.delay.metrics("assignment_applied_seconds", m)
	for name, value := range a.cfg.Metrics() {
		m[strings.TrimPrefix(name, metricPrefix)] = value
	}
	return m, nil
}
