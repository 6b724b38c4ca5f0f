package rpc

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// PlacementStudy answers questions about where stages run, as of what is applied on
// this node; *control.Study is one. Its methods block until it is their turn, and
// fail with raftnode.ErrBusy when too much is asked.
type PlacementStudy interface {
	// Explain returns nil for a pipeline that does not exist.
	Explain(ctx context.Context, pipeline string, q placement.Query) ([]placement.StageStatus, router.Point, error)
	WhatIf(ctx context.Context, lose func(*placement.Sidecar) bool, reasons int) (placement.Outlook, router.Point, error)
	Try(ctx context.Context, specs []*commandpb.PipelineSpec, reasons int) (placement.Outlook, router.Point, error)
}

// The limits of questions about the placement.
const (
	// MaxPlannedPipelines bounds the pipelines of one PlanPipelines.
	MaxPlannedPipelines = 1000
	maxLostSidecars     = 10_000
	maxLostZones        = 100

	defaultExplained = 20
	maxExplained     = 1000
	defaultOutlook   = 1000
	maxOutlook       = 10_000
	// studyAnswerBytes bounds one answer: clients take 4 MiB.
	studyAnswerBytes = 3 << 20
	// pendingReasons is for how many pipelines an outlook says why stages of them
	// would wait.
	pendingReasons = 100
)

func listLimit(asked uint32, standard, most int) (int, error) {
	if asked > uint32(most) {
		return 0, invalid("limit", "%d, the limit is %d", asked, most)
	}
	if asked == 0 {
		return standard, nil
	}
	return int(asked), nil
}

// study waits until this node may answer at the consistency asked for.
func (a *clusterAPI) study(ctx context.Context) (PlacementStudy, error) {
	if a.cfg.Placement == nil {
		return nil, errNoPlacement()
	}
	return a.cfg.Placement, a.reader.Wait(ctx)
}

func errNoPlacement() error {
	return newStatus(codes.Unimplemented, "this node does not plan where stages run; nothing was done", "NO_PLACEMENT", NotDone, 0, nil).Err()
}

// ExplainPipeline tells where the stages of a pipeline run and why.
func (a *clusterAPI) ExplainPipeline(ctx context.Context, req *clusterpb.ExplainPipelineRequest) (*clusterpb.ExplainPipelineResponse, error) {
	if err := checkID("pipeline_id", req.GetPipelineId()); err != nil {
		return nil, err
	}
	if err := checkOptionalID("stage_id", req.GetStageId()); err != nil {
		return nil, err
	}
	limit, err := listLimit(req.GetLimit(), defaultExplained, maxExplained)
	if err != nil {
		return nil, err
	}
	study, err := a.study(ctx)
	if err != nil {
		return nil, err
	}
	stages, at, err := study.Explain(ctx, req.PipelineId, placement.Query{Stage: req.StageId, Candidates: limit, NextHops: limit})
	if err != nil {
		return nil, err
	}
	switch {
	case stages == nil:
		return nil, errUnknownPipeline(req.PipelineId)
	case len(stages) == 0 && req.StageId != "":
		return nil, errAbsent("pipeline "+req.PipelineId, fmt.Sprintf("pipeline %q has no stage %q", req.PipelineId, req.StageId))
	}
	reasons, err := a.waitingFor(ctx, req.PipelineId, stages)
	if err != nil {
		return nil, err
	}
	a.reader.SetHeader(ctx, at.Revision, at.Epoch)
	resp := &clusterpb.ExplainPipelineResponse{Revision: at.Revision, Epoch: at.Epoch}
	size := 0
	for i := range stages {
		st := explainedStage(&stages[i], limit)
		st.SilentReason, st.DrainingReason = reasons[st.StageId].silent, reasons[st.StageId].draining
		if n := proto.Size(st); size+n <= studyAnswerBytes {
			size += n
		} else {
			st.SidecarIds, st.Candidates, st.NextHops, resp.Cut = nil, nil, nil, true
		}
		resp.Stages = append(resp.Stages, st)
	}
	return resp, nil
}

// stageReasons say why a stage that runs may not for long.
type stageReasons struct{ silent, draining string }

