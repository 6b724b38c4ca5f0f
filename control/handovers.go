package control

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// A stage only so many sidecars may run at a time is handed over in two commands:
// one tells the old sidecar to let go, and leaves a Handover behind in the state;
// another, once that is gone, gives the stage to the new one. The Handover ends
// because the sidecar has applied what took the stage from it, which the node it
// talks to reports, or is gone, or has had its time, which is found here. Nothing of
// this is in memory only, apart from how much of its time is left.

// now returns the changes of steps that may be carried out at once.
// ms is the time of the state.
func (p *Placer) now(m *mirror, steps []placement.Step, w *waits, info *PlanInfo, ms uint64) []*commandpb.AssignmentChange {
	w.more, w.heard = time.Time{}, time.Time{}
	at := time.Now()
	p.older.expire(at)
	todo := make([]placement.Step, 0, len(steps))
	held := make(map[string]Held)
	for _, st := range steps {
		if st.Urgency == placement.Rearrange && !p.budget.take(st.Moves, at) {
			if info.Held == 0 {
				w.more = at.Add(p.budget.wait(st.Moves))
			}
			info.Held += st.Moves
			held[st.Pipeline] = Held{Pipeline: st.Pipeline, Moves: st.Moves, Until: at.Add(p.budget.wait(st.Moves))}
			continue
		}
		holders := m.holders(st.Pipeline)
		free, waiting := m.engine.Defer(st, func(stage, sidecar string) bool { return holders[stage].but(sidecar) })
		now, h := p.postpone(m, free, at)
		info.Waiting += waiting
		info.Unplaced += waiting + free.Moves - now.Moves
		if waiting > 0 || h.Later > 0 {
			info.Idle += len(m.engine.Idle(st, now))
		}
		if info.Later += h.Later; h.Later > 0 {
			held[st.Pipeline] = h
			next := p.older.next(st.Pipeline)
			if len(now.Changes) > 0 && next.IsZero() {
				next = at.Add(p.older.keep) // it waits for what is told now
			}
			if w.heard.IsZero() || next.Before(w.heard) {
				w.heard = next
			}
		}
		todo = append(todo, now)
	}
	p.setHeld(held)
	return p.commands(m, todo, ms, func(pipeline, sidecar string) bool {
		return m.draining[sidecar] || m.hasLeaving(sidecar) || held[pipeline].Later > 0
	})
}

// commands puts the changes of steps into commands. all is true for those of which all
// that is let go of is noted, and not only what others wait for: somebody wants to know
// when the sidecar has heard of it. ms is the time of the state.
func (p *Placer) commands(m *mirror, steps []placement.Step, ms uint64, all func(pipeline, sidecar string) bool) []*commandpb.AssignmentChange {
	changes := changesOf(steps)
	k := 0
	for i := range steps {
		for j := range steps[i].Changes {
			c := changes[k]
			k++
			if all(c.PipelineId, c.SidecarId) {
				c.SharedReleases = slices.DeleteFunc(slices.Clone(steps[i].Changes[j].Releases), func(s string) bool { return slices.Contains(c.Releases, s) })
			}
			if len(c.Releases)+len(c.SharedReleases) > 0 {
				c.ReleaseTimeoutMs = uint64(p.releaseTimeout(m, c.SidecarId, ms).Milliseconds())
			}
		}
	}
	return changes
}

// releaseTimeout is how long a sidecar is waited for from now on. A drain's deadline
// bounds all that it lets go of until then; what it can let go of only later, for
// want of another sidecar until then, has the usual time. The deadline is in the time
// of the state, and so is now: the clock of the day may have been set back since.
func (p *Placer) releaseTimeout(m *mirror, sidecar string, now uint64) time.Duration {
	if s := m.sidecars[sidecar]; s.GetDraining() && s.GetDrainDeadlineMs() > 0 {
		if left := time.Duration(int64(s.DrainDeadlineMs)-int64(now)) * time.Millisecond; left > 0 {
			return left
		}
	}
	return p.c.HandoverTimeout
}

