package control

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"conveyor.etl/router/placement"
)

// Held is what the last plan of a pipeline holds back.
type Held struct {
	Pipeline string
	// Later counts the changes that are told once sidecars have heard of theirs, since
	// records could go round before. These are Sidecars, by id, who must have heard by
	// HeardBy; it may be that others have to hear then. Stages are those that nobody
	// runs until then, by id.
	Later            int
	Stages, Sidecars []string
	HeardBy          time.Time
	// Moves counts the stages whose move waits for the movement budget, which does not
	// allow it before Until.
	Moves int
	Until time.Time
}

// Held returns what the last plan holds back of a pipeline, or of all, by id, when
// pipeline is empty; nothing while this node does not lead. Times are by the clock of
// the commands.
func (p *Placer) Held(pipeline string) (out []Held) {
	p.mu.Lock()
	held := p.held
	p.mu.Unlock()
	clock := func(at time.Time) time.Time {
		if at.IsZero() {
			return at
		}
		return p.c.Now().Add(time.Until(at))
	}
	for _, id := range slices.Sorted(maps.Keys(held)) {
		if h := held[id]; pipeline == "" || pipeline == id {
			h.HeardBy, h.Until = clock(h.HeardBy), clock(h.Until)
			out = append(out, h)
		}
	}
	return out
}

func (p *Placer) setHeld(held map[string]Held) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = held
}

// heardBy returns when sidecars must have heard of what they were told of a pipeline, or
// are told at a time.
func (o *olderTables) heardBy(m *mirror, pipeline string, sidecars []string, at time.Time) (by time.Time) {
	for _, id := range sidecars {
		until := at.Add(o.keep)
		if len(o.of(m, pipeline, id)) > 0 {
			tables := o.by[pipeline][id]
			until = tables[len(tables)-1].until
		}
		if until.After(by) {
			by = until
		}
	}
	return by
}

// postpone returns what of a step may be told now, and what there is to say of the rest.
func (p *Placer) postpone(m *mirror, st placement.Step, at time.Time) (now placement.Step, h Held) {
	now, later, by := m.engine.Postpone(st, func(sidecar string) []*placement.Assignment { return p.older.of(m, st.Pipeline, sidecar) })
	if later > 0 {
		h = Held{Pipeline: st.Pipeline, Later: later, Stages: m.engine.Idle(st, now), Sidecars: by, HeardBy: p.older.heardBy(m, st.Pipeline, by, at)}
	}
	return now, h
}

// HeldExpiries returns how many sidecars have been silent for longer than their lease
// and are not expired, because too many fell silent at once, from when on they are, one
// after another, and by when the last of them is; 0 while this node does not lead. When
// most are heard of again, the others expire before.
func (l *Liveness) HeldExpiries() (n int, until, last time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.leading || l.sidecars.due == 0 {
		return 0, time.Time{}, time.Time{}
	}
	until, last = l.sidecars.heldUntil()
	return l.sidecars.due, until, last
}

// alarm says of leases that are held back how many, for how long, and what comes then.
func (l *leases) alarm(now time.Time) string {
	from, last := l.heldUntil()
	clock := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	have := "have been silent for longer than their lease"
	if l.due == 1 {
		have = "has been silent for longer than its lease"
	}
	what := fmt.Sprintf("%d of %d %s %s after too many fell silent at once", l.due, len(l.all), l.what, have)
	if now.Before(from) {
		return fmt.Sprintf("%s, which may be the fault of the network between them and the cluster; nobody is given up before %s, "+
			"and who is still silent then one after another, the last by %s; all of them sooner if most come back", what, clock(from), clock(last))
	}
	return fmt.Sprintf("%s; since %s they are given up one after another, the last by %s", what, clock(from), clock(last))
}
