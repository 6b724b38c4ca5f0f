package placement

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// balanced lets the engine of m even its load once, and returns the steps.
func (m *model) balanced(most int, all bool) []Step {
	return m.engine.Balance(Limits{Moves: most, Whole: all})
}

// join lets n sidecars come that can run much, anywhere.
func (m *model) join(t *rapid.T, n int) {
	words := []string{"s0:source", "s1:source", "t0:transform", "t1:transform", "t2:transform", "k0:sink", "k1:sink"}
	for i := range n {
		s := &Sidecar{ID: fmt.Sprintf("join%d", i), Endpoint: "join:1", Generation: 1}
		drawPlace(t, s)
		s.Offers = parseOffers(nil, slices.DeleteFunc(slices.Clone(words), func(string) bool { return rapid.IntRange(0, 5).Draw(t, "lacks") == 0 }))
		m.putSidecar(s)
	}
}

// load returns what each sidecar runs by its capacity.
func (m *model) load() map[string]float64 {
	n := make(map[string]float64)
	for id := range m.pipelines {
		for _, on := range m.runs(id) {
			for _, h := range on {
				n[h] += 1 / float64(m.sidecars[h].capacity())
			}
		}
	}
	return n
}

// loads returns what load does, the highest first.
func (m *model) loads() []float64 {
	out := slices.Sorted(maps.Values(m.load()))
	slices.Reverse(out)
	for len(out) < len(m.sidecars) {
		out = append(out, 0)
	}
	return out
}

// near counts the edges of each pipeline by how near their ends are.
func (m *model) near() map[string]figures {
	out := make(map[string]figures)
	for id := range m.pipelines {
		l := solved(m, id)
		f := l.evaluate()
		out[id] = figures{placed: f.placed, pod: f.pod, node: f.node, zone: f.zone}
	}
	return out
}

// lower is true when the loads of a are more even than those of b: the first that
// differs is lower.
func lower(a, b []float64) bool {
	for i := range a {
		if d := a[i] - b[i]; d < -1e-9 {
			return true
		} else if d > 1e-9 {
			return false
		}
	}
	return false
}

// TestBalanceHolds: whatever happened before, evening the load stops by itself, moves no
// more than it may and nothing that does not run well, loses no instance, takes no edge
// out of its pod, makes the load more even with every call, and leaves nothing to a plan.
func TestBalanceHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, rapid.Bool().Draw(t, "parallel"))
		for range rapid.IntRange(0, 4).Draw(t, "events") {
			m.carryOut(m.engine.Plan())
			disturb(t, m, true)
		}
		for i := range rapid.IntRange(0, 4).Draw(t, "more pipelines") {
			m.putPipeline(drawPipeline(t, fmt.Sprint("more", i), false))
		}
		m.carryOut(m.engine.Plan())
		m.join(t, rapid.IntRange(0, 4).Draw(t, "newcomers"))
		m.carryOut(m.engine.Plan())
		most, all := rapid.IntRange(1, 12).Draw(t, "most"), rapid.Bool().Draw(t, "all")
		for round := 0; ; round++ {
			if round > 50 {
				t.Fatalf("there is always something to even")
			}
			fresh := NewEngine(m.view())
			fresh.Plan()
			again := NewEngine(m.shuffled(rapid.Uint64().Draw(t, "shuffle")))
			again.Plan()
			steps, same := fresh.Balance(Limits{Moves: most, Whole: all}), again.Balance(Limits{Moves: most, Whole: all})
			if !reflect.DeepEqual(steps, same) {
				t.Fatalf("the order of the view changes what is moved:\n%+v\n%+v", steps, same)
			}
			if rapid.Bool().Draw(t, "incremental") {
				steps = m.balanced(most, all)
			}
			if len(steps) == 0 {
				break
			}
			loads, near, moves := m.loads(), m.near(), 0
			for _, st := range steps {
				moves += st.Moves
				if st.Urgency != Even || st.Moves == 0 {
					t.Fatalf("a step that evens nothing: %+v", st)
				}
				for _, c := range st.Changes {
					s := m.sidecars[c.Sidecar]
					if len(c.Takes) > 0 && !s.takes() || len(c.Releases) > 0 && !s.takes() {
						t.Fatalf("%+v takes part in %+v", s, c)
					}
				}
			}
			if moves > most && (!all || len(steps) > 1) {
				t.Fatalf("%d moves, allowed were %d", moves, most)
			}
			m.carryOut(Plan{Steps: steps})
			m.check(t)
			if now := m.loads(); !lower(now, loads) {
				t.Fatalf("the loads were %v, and are %v after %+v", loads, now, steps)
			}
			for id, was := range near {
				if now := m.near()[id]; now.placed < was.placed || now.pod < was.pod {
					t.Fatalf("%s had %+v, and has %+v after %+v", id, was, now, steps)
				}
			}
			if more := m.engine.Plan(); len(more.Steps) > 0 {
				t.Fatalf("the engine has more to change: %+v", more.Steps)
			}
			if more := Compute(m.view()); len(more.Steps) > 0 {
				t.Fatalf("a plan of the whole has more to change: %+v", more.Steps)
			}
		}
		afresh := NewEngine(m.view())
		afresh.Plan()
		now, want := m.engine.Measure(), afresh.Measure()
		if now.Placed != want.Placed || now.Pending != want.Pending || now.Highest != want.Highest || now.Edges != want.Edges || now.InPod != want.InPod {
			t.Fatalf("the engine counts %+v, afresh it is %+v", now, want)
		}
		for h := range m.engine.hosts {
			if m.engine.hosts[h].held {
				t.Fatalf("%s cannot be found by load any more", m.engine.hosts[h].s.ID)
			}
		}
	})
}