// submit replicates a decision of this reign about the state of m. atLeast is the
// time of the state it needs: the clock of the day may have been set back since.
func (p *Placer) submit(ctx context.Context, m *mirror, atLeast uint64, cmd *commandpb.Command) (*commandpb.Result, error) {
	cmd.TimeMs = max(uint64(p.c.Now().UnixMilli()), atLeast)
	// A state restored meanwhile may have the very generations and versions the plan
	// was made from, and a leader elected since may have given a stage to another.
	cmd.ExpectedEpoch, cmd.ExpectedTerm = &m.epoch, &p.term
	res, err := p.c.Submit.Submit(ctx, cmd)
	if err == nil && res.GetRejection().GetCode() == commandpb.Code_CODE_EPOCH {
		return nil, router.ErrResync
	}
	return res, err
}

// tidy does what is due by the clock: it ends handovers and graces, and removes
// sidecars that leave and services that have drained.
func (p *Placer) tidy(ctx context.Context, m *mirror, w *waits) error {
	now := time.Now()
	past := func(k waitKey) bool { return w.past(k, now) }
	ended, latest := m.ended(w, now)
	slices.SortFunc(ended, func(a, b *commandpb.EndedHandover) int {
		return cmp.Or(cmp.Compare(a.PipelineId, b.PipelineId), cmp.Compare(a.SidecarId, b.SidecarId))
	})
	for _, e := range ended {
		p.older.unconfirmed(e.PipelineId, e.SidecarId)
	}
	for chunk := range slices.Chunk(ended, p.c.ChunkChanges) {
		res, err := p.submit(ctx, m, latest, &commandpb.Command{Op: &commandpb.Command_EndHandovers{
			EndHandovers: &commandpb.EndHandovers{Ended: chunk},
		}})
		if err == nil && res.GetRejection() != nil {
			err = errors.New("the state refused to end handovers: " + res.Rejection.Reason)
		}
		if err != nil {
			return err
		}
		for _, e := range chunk {
			if e.End == commandpb.HandoverEnd_HANDOVER_END_DEADLINE {
				p.c.Logger.Warn("a sidecar has not confirmed that it let go of a stage; it is given to another", "sidecar", e.SidecarId, "pipeline", e.PipelineId)
			}
		}
	}
	if err := p.tidySidecars(ctx, m, past); err != nil {
		return err
	}
	return p.tidyServices(ctx, m, past)
}

// ended returns the handovers that are over since their sidecars are gone or have had
// their time, and the latest deadline of those. Most of what wakes the placer after a
// change of ten thousand sidecars is that some more of them have let go: only what may
// have ended since is looked at.
func (m *mirror) ended(w *waits, now time.Time) (ended []*commandpb.EndedHandover, latest uint64) {
	seen := make(map[*commandpb.Handover]bool)
	look := func(h *commandpb.Handover) {
		if h == nil || seen[h] {
			return
		}
		seen[h] = true
		e := &commandpb.EndedHandover{SidecarId: h.SidecarId, PipelineId: h.PipelineId}
		for _, r := range h.Releases {
			switch {
			case m.gone(h.SidecarId):
				e.End = commandpb.HandoverEnd_HANDOVER_END_GONE
			case w.past(waitKey{pipeline: h.PipelineId, sidecar: h.SidecarId, ms: r.DeadlineMs}, now):
				e.End = commandpb.HandoverEnd_HANDOVER_END_DEADLINE
				latest = max(latest, r.DeadlineMs)
			default:
				continue
			}
			e.Revision = max(e.Revision, r.Revision)
		}
		if e.End != commandpb.HandoverEnd_HANDOVER_END_UNSPECIFIED {
			ended = append(ended, e)
		}
	}
	for sidecar := range w.look {
		// One that is gone is looked at until its handovers are over.
		if !m.gone(sidecar) || len(m.letting[sidecar]) == 0 {
			delete(w.look, sidecar)
			continue
		}
		for _, h := range m.letting[sidecar] {
			look(h)
		}
	}
	for _, k := range w.late(now) {
		look(m.handovers[k.pipeline][k.sidecar])
	}
	return ended, latest
}

