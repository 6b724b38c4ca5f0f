package rpc

import (
	"context"
	"slices"
	"strings"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// outlookToAPI renders what would come of a change, limit entries of each list.
// specs are the pipelines that would be declared by it, in whose order stages are
// listed; those of others are listed in the order of their ids.
func outlookToAPI(o *placement.Outlook, specs []*commandpb.PipelineSpec, limit int) *clusterpb.PlacementOutlook {
	out := &clusterpb.PlacementOutlook{
		Moves: uint32(o.After.Moves), LeastMoves: uint32(o.After.Least), WaitingTotal: uint32(o.Waits),
		Before: qualityToAPI(&o.Before), After: qualityToAPI(&o.After), UnderWay: uint32(o.UnderWay),
	}
	size := 0
	for _, w := range o.Waiting[:min(limit, len(o.Waiting))] {
		if size += len(w.Pipeline) + len(w.Stage) + len(w.Reason) + 16; size > studyAnswerBytes/3 {
			break
		}
		out.Waiting = append(out.Waiting, &clusterpb.WaitingStage{PipelineId: w.Pipeline, StageId: w.Stage, Reason: w.Reason})
	}
	order := make(map[string]map[string]int, len(specs))
	for _, spec := range specs {
		at := make(map[string]int, len(spec.Stages))
		for i, st := range spec.Stages {
			at[st.Id] = i
		}
		order[spec.Id] = at
	}
	steps := slices.Clone(o.Plan.Steps)
	slices.SortFunc(steps, func(a, b placement.Step) int { return strings.Compare(a.Pipeline, b.Pipeline) })
	l := changeList{left: limit, bytes: studyAnswerBytes / 2}
	for i := range steps {
		out.ChangesTotal += uint32(l.add(&steps[i], order[steps[i].Pipeline]))
		for _, c := range steps[i].Changes {
			if len(c.Takes)+len(c.Releases) == 0 {
				out.Rerouted++
			}
		}
	}
	out.Changes = l.out
	return out
}

// changeList gathers changes until it is full.
type changeList struct {
	out         []*clusterpb.StageChange
	left, bytes int
}

// add lists the stages of a step and returns how many sidecars would take or let go
// of one.
func (l *changeList) add(s *placement.Step, order map[string]int) (n int) {
	byStage := make(map[string]*clusterpb.StageChange)
	stage := func(id string) *clusterpb.StageChange {
		if byStage[id] == nil {
			byStage[id] = &clusterpb.StageChange{PipelineId: s.Pipeline, StageId: id, Urgency: s.Urgency.String()}
		}
		return byStage[id]
	}
	for i := range s.Changes {
		c := &s.Changes[i]
		for _, id := range c.Takes {
			stage(id).Takes = append(stage(id).Takes, c.Sidecar)
		}
		for _, id := range c.Releases {
			stage(id).Releases = append(stage(id).Releases, c.Sidecar)
		}
		n += len(c.Takes) + len(c.Releases)
	}
	stages := make([]*clusterpb.StageChange, 0, len(byStage))
	for _, st := range byStage {
		stages = append(stages, st)
	}
	place := func(id string) int {
		if at, ok := order[id]; ok {
			return at
		}
		return len(order) // those that the pipeline has no more come last
	}
	slices.SortFunc(stages, func(a, b *clusterpb.StageChange) int {
		if x, y := place(a.StageId), place(b.StageId); x != y {
			return x - y
		}
		return strings.Compare(a.StageId, b.StageId)
	})
	for _, st := range stages {
		st.Takes, st.Releases = l.take(st.Takes), l.take(st.Releases)
		if len(st.Takes)+len(st.Releases) > 0 {
			l.out = append(l.out, st)
		}
	}
	return n
}

// take returns as many of ids as there is room for.
func (l *changeList) take(ids []string) []string {
	for i, id := range ids {
		if l.bytes -= len(id) + 64; l.left == 0 || l.bytes < 0 {
			l.left = 0
			return ids[:i]
		}
		l.left--
	}
	return ids
}

func qualityToAPI(q *placement.Quality) *clusterpb.PlacementQuality {
	return &clusterpb.PlacementQuality{
		InstancesAsked: uint32(q.Asked), InstancesPlaced: uint32(q.Placed), StagesPending: uint32(q.Pending),
		Edges: uint32(q.Edges), EdgesInPod: uint32(q.InPod), EdgesInNode: uint32(q.InNode), EdgesInZone: uint32(q.InZone),
		LocalEdgeShare: q.LocalShare(), HighestLoad: q.Highest, MeanLoad: q.Mean, MaxOverMean: q.MaxOverMean(),
	}
}

// leaderWord bounds how long an answer waits for what only the leader knows and
// need not be in it.
const leaderWord = time.Second

// GetPlacementQuality tells how good it is where one pipeline runs, from the state
// here, and what the leader's last plan moved of it; or of all pipelines, which the
// leader alone has counted.
func (a *clusterAPI) GetPlacementQuality(ctx context.Context, req *clusterpb.GetPlacementQualityRequest) (*clusterpb.GetPlacementQualityResponse, error) {
	id := req.GetPipelineId()
	if err := checkOptionalID("pipeline_id", id); err != nil {
		return nil, err
	}
	if id == "" {
		return a.wholeQuality(ctx, req)
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &clusterpb.GetPlacementQualityResponse{Revision: v.Revision(), Epoch: v.Epoch()}
	if a.cfg.PipelineQuality != nil {
		q, ok, err := a.cfg.PipelineQuality(v, id)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, errUnknownPipeline(id)
		}
		resp.Quality = qualityToAPI(&q)
	}
	if a.cfg.Node.Leadership().Leading {
		resp.LastPlan = a.lastPlan(id)
		return resp, nil
	}
	if relayed(ctx) != "" {
		return resp, nil
	}
	if conn, rctx, err := a.relay.connect(ctx); err == nil {
		rctx, cancel := context.WithTimeout(rctx, leaderWord)
		defer cancel()
		theirs, err := clusterpb.NewClusterClient(conn).GetPlacementQuality(rctx, req)
		if err != nil {
			a.log.Debug("the leader does not say what its plans moved", "err", err)
		}
		resp.LastPlan = theirs.GetLastPlan()
	}
	return resp, nil
}

func (a *clusterAPI) lastPlan(pipeline string) *clusterpb.PlanMoves {
	q, revision, ok := a.cfg.Moved(pipeline)
	if !ok {
		return nil
	}
	return &clusterpb.PlanMoves{Revision: revision, Moves: uint32(q.Moves), LeastMoves: uint32(q.Least)}
}

func (a *clusterAPI) wholeQuality(ctx context.Context, req *clusterpb.GetPlacementQualityRequest) (*clusterpb.GetPlacementQualityResponse, error) {
	if !a.cfg.Node.Leadership().Leading {
		conn, rctx, err := a.relay.connect(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := clusterpb.NewClusterClient(conn).GetPlacementQuality(rctx, req)
		return resp, relayedErr(err)
	}
	if err := a.reader.Wait(ctx); err != nil { // it may lead no more
		return nil, err
	}
	q, _, ok := a.cfg.Moved("")
	if !ok {
		return nil, retryAfter{raftnode.ErrNoLeader, time.Second} // elected a moment ago
	}
	resp := &clusterpb.GetPlacementQualityResponse{
		Quality: qualityToAPI(&q), LastPlan: a.lastPlan(""), Revision: a.cfg.State.Revision(), Epoch: a.cfg.State.Epoch(),
	}
	if resp.LastPlan.GetRevision() == 0 {
		resp.LastPlan = nil
	}
	a.reader.SetHeader(ctx, resp.Revision, resp.Epoch)
	return resp, nil
}
