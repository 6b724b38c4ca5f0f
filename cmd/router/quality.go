package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// qualityWait bounds the question for figures that are shown beside what was asked
// for: without them the rest is shown all the same.
const qualityWait = 2 * time.Second

// pipelineQuality returns the figures of a pipeline, nil when they are not to be
// had.
func pipelineQuality(ctx context.Context, c *clients, id string) *clusterpb.GetPlacementQualityResponse {
	ctx, cancel := context.WithTimeout(ctx, qualityWait)
	defer cancel()
	reply, err := c.Cluster.GetPlacementQuality(ctx, &clusterpb.GetPlacementQualityRequest{PipelineId: id})
	if err != nil {
		return nil // an older node, or it is gone meanwhile
	}
	return reply
}

// clusterQuality returns the figures of all pipelines, nil when nobody leads or they
// are not to be had.
func clusterQuality(ctx context.Context, c *clients, st *adminpb.GetClusterStatusResponse) *clusterpb.GetPlacementQualityResponse {
	if st.GetLeaderId() == 0 || st.GetHealth() == adminpb.ClusterHealth_CLUSTER_HEALTH_UNHEALTHY {
		return nil
	}
	reply := pipelineQuality(ctx, c, "")
	if reply.GetQuality() == nil {
		return nil
	}
	return reply
}

// qualityLine says in a line how good a placement is.
func qualityLine(r *clusterpb.GetPlacementQualityResponse) string {
	q := r.GetQuality()
	var parts []string
	parts = append(parts, fmt.Sprintf("%d of %d instances run", q.GetInstancesPlaced(), q.GetInstancesAsked()))
	if n := q.GetStagesPending(); n > 0 {
		parts = append(parts, count(n, "stage waits", "stages wait"))
	}
	if q.GetEdges() > 0 {
		parts = append(parts, fmt.Sprintf("%s of the edges stay in the pod", percent(q.GetLocalEdgeShare())))
	}
	parts = append(parts, "load max/mean "+maxOverMean(q))
	if p := r.GetLastPlan(); p != nil {
		parts = append(parts, fmt.Sprintf("last plan: %s, at least %d", count(p.GetMoves(), "move", "moves"), p.GetLeastMoves()))
	}
	return strings.Join(parts, "; ")
}

// maxOverMean is the highest load by the least it could be, "-" when there is
// nothing to compare.
func maxOverMean(q *clusterpb.PlacementQuality) string {
	if r := q.GetMaxOverMean(); r > 0 && !math.IsInf(r, 0) { // older nodes say +Inf
		return fmt.Sprintf("%.2f", r)
	}
	return "-"
}

// localShare is the share of edges that stay within a pod, "-" when there are none.
func localShare(q *clusterpb.PlacementQuality) string {
	if q.GetEdges() == 0 {
		return "-"
	}
	return percent(q.GetLocalEdgeShare())
}

func percent(share float64) string { return fmt.Sprintf("%.0f%%", 100*share) }

// count puts a number before the word for one or for several.
func count(n uint32, one, several string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, several)
}

// shownPipeline is a pipeline as apply reads it, with a status that apply ignores.
type shownPipeline struct {
	config *adminpb.PipelineConfig
	status pipelineStatus
}

// MarshalJSON implements json.Marshaler.
func (p shownPipeline) MarshalJSON() ([]byte, error) {
	return withMember(p.config, "status", p.status)
}

// withMember renders m with one more member.
func withMember(m proto.Message, name string, value any) ([]byte, error) {
	raw, err := output.Message(m)
	if err != nil {
		return nil, err
	}
	member, err := json.Marshal(map[string]any{name: value})
	if err != nil {
		return nil, err
	}
	raw = raw[:len(raw)-1]
	if len(raw) > 1 {
		raw = append(raw, ',')
	}
	return append(raw, member[1:]...), nil
}

// shownStatus is the status of the cluster with how good the placement is, which is
// left out when nobody leads or the node that was asked does not tell.
type shownStatus struct {
	status    *adminpb.GetClusterStatusResponse
	placement *qualityStatus
}

// MarshalJSON implements json.Marshaler.
func (s shownStatus) MarshalJSON() ([]byte, error) {
	if s.placement == nil {
		return output.Message(s.status)
	}
	return withMember(s.status, "placement", s.placement)
}

type pipelineStatus struct {
	Version uint64 `json:"version"`
	Epoch   uint64 `json:"epoch"`
	// Placement is left out when the node that was asked does not tell.
	Placement *qualityStatus `json:"placement,omitempty"`
	// Stages say where each runs, or why it waits.
	Stages []stagePlacement `json:"stages"`
	// HeldBack says what is decided and not told yet, a sentence each.
	HeldBack []string `json:"held_back,omitempty"`
}

// stagePlacement is where a stage runs, with what is empty left out.
type stagePlacement struct{ *adminpb.StagePlacement }

// MarshalJSON implements json.Marshaler.
func (p stagePlacement) MarshalJSON() ([]byte, error) { return output.Message(p.StagePlacement) }

// qualityStatus is a PlacementQuality with what is zero, which there means
// something.
type qualityStatus struct {
	InstancesAsked  uint32  `json:"instances_asked"`
	InstancesPlaced uint32  `json:"instances_placed"`
	StagesPending   uint32  `json:"stages_pending"`
	Edges           uint32  `json:"edges"`
	EdgesInPod      uint32  `json:"edges_in_pod"`
	EdgesInNode     uint32  `json:"edges_in_node"`
	EdgesInZone     uint32  `json:"edges_in_zone"`
	LocalEdgeShare  float64 `json:"local_edge_share"`
	HighestLoad     float64 `json:"highest_load"`
	MeanLoad        float64 `json:"mean_load"`
	// MaxOverMean is left out when there is nothing to compare.
	MaxOverMean float64 `json:"max_over_mean,omitempty"`
	// LastPlan is left out when the leader has made none of it since it leads, or
	// does not answer.
	LastPlan *planMoves `json:"last_plan,omitempty"`
}

type planMoves struct {
	Revision   uint64 `json:"revision"`
	Moves      uint32 `json:"moves"`
	LeastMoves uint32 `json:"least_moves"`
}

func statusOf(st *adminpb.PipelineStatus, r *clusterpb.GetPlacementQualityResponse, held []string) pipelineStatus {
	out := pipelineStatus{Version: st.GetVersion(), Epoch: st.GetEpoch(), Placement: qualityOf(r), Stages: []stagePlacement{}, HeldBack: held}
	for _, pl := range st.GetPlacements() {
		out.Stages = append(out.Stages, stagePlacement{pl})
	}
	return out
}

// qualityOf returns nil when there are no figures.
func qualityOf(r *clusterpb.GetPlacementQualityResponse) *qualityStatus {
	q := r.GetQuality()
	if q == nil {
		return nil
	}
	ratio := q.GetMaxOverMean()
	if math.IsInf(ratio, 0) { // an older node's, of which JSON knows nothing
		ratio = 0
	}
	out := &qualityStatus{
		q.GetInstancesAsked(), q.GetInstancesPlaced(), q.GetStagesPending(), q.GetEdges(), q.GetEdgesInPod(), q.GetEdgesInNode(),
		q.GetEdgesInZone(), q.GetLocalEdgeShare(), q.GetHighestLoad(), q.GetMeanLoad(), ratio, nil,
	}
	if p := r.GetLastPlan(); p != nil {
		out.LastPlan = &planMoves{p.GetRevision(), p.GetMoves(), p.GetLeastMoves()}
	}
	return out
}
