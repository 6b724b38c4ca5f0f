package control

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"conveyor.etl/router/router/commandpb"
)

// drawModel draws pods with some of a few services, and pipelines over them:
// small enough that all layouts can be enumerated, crowded enough that circles
// are common.
func drawModel(t *rapid.T, parallel bool) *model {
	m := newModel()
	services := []string{"s0:source", "s1:source", "t0:transform", "t1:transform", "t2:transform", "k0:sink", "k1:sink"}
	for i := range rapid.IntRange(1, 5).Draw(t, "sidecars") {
		var offered []string
		for _, s := range services {
			if rapid.IntRange(0, 2).Draw(t, "offers") == 0 {
				offered = append(offered, s)
			}
		}
		s := m.putSidecar(fmt.Sprintf("pod%d", i), offered...)
		s.State = drawState(t)
	}
	for i := range rapid.IntRange(1, 3).Draw(t, "pipelines") {
		m.putPipeline(drawPipeline(t, fmt.Sprintf("p%d", i), parallel))
	}
	return m
}

func drawState(t *rapid.T) commandpb.SidecarState {
	return rapid.SampledFrom([]commandpb.SidecarState{
		commandpb.SidecarState_SIDECAR_STATE_ALIVE, commandpb.SidecarState_SIDECAR_STATE_ALIVE,
		commandpb.SidecarState_SIDECAR_STATE_ALIVE, commandpb.SidecarState_SIDECAR_STATE_SUSPECT,
		commandpb.SidecarState_SIDECAR_STATE_EXPIRED,
	}).Draw(t, "state")
}

// drawPipeline draws a graph of at most five stages: sources, then transforms,
// then sinks, with random edges forward and none missing to be connected.
func drawPipeline(t *rapid.T, id string, parallel bool) *commandpb.PipelineSpec {
	spec := &commandpb.PipelineSpec{Id: id, Enabled: rapid.IntRange(0, 9).Draw(t, "enabled") > 0}
	add := func(prefix string, kinds, n int, typ commandpb.StageType) {
		for range n {
			st := &commandpb.Stage{
				Id: fmt.Sprintf("%d", len(spec.Stages)), Type: typ,
				Selector: &commandpb.ServiceSelector{ServiceName: fmt.Sprintf("%s%d", prefix, rapid.IntRange(0, kinds-1).Draw(t, "service"))},
			}
			if parallel {
				st.Parallelism = uint32(rapid.IntRange(0, 4).Draw(t, "parallelism"))
			}
			spec.Stages = append(spec.Stages, st)
		}
	}
	add("s", 2, rapid.IntRange(1, 2).Draw(t, "sources"), commandpb.StageType_STAGE_TYPE_SOURCE)
	add("t", 3, rapid.IntRange(0, 2).Draw(t, "transforms"), commandpb.StageType_STAGE_TYPE_TRANSFORM)
	add("k", 2, 1, commandpb.StageType_STAGE_TYPE_SINK)
	last := len(spec.Stages) - 1
	for i := range spec.Stages[:last] {
		for j := i + 1; j <= last; j++ {
			if spec.Stages[j].Type != commandpb.StageType_STAGE_TYPE_SOURCE &&
				(j == last || rapid.Bool().Draw(t, "edge")) {
				spec.Edges = append(spec.Edges, &commandpb.Edge{FromStage: spec.Stages[i].Id, ToStage: spec.Stages[j].Id})
			}
		}
	}
	return spec
}

// disturb changes something that can happen to a cluster.
func disturb(t *rapid.T, m *model, parallel bool) {
	ids := make([]string, 0, len(m.sidecars))
	for _, s := range sortedValues(m.sidecars) {
		ids = append(ids, s.SidecarId)
	}
	id := rapid.SampledFrom(ids).Draw(t, "sidecar")
	switch rapid.IntRange(0, 4).Draw(t, "event") {
	case 0, 1:
		m.sidecars[id].State = drawState(t)
	case 2: // comes back with one service less or another address
		s := m.sidecars[id]
		s.Generation++
		if len(s.Services) > 0 {
			s.Services = s.Services[1:]
		}
		s.Endpoint = fmt.Sprintf("%s:%d", id, s.Generation)
	case 3:
		m.putPipeline(drawPipeline(t, "p0", parallel))
	case 4:
		p := m.pipelines["p0"]
		p.Spec.Enabled = !p.Spec.Enabled
		p.Version++
	}
}

