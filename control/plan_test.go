package control

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router/commandpb"
)

// TestPlan replays the stories in testdata/plan: what is registered and
// declared, and what the planner makes of it. "plan" prints the changes, takes
// them over and checks the invariants of every table.
func TestPlan(t *testing.T) {
	datadriven.Walk(t, "testdata/plan", func(t *testing.T, path string) {
		m := newModel()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			return m.run(t, d)
		})
	})
}

func (m *model) run(t *testing.T, d *datadriven.TestData) string {
	one := func(key string) string {
		var v string
		d.MaybeScanArgs(t, key, &v)
		return v
	}
	id := one("id")
	switch d.Cmd {
	case "sidecar": // id=, one service "name:type" a line
		m.putSidecar(id, strings.Fields(d.Input)...)
		return ""
	case "state": // id= to=
		s := m.sidecars[id]
		s.State = commandpb.SidecarState(commandpb.SidecarState_value["SIDECAR_STATE_"+strings.ToUpper(one("to"))])
		return ""
	case "deregister": // id=
		delete(m.sidecars, id)
		for k := range m.assignments {
			if k.sidecar == id {
				delete(m.assignments, k)
			}
		}
		return ""
	case "service": // id= name= type= sidecar= group= labels=k:v state= health=
		s := &commandpb.Service{
			ServiceId: id, Name: one("name"), SidecarId: one("sidecar"), GroupId: one("group"),
			Type:     commandpb.ServiceType(commandpb.ServiceType_value["SERVICE_TYPE_"+strings.ToUpper(one("type"))]),
			Endpoint: &commandpb.Endpoint{Host: "10.0.0.9", Port: 7000},
			State:    commandpb.ServiceState_SERVICE_STATE_ALIVE,
			Health:   &commandpb.Health{Status: commandpb.HealthStatus_HEALTH_STATUS_HEALTHY},
		}
		if one("state") == "expired" {
			s.State = commandpb.ServiceState_SERVICE_STATE_EXPIRED
		}
		if one("health") == "unhealthy" {
			s.Health.Status = commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY
		}
		if k, v, ok := strings.Cut(one("labels"), ":"); ok {
			s.Labels = map[string]string{k: v}
		}
		m.services[id] = s
		return ""
	case "pipeline": // id=, stages and edges; labels= and group= go to every stage named in on=
		spec := parsePipeline(t, id, d.Input)
		for _, st := range spec.Stages {
			if st.Id != one("on") {
				continue
			}
			st.Selector.GroupId = one("group")
			if k, v, ok := strings.Cut(one("labels"), ":"); ok {
				st.Selector.Labels = map[string]string{k: v}
			}
		}
		m.putPipeline(spec)
		return ""
	case "enable", "disable":
		p := m.pipelines[id]
		p.Spec.Enabled = d.Cmd == "enable"
		p.Version++
		return ""
	case "delete":
		delete(m.pipelines, id)
		return ""
	case "plan":
		changes := Plan(m.input())
		var b strings.Builder
		for _, c := range changes {
			if c.Revoke {
				fmt.Fprintf(&b, "%s %s: revoke\n", c.PipelineId, c.SidecarId)
			} else {
				fmt.Fprintf(&b, "%s %s: %s\n", c.PipelineId, c.SidecarId, renderStages(c.Stages, c.LocalComplete))
			}
		}
		if stale := m.apply(changes); stale > 0 {
			t.Fatalf("%d changes are stale against the state they were planned from", stale)
		}
		m.check(t)
		if again := Plan(m.input()); len(again) > 0 {
			t.Fatalf("a second plan changes more: %v", again)
		}
		if b.Len() == 0 {
			return "no change\n"
		}
		return b.String()
	case "table":
		return m.table()
	case "placements": // id=
		var b strings.Builder
		for _, p := range placement.NewEngine(viewOf(m.input())).Explain(id, placement.Query{}) {
			where := strings.Join(p.Sidecars, " ")
			if p.Pending != "" {
				where = "pending: " + p.Pending
			}
			fmt.Fprintf(&b, "%s: %s\n", p.Stage, where)
		}
		return b.String()
	}
	t.Fatalf("unknown command %q", d.Cmd)
	return ""
}
