package control

import (
	"time"

	"conveyor.etl/router/placement"
)

// even returns the steps that even the load, once every BalanceInterval. Plans keep
// everything where it runs well, so that without it a sidecar that joins would stay
// idle until something is new or lost.
//
// It moves no more than the budget allows, so that all of it can be done at once: what
// is to be moved for the sake of pipelines' edges has been taken from it before.
func (p *Placer) even(m *mirror, w *waits, now time.Time) []placement.Step {
	if w.even = p.evenAt; w.even.IsZero() || now.Before(w.even) {
		return nil
	}
	p.evenAt = now.Add(p.c.BalanceInterval)
	w.even = p.evenAt
	most, all := p.budget.room(now)
	return m.engine.Balance(most, all, func(pipeline string) bool { return len(m.handovers[pipeline]) > 0 })
}

// evens says whether a step that evens the load may be carried out: as a whole and now,
// or not at all. What it moves runs well where it is, and must not wait for other tables
// to be forgotten while it runs nowhere.
func (p *Placer) evens(st placement.Step, h Held, now time.Time) bool {
	return h.Later == 0 && p.budget.take(st.Moves, now)
}
