package control

import (
	"cmp"
	"net"
	"slices"
	"strconv"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// viewOf turns records of the state into what the planner reads.
func viewOf(in Input) placement.View {
	v := placement.View{
		Pipelines:   make([]*placement.Pipeline, 0, len(in.Pipelines)),
		Sidecars:    make([]*placement.Sidecar, 0, len(in.Sidecars)),
		Assignments: make([]*placement.Assignment, 0, len(in.Assignments)),
	}
	for _, p := range in.Pipelines {
		v.Pipelines = append(v.Pipelines, pipelineOf(p))
	}
	services := make(map[string][]*commandpb.Service)
	for _, s := range in.Services {
		if s.SidecarId != "" {
			services[s.SidecarId] = append(services[s.SidecarId], s)
		}
	}
	for _, s := range in.Sidecars {
		v.Sidecars = append(v.Sidecars, sidecarOf(s, services[s.SidecarId]))
	}
	for _, a := range in.Assignments {
		v.Assignments = append(v.Assignments, assignmentOf(a))
	}
	return v
}

func pipelineOf(p *commandpb.Pipeline) *placement.Pipeline {
	spec := p.GetSpec()
	out := &placement.Pipeline{
		ID: spec.GetId(), Version: p.GetVersion(), Enabled: spec.GetEnabled(),
		Stages: make([]placement.Stage, len(spec.GetStages())), Edges: make([]placement.Edge, len(spec.GetEdges())),
	}
	for i, st := range spec.GetStages() {
		sel := st.GetSelector()
		out.Stages[i] = placement.Stage{
			ID: st.GetId(), Type: placement.StageType(st.GetType()),
			Name: router.NormalizeName(sel.GetServiceName()), Raw: sel.GetServiceName(),
			Group: sel.GetGroupId(), Labels: sel.GetLabels(),
			Strategy: placement.Strategy(sel.GetLoadBalance()), Parallelism: st.GetParallelism(),
		}
	}
	for i, e := range spec.GetEdges() {
		out.Edges[i] = placement.Edge{From: e.GetFromStage(), To: e.GetToStage()}
	}
	return out
}

// sidecarOf puts together what a sidecar reported and what is registered of its
// services, in any order.
func sidecarOf(s *commandpb.Sidecar, registered []*commandpb.Service) *placement.Sidecar {
	out := &placement.Sidecar{
		ID: s.SidecarId, Endpoint: s.Endpoint, Generation: s.Generation,
		Zone: s.Zone, Node: s.Node, Capacity: min(s.Capacity, router.MaxCapacity),
		Draining: s.Draining, Grace: s.GraceUntilMs > 0,
		Offers: make([]placement.Offer, 0, len(s.Services)),
	}
	switch s.State {
	case commandpb.SidecarState_SIDECAR_STATE_SUSPECT:
		out.Condition = placement.Suspect
	case commandpb.SidecarState_SIDECAR_STATE_EXPIRED:
		out.Condition = placement.Expired
	}
	for _, l := range s.Services {
		out.Offers = append(out.Offers, placement.Offer{
			Name: router.NormalizeName(l.Name), Raw: l.Name, Type: placement.ServiceType(l.Type), Endpoint: l.Endpoint,
		})
	}
	registered = slices.Clone(registered)
	slices.SortFunc(registered, func(a, b *commandpb.Service) int { return cmp.Compare(a.ServiceId, b.ServiceId) })
	for _, r := range registered {
		register(out, r)
		locate(out, r)
	}
	return out
}

// locate takes from the labels of a service where its sidecar runs and how much it
// can take, as far as the sidecar does not say so itself: those in the field send
// no labels, and the services behind them may.
func locate(out *placement.Sidecar, s *commandpb.Service) {
	if out.Zone == "" {
		out.Zone = s.Labels[router.LabelZone]
	}
	if out.Node == "" {
		out.Node = s.Labels[router.LabelNode]
	}
	if n, ok := router.Capacity(s.Labels[router.LabelCapacity]); ok && out.Capacity == 0 {
		out.Capacity = n
	}
}

// register adds a ServiceRegistry registration: to the offer of its name when
// the sidecar reported that itself, as an offer of its own otherwise.
func register(out *placement.Sidecar, s *commandpb.Service) {
	reg := placement.Registration{
		Group: s.GroupId, Labels: s.Labels,
		Expired:   s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED,
		Unhealthy: s.GetHealth().GetStatus() == commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY,
		Draining:  s.DrainSinceMs > 0,
	}
	name := router.NormalizeName(s.Name)
	found := false
	for i := range out.Offers {
		if out.Offers[i].Name == name {
			out.Offers[i].Registrations = append(out.Offers[i].Registrations, reg)
			found = true
		}
	}
	if !found && s.Endpoint != nil {
		out.Offers = append(out.Offers, placement.Offer{
			Name: name, Raw: s.Name, Type: placement.ServiceType(s.Type),
			Endpoint:      net.JoinHostPort(s.Endpoint.Host, strconv.FormatUint(uint64(s.Endpoint.Port), 10)),
			Registrations: []placement.Registration{reg},
		})
	}
}

func assignmentOf(a *commandpb.Assignment) *placement.Assignment {
	out := &placement.Assignment{
		Sidecar: a.SidecarId, Pipeline: a.PipelineId, Revoked: a.Revoked, LocalComplete: a.LocalComplete,
		Changed: a.ModRevision, MovedTo: a.Moved.GetSidecarId(), Moved: a.Moved.GetStages(),
		Stages: make([]placement.Assigned, len(a.Stages)),
	}
	for i, s := range a.Stages {
		out.Stages[i] = placement.Assigned{
			Stage: s.StageId, Endpoint: s.LocalEndpoint, Remote: s.RemoteSidecarId, RemoteEndpoint: s.RemoteEndpoint,
		}
	}
	return out
}
