package placement

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestPlanHolds drives random clusters through random events and checks after
// every plan that its tables are sound, that nothing about it depends on the
// order of the view, that planning again changes nothing, and that the engine,
// which hears of one event at a time, comes to a state in which the planner of
// the whole view finds nothing to do either.
func TestPlanHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		for range rapid.IntRange(1, 8).Draw(t, "events") {
			whole := Compute(m.view())
			if again := Compute(m.shuffled(rapid.Uint64().Draw(t, "shuffle"))); !reflect.DeepEqual(whole, again) {
				t.Fatalf("the order of the view changes the plan:\n%+v\n%+v", whole, again)
			}
			if rapid.Bool().Draw(t, "incremental") {
				m.carryOut(m.engine.Plan())
			} else {
				m.carryOut(whole)
			}
			m.check(t)
			if more := Compute(m.view()); len(more.Steps) > 0 {
				t.Fatalf("planning again changes more: %+v", more.Steps)
			}
			if more := m.engine.Plan(); len(more.Steps) > 0 {
				t.Fatalf("the engine has more to change: %+v", more.Steps)
			}
			afresh := NewEngine(m.view())
			if now, want := m.engine.sizes(), afresh.sizes(); now != want {
				t.Fatalf("the engine keeps %v names, wants, nodes and zones, afresh it would be %v", now, want)
			}
			afresh.Plan()
			now, want := m.engine.Measure(), afresh.Measure()
			if now.Placed != want.Placed || now.Pending != want.Pending || now.Highest != want.Highest || now.Edges != want.Edges {
				t.Fatalf("the engine counts %+v, afresh it is %+v", now, want)
			}
			disturb(t, m, true)
		}
	})
}

// solved lays out one pipeline of m.
func solved(m *model, id string) *layout {
	e := NewEngine(m.view())
	x := &e.pipes[e.pipeID[id]]
	e.drop(x)
	e.l.reset(x)
	e.l.solve()
	return &e.l
}

// hosts lists the sidecars that may run each stage.
func (l *layout) hosts() [][]string {
	out := make([][]string, len(l.x.stages))
	for i := range out {
		for h := range l.e.hosts {
			if n := l.node(int32(h)); l.usable(int32(i), n) {
				out[i] = append(out[i], l.e.hosts[h].s.ID)
			}
		}
	}
	return out
}

// feasible enumerates the layouts with one instance of every stage that anybody
// may run, those of fixed being given, and says whether one of them is free of
// circles.
func feasible(l *layout, hosts [][]string, fixed map[int]string) bool {
	at := make([]string, len(hosts))
	var try func(int) bool
	try = func(i int) bool {
		if i == len(hosts) {
			return acyclic(l, at)
		}
		if h, ok := fixed[i]; ok {
			at[i] = h
			return try(i + 1)
		}
		for _, h := range hosts[i] {
			at[i] = h
			if try(i + 1) {
				return true
			}
		}
		at[i] = ""
		return len(hosts[i]) == 0 && try(i+1)
	}
	return try(0)
}

// acyclic says whether no batch comes back to a sidecar when stage i runs at
// at[i] alone.
func acyclic(l *layout, at []string) bool {
	next := make(map[string]map[string]bool)
	for i := range l.x.stages {
		for _, d := range l.x.stages[i].down {
			if a, b := at[i], at[d]; a != "" && b != "" && a != b {
				if next[a] == nil {
					next[a] = make(map[string]bool)
				}
				next[a][b] = true
			}
		}
	}
	for grew := true; grew; {
		grew = false
		for a := range next {
			for b := range next[a] {
				for c := range next[b] {
					if !next[a][c] {
						next[a][c], grew = true, true
					}
				}
			}
		}
	}
	for a := range next {
		if next[a][a] {
			return false
		}
	}
	return true
}

// TestPlanPlacesWhatCanBePlaced: whenever any layout without a circle exists,
// every stage that somebody may run is placed, whatever ran where before.
func TestPlanPlacesWhatCanBePlaced(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, rapid.Bool().Draw(t, "parallel"))
		for range rapid.IntRange(1, 4).Draw(t, "events") {
			for _, id := range slices.Sorted(maps.Keys(m.pipelines)) {
				l := solved(m, id)
				hosts := l.hosts()
				if !feasible(l, hosts, nil) {
					continue
				}
				for i := range l.x.stages {
					if len(l.at[i]) == 0 && len(hosts[i]) > 0 {
						t.Fatalf("stage %s of %s is left pending although a layout exists", l.x.stages[i].ID, id)
					}
				}
			}
			m.carryOut(m.engine.Plan())
			disturb(t, m, true)
		}
	})
}