// TestBalanceInTwoSteps: stages that have to be let go of first go to whom they were
// meant for, whoever plans the second step, and as it was told meanwhile to let others
// go on.
func TestBalanceInTwoSteps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, rapid.Bool().Draw(t, "parallel"))
		for id := range m.sidecars {
			m.change(id, func(s *Sidecar) { s.Condition, s.Grace, s.Draining = Alive, false, false })
		}
		m.carryOut(m.engine.Plan())
		m.join(t, 2)
		m.carryOut(m.engine.Plan())
		steps := m.balanced(100, true)
		if len(steps) == 0 {
			return
		}
		// Where it would all be.
		whole := newModel()
		whole.pipelines, whole.sidecars, whole.assignments, whole.changes = m.pipelines, m.sidecars, maps.Clone(m.assignments), m.changes
		whole.carryOut(Plan{Steps: steps})
		busy := make(map[[2]string]bool) // stage, pipeline: to be confirmed
		for _, st := range steps {
			for _, c := range st.Changes {
				for _, stage := range c.Confirm {
					busy[[2]string{stage, st.Pipeline}] = true
				}
			}
		}
		now := func(p Plan) (out Plan, waits int) {
			for _, st := range p.Steps {
				begun, n := m.engine.Defer(st, func(stage, _ string) bool { return busy[[2]string{stage, st.Pipeline}] })
				out.Steps = append(out.Steps, begun)
				waits += n
			}
			return out, waits
		}
		first, waits := now(Plan{Steps: steps})
		m.carryOut(first)
		if waits == 0 {
			return
		}
		if rapid.Bool().Draw(t, "another leader") {
			m.engine = NewEngine(m.view())
		}
		// Nobody has let go yet: others plan meanwhile.
		meanwhile, _ := now(m.engine.Plan())
		m.carryOut(meanwhile)
		clear(busy)
		m.carryOut(m.engine.Plan())
		m.check(t)
		for id := range m.pipelines {
			if got, want := m.runs(id), whole.runs(id); !reflect.DeepEqual(got, want) {
				t.Fatalf("%s was to run on %v, and runs on %v", id, want, got)
			}
		}
		if more := m.engine.Plan(); len(more.Steps) > 0 {
			t.Fatalf("the engine has more to change: %+v", more.Steps)
		}
	})
}

