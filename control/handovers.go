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

// waits is what the placer waits for by the clock. Times are measured with the
// monotonic clock from when a thing was first seen, and never with that of the day:
// if that jumps, a sidecar must not lose its time to let go.
type waits struct {
	due map[waitKey]time.Time
	// next is when something has to be looked at again; zero = never.
	next time.Time
	// first is when the first of due is, or was of something that is over since; zero
	// = nothing is due.
	first time.Time
	// more is when the budget allows another move; zero = nothing waits for it.
	more time.Time
	// heard is when a sidecar must have heard of a change that another's waits for;
	// zero = none waits.
	heard time.Time
}

// waitKey is a release, or with an empty pipeline a sidecar, or a service. ms is the
// time it is about, in that of the state.
type waitKey struct {
	pipeline, sidecar, service string
	ms                         uint64
}

// past is true when something may be due.
func (w *waits) past(now time.Time) bool { return !w.first.IsZero() && !now.Before(w.first) }

func newWaits() *waits { return &waits{due: make(map[waitKey]time.Time)} }

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
	changes := changesOf(todo)
	k := 0
	for i := range todo {
		for j := range todo[i].Changes {
			c := changes[k]
			k++
			if m.draining[c.SidecarId] || m.hasLeaving(c.SidecarId) || held[c.PipelineId].Later > 0 {
				c.SharedReleases = slices.DeleteFunc(slices.Clone(todo[i].Changes[j].Releases), func(s string) bool { return slices.Contains(c.Releases, s) })
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
	past := func(k waitKey) bool {
		at, ok := w.due[k]
		return ok && !now.Before(at)
	}
	var ended []*commandpb.EndedHandover
	latest := uint64(0)
	// Most of what wakes the placer after a change of ten thousand sidecars is that
	// some more of them have let go: a look at all that have not, each time, would
	// take as long as everything else together.
	look := m.handovers
	if !m.untidy && !w.past(now) {
		look = nil
	}
	m.untidy = false
	for pipeline, hs := range look {
		for sidecar, h := range hs {
			e := &commandpb.EndedHandover{SidecarId: sidecar, PipelineId: pipeline}
			for _, r := range h.Releases {
				switch {
				case m.gone(sidecar):
					e.End = commandpb.HandoverEnd_HANDOVER_END_GONE
				case past(waitKey{pipeline: pipeline, sidecar: sidecar, ms: r.DeadlineMs}):
					e.End = commandpb.HandoverEnd_HANDOVER_END_DEADLINE
					latest = max(latest, r.DeadlineMs)
				default:
					continue
				}
				e.Revision = max(e.Revision, r.Revision)
			}
			if e.End != commandpb.HandoverEnd_HANDOVER_END_UNSPECIFIED {
				ended = append(ended, e)
				m.untidy = true // until they are over
			}
		}
	}
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
func (m *mirror) idle(id string) bool {
	for _, hs := range m.handovers {
		if hs[id] != nil {
			return false
		}
	}
	return !m.engine.Runs(id)
}

// stateTime returns the time of the state, in ms.
func (p *Placer) stateTime() (uint64, error) {
	v := p.c.State.View()
	ms, err := v.Time()
	return ms, errors.Join(err, v.Close())
}

// watchClock notes by when which of what m holds is due, and when the next is.
func (p *Placer) watchClock(m *mirror, w *waits) error {
	if m.unclocked || len(m.timed)+len(m.leaving) > 0 || w.past(time.Now()) {
		m.unclocked = false
		if err := p.clock(m, w); err != nil {
			return err
		}
	}
	w.next = time.Time{}
	for _, at := range [...]time.Time{w.first, w.more, w.heard} {
		if w.next.IsZero() || !at.IsZero() && at.Before(w.next) {
			w.next = at
		}
	}
	return nil
}

// clock notes by when which of what m holds is due.
func (p *Placer) clock(m *mirror, w *waits) error {
	due := make(map[waitKey]time.Time, len(w.due))
	var fresh []waitKey
	note := func(k waitKey) {
		if at, ok := w.due[k]; ok {
			due[k] = at
		} else if k.ms > 0 {
			fresh = append(fresh, k)
		}
	}
	for pipeline, hs := range m.handovers {
		for sidecar, h := range hs {
			for _, r := range h.Releases {
				note(waitKey{pipeline: pipeline, sidecar: sidecar, ms: r.DeadlineMs})
			}
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
	if len(fresh) > 0 {
		// The time of the state is never ahead of what has passed, so nobody gets
		// less than its time.
		ms, err := p.stateTime()
		if err != nil {
			return err
		}
		now := time.Now()
		for _, k := range fresh {
			left := time.Duration(max(0, int64(k.ms)-int64(ms))) * time.Millisecond
			due[k] = now.Add(left)
		}
	}
	w.due, w.first = due, time.Time{}
	for id := range m.timed {
		if s := m.sidecars[id]; s.Draining && s.Leaves && m.idle(id) {
			due[waitKey{sidecar: id}] = time.Now().Add(p.c.Quiet) // it is removed by the next look
		}
	}
	for id, s := range m.leaving {
		left, err := p.hasLeft(m, s)
		if err != nil {
			return err
		}
		if left {
			due[waitKey{service: id}] = time.Now().Add(p.c.Quiet)
		}
	}
	for _, at := range due {
		if w.first.IsZero() || at.Before(w.first) {
			w.first = at
		}
	}
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