// TestPlanHolds drives random clusters through random events and checks after
// every plan that its tables are sound, that nothing about it depends on the
// order of the input, and that planning again changes nothing.
func TestPlanHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		for range rapid.IntRange(1, 6).Draw(t, "events") {
			in := m.input()
			plan := Plan(in)
			rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "shuffle"), 1))
			shuffle(rng, in.Pipelines)
			shuffle(rng, in.Sidecars)
			shuffle(rng, in.Services)
			shuffle(rng, in.Assignments)
			if again := Plan(in); !samePlan(plan, again) {
				t.Fatalf("the order of the input changes the plan:\n%v\n%v", plan, again)
			}
			if stale := m.apply(plan); stale > 0 {
				t.Fatalf("%d stale changes in a fresh plan", stale)
			}
			m.check(t)
			if more := Plan(m.input()); len(more) > 0 {
				t.Fatalf("planning again changes more: %v\n%s", more, m.table())
			}
			disturb(t, m, true)
		}
	})
}

func shuffle[T any](rng *rand.Rand, s []T) {
	rng.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
}

func samePlan(a, b []*commandpb.AssignmentChange) bool {
	return slices.EqualFunc(a, b, func(x, y *commandpb.AssignmentChange) bool { return proto.Equal(x, y) })
}

// TestPlanCarriesOn: a sidecar that comes to take part takes nothing from
// anybody of a pipeline that is whole.
func TestPlanCarriesOn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawModel(t, true)
		m.apply(Plan(m.input()))
		before := make(map[string]map[string][]string)
		for id := range m.pipelines {
			before[id] = m.runs(id)
		}
		// A newcomer that offers everything.
		m.putSidecar("newcomer", "s0:source", "t0:transform", "t1:transform", "k0:sink")
		m.apply(Plan(m.input()))
		for id := range m.pipelines {
			after := m.runs(id)
			if stoodIn(m, id, before[id]) || len(before[id]) < len(m.pipelines[id].Spec.Stages) {
				continue // a stand-in gives way to a namesake; a gap that closes lets sources in
			}
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

// stoodIn is true when any stage runs somewhere for its type instead of its
// name.
func stoodIn(m *model, pipeline string, runs map[string][]string) bool {
	for _, st := range m.pipelines[pipeline].Spec.Stages {
		for _, h := range runs[st.Id] {
			if !slices.ContainsFunc(m.sidecars[h].Services, func(s *commandpb.LocalService) bool {
				return s.Name == st.Selector.ServiceName
			}) {
				return true
			}
		}
	}
	return false
}

// bigModel is a fleet of n pods with three services each and pipelines of five
// stages over them.
func bigModel(sidecars, pipelines int) *model {
	m := newModel()
	for i := range sidecars {
		m.putSidecar(fmt.Sprintf("default/pod-%04d", i),
			fmt.Sprintf("src-%d:source", i%50), fmt.Sprintf("map-%d:transform", i%70), fmt.Sprintf("out-%d:sink", i%30))
	}
	for i := range pipelines {
		spec := &commandpb.PipelineSpec{Id: fmt.Sprintf("default/pipeline-%04d", i), Enabled: true}
		for j, st := range []struct {
			name string
			typ  commandpb.StageType
		}{
			{fmt.Sprintf("src-%d", i%50), commandpb.StageType_STAGE_TYPE_SOURCE},
			{fmt.Sprintf("map-%d", i%70), commandpb.StageType_STAGE_TYPE_TRANSFORM},
			{fmt.Sprintf("map-%d", (i+9)%70), commandpb.StageType_STAGE_TYPE_TRANSFORM},
			{fmt.Sprintf("by-type-%d", i), commandpb.StageType_STAGE_TYPE_TRANSFORM},
			{fmt.Sprintf("out-%d", i%30), commandpb.StageType_STAGE_TYPE_SINK},
		} {
			id := fmt.Sprintf("stage-%d", j)
			spec.Stages = append(spec.Stages, &commandpb.Stage{Id: id, Type: st.typ, Parallelism: 2, Selector: &commandpb.ServiceSelector{ServiceName: st.name}})
			if j > 0 {
				spec.Edges = append(spec.Edges, &commandpb.Edge{FromStage: fmt.Sprintf("stage-%d", j-1), ToStage: id})
			}
		}
		m.putPipeline(spec)
	}
	return m
}

// BenchmarkPlan plans 1,000 sidecars x 500 pipelines: from nothing, with
// nothing to do, and after the loss of one sidecar.
func BenchmarkPlan(b *testing.B) {
	m := bigModel(1000, 500)
	b.Run("first", func(b *testing.B) {
		in := m.input()
		for b.Loop() {
			Plan(in)
		}
	})
	m.apply(Plan(m.input()))
	b.Run("idle", func(b *testing.B) {
		in := m.input()
		for b.Loop() {
			if n := len(Plan(in)); n != 0 {
				b.Fatalf("%d changes", n)
			}
		}
	})
	b.Run("one-lost", func(b *testing.B) {
		lost := m.clone()
		lost.sidecars["default/pod-0010"].State = commandpb.SidecarState_SIDECAR_STATE_EXPIRED
		in := lost.input()
		for b.Loop() {
			if len(Plan(in)) == 0 {
				b.Fatal("no change")
			}
		}
	})
}
