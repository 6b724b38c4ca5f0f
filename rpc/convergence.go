package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	// defaultLaggards is how many laggards are listed, maxLaggards how many may be
	// asked for.
	defaultLaggards = 100
	maxLaggards     = 10_000
	// appliedChunk is how many sidecars go into one message of ListApplied.
	appliedChunk = 1000
	// askNodeTimeout bounds the question to one other node. One that is down must
	// not use up the time of the call.
	askNodeTimeout = 2 * time.Second
)

// GetConvergence compares what was decided about a pipeline with what its sidecars
// are known to have applied. The leader answers it, for it knows what is decided;
// what sidecars have applied is known to the nodes they talk to, so all are asked.
func (a *clusterAPI) GetConvergence(ctx context.Context, req *clusterpb.GetConvergenceRequest) (*clusterpb.GetConvergenceResponse, error) {
	if err := checkID("pipeline_id", req.GetPipelineId()); err != nil {
		return nil, err
	}
	if n := req.GetMaxLaggards(); n > maxLaggards {
		return nil, invalid("max_laggards", "%d, the limit is %d", n, maxLaggards)
	}
	if !a.cfg.Node.Leadership().Leading {
		conn, rctx, err := a.relay.connect(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := clusterpb.NewClusterClient(conn).GetConvergence(rctx, req)
		return resp, relayedErr(err)
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	p, err := v.Pipeline(req.PipelineId)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return nil, FromRejection(&commandpb.Rejection{
			Code: commandpb.Code_CODE_NOT_FOUND, Reason: fmt.Sprintf("there is no pipeline %q", req.PipelineId),
			Subject: "pipeline " + req.PipelineId,
		}).Err()
	}
	resp := &clusterpb.GetConvergenceResponse{Version: p.Version, Revision: v.Revision()}
	if err := a.pendingStages(ctx, v, p, resp); err != nil {
		return nil, err
	}
	concerned, err := concernedBy(v, req.PipelineId)
	if err != nil {
		return nil, err
	}
	applied := a.askApplied(ctx, req.PipelineId, v.Revision(), resp)
	for _, as := range concerned {
		if a.told.hasApplied(as.Assignment, v.Epoch()) {
			applied[as.SidecarId] = struct{}{}
		}
	}
	limit := int(req.GetMaxLaggards())
	if limit == 0 {
		limit = defaultLaggards
	}
	for _, as := range concerned {
		resp.Concerned++
		if _, ok := applied[as.SidecarId]; ok {
			resp.Applied++
		} else if len(resp.Laggards) < limit {
			resp.Laggards = append(resp.Laggards, &clusterpb.Laggard{SidecarId: as.SidecarId, Reason: as.reason()})
		}
	}
	resp.Converged = len(resp.Pending) == 0 && resp.Applied == resp.Concerned
	return resp, nil
}

// pendingStages adds the stages that nobody runs, or that may still be moved.
func (a *clusterAPI) pendingStages(ctx context.Context, v *router.View, p *commandpb.Pipeline, resp *clusterpb.GetConvergenceResponse) error {
	if planned := a.cfg.Planned; planned != nil && planned() < p.ModRevision {
		resp.Pending = append(resp.Pending, &clusterpb.PendingStage{
			Reason: fmt.Sprintf("where the stages of version %d run is not decided yet", p.Version),
		})
		return nil
	}
	for _, h := range a.held(p.GetSpec().GetId()).GetPipelines() {
		if h.PutOff > 0 {
			resp.Pending = append(resp.Pending, &clusterpb.PendingStage{Reason: "some sidecars are told their part later: " + putOffReason(h)})
		}
	}
	if !p.GetSpec().GetEnabled() {
		return nil
	}
	st, err := a.newPlacementReader(ctx, v, p.GetSpec().GetId()).status(p)
	if err != nil {
		return err
	}
	for _, pl := range st.GetPlacements() {
		if len(pl.GetSidecarIds()) == 0 {
			resp.Pending = append(resp.Pending, &clusterpb.PendingStage{StageId: pl.GetStageId(), Reason: pl.GetPendingReason()})
		}
	}
	return nil
}

// concern is one sidecar that has to know.
type concern struct {
	*commandpb.Assignment
	state commandpb.SidecarState
}

func (c concern) reason() string {
	what := "is not known to have applied its part"
	if c.Revoked {
		what = "is not known to have given up its part"
	}
	if c.state != commandpb.SidecarState_SIDECAR_STATE_ALIVE {
		what += "; it is " + sidecarStateWord(c.state)
	}
	return what
}

// concernedBy returns the assignments of a pipeline that their sidecars have to
// know of, by sidecar. One that is gone for good, or counts as gone, has to know of
// no loss.
func concernedBy(v *router.View, pipeline string) ([]concern, error) {
	var out []concern
	var inner error
	err := v.PipelineAssignments(pipeline, func(as *commandpb.Assignment) bool {
		var sc *commandpb.Sidecar
		if sc, inner = v.Sidecar(as.SidecarId); inner != nil {
			return false
		}
		gone := sc == nil || sc.State == commandpb.SidecarState_SIDECAR_STATE_EXPIRED
		if !as.Revoked || !gone {
			out = append(out, concern{as, sc.GetState()})
		}
		return true
	})
	slices.SortFunc(out, func(x, y concern) int { return strings.Compare(x.SidecarId, y.SidecarId) })
	return out, errors.Join(err, inner)
}

// askApplied asks the other nodes which sidecars have applied their part, as of the
// given revision or later, and adds to resp those that do not answer.
func (a *clusterAPI) askApplied(ctx context.Context, pipeline string, revision uint64, resp *clusterpb.GetConvergenceResponse) map[string]struct{} {
	applied := make(map[string]struct{})
	var mu sync.Mutex
	var asking sync.WaitGroup
	for _, m := range a.cfg.Node.Status().Position.Members {
		if m.Removed || m.ID == a.cfg.NodeID {
			continue
		}
		asking.Go(func() {
			ids, err := a.appliedAt(ctx, m.ID, pipeline, revision)
			mu.Lock()
			defer mu.Unlock()
			for _, id := range ids {
				applied[id] = struct{}{}
			}
			if err != nil {
				a.log.Debug("a node does not say what its sidecars have applied", "peer", m.ID, "err", err)
				resp.Unreachable = append(resp.Unreachable, m.ID)
			}
		})
	}
	asking.Wait()
	slices.Sort(resp.Unreachable)
	return applied
}

func (a *clusterAPI) appliedAt(ctx context.Context, node uint64, pipeline string, revision uint64) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, askNodeTimeout)
	defer cancel()
	conn, ctx, err := a.relay.to(ctx, node)
	if err != nil {
		return nil, err
	}
	ctx = metadata.AppendToOutgoingContext(ctx, MetadataConsistency, "stale", MetadataMinRevision, strconv.FormatUint(revision, 10))
	stream, err := clusterpb.NewClusterClient(conn).ListApplied(ctx, &clusterpb.ListAppliedRequest{PipelineId: pipeline})
	if err != nil {
		return nil, err
	}
	var out []string
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, m.GetSidecarIds()...)
	}
}

// ListApplied answers from what this node was told by the sidecars that talk to it.
func (a *clusterAPI) ListApplied(req *clusterpb.ListAppliedRequest, stream clusterpb.Cluster_ListAppliedServer) error {
	if err := checkID("pipeline_id", req.GetPipelineId()); err != nil {
		return err
	}
	v, err := a.view(stream.Context())
	if err != nil {
		return err
	}
	var ids []string
	err = v.PipelineAssignments(req.PipelineId, func(as *commandpb.Assignment) bool {
		if a.told.hasApplied(as, v.Epoch()) {
			ids = append(ids, as.SidecarId)
		}
		return true
	})
	v.Close() // before sending: whoever asks may not be reading
	if err != nil {
		return err
	}
	for chunk := range slices.Chunk(ids, appliedChunk) {
		if err := stream.Send(&clusterpb.ListAppliedResponse{SidecarIds: chunk}); err != nil {
			return err
		}
	}
	return nil
}
