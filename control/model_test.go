package control

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// model is the replicated state as far as plans read and change it, with the
// rules of ApplyAssignments: what was planned from other registrations or
// versions than those in force is skipped.
type model struct {
	pipelines   map[string]*commandpb.Pipeline
	sidecars    map[string]*commandpb.Sidecar
	services    map[string]*commandpb.Service
	assignments map[assignmentKey]*commandpb.Assignment
	revision    uint64
}

func newModel() *model {
	return &model{
		pipelines:   make(map[string]*commandpb.Pipeline),
		sidecars:    make(map[string]*commandpb.Sidecar),
		services:    make(map[string]*commandpb.Service),
		assignments: make(map[assignmentKey]*commandpb.Assignment),
	}
}

func sortedValues[K cmp.Ordered, V any](m map[K]V) []V {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	out := make([]V, 0, len(m))
	for _, k := range keys {
		out = append(out, m[k])
	}
	return out
}

func (m *model) input() Input {
	in := Input{
		Pipelines: sortedValues(m.pipelines),
		Sidecars:  sortedValues(m.sidecars),
		Services:  sortedValues(m.services),
	}
	for _, a := range m.assignments {
		in.Assignments = append(in.Assignments, a)
	}
	in.Assignments = sortedAssignments(in.Assignments)
	return in
}

// apply returns the number of changes skipped as stale.
func (m *model) apply(changes []*commandpb.AssignmentChange) (stale int) {
	m.revision++
	for _, c := range changes {
		k := assignmentKey{c.SidecarId, c.PipelineId}
		if c.Revoke {
			if a := m.assignments[k]; a != nil {
				m.assignments[k] = &commandpb.Assignment{
					SidecarId: c.SidecarId, PipelineId: c.PipelineId, Revoked: true, PipelineVersion: a.PipelineVersion,
					ModRevision: m.revision,
				}
			}
			continue
		}
		s, p := m.sidecars[c.SidecarId], m.pipelines[c.PipelineId]
		if s == nil || p == nil || s.Generation != c.SidecarGeneration || p.Version != c.PipelineVersion {
			stale++
			continue
		}
		m.assignments[k] = &commandpb.Assignment{
			SidecarId: c.SidecarId, PipelineId: c.PipelineId, Stages: c.Stages,
			LocalComplete: c.LocalComplete, PipelineVersion: c.PipelineVersion,
		}
	}
	return stale
}

// clone copies the model, so that a change can be tried.
func (m *model) clone() *model {
	c := newModel()
	c.revision = m.revision
	for k, v := range m.pipelines {
		c.pipelines[k] = proto.Clone(v).(*commandpb.Pipeline)
	}
	for k, v := range m.sidecars {
		c.sidecars[k] = proto.Clone(v).(*commandpb.Sidecar)
	}
	for k, v := range m.services {
		c.services[k] = proto.Clone(v).(*commandpb.Service)
	}
	for k, v := range m.assignments {
		c.assignments[k] = proto.Clone(v).(*commandpb.Assignment)
	}
	return c
}

// runs lists the sidecars that run each stage of a pipeline, "sidecar" by
// "stage".
func (m *model) runs(pipeline string) map[string][]string {
	out := make(map[string][]string)
	for _, a := range m.input().Assignments {
		if a.PipelineId != pipeline || a.Revoked {
			continue
		}
		for _, s := range a.Stages {
			if s.RemoteSidecarId == "" {
				out[s.StageId] = append(out[s.StageId], a.SidecarId)
			}
		}
	}
	return out
}

