package placement

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// model is a small cluster: what is registered, declared and assigned. When it
// has an engine, every change is told to it as well.
type model struct {
	pipelines   map[string]*Pipeline
	sidecars    map[string]*Sidecar
	assignments map[[2]string]*Assignment // pipeline, sidecar
	changes     uint64
	engine      *Engine
}

func newModel() *model {
	return &model{
		pipelines: make(map[string]*Pipeline), sidecars: make(map[string]*Sidecar),
		assignments: make(map[[2]string]*Assignment), engine: NewEngine(View{}),
	}
}

func (m *model) view() View {
	var v View
	for _, id := range slices.Sorted(maps.Keys(m.pipelines)) {
		v.Pipelines = append(v.Pipelines, m.pipelines[id])
	}
	for _, id := range slices.Sorted(maps.Keys(m.sidecars)) {
		v.Sidecars = append(v.Sidecars, m.sidecars[id])
	}
	v.Assignments = append(v.Assignments, m.sorted()...)
	return v
}

func (m *model) sorted() (out []*Assignment) {
	keys := slices.SortedFunc(maps.Keys(m.assignments), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	for _, k := range keys {
		out = append(out, m.assignments[k])
	}
	return out
}

// shuffled is view in another order.
func (m *model) shuffled(seed uint64) View {
	rng := rand.New(rand.NewPCG(seed, 1))
	v := m.view()
	rng.Shuffle(len(v.Pipelines), func(i, j int) { v.Pipelines[i], v.Pipelines[j] = v.Pipelines[j], v.Pipelines[i] })
	rng.Shuffle(len(v.Sidecars), func(i, j int) { v.Sidecars[i], v.Sidecars[j] = v.Sidecars[j], v.Sidecars[i] })
	rng.Shuffle(len(v.Assignments), func(i, j int) { v.Assignments[i], v.Assignments[j] = v.Assignments[j], v.Assignments[i] })
	for i, s := range v.Sidecars {
		c := *s
		c.Offers = slices.Clone(s.Offers)
		rng.Shuffle(len(c.Offers), func(i, j int) { c.Offers[i], c.Offers[j] = c.Offers[j], c.Offers[i] })
		v.Sidecars[i] = &c
	}
	return v
}

func (m *model) putSidecar(s *Sidecar) {
	m.sidecars[s.ID] = s
	m.engine.PutSidecar(s)
}

// change alters a copy of a sidecar.
func (m *model) change(id string, fn func(s *Sidecar)) {
	c := *m.sidecars[id]
	fn(&c)
	m.putSidecar(&c)
}

func (m *model) removeSidecar(id string) {
	delete(m.sidecars, id)
	m.engine.RemoveSidecar(id)
	for _, a := range m.sorted() {
		if a.Sidecar == id && !a.Revoked {
			m.put(&Assignment{Sidecar: id, Pipeline: a.Pipeline, Revoked: true})
		}
	}
}

func (m *model) putPipeline(p *Pipeline) {
	p.Version = 1
	if old := m.pipelines[p.ID]; old != nil {
		p.Version = old.Version + 1
	}
	m.pipelines[p.ID] = p
	m.engine.PutPipeline(p)
}

func (m *model) removePipeline(id string) {
	delete(m.pipelines, id)
	m.engine.RemovePipeline(id)
}

func (m *model) put(a *Assignment) {
	m.changes++
	m.putAt(a)
}

// putAt is put as part of the change that is being made.
func (m *model) putAt(a *Assignment) {
	a.Changed = m.changes
	m.assignments[[2]string{a.Pipeline, a.Sidecar}] = a
	m.engine.PutAssignment(a)
}

// carryOut lets the model have what p decided.
func (m *model) carryOut(p Plan) {
	m.changes++
	for _, a := range decided(p) {
		m.putAt(a)
	}
}

// runs lists the sidecars that run each stage of a pipeline.
func (m *model) runs(pipeline string) map[string][]string {
	out := make(map[string][]string)
	for _, a := range m.sorted() {
		if a.Pipeline != pipeline || a.Revoked {
			continue
		}
		for _, s := range a.Stages {
			if s.Remote == "" {
				out[s.Stage] = append(out[s.Stage], a.Sidecar)
			}
		}
	}
	return out
}

// check fails on a table that no plan may produce.
func (m *model) check(t fataler) {
	t.Helper()
	running := make(map[string]map[string][]string)
	for id := range m.pipelines {
		running[id] = m.runs(id)
	}
	for _, a := range m.sorted() {
		if a.Revoked {
			continue
		}
		p, runs := m.pipelines[a.Pipeline], running[a.Pipeline]
		if p == nil || !p.Enabled {
			t.Fatalf("%s holds %s, which is gone or disabled", a.Sidecar, a.Pipeline)
		}
		if s := m.sidecars[a.Sidecar]; s == nil || s.lost() {
			t.Fatalf("%s is lost and holds %s", a.Sidecar, a.Pipeline)
		}
		local := make(map[string]bool)
		for _, s := range a.Stages {
			local[s.Stage] = s.Remote == ""
		}
		if !slices.Contains(slices.Collect(maps.Values(local)), true) {
			t.Fatalf("%s is told to run nothing of %s", a.Sidecar, a.Pipeline)
		}
		for _, s := range a.Stages {
			if s.Remote == "" {
				continue
			}
			if !slices.ContainsFunc(p.Edges, func(e Edge) bool { return local[e.From] && e.To == s.Stage }) {
				t.Fatalf("%s has a remote entry for %s/%s, which is not directly downstream", a.Sidecar, a.Pipeline, s.Stage)
			}
			if !slices.Contains(runs[s.Stage], s.Remote) {
				t.Fatalf("%s hands %s/%s to %s, which does not run it", a.Sidecar, a.Pipeline, s.Stage, s.Remote)
			}
			if want := m.sidecars[s.Remote].Endpoint; s.RemoteEndpoint != want {
				t.Fatalf("remote endpoint %q, registered is %q", s.RemoteEndpoint, want)
			}
		}
		for _, e := range p.Edges {
			if _, covered := local[e.To]; local[e.From] && !covered && len(runs[e.To]) > 0 {
				t.Fatalf("%s runs %s/%s and does not know where %s runs (%v)", a.Sidecar, a.Pipeline, e.From, e.To, runs[e.To])
			}
		}
	}
	for id, p := range m.pipelines {
		if way := m.circle(id); way != nil {
			t.Fatalf("pipeline %s goes round: %v", id, way)
		}
		for stage, on := range m.runs(id) {
			i := slices.IndexFunc(p.Stages, func(s Stage) bool { return s.ID == stage })
			if n := int(max(1, p.Stages[i].Parallelism)); len(on) > n {
				t.Fatalf("%s/%s runs %d times, asked for are %d", id, stage, len(on), n)
			}
		}
	}
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

// circle finds a way along the remote entries of a pipeline that comes back to
// a sidecar it has passed.
func (m *model) circle(pipeline string) []string {
	next := make(map[string][]string)
	for _, a := range m.sorted() {
		if a.Pipeline != pipeline || a.Revoked {
			continue
		}
		for _, s := range a.Stages {
			if s.Remote != "" {
				next[a.Sidecar] = append(next[a.Sidecar], s.Remote)
			}
		}
	}
	state := make(map[string]int) // 1 = on the way, 2 = done
	var way, found []string
	var visit func(string)
	visit = func(s string) {
		if found != nil || state[s] == 2 {
			return
		}
		way = append(way, s)
		if state[s] == 1 {
			found = slices.Clone(way)
		} else {
			state[s] = 1
			for _, n := range next[s] {
				visit(n)
			}
			state[s] = 2
		}
		way = way[:len(way)-1]
	}
	for s := range next {
		visit(s)
	}
	return found
}

// parseOffers reads services written "name:type", with "!" at the end for one
// whose registration is unhealthy, "~" for one whose registration drains, and
// "@zone=west" for one that is registered with a label.
func parseOffers(t testing.TB, words []string) (out []Offer) {
	for i, w := range words {
		w, unhealthy := strings.CutSuffix(w, "!")
		w, drains := strings.CutSuffix(w, "~")
		w, label, labelled := strings.Cut(w, "@")
		name, typ, _ := strings.Cut(w, ":")
		o := Offer{Name: strings.ReplaceAll(strings.ToLower(name), "-", ""), Raw: name, Endpoint: fmt.Sprintf("127.0.0.1:%d", 9001+i)}
		switch typ {
		case "source":
			o.Type = SourceService
		case "transform":
			o.Type = TransformService
		case "sink":
			o.Type = SinkService
		case "lookup":
			o.Type = LookupService
		default:
			t.Fatalf("%s: no such type of service", w)
		}
		if unhealthy || drains || labelled {
			r := Registration{Unhealthy: unhealthy, Draining: drains}
			if k, v, ok := strings.Cut(label, "="); ok {
				r.Labels = map[string]string{k: v}
			}
			o.Registrations = []Registration{r}
		}
		out = append(out, o)
	}
	return out
}

// parsePipeline reads lines such as "orders:source -> clean=filter:transform*2
// -> lake:sink": stage id, =selector name when it differs, :type, *parallelism. A
// stage is described once; later mentions need only its id.
func parsePipeline(t testing.TB, id, text string) *Pipeline {
	t.Helper()
	p := &Pipeline{ID: id, Enabled: true}
	known := make(map[string]bool)
	for line := range strings.Lines(text) {
		from := ""
		for part := range strings.SplitSeq(strings.TrimSpace(line), "->") {
			if part = strings.TrimSpace(part); part == "" {
				continue
			}
			var st Stage
			if head, n, ok := strings.Cut(part, "*"); ok {
				k, err := strconv.Atoi(n)
				if err != nil {
					t.Fatalf("%s: %v", part, err)
				}
				part, st.Parallelism = head, uint32(k)
			}
			head, typ, _ := strings.Cut(part, ":")
			name, sel, ok := strings.Cut(head, "=")
			if !ok {
				sel = name
			}
			st.ID, st.Raw, st.Name = name, sel, strings.ReplaceAll(strings.ToLower(sel), "-", "")
			for k := AnyStage; k <= SinkStage; k++ {
				if k.String() == typ {
					st.Type = k
				}
			}
			if !known[name] {
				known[name] = true
				p.Stages = append(p.Stages, st)
			}
			if from != "" {
				p.Edges = append(p.Edges, Edge{from, name})
			}
			from = name
		}
	}
	return p
}

// drawModel draws pods with some of a few services, and pipelines over them:
// small enough that all layouts can be enumerated, crowded enough that circles
// are common.
func drawModel(t *rapid.T, parallel bool) *model {
	m := newModel()
	for i := range rapid.IntRange(1, 6).Draw(t, "sidecars") {
		s := &Sidecar{ID: fmt.Sprintf("pod%d", i), Endpoint: fmt.Sprintf("pod%d:1", i), Generation: 1, Offers: drawOffers(t)}
		drawPlace(t, s)
		drawState(t, s)
		m.putSidecar(s)
	}
	for i := range rapid.IntRange(1, 3).Draw(t, "pipelines") {
		m.putPipeline(drawPipeline(t, fmt.Sprintf("p%d", i), parallel))
	}
	return m
}

func drawOffers(t *rapid.T) []Offer {
	var words []string
	for _, s := range []string{"s0:source", "s1:source", "t0:transform", "t1:transform", "t2:transform", "k0:sink", "k1:sink"} {
		if rapid.IntRange(0, 2).Draw(t, "offers") == 0 {
			if rapid.IntRange(0, 7).Draw(t, "drains") == 0 {
				s += "~"
			}
			words = append(words, s)
		}
	}
	return parseOffers(nil, words)
}

func drawPlace(t *rapid.T, s *Sidecar) {
	s.Zone = rapid.SampledFrom([]string{"", "east", "west"}).Draw(t, "zone")
	s.Node = rapid.SampledFrom([]string{"", "n1", "n2"}).Draw(t, "node")
	s.Capacity = rapid.SampledFrom([]uint32{0, 1, 4}).Draw(t, "capacity")
}

func drawState(t *rapid.T, s *Sidecar) {
	s.Condition, s.Draining, s.Grace = Alive, false, false
	switch rapid.IntRange(0, 9).Draw(t, "state") {
	case 0:
		s.Condition = Suspect
	case 1, 2:
		s.Condition = Expired
	case 3:
		s.Draining = true
	case 4:
		s.Condition, s.Grace = rapid.SampledFrom([]Condition{Alive, Expired}).Draw(t, "condition"), true
	}
}

// drawPipeline draws a graph of at most five stages: sources, then transforms,
// then sinks, with random edges forward.
func drawPipeline(t *rapid.T, id string, parallel bool) *Pipeline {
	p := &Pipeline{ID: id, Enabled: rapid.IntRange(0, 9).Draw(t, "enabled") > 0}
	add := func(prefix string, kinds, n int, typ StageType) {
		for range n {
			name := fmt.Sprintf("%s%d", prefix, rapid.IntRange(0, kinds-1).Draw(t, "service"))
			st := Stage{ID: strconv.Itoa(len(p.Stages)), Type: typ, Name: name, Raw: name}
			st.Strategy = Strategy(rapid.IntRange(0, int(ConsistentHash)).Draw(t, "strategy"))
			if parallel {
				st.Parallelism = uint32(rapid.IntRange(0, 4).Draw(t, "parallelism"))
			}
			p.Stages = append(p.Stages, st)
		}
	}
	add("s", 2, rapid.IntRange(1, 2).Draw(t, "sources"), SourceStage)
	add("t", 3, rapid.IntRange(0, 2).Draw(t, "transforms"), TransformStage)
	add("k", 2, 1, SinkStage)
	last := len(p.Stages) - 1
	for i := range p.Stages[:last] {
		for j := i + 1; j <= last; j++ {
			if p.Stages[j].Type != SourceStage && (j == last || rapid.Bool().Draw(t, "edge")) {
				p.Edges = append(p.Edges, Edge{p.Stages[i].ID, p.Stages[j].ID})
			}
		}
	}
	return p
}

// disturb changes something that can happen to a cluster.
func disturb(t *rapid.T, m *model, parallel bool) {
	id := rapid.SampledFrom(slices.Sorted(maps.Keys(m.sidecars))).Draw(t, "sidecar")
	switch rapid.IntRange(0, 7).Draw(t, "event") {
	case 0, 1:
		m.change(id, func(s *Sidecar) { drawState(t, s) })
	case 2: // comes back with other services and another address
		m.change(id, func(s *Sidecar) {
			s.Generation++
			s.Offers = drawOffers(t)
			s.Endpoint = fmt.Sprintf("%s:%d", id, s.Generation)
			s.Condition = Alive
		})
	case 3:
		m.putPipeline(drawPipeline(t, "p0", parallel))
	case 4:
		p := *m.pipelines["p0"]
		p.Enabled = !p.Enabled
		m.putPipeline(&p)
	case 5:
		if len(m.sidecars) > 1 {
			m.removeSidecar(id)
		}
	case 6:
		s := &Sidecar{ID: fmt.Sprintf("new%d", rapid.IntRange(0, 2).Draw(t, "new")), Endpoint: "new:1", Generation: 1, Offers: drawOffers(t)}
		drawPlace(t, s)
		m.putSidecar(s)
	case 7:
		m.change(id, func(s *Sidecar) { drawPlace(t, s) })
	}
}