// waitingFor says of stages that run nowhere what else they wait for, as GetPipeline
// does: handovers are of the state, and what is held back is the leader's to know; the
// planner knows neither. Of stages that only silent sidecars run, or that run with
// services that drain, it returns why.
func (a *clusterAPI) waitingFor(ctx context.Context, pipeline string, stages []placement.StageStatus) (map[string]stageReasons, error) {
	v := a.cfg.State.View()
	defer v.Close()
	p, err := v.Pipeline(pipeline)
	if err != nil || !p.GetSpec().GetEnabled() {
		return nil, err
	}
	releasing, err := releasingOf(v, pipeline)
	if err != nil {
		return nil, err
	}
	runs, err := runnersOf(v, pipeline)
	if err != nil {
		return nil, err
	}
	word, services := leaderWords{s: a.Server, ctx: ctx, pipeline: pipeline}, leavers{v: v}
	out := make(map[string]stageReasons)
	for i := range stages {
		s := &stages[i]
		if len(s.Sidecars) == 0 && s.Pending != "" {
			s.Pending = pendingReason(p, s.Stage, plannedReason{s.Pending, s.Placed}, releasing[s.Stage], &word)
			continue
		}
		var by []*commandpb.Sidecar
		for _, id := range s.Sidecars {
			sc, err := v.Sidecar(id)
			if err != nil {
				return nil, err
			}
			if !isSilent(sc) {
				by = nil
				break
			}
			by = append(by, sc)
		}
		draining, err := services.reason(runs[s.Stage])
		if err != nil {
			return nil, err
		}
		out[s.Stage] = stageReasons{silentReason(by, &word), draining}
	}
	return out, nil
}

// errAbsent refuses a call about something that does not exist.
func errAbsent(subject, reason string) error {
	return FromRejection(&commandpb.Rejection{Code: commandpb.Code_CODE_NOT_FOUND, Reason: reason, Subject: subject}).Err()
}

func explainedStage(s *placement.StageStatus, limit int) *clusterpb.ExplainedStage {
	out := &clusterpb.ExplainedStage{
		StageId: s.Stage, AsksFor: s.Asks, InstancesAsked: uint32(s.Asked), Instances: uint32(len(s.Sidecars)),
		SidecarIds: s.Sidecars[:min(limit, len(s.Sidecars))], PendingReason: s.Pending, Offering: uint32(s.Offering),
		Strangers: uint32(s.Strangers), Unexamined: s.Unexamined, NextHopsTotal: uint32(s.NextHopsTotal),
	}
	for _, c := range s.Candidates {
		out.Candidates = append(out.Candidates, &clusterpb.StageCandidate{
			SidecarId: c.Sidecar, LocalEndpoint: c.Endpoint, Runs: c.Runs, Verdict: c.Verdict, Load: c.Load, StandsIn: c.StandsIn,
		})
	}
	for _, v := range s.Verdicts {
		out.Verdicts = append(out.Verdicts, &clusterpb.VerdictCount{Verdict: v.Verdict, Count: uint32(v.Count)})
	}
	for _, h := range s.NextHops {
		out.NextHops = append(out.NextHops, &clusterpb.NextHop{
			FromSidecarId: h.From, StageId: h.Stage, ToSidecarId: h.To, ToEndpoint: h.Endpoint, Reason: h.Why,
		})
	}
	return out
}

// PlanPipelines tells what would come of applying pipelines.
func (a *clusterAPI) PlanPipelines(ctx context.Context, req *clusterpb.PlanPipelinesRequest) (*clusterpb.PlanPipelinesResponse, error) {
	limit, err := listLimit(req.GetLimit(), defaultOutlook, maxOutlook)
	if err != nil {
		return nil, err
	}
	switch n := len(req.GetPipelines()); {
	case n == 0:
		return nil, invalid("pipelines", "is empty")
	case n > MaxPlannedPipelines:
		return nil, invalid("pipelines", "%d pipelines, the limit is %d", n, MaxPlannedPipelines)
	}
	specs := make([]*commandpb.PipelineSpec, len(req.Pipelines))
	seen := make(map[string]bool, len(specs))
	for i, cfg := range req.Pipelines {
		if err := checkPipelineShape(proto.Size(cfg), cfg); err != nil {
			return nil, err
		}
		if seen[cfg.Id] {
			return nil, invalid("pipelines", "%q is given twice", cfg.Id)
		}
		specs[i], seen[cfg.Id] = specFromAPI(cfg), true
	}
	study, err := a.study(ctx)
	if err != nil {
		return nil, err
	}
	resp := &clusterpb.PlanPipelinesResponse{}
	valid, err := a.compare(specs, resp)
	if err != nil || !valid {
		return resp, err
	}
	o, at, err := study.Try(ctx, specs, pendingReasons)
	if err != nil {
		return nil, err
	}
	a.reader.SetHeader(ctx, at.Revision, at.Epoch)
	resp.Revision, resp.Epoch, resp.Outlook = at.Revision, at.Epoch, outlookToAPI(&o, specs, limit)
	return resp, nil
}