// circle finds a way along the remote entries of pipeline that comes back to a
// sidecar it has passed.
func (m *model) circle(pipeline string) []string {
	next := make(map[string][]string)
	for k, a := range m.assignments {
		if k.pipeline != pipeline || a.Revoked {
			continue
		}
		for _, s := range a.Stages {
			if s.RemoteSidecarId != "" {
				next[k.sidecar] = append(next[k.sidecar], s.RemoteSidecarId)
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

// check fails on a table that no plan may produce.
func (m *model) check(t interface{ Fatalf(string, ...any) }) {
	for _, a := range m.assignments {
		if a.Revoked {
			continue
		}
		p := m.pipelines[a.PipelineId]
		local := make(map[string]bool)
		for _, s := range a.Stages {
			if s.RemoteSidecarId == "" {
				local[s.StageId] = true
			}
		}
		if len(local) == 0 {
			t.Fatalf("%s is told to run nothing of %s", a.SidecarId, a.PipelineId)
		}
		for _, s := range a.Stages {
			if s.RemoteSidecarId == "" {
				continue
			}
			if !slices.ContainsFunc(p.Spec.Edges, func(e *commandpb.Edge) bool { return local[e.FromStage] && e.ToStage == s.StageId }) {
				t.Fatalf("%s has a remote entry for %s/%s, which is not directly downstream of %v", a.SidecarId, a.PipelineId, s.StageId, local)
			}
			if !slices.Contains(m.runs(a.PipelineId)[s.StageId], s.RemoteSidecarId) {
				t.Fatalf("%s hands %s/%s to %s, which does not run it", a.SidecarId, a.PipelineId, s.StageId, s.RemoteSidecarId)
			}
			if want := m.sidecars[s.RemoteSidecarId].Endpoint; s.RemoteEndpoint != want {
				t.Fatalf("remote endpoint %q, registered is %q", s.RemoteEndpoint, want)
			}
		}
		// Every direct downstream stage is either here or handed over:
		// otherwise its records would be lost.
		for _, e := range p.Spec.Edges {
			if !local[e.FromStage] || local[e.ToStage] {
				continue
			}
			covered := slices.ContainsFunc(a.Stages, func(s *commandpb.StageAssignment) bool { return s.StageId == e.ToStage })
			if runs := m.runs(a.PipelineId); !covered && len(runs[e.ToStage]) > 0 {
				t.Fatalf("%s runs %s/%s and does not know where %s runs (%v)", a.SidecarId, a.PipelineId, e.FromStage, e.ToStage, runs[e.ToStage])
			}
		}
	}
	for id := range m.pipelines {
		if c := m.circle(id); c != nil {
			t.Fatalf("pipeline %s goes round: %v", id, c)
		}
	}
}

// table renders what every sidecar holds, for golden files.
func (m *model) table() string {
	var b strings.Builder
	for _, a := range m.input().Assignments {
		if !a.Revoked {
			fmt.Fprintf(&b, "%s %s: %s\n", a.PipelineId, a.SidecarId, renderStages(a.Stages, a.LocalComplete))
		}
	}
	if b.Len() == 0 {
		return "nothing is assigned\n"
	}
	return b.String()
}

func renderStages(stages []*commandpb.StageAssignment, complete bool) string {
	var parts []string
	for _, s := range stages {
		if s.RemoteSidecarId != "" {
			parts = append(parts, fmt.Sprintf("%s@%s(%s)", s.StageId, s.RemoteSidecarId, s.RemoteEndpoint))
		} else {
			parts = append(parts, fmt.Sprintf("%s=%s", s.StageId, s.LocalEndpoint))
		}
	}
	if complete {
		parts = append(parts, "(all stages here)")
	}
	return strings.Join(parts, " ")
}

// parsePipeline reads lines such as "orders:source -> clean=filter:transform*2
// -> lake:sink": stage id, =selector name when it differs, :type, *parallelism.
// A stage is described once; later mentions need only its id.
func parsePipeline(t testing.TB, id, text string) *commandpb.PipelineSpec {
	t.Helper()
	spec := &commandpb.PipelineSpec{Id: id, Name: id, Enabled: true}
	known := make(map[string]bool)
	for line := range strings.Lines(text) {
		from := ""
		for part := range strings.SplitSeq(strings.TrimSpace(line), "->") {
			part = strings.TrimSpace(part)
			if part == "" {
				continue
			}
			st := &commandpb.Stage{}
			if head, n, ok := strings.Cut(part, "*"); ok {
				p, err := strconv.Atoi(n)
				if err != nil {
					t.Fatalf("%s: %v", part, err)
				}
				part, st.Parallelism = head, uint32(p)
			}
			head, typ, typed := strings.Cut(part, ":")
			name, sel, ok := strings.Cut(head, "=")
			if !ok {
				sel = name
			}
			st.Id, st.Selector = name, &commandpb.ServiceSelector{ServiceName: sel}
			if typed {
				st.Type = commandpb.StageType(commandpb.StageType_value["STAGE_TYPE_"+strings.ToUpper(typ)])
			}
			if !known[name] {
				known[name] = true
				spec.Stages = append(spec.Stages, st)
			}
			if from != "" {
				spec.Edges = append(spec.Edges, &commandpb.Edge{FromStage: from, ToStage: name})
			}
			from = name
		}
	}
	return spec
}

func (m *model) putPipeline(spec *commandpb.PipelineSpec) {
	version := uint64(1)
	if old := m.pipelines[spec.Id]; old != nil {
		version = old.Version + 1
	}
	m.pipelines[spec.Id] = &commandpb.Pipeline{Spec: spec, Version: version}
}

// putSidecar registers id with services written "name:type".
func (m *model) putSidecar(id string, services ...string) *commandpb.Sidecar {
	s := &commandpb.Sidecar{SidecarId: id, Endpoint: id + ":50053", State: commandpb.SidecarState_SIDECAR_STATE_ALIVE, Generation: 1}
	if old := m.sidecars[id]; old != nil {
		s.Generation = old.Generation + 1
	}
	for i, svc := range services {
		name, typ, _ := strings.Cut(svc, ":")
		s.Services = append(s.Services, &commandpb.LocalService{
			Name: name, Type: commandpb.ServiceType(commandpb.ServiceType_value["SERVICE_TYPE_"+strings.ToUpper(typ)]),
			Endpoint: fmt.Sprintf("127.0.0.1:%d", 9001+i),
		})
	}
	m.sidecars[id] = s
	return s
}
