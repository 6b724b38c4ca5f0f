package rpc

import (
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// assignmentToAPI shows what a sidecar has to run of one pipeline, in a state of an
// epoch.
func assignmentToAPI(a *commandpb.Assignment, epoch uint64) *sidecarpb.PipelineAssignment {
	out := &sidecarpb.PipelineAssignment{
		PipelineId:      a.PipelineId,
		IsLocalComplete: a.LocalComplete,
		Generation:      router.Ordered(epoch, a.Generation),
		PipelineVersion: a.PipelineVersion,
		Stages:          make([]*sidecarpb.StageAssignment, 0, len(a.Stages)),
	}
	for _, st := range a.Stages {
		sa := &sidecarpb.StageAssignment{StageId: st.StageId}
		if st.RemoteSidecarId != "" {
			sa.Target = &sidecarpb.StageAssignment_RemoteSidecar{RemoteSidecar: &sidecarpb.RemoteSidecar{
				SidecarId: st.RemoteSidecarId, Endpoint: st.RemoteEndpoint,
			}}
		} else {
			sa.Target = &sidecarpb.StageAssignment_LocalEndpoint{LocalEndpoint: st.LocalEndpoint}
		}
		out.Stages = append(out.Stages, sa)
	}
	return out
}

func assignCommand(a *commandpb.Assignment, epoch uint64) *sidecarpb.SidecarCommand {
	return &sidecarpb.SidecarCommand{Command: &sidecarpb.SidecarCommand_Assign{Assign: assignmentToAPI(a, epoch)}}
}

func revokeCommand(pipeline string, drainFirst bool) *sidecarpb.SidecarCommand {
	return &sidecarpb.SidecarCommand{Command: &sidecarpb.SidecarCommand_Revoke{
		Revoke: &sidecarpb.PipelineRevocation{PipelineId: pipeline, DrainFirst: drainFirst},
	}}
}

// sidecarToAPI shows one sidecar of a state of an epoch; assignments are those not
// revoked.
func sidecarToAPI(s *commandpb.Sidecar, assignments []*commandpb.Assignment, epoch uint64) *clusterpb.SidecarInfo {
	out := &clusterpb.SidecarInfo{
		SidecarId:      s.SidecarId,
		PodName:        s.PodName,
		Namespace:      s.Namespace,
		Endpoint:       s.Endpoint,
		State:          clusterpb.SidecarState(s.State),
		RegisteredAt:   timestampMs(s.RegisteredAtMs),
		StateChangedAt: timestampMs(s.StateChangedAtMs),
		Generation:     s.Generation,
		ModRevision:    s.ModRevision,
		Zone:           s.Zone,
		Node:           s.Node,
		Capacity:       max(s.Capacity, router.DefaultCapacity),
		Draining:       s.Draining,
		Leaves:         s.Leaves,
	}
	if s.DrainSinceMs > 0 {
		out.DrainSince = timestampMs(s.DrainSinceMs)
	}
	if s.DrainDeadlineMs > 0 {
		out.DrainDeadline = timestampMs(s.DrainDeadlineMs)
	}
	if s.GraceUntilMs > 0 {
		out.GraceUntil = timestampMs(s.GraceUntilMs)
	}
	for _, ls := range s.Services {
		out.LocalServices = append(out.LocalServices, &sidecarpb.LocalService{
			ServiceName: ls.Name, ServiceType: sidecarpb.ServiceType(ls.Type), LocalEndpoint: ls.Endpoint,
		})
	}
	for _, a := range assignments {
		out.Assignments = append(out.Assignments, assignmentToAPI(a, epoch))
	}
	return out
}

// groupToAPI shows one consumer group of a state of an epoch. Generations are shown
// as commits have to name them.
func groupToAPI(g *commandpb.Group, epoch uint64) *clusterpb.GroupInfo {
	out := &clusterpb.GroupInfo{
		GroupId:        g.GroupId,
		StageId:        g.StageId,
		Generation:     router.Fence(epoch, g.Generation),
		PartitionCount: g.PartitionCount,
		ModRevision:    g.ModRevision,
	}
	for _, m := range g.Members {
		out.Members = append(out.Members, &clusterpb.GroupMember{
			ServiceId: m.ServiceId, Partitions: m.Partitions, JoinedGeneration: router.Fence(epoch, m.JoinedGeneration),
		})
	}
	return out
}