// compare says what applying specs would be to each; false when it would be refused
// for any. It reads from one view.
func (a *clusterAPI) compare(specs []*commandpb.PipelineSpec, resp *clusterpb.PlanPipelinesResponse) (valid bool, err error) {
	v := a.cfg.State.View()
	defer v.Close()
	resp.Revision, resp.Epoch = v.Revision(), v.Epoch()
	valid = true
	for _, spec := range specs {
		p := &clusterpb.PlannedPipeline{PipelineId: spec.Id, Violations: router.ValidatePipeline(spec)}
		current, err := v.Pipeline(spec.Id)
		if err != nil {
			return false, err
		}
		p.Version = current.GetVersion()
		switch {
		case len(p.Violations) > 0:
			p.Result, valid = "invalid", false
		case current == nil:
			p.Result = "created"
		case proto.Equal(current.Spec, spec):
			p.Result = "unchanged"
		default:
			p.Result = "changed"
		}
		resp.Pipelines = append(resp.Pipelines, p)
	}
	return valid, nil
}

// WhatIf tells what would come of losing sidecars.
func (a *clusterAPI) WhatIf(ctx context.Context, req *clusterpb.WhatIfRequest) (*clusterpb.WhatIfResponse, error) {
	limit, err := listLimit(req.GetLimit(), defaultOutlook, maxOutlook)
	if err != nil {
		return nil, err
	}
	if err := checkTexts("lose_sidecars", req.GetLoseSidecars(), maxLostSidecars, MaxText); err != nil {
		return nil, err
	}
	if err := checkTexts("lose_zones", req.GetLoseZones(), maxLostZones, MaxText); err != nil {
		return nil, err
	}
	if len(req.LoseSidecars)+len(req.LoseZones) == 0 {
		return nil, invalid("lose_sidecars", "neither a sidecar nor a zone is named")
	}
	study, err := a.study(ctx)
	if err != nil {
		return nil, err
	}
	sidecars, zones := make(map[string]bool), make(map[string]bool) // true once seen
	for _, id := range req.LoseSidecars {
		sidecars[id] = false
	}
	for _, z := range req.LoseZones {
		zones[z] = false
	}
	lost := uint32(0)
	o, at, err := study.WhatIf(ctx, func(s *placement.Sidecar) bool {
		_, named := sidecars[s.ID]
		_, within := zones[s.Zone]
		within = within && s.Zone != ""
		if named {
			sidecars[s.ID] = true
		}
		if within {
			zones[s.Zone] = true
		}
		if named || within {
			lost++
		}
		return named || within
	}, pendingReasons)
	if err != nil {
		return nil, err
	}
	if err := errMissing("sidecar", sidecars); err != nil {
		return nil, err
	}
	if err := errMissing("zone", zones); err != nil {
		return nil, err
	}
	specs, err := a.specsOf(&o.Plan, limit)
	if err != nil {
		return nil, err
	}
	a.reader.SetHeader(ctx, at.Revision, at.Epoch)
	return &clusterpb.WhatIfResponse{Revision: at.Revision, Epoch: at.Epoch, Lost: lost, Outlook: outlookToAPI(&o, specs, limit)}, nil
}

// specsOf reads the pipelines that p changes, as many of the first as can be listed.
func (a *clusterAPI) specsOf(p *placement.Plan, limit int) ([]*commandpb.PipelineSpec, error) {
	ids := make([]string, len(p.Steps))
	for i := range p.Steps {
		ids[i] = p.Steps[i].Pipeline
	}
	slices.Sort(ids)
	v := a.cfg.State.View()
	defer v.Close()
	var out []*commandpb.PipelineSpec
	for _, id := range ids[:min(limit, len(ids))] {
		rec, err := v.Pipeline(id)
		if err != nil {
			return nil, err
		}
		if rec != nil {
			out = append(out, rec.Spec)
		}
	}
	return out, nil
}

// errMissing refuses a loss of what does not exist.
func errMissing(kind string, seen map[string]bool) error {
	var missing []string
	for _, id := range slices.Sorted(maps.Keys(seen)) {
		if !seen[id] {
			missing = append(missing, fmt.Sprintf("%q", id))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	names := strings.Join(missing[:min(5, len(missing))], ", ")
	if more := len(missing) - 5; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	if kind == "zone" {
		return errAbsent(kind, "no sidecar is in zone "+names)
	}
	return errAbsent(kind, "there is no sidecar "+names)
}
