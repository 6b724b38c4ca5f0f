package rpc

import (
	"context"
	"fmt"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// placementReader says where the stages of pipelines run and why others do not.
// It reads the sidecars of its view at most once, when a stage is found that
// nobody runs.
type placementReader struct {
	ctx   context.Context
	v     *router.View
	word  leaderWords
	study PlacementStudy // nil = none, or it has no time
	busy  bool           // study had no time
	// reasons are those of pipeline, the last one asked about: its stages are asked
	// about in a row.
	pipeline string
	reasons  map[string]plannedReason
	offers   map[string]sidecarCount // by normalised service name
	byType   map[commandpb.ServiceType]sidecarCount
	sidecars int
}

// sidecarCount counts sidecars by whether they are alive.
type sidecarCount struct{ alive, gone int }

// plannedReason is why a stage runs nowhere, by the planner.
type plannedReason struct {
	text   string
	placed bool // it has a place
}

// newPlacementReader returns one for a pipeline, or for many when that is empty.
func (s *Server) newPlacementReader(ctx context.Context, v *router.View, pipeline string) *placementReader {
	return &placementReader{ctx: ctx, v: v, study: s.cfg.Placement, word: leaderWords{s: s, ctx: ctx, pipeline: pipeline}}
}

// status describes one pipeline of the view.
func (r *placementReader) status(p *commandpb.Pipeline) (*adminpb.PipelineStatus, error) {
	st := &adminpb.PipelineStatus{
		Enabled:     p.GetSpec().GetEnabled(),
		Version:     p.Version,
		CreatedAt:   timestampMs(p.CreatedAtMs),
		UpdatedAt:   timestampMs(p.UpdatedAtMs),
		ModRevision: p.ModRevision,
		Epoch:       r.v.Epoch(),
	}
	runs, err := runnersOf(r.v, p.GetSpec().GetId())
	if err != nil {
		return nil, err
	}
	releasing, err := releasingOf(r.v, p.GetSpec().GetId())
	if err != nil {
		return nil, err
	}
	services := leavers{v: r.v}
	for _, stage := range p.GetSpec().GetStages() {
		placed := &adminpb.StagePlacement{StageId: stage.Id}
		var silent []*commandpb.Sidecar
		for _, run := range runs[stage.Id] {
			id := run.sidecar
			placed.SidecarIds = append(placed.SidecarIds, id)
			s, err := r.v.Sidecar(id)
			if err != nil {
				return nil, err
			}
			if s.GetDraining() {
				placed.Draining = append(placed.Draining, id)
			}
			if isSilent(s) {
				placed.Silent, silent = append(placed.Silent, id), append(silent, s)
			}
		}
		if len(silent) == len(placed.SidecarIds) {
			placed.SilentReason = silentReason(silent, &r.word)
		}
		// In a listing it would cost a look at each sidecar of all pipelines.
		if r.word.pipeline != "" {
			if placed.DrainingReason, err = services.reason(runs[stage.Id]); err != nil {
				return nil, err
			}
		}
		for _, h := range releasing[stage.Id] {
			placed.Releasing = append(placed.Releasing, h.SidecarId)
		}
		if len(placed.SidecarIds) == 0 {
			if placed.PendingReason, err = r.pending(p, stage, releasing[stage.Id]); err != nil {
				return nil, err
			}
		}
		st.Placements = append(st.Placements, placed)
	}
	return st, nil
}

// releasingOf returns by stage of a pipeline the handovers that it waits for.
func releasingOf(v *router.View, pipeline string) (map[string][]*commandpb.Handover, error) {
	out := make(map[string][]*commandpb.Handover)
	err := v.PipelineHandovers(pipeline, func(h *commandpb.Handover) bool {
		for _, rel := range h.Releases {
			if !rel.Shared {
				out[rel.StageId] = append(out[rel.StageId], h)
			}
		}
		return true
	})
	return out, err
}

// handoverReason says whom a stage waits for, and how long at most. It does not say that
// anybody is given it then: that is the planner's to say.
func handoverReason(from []*commandpb.Handover, stage string) string {
	h := from[0]
	var until uint64
	for _, x := range from {
		for _, r := range x.Releases {
			if r.StageId == stage && r.DeadlineMs > until {
				h, until = x, r.DeadlineMs
			}
		}
	}
	who := "sidecar " + h.SidecarId + " was told to let go of it and has not confirmed that"
	if n := len(from) - 1; n > 0 {
		who = fmt.Sprintf("sidecars %s and %d more were told to let go of it and have not confirmed that", h.SidecarId, n)
	}
	return fmt.Sprintf("%s; nobody else is given it before, or before %s", who, clock(time.UnixMilli(int64(until))))
}

// pending says in a sentence why nobody runs a stage. releasing are the handovers it
// waits for.
func (r *placementReader) pending(p *commandpb.Pipeline, stage *commandpb.Stage, releasing []*commandpb.Handover) (string, error) {
	if !p.GetSpec().GetEnabled() {
		return "the pipeline is disabled", nil
	}
	if planned := r.explained(p.GetSpec().GetId(), stage.GetId()); planned.text != "" {
		return pendingReason(p, stage.GetId(), planned, releasing, &r.word), nil
	}
	if len(releasing) > 0 {
		return handoverReason(releasing, stage.GetId()), nil
	}
	if r.busy {
		return "no sidecar runs it; this node is too busy to find out why: ask again", nil
	}
	if err := r.readSidecars(); err != nil {
		return "", err
	}
	name := stage.GetSelector().GetServiceName()
	count := r.offers[router.NormalizeName(name)]
	fallback := r.byType[commandpb.ServiceType(stage.GetType())]
	switch {
	case r.sidecars == 0:
		return "no sidecar is registered", nil
	case count.alive > 0:
		return fmt.Sprintf("%d %s service %q; the stage has not been placed yet, or its selector's group or labels exclude %s", count.alive,
			plural(count.alive, "sidecar offers", "sidecars offer"), name, plural(count.alive, "it", "them")), nil
	case count.gone == 1:
		return fmt.Sprintf("the only sidecar that offers service %q is silent", name), nil
	case count.gone > 0:
		return fmt.Sprintf("all %d sidecars that offer service %q are silent", count.gone, name), nil
	case fallback.alive > 0:
		return fmt.Sprintf("no sidecar offers service %q; %d %s a single service of the stage's type and may take it", name,
			fallback.alive, plural(fallback.alive, "has", "have")), nil
	}
	return fmt.Sprintf("no sidecar offers service %q", name), nil
}

// explained is what the planner says of a stage; no text when it says nothing. Without
// time for that a listing goes on without the reasons, rather than fail.
func (r *placementReader) explained(pipeline, stage string) plannedReason {
	if r.study == nil {
		return plannedReason{}
	}
	if r.reasons == nil || r.pipeline != pipeline {
		stages, _, err := r.study.Explain(r.ctx, pipeline, placement.Query{})
		if err != nil {
			r.study, r.busy = nil, true
			return plannedReason{}
		}
		r.pipeline, r.reasons = pipeline, make(map[string]plannedReason, len(stages))
		for _, st := range stages {
			r.reasons[st.Stage] = plannedReason{st.Pending, st.Placed}
		}
	}
	return r.reasons[stage]
}

func (r *placementReader) readSidecars() error {
	if r.offers != nil {
		return nil
	}
	r.offers = make(map[string]sidecarCount)
	r.byType = make(map[commandpb.ServiceType]sidecarCount)
	return r.v.Sidecars("", 0, func(s *commandpb.Sidecar) bool {
		r.sidecars++
		alive := s.State == commandpb.SidecarState_SIDECAR_STATE_ALIVE
		add := func(c sidecarCount) sidecarCount {
			if alive {
				c.alive++
			} else {
				c.gone++
			}
			return c
		}
		names := make(map[string]struct{})
		types := make(map[commandpb.ServiceType]int)
		for _, ls := range s.Services {
			names[router.NormalizeName(ls.Name)] = struct{}{}
			types[ls.Type]++
		}
		for n := range names {
			r.offers[n] = add(r.offers[n])
		}
		for t, n := range types {
			if n == 1 {
				r.byType[t] = add(r.byType[t])
			}
		}
		return true
	})
}