// TestBalanceGivesNewcomersTheirShare: a deployment that is doubled carries half of
// the load each afterwards, with as many moves as that takes and no edge out of its pod.
func TestBalanceGivesNewcomersTheirShare(t *testing.T) {
	m := newModel()
	pod := func(i int) *Sidecar {
		return &Sidecar{ID: fmt.Sprintf("pod%02d", i), Endpoint: "pod:1", Generation: 1, Zone: []string{"east", "west"}[i%2],
			Offers: parseOffers(t, []string{"orders:source", "filter:transform", "lake:sink"})}
	}
	for i := range 3 {
		m.putSidecar(pod(i))
	}
	for i := range 60 {
		m.putPipeline(parsePipeline(t, fmt.Sprintf("p%02d", i), "orders:source -> filter:transform -> lake:sink"))
	}
	m.carryOut(m.engine.Plan())
	for i := 3; i < 6; i++ {
		m.putSidecar(pod(i))
	}
	if p := m.engine.Plan(); len(p.Steps) > 0 {
		t.Fatalf("a plan moves what runs well: %+v", p.Steps)
	}
	moves := 0
	for range 20 {
		for _, st := range m.balanced(12, true) {
			moves += st.Moves
			m.carryOut(Plan{Steps: []Step{st}})
		}
		m.carryOut(m.engine.Plan())
	}
	q := m.engine.Measure()
	if q.Highest > 33 || q.LocalShare() != 1 || moves > 90 {
		t.Fatalf("%d moves, 90 would do; %+v", moves, q)
	}
}

// TestBalanceOfAWidePipeline: of a stage that runs on hundreds of sidecars as many
// instances move to newcomers as fit, in a few calls.
func TestBalanceOfAWidePipeline(t *testing.T) {
	const seed = 3
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	m := newModel()
	pod := func(i int) *Sidecar {
		return &Sidecar{ID: fmt.Sprintf("pod%03d", i), Endpoint: "pod:1", Generation: 1, Zone: fmt.Sprint("z", rng.IntN(3)),
			Offers: parseOffers(t, []string{"orders:source", "lake:sink"})}
	}
	for i := range 300 {
		m.putSidecar(pod(i))
	}
	for i := range 4 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "orders:source*300 -> lake:sink*300"))
	}
	m.carryOut(m.engine.Plan())
	for i := 300; i < 400; i++ {
		m.putSidecar(pod(i))
	}
	m.carryOut(m.engine.Plan())
	for range 4 {
		m.carryOut(Plan{Steps: m.balanced(1000, true)})
		m.carryOut(m.engine.Plan())
	}
	m.check(t)
	if q := m.engine.Measure(); q.Highest > 6 || q.LocalShare() != 1 || q.Placed != q.Asked {
		t.Fatalf("%+v", q)
	}
}

// TestBalanceStaysNear: of sidecars that would do, one in the zone of those that hand
// over is taken; without one, any.
func TestBalanceStaysNear(t *testing.T) {
	m := newModel()
	put := func(id, zone string, offers ...string) {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Zone: zone, Offers: parseOffers(t, offers)})
	}
	put("orders", "east", "orders:source")
	put("lake", "east", "lake:sink")
	for i := range 4 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "orders:source -> lake:sink"))
	}
	m.carryOut(m.engine.Plan())
	put("a", "west", "lake:sink")
	put("b", "east", "lake:sink")
	m.carryOut(m.engine.Plan())
	m.carryOut(Plan{Steps: m.balanced(100, true)})
	if loads := m.load(); loads["a"] != 0 || loads["b"] != 2 || loads["lake"] != 2 {
		t.Fatalf("the loads are %v", loads)
	}
	m.change("b", func(s *Sidecar) { s.Draining = true })
	m.carryOut(m.engine.Plan())
	m.carryOut(Plan{Steps: m.balanced(100, true)})
	if loads := m.load(); loads["a"] != 2 || loads["lake"] != 2 {
		t.Fatalf("without b the loads are %v", loads)
	}
}

// TestBalanceTriesAnother: when records would go round if the least loaded sidecar took
// something, another one takes it.
func TestBalanceTriesAnother(t *testing.T) {
	m := newModel()
	put := func(id string, capacity uint32, offers ...string) {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Capacity: capacity, Offers: parseOffers(t, offers)})
	}
	put("a", 100, "orders:source", "lake:sink") // runs the sources, so that it must not run the sinks
	put("b", 10, "filter:transform")
	put("e", 1, "lake:sink")
	for i := range 10 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "orders:source -> filter:transform -> lake:sink"))
	}
	m.carryOut(m.engine.Plan())
	put("u", 1, "lake:sink")
	m.carryOut(m.engine.Plan())
	m.carryOut(Plan{Steps: m.balanced(100, true)})
	if load := m.load(); load["u"] != 5 || load["e"] != 5 {
		t.Fatalf("the loads are %v", load)
	}
}

