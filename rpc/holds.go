package rpc

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// HeldPipeline is what the leader's last plan of a pipeline holds back; Server.Held
// returns it, and *control.Placer says what each means.
type HeldPipeline struct {
	Pipeline         string
	Later            int
	Stages, Sidecars []string
	HeardBy          time.Time
	Moves            int
	Until            time.Time
}

// namedSidecars is how many of those that are waited for are named.
const namedSidecars = 5

// GetPlacementHolds tells what this node holds back, if it leads.
func (a *clusterAPI) GetPlacementHolds(ctx context.Context, req *clusterpb.GetPlacementHoldsRequest) (*clusterpb.GetPlacementHoldsResponse, error) {
	if err := checkOptionalID("pipeline_id", req.GetPipelineId()); err != nil {
		return nil, err
	}
	if !a.cfg.Node.Leadership().Leading {
		conn, rctx, err := a.relay.connect(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := clusterpb.NewClusterClient(conn).GetPlacementHolds(rctx, req)
		return resp, relayedErr(err)
	}
	if a.cfg.Held == nil {
		return nil, errNoPlacement()
	}
	if err := a.reader.Wait(ctx); err != nil { // it may lead no more
		return nil, err
	}
	resp := a.held(req.PipelineId)
	if !a.cfg.Node.Leadership().Leading {
		return nil, retryAfter{raftnode.ErrNoLeader, time.Second}
	}
	return resp, nil
}

// held is what this node holds back of a pipeline, or of all when that is empty, while
// it leads.
func (s *Server) held(pipeline string) *clusterpb.GetPlacementHoldsResponse {
	resp := &clusterpb.GetPlacementHoldsResponse{}
	if s.cfg.Planned != nil {
		resp.PlannedRevision = s.cfg.Planned()
	}
	if s.cfg.HeldExpiries != nil {
		n, until, last := s.cfg.HeldExpiries()
		resp.ExpiriesHeld, resp.ExpiriesHeldUntil, resp.ExpiriesHeldLast = uint32(n), timestampOrNil(until), timestampOrNil(last)
	}
	if s.cfg.Held == nil {
		return resp
	}
	size := 0
	for _, h := range s.cfg.Held(pipeline) {
		p := &clusterpb.HeldPipeline{
			PipelineId: h.Pipeline, PutOff: uint32(h.Later), StageIds: h.Stages, HeardBy: timestampOrNil(h.HeardBy),
			WaitsFor: h.Sidecars[:min(namedSidecars, len(h.Sidecars))], WaitsForTotal: uint32(len(h.Sidecars)),
			HeldMoves: uint32(h.Moves), HeldUntil: timestampOrNil(h.Until),
		}
		if size += proto.Size(p); size > studyAnswerBytes {
			resp.Cut = true
			break
		}
		resp.Pipelines = append(resp.Pipelines, p)
	}
	return resp
}

func timestampOrNil(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// leaderWords is what the leader says it holds back of a pipeline, or of all when that is
// empty. It is asked at most once, when that is needed first, and waited for
// leaderWord: an answer that can be had without it is given without it.
type leaderWords struct {
	s        *Server
	ctx      context.Context
	pipeline string

	asked bool
	said  *clusterpb.GetPlacementHoldsResponse // nil = it did not answer
}

func (w *leaderWords) get() *clusterpb.GetPlacementHoldsResponse {
	if w.asked {
		return w.said
	}
	w.asked = true
	if w.s.cfg.Node.Leadership().Leading {
		if w.s.cfg.Held != nil {
			w.said = w.s.held(w.pipeline)
		}
		return w.said
	}
	// Who is content with an old state is not made to wait for a leader that may be gone.
	if o, err := parseReadOptions(w.ctx); err != nil || o.stale {
		return nil
	}
	conn, ctx, err := w.s.relay.connect(w.ctx)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, leaderWord)
	defer cancel()
	said, err := clusterpb.NewClusterClient(conn).GetPlacementHolds(ctx, &clusterpb.GetPlacementHoldsRequest{PipelineId: w.pipeline})
	if err != nil {
		w.s.log.Debug("the leader does not say what it holds back", "err", err)
		return nil
	}
	w.said = said
	return said
}

// pendingReason says why nobody runs a stage of an enabled pipeline, of which the
// planner knows a reason. releasing are the handovers it waits for.
func pendingReason(p *commandpb.Pipeline, stage string, planned plannedReason, releasing []*commandpb.Handover, word *leaderWords) string {
	switch {
	case planned.placed && len(releasing) > 0:
		return handoverReason(releasing, stage)
	case planned.placed:
		return heldReason(p, stage, planned.text, word.get())
	case len(releasing) > 0:
		return planned.text + "; also, " + handoverReason(releasing, stage)
	}
	return planned.text
}

// heldReason says why nobody runs a stage that has a place, by what the leader said; it
// is planned when it holds nothing back.
func heldReason(p *commandpb.Pipeline, stage, planned string, said *clusterpb.GetPlacementHoldsResponse) string {
	const place = "a sidecar can take it; "
	if said == nil {
		return place + "whether that is held back for now, and until when, only the leader knows, which was not asked or did not answer"
	}
	id := p.GetSpec().GetId()
	for _, h := range said.Pipelines {
		if h.PipelineId == id && slices.Contains(h.StageIds, stage) {
			return putOffReason(h)
		}
	}
	switch {
	case said.PlannedRevision == 0:
		return place + "the leader has not made a plan yet since it was elected"
	case said.PlannedRevision < p.ModRevision:
		return place + fmt.Sprintf("where the stages of version %d run is not decided yet", p.Version)
	case said.Cut:
		return place + "the leader holds back too much to say whether this is"
	}
	return planned
}

// putOffReason says whom changes that are put off wait for, and how long at most.
func putOffReason(h *clusterpb.HeldPipeline) string {
	const why = "records could go round between sidecars that have heard of a change and others that have not"
	if len(h.WaitsFor) == 0 || h.HeardBy == nil {
		return why + "; it is told in parts"
	}
	who := "sidecar " + h.WaitsFor[0] + " has"
	if n := int64(h.WaitsForTotal) - 1; n > 0 {
		who = fmt.Sprintf("sidecars %s and %d more have", h.WaitsFor[0], n)
	}
	return fmt.Sprintf("%s: nothing more is told before %s confirmed what was told before, or must have heard of it, which is by %s", why, who, clock(h.HeardBy.AsTime()))
}

// clock renders a time by which something is over for people: the next full second.
func clock(t time.Time) string { return t.Add(time.Second - 1).UTC().Format(time.RFC3339) }
