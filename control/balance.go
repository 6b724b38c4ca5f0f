package control

import (
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// minBalanceInterval is the shortest time between two looks for what can be evened.
const minBalanceInterval = time.Second

// even returns the changes that even the load, once every BalanceInterval. Plans keep
// everything where it runs well, so that without it a sidecar that joins would stay
// idle until something is new or lost.
//
// It is asked only when a plan changes nothing, so that no plan waits for it, and not
// while moves for the sake of pipelines' edges wait for the budget: it would use up what
// is saved for them.
func (p *Placer) even(m *mirror, w *waits, info *PlanInfo, ms uint64) []*commandpb.AssignmentChange {
	at := time.Now()
	if w.even = p.evenAt; w.even.IsZero() || at.Before(w.even) || info.Held > 0 {
		if info.Held > 0 {
			w.even = time.Time{} // w.more says when to look
		}
		return nil
	}
	most, whole := p.budget.room(at)
	// The time of the state stands still while nothing happens.
	now := max(ms, uint64(p.c.Now().UnixMilli()))
	steps := m.engine.Balance(placement.Limits{
		Moves: most, Whole: whole,
		SkipPipeline: func(pipeline string) bool { return len(m.handovers[pipeline]) > 0 },
		// One that comes and goes would draw its share to itself with every return.
		SkipSidecar: func(id string) bool {
			s := m.sidecars[id]
			return s.GetExpiredAtMs() > 0 && now <= s.GetExpiredAtMs()+router.FlapFactor*uint64(p.c.FlapGrace.Milliseconds())
		},
	})
	// After the look, which takes its time: the next one has to be later than this one.
	p.evenAt = time.Now().Add(p.c.BalanceInterval)
	w.even = p.evenAt
	todo := make([]placement.Step, 0, len(steps))
	holders := func(st placement.Step) func(stage, sidecar string) bool {
		by := m.holders(st.Pipeline)
		return func(stage, sidecar string) bool { return by[stage].but(sidecar) }
	}
	for _, st := range steps {
		free, waiting := m.engine.Defer(st, holders(st))
		now, h := p.postpone(m, free, at)
		// As a whole and now, or not at all: it runs well where it is, and must not wait
		// for other tables to be forgotten while it runs nowhere.
		if h.Later > 0 || !p.budget.take(st.Moves, at) {
			m.engine.Declined(st.Pipeline)
			continue
		}
		info.Evened += st.Moves
		info.Waiting += waiting
		info.Unplaced += waiting
		info.Idle += len(m.engine.Idle(st, now))
		todo = append(todo, now)
	}
	if len(todo) < len(steps) {
		m.engine.Plan() // what is not carried out is where it was
	}
	return p.commands(m, todo, ms, func(string, string) bool { return true })
}