// tidySidecars ends graces and removes who leaves.
func (p *Placer) tidySidecars(ctx context.Context, m *mirror, past func(waitKey) bool) error {
	var ids []string
	for id := range m.timed {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		s := m.sidecars[id]
		cmd := &commandpb.Command{}
		atLeast := uint64(0)
		switch {
		case s.Draining && s.Leaves && (past(waitKey{sidecar: id, ms: s.DrainDeadlineMs}) || m.idle(id)):
			cmd.Op = &commandpb.Command_DeregisterSidecar{DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: id, LeavingOnly: true}}
		case s.GraceUntilMs > 0 && past(waitKey{sidecar: id, ms: s.GraceUntilMs}):
			atLeast = s.GraceUntilMs
			cmd.Op = &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
				SidecarId: id, ExpectedGeneration: s.Generation, State: commandpb.SidecarState_SIDECAR_STATE_EXPIRED,
			}}
		default:
			continue
		}
		// A refusal means that it came back, or was undrained, since.
		if _, err := p.submit(ctx, m, atLeast, cmd); err != nil {
			return err
		}
	}
	return nil
}

// idle is true for a sidecar that runs nothing and has nothing to let go of.
func (m *mirror) idle(id string) bool { return len(m.letting[id]) == 0 && !m.engine.Runs(id) }

// stateTime returns the time of the state, in ms.
func (p *Placer) stateTime() (uint64, error) {
	v := p.c.State.View()
	ms, err := v.Time()
	return ms, errors.Join(err, v.Close())
}

// watchClock notes by when which of what m holds is due, and when the next is.
func (p *Placer) watchClock(m *mirror, w *waits) error {
	if err := p.clock(m, w); err != nil {
		return err
	}
	w.next = time.Time{}
	for _, at := range [...]time.Time{w.first, w.more, w.heard, w.even} {
		if w.next.IsZero() || !at.IsZero() && at.Before(w.next) {
			w.next = at
		}
	}
	return nil
}

// clock notes by when which of what m holds is due.
func (p *Placer) clock(m *mirror, w *waits) error {
	others := make(map[waitKey]time.Time, len(w.others))
	var fresh []waitKey
	note := func(k waitKey) {
		if at, ok := w.others[k]; ok {
			others[k] = at
		} else if k.ms > 0 {
			fresh = append(fresh, k)
		}
	}
	for id := range m.timed {
		s := m.sidecars[id]
		if s.Draining && s.Leaves {
			note(waitKey{sidecar: id, ms: s.DrainDeadlineMs})
		}
		note(waitKey{sidecar: id, ms: s.GraceUntilMs})
	}
	for id, s := range m.leaving {
		note(waitKey{service: id, ms: s.DrainDeadlineMs})
	}
	if len(fresh)+len(w.fresh) > 0 {
		// The time of the state is never ahead of what has passed, so nobody gets
		// less than its time.
		ms, err := p.stateTime()
		if err != nil {
			return err
		}
		now := time.Now()
		left := func(until uint64) time.Duration {
			return time.Duration(max(0, int64(until)-int64(ms))) * time.Millisecond
		}
		for _, k := range fresh {
			others[k] = now.Add(left(k.ms))
		}
		w.measure(now, left)
	}
	for id := range m.timed {
		if s := m.sidecars[id]; s.Draining && s.Leaves && m.idle(id) {
			others[waitKey{sidecar: id}] = time.Now().Add(p.c.Quiet) // it is removed by the next look
		}
	}
	for id, s := range m.leaving {
		left, err := p.hasLeft(m, s)
		if err != nil {
			return err
		}
		if left {
			others[waitKey{service: id}] = time.Now().Add(p.c.Quiet)
		}
	}
	w.others = others
	w.first = w.soonest()
	return nil
}

// stats counts what placement waits for. held is of the plan made last.
func (m *mirror) stats(held int) PlacerStats {
	s := PlacerStats{Held: held, Draining: len(m.draining), Graced: len(m.graced), DrainingServices: len(m.leaving)}
	for _, hs := range m.handovers {
		s.Handovers += len(hs)
	}
	return s
}