// TestPlanMovesOnlyWhatWasLost: after the loss of one sidecar everything that
// ran elsewhere still runs there, unless no layout without a circle keeps it,
// and the moves are as few as can be.
func TestPlanMovesOnlyWhatWasLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, false)
		m.carryOut(m.engine.Plan())
		lost := rapid.SampledFrom(slices.Sorted(maps.Keys(m.sidecars))).Draw(t, "lost")
		before := make(map[string]map[string][]string)
		for id := range m.pipelines {
			before[id] = m.runs(id)
		}
		m.change(lost, func(s *Sidecar) { s.Condition, s.Grace = Expired, false })
		for _, id := range slices.Sorted(maps.Keys(m.pipelines)) {
			l := solved(m, id)
			if l.circular || !m.pipelines[id].Enabled {
				continue // nothing of it is handed out
			}
			hosts := l.hosts()
			fixed := make(map[int]string)
			for i := range l.x.stages {
				for _, s := range before[id][l.x.stages[i].ID] {
					if s != lost && slices.Contains(hosts[i], s) {
						fixed[i] = s
					}
				}
			}
			if !feasible(l, hosts, fixed) {
				continue
			}
			for i, s := range fixed {
				if !l.nodes[l.node(l.e.hostID[s])].local.has(int32(i)) {
					t.Fatalf("the loss of %s moved stage %s of %s away from %s", lost, l.x.stages[i].ID, id, s)
				}
			}
			if f := l.evaluate(); f.moves != f.least {
				t.Fatalf("%d moves after the loss of %s, %d would do", f.moves, lost, f.least)
			}
		}
	})
}

// TestNothingGoneMovesNothing: a sidecar that comes, and one that stays away from
// where nothing ran, change nothing for a pipeline that is whole.
func TestNothingGoneMovesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		m.carryOut(m.engine.Plan())
		before := make(map[string]map[string][]string)
		for id := range m.pipelines {
			before[id] = m.runs(id)
		}
		m.putSidecar(&Sidecar{ID: "newcomer", Endpoint: "newcomer:1", Generation: 1,
			Offers: parseOffers(nil, []string{"s0:source", "t0:transform", "t1:transform", "k0:sink"})})
		m.carryOut(m.engine.Plan())
		for id, p := range m.pipelines {
			// A stand-in gives way to a namesake, what drains to whoever comes, and
			// a gap that closes lets sources in.
			if len(before[id]) < len(p.Stages) || m.provisional(p, before[id]) {
				continue
			}
			after := m.runs(id)
			for stage, hosts := range before[id] {
				for _, h := range hosts {
					if !slices.Contains(after[stage], h) {
						t.Fatalf("a newcomer took stage %s of %s from %s: %v", stage, id, h, after[stage])
					}
				}
			}
		}
	})
}

// provisional is true when any stage runs somewhere for its type instead of its
// name, or on what drains.
func (m *model) provisional(p *Pipeline, runs map[string][]string) bool {
	for _, st := range p.Stages {
		for _, h := range runs[st.ID] {
			s := m.sidecars[h]
			settled := func(o Offer) bool {
				return o.Name == st.Name && !slices.ContainsFunc(o.Registrations, func(r Registration) bool { return r.Draining })
			}
			if s.Draining || !slices.ContainsFunc(s.Offers, settled) {
				return true
			}
		}
	}
	return false
}