// TestBalanceLeavesNothingToAPlan: a move that would let a stage run once more, as soon as
// the tables it replaces are gone, is not made. The instance would bring back as much load
// as the move took away, and others can be moved instead.
func TestBalanceLeavesNothingToAPlan(t *testing.T) {
	m := newModel()
	put := func(id string, offers ...string) {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Offers: parseOffers(t, offers)})
	}
	put("in", "orders:source")
	put("a", "lake:sink")
	put("b", "filter:transform")
	m.putPipeline(parsePipeline(t, "p", "orders:source*2 -> filter:transform -> lake:sink"))
	for i := range 3 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("q", i), "lake:sink"))
	}
	m.carryOut(m.engine.Plan())
	// The second source could run on a only, where its records would come back to. They
	// would not if the sink of p were on c.
	m.change("a", func(s *Sidecar) { s.Offers = parseOffers(t, []string{"lake:sink", "orders:source"}) })
	put("c", "lake:sink")
	m.carryOut(m.engine.Plan())
	if load := m.load(); load["a"] != 4 || load["c"] != 0 {
		t.Fatalf("the loads are %v", load)
	}
	for call := 0; ; call++ {
		steps := m.balanced(1, false)
		if len(steps) == 0 {
			break
		}
		if call == 10 {
			t.Fatal("there is always something to even")
		}
		m.carryOut(Plan{Steps: steps})
		m.check(t)
		if more := m.engine.Plan(); len(more.Steps) > 0 {
			t.Fatalf("after %+v a plan has more to change: %+v", steps, more.Steps)
		}
	}
	if load := m.load(); load["a"] != 2 || load["c"] != 2 {
		t.Fatalf("the loads are %v", load)
	}
}

// TestBalanceComesToAll: pipelines that cannot be helped, and are too many to look at in
// one call, do not keep one that can be from its turn.
func TestBalanceComesToAll(t *testing.T) {
	m := newModel()
	put := func(id string, offers ...string) {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Offers: parseOffers(t, offers)})
	}
	const wide = 3000
	for i := range wide {
		put(fmt.Sprintf("a%05d", i), "orders:source", "lake:sink")
	}
	for i := range 12 {
		m.putPipeline(parsePipeline(t, fmt.Sprintf("w%02d", i), fmt.Sprintf("orders:source*%d -> lake:sink*%d", wide, wide)))
	}
	put("d1", "ticks:source", "fish:sink")
	for i := range 6 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "ticks:source -> fish:sink"))
	}
	m.carryOut(m.engine.Plan())
	// Those that can run one half each, so that nothing moves to them, and one that can
	// take what d1 runs.
	for i := range wide {
		put(fmt.Sprintf("b%05d", i), "orders:source")
		put(fmt.Sprintf("c%05d", i), "lake:sink")
	}
	put("d2", "ticks:source", "fish:sink")
	m.carryOut(m.engine.Plan())
	for call := 0; m.load()["d2"] < 6; call++ {
		if call == 40 {
			t.Fatalf("after %d calls the loads are %v and %v", call, m.load()["d1"], m.load()["d2"])
		}
		steps := m.balanced(600, true)
		m.carryOut(Plan{Steps: steps})
		m.carryOut(m.engine.Plan())
	}
}

// TestBalanceLeavesAlone: pipelines and sidecars that are to be left alone are, and so is
// what somebody hands over to who is silent.
func TestBalanceLeavesAlone(t *testing.T) {
	m := newModel()
	put := func(id string, offers ...string) {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Offers: parseOffers(t, offers)})
	}
	put("in", "orders:source")
	put("a", "lake:sink")
	for i := range 4 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "orders:source -> lake:sink"))
	}
	m.carryOut(m.engine.Plan())
	put("b", "lake:sink")
	m.carryOut(m.engine.Plan())
	is := func(id string) func(string) bool { return func(s string) bool { return s == id } }
	if steps := m.engine.Balance(Limits{Moves: 10, SkipSidecar: is("b")}); len(steps) > 0 {
		t.Fatalf("b is to be left alone: %+v", steps)
	}
	m.change("in", func(s *Sidecar) { s.Condition = Suspect })
	m.carryOut(m.engine.Plan())
	if steps := m.engine.Balance(Limits{Moves: 10}); len(steps) > 0 {
		t.Fatalf("who hands over is silent: %+v", steps)
	}
	m.change("in", func(s *Sidecar) { s.Condition = Alive })
	m.carryOut(m.engine.Plan())
	steps := m.engine.Balance(Limits{Moves: 10, SkipPipeline: is("p0")})
	if len(steps) != 2 || steps[0].Pipeline == "p0" || steps[1].Pipeline == "p0" {
		t.Fatalf("p0 is to be left alone: %+v", steps)
	}
}

// TestDriftCountsWhoTakes: changes of sidecars that are given nothing do not make up for
// others that come, which have to be noticed.
func TestDriftCountsWhoTakes(t *testing.T) {
	m := newModel()
	for _, id := range []string{"a", "b"} {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id, Generation: 1, Condition: Expired, Offers: parseOffers(t, []string{"lake:sink"})})
	}
	m.change("a", func(s *Sidecar) { s.Condition = Alive })
	for i := range 4 {
		m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "lake:sink"))
	}
	m.carryOut(m.engine.Plan())
	m.balanced(1, false)
	for range 3 {
		m.change("b", func(s *Sidecar) { s.Grace = !s.Grace })
	}
	m.change("b", func(s *Sidecar) { s.Condition, s.Grace = Alive, false })
	m.carryOut(m.engine.Plan())
	m.carryOut(Plan{Steps: m.balanced(10, false)})
	if load := m.load(); load["b"] != 2 {
		t.Fatalf("the loads are %v", load)
	}
}

// TestBalanceLooksPastTheSkipped: a sidecar that is to be given nothing, and is the least
// loaded of its like, does not hide the others.
func TestBalanceLooksPastTheSkipped(t *testing.T) {
	for _, skipped := range []string{"b", "c"} {
		m := newModel()
		put := func(id string) {
			m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Zone: "east", Offers: parseOffers(t, []string{"lake:sink"})})
		}
		put("a")
		for i := range 6 {
			m.putPipeline(parsePipeline(t, fmt.Sprint("p", i), "lake:sink"))
		}
		m.carryOut(m.engine.Plan())
		put("b")
		put("c")
		m.carryOut(m.engine.Plan())
		m.carryOut(Plan{Steps: m.engine.Balance(Limits{Moves: 10, SkipSidecar: func(id string) bool { return id == skipped }})})
		if load := m.load(); load["a"] > 3 || load[skipped] != 0 {
			t.Fatalf("%s is skipped, the loads are %v", skipped, load)
		}
		if len(m.engine.Balance(Limits{Moves: 10})) == 0 {
			t.Fatalf("%s is not skipped any more, and still gets nothing", skipped)
		}
	}
}

// TestBalanceOfMoreThanItLooksAt: what is more than one call looks at is evened by many.
func TestBalanceOfMoreThanItLooksAt(t *testing.T) {
	m := newModel()
	put := func(id string) {
		m.putSidecar(&Sidecar{ID: id, Endpoint: id + ":1", Generation: 1, Offers: parseOffers(t, []string{"lake:sink"})})
	}
	const wide, pipelines = 1500, 180
	for i := range wide {
		put(fmt.Sprintf("a%05d", i))
	}
	for i := range pipelines {
		m.putPipeline(parsePipeline(t, fmt.Sprintf("w%03d", i), fmt.Sprintf("lake:sink*%d", wide)))
	}
	m.carryOut(m.engine.Plan())
	for i := range wide {
		put(fmt.Sprintf("b%05d", i))
	}
	m.carryOut(m.engine.Plan())
	if wide*pipelines <= maxLooks {
		t.Fatal("that is not more")
	}
	moves := 0
	for range 3 {
		steps := m.balanced(2000, true)
		for _, st := range steps {
			moves += st.Moves
		}
		m.carryOut(Plan{Steps: steps})
		m.carryOut(m.engine.Plan())
	}
	if moves < 5000 {
		t.Fatalf("%d stages were moved in three calls of up to 2,000", moves)
	}
}