// TestExplainAgrees: what is explained as pending runs nowhere and the reverse,
// no candidate without a verdict is missing where a stage waits, and explaining
// changes nothing.
func TestExplainAgrees(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		m.carryOut(m.engine.Plan())
		disturb(t, m, true)
		m.carryOut(m.engine.Plan())
		load := fmt.Sprint(m.engine.Measure())
		for id, p := range m.pipelines {
			runs := m.runs(id)
			for _, s := range m.engine.Explain(id, Query{Candidates: 1000}) {
				if (s.Pending == "") != (len(runs[s.Stage]) > 0) || !slices.Equal(s.Sidecars, runs[s.Stage]) {
					t.Fatalf("%s/%s: explained %+v, runs on %v", id, s.Stage, s, runs[s.Stage])
				}
				if p.Enabled && s.Pending == "about to be assigned" {
					t.Fatalf("%s/%s is about to be assigned after the plan was carried out: %+v", id, s.Stage, s)
				}
				if s.Strangers+len(s.Candidates) != len(m.sidecars) {
					t.Fatalf("%s/%s: %d sidecars are explained, there are %d", id, s.Stage, s.Strangers+len(s.Candidates), len(m.sidecars))
				}
				for _, c := range s.Candidates {
					if s.Pending != "" && c.Verdict == "" {
						t.Fatalf("%s/%s is pending (%s) while nothing rules out %s", id, s.Stage, s.Pending, c.Sidecar)
					}
				}
			}
		}
		if now := fmt.Sprint(m.engine.Measure()); now != load {
			t.Fatalf("explaining changed the figures from %s to %s", load, now)
		}
		if more := m.engine.Plan(); len(more.Steps) > 0 {
			t.Fatalf("explaining made a plan of %+v", more.Steps)
		}
	})
}

// TestOutlookChangesNothing: after a loss or a declaration was tried, the engine
// finds what it found before, and what it foretold is as good as what comes when the
// change is made.
func TestOutlookChangesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		m.carryOut(m.engine.Plan())
		disturb(t, m, true)
		if rapid.Bool().Draw(t, "settled") {
			m.carryOut(m.engine.Plan())
		}
		settled := len(m.engine.Plan().Steps) == 0
		before := m.engine.Measure()
		ids := slices.Sorted(maps.Keys(m.sidecars))
		lose := rapid.SliceOfDistinct(rapid.SampledFrom(append(ids, "nobody")), rapid.ID).Draw(t, "lose")
		o := m.engine.WhatIf(func(s *Sidecar) bool { return slices.Contains(lose, s.ID) }, 100)
		same := func(what string) {
			now := m.engine.Measure()
			now.Bound = before.Bound // of the shares, which are counted anew only now and then
			if settled && now != before {
				t.Fatalf("%s: the engine measures %+v, before it was %+v", what, now, before)
			}
			if more := m.engine.Plan(); settled && len(more.Steps) > 0 {
				t.Fatalf("%s: the engine has more to change: %+v", what, more.Steps)
			}
		}
		same(fmt.Sprintf("losing %v", lose))
		if o.After.Moves < o.After.Least {
			t.Fatalf("%d moves, at least %d", o.After.Moves, o.After.Least)
		}
		for _, w := range o.Waiting {
			if w.Reason == "" || w.Reason == "about to be assigned" {
				t.Fatalf("%s of %s would wait: %q", w.Stage, w.Pipeline, w.Reason)
			}
		}
		other := drawModel(t, true)
		var declared []*Pipeline
		for _, id := range slices.Sorted(maps.Keys(other.pipelines)) {
			p := *other.pipelines[id]
			p.Version = 1
			if old := m.pipelines[id]; old != nil {
				p.Version = old.Version + 1
			}
			declared = append(declared, &p)
		}
		o = m.engine.Try(declared, 100)
		same("declaring pipelines")
		if !settled {
			return
		}
		for _, p := range declared {
			m.putPipeline(p)
		}
		// Of equally good places a plan of the whole may take others.
		p := Compute(m.view())
		if p.Quality.Placed != o.After.Placed || p.Quality.Pending != o.After.Pending || p.Quality.Least != o.After.Least {
			t.Fatalf("foretold were %+v\n%+v\na plan of the whole is %+v\n%+v", o.After, o.Plan.Steps, p.Quality, p.Steps)
		}
	})
}

// TestJudgeAgrees: what is said of one pipeline from its assignments alone is what
// the engine counts of all when there is no other.
func TestJudgeAgrees(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		for _, id := range slices.Sorted(maps.Keys(m.pipelines))[1:] {
			m.removePipeline(id)
		}
		m.carryOut(m.engine.Plan())
		for id, p := range m.pipelines {
			load := make(map[string]int)
			for _, hosts := range m.runs(id) {
				for _, h := range hosts {
					load[h]++
				}
			}
			got := Judge(p, m.sorted(), func(id string) (*Sidecar, int) { return m.sidecars[id], load[id] })
			want := m.engine.Measure()
			got.Mean, got.Bound, got.Together = want.Mean, want.Bound, want.Together // of all sidecars
			if got != want {
				t.Fatalf("judged %+v, the engine counts %+v", got, want)
			}
		}
	})
}
