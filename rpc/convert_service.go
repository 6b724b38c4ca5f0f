package rpc

import (
	"slices"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// serviceFromAPI turns a registration into the record the log carries; times,
// state and revisions are left to the state machine.
func serviceFromAPI(req *registrypb.RegisterRequest, registrationID string) *commandpb.Service {
	id, md := req.GetIdentity(), req.GetMetadata()
	return &commandpb.Service{
		ServiceId:    id.GetServiceId(),
		Type:         commandpb.ServiceType(id.GetServiceType()),
		Name:         id.GetName(),
		Version:      id.GetVersion(),
		Capabilities: id.GetCapabilities(),
		GroupId:      id.GetGroupId(),
		Endpoint: &commandpb.Endpoint{
			Host:   req.GetEndpoint().GetHost(),
			Port:   req.GetEndpoint().GetPort(),
			UseTls: req.GetEndpoint().GetUseTls(),
		},
		Labels:                md.GetLabels(),
		RecordTypes:           md.GetRecordTypesHandled(),
		MaxConcurrentRequests: md.GetMaxConcurrentRequests(),
		Weight:                md.GetWeight(),
		HeartbeatIntervalMs:   uint64(max(req.GetHeartbeatInterval().AsDuration().Milliseconds(), 0)),
		SidecarId:             req.GetSidecarId(),
		RegistrationId:        registrationID,
	}
}

// serviceToAPI shows one service. partitions are those it holds in the group it
// names, and are copied.
func serviceToAPI(s *commandpb.Service, partitions []uint32) *registrypb.RegisteredService {
	return &registrypb.RegisteredService{
		Identity: &commonpb.ServiceIdentity{
			ServiceId:    s.ServiceId,
			ServiceType:  serviceTypeToAPI(s.Type),
			Name:         s.Name,
			Version:      s.Version,
			Capabilities: s.Capabilities,
			GroupId:      s.GroupId,
		},
		Endpoint: endpointToAPI(s.Endpoint),
		Metadata: &registrypb.ServiceMetadata{
			Labels:                s.Labels,
			RecordTypesHandled:    s.RecordTypes,
			MaxConcurrentRequests: s.MaxConcurrentRequests,
			Weight:                s.Weight,
		},
		Health:             serviceHealthToAPI(s),
		RegisteredAt:       timestampMs(s.RegisteredAtMs),
		LastHeartbeat:      timestampMs(max(s.LastHeartbeatMs, s.RegisteredAtMs)),
		AssignedPartitions: slices.Clone(partitions),
		SidecarId:          s.SidecarId,
		ModRevision:        s.ModRevision,
		RemovedBy:          timestampMs(s.DrainDeadlineMs),
	}
}

// serviceHealthToAPI shows the health a caller should act on: an expired lease is
// unhealthy whatever the service last said of itself, and so is one that drains, for
// it takes no new work and callers in the field know no other word for that.
func serviceHealthToAPI(s *commandpb.Service) *registrypb.ServiceHealth {
	out := &registrypb.ServiceHealth{Status: healthOf(s), Message: s.Health.GetMessage()}
	switch {
	case s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED:
		out.Message = "its lease expired: no heartbeat arrived in time"
	case s.DrainSinceMs > 0:
		out.Message = "it drains and takes nothing new: it was deregistered, and is removed once it is done"
	}
	if cs := s.Health.GetComponents(); len(cs) > 0 {
		out.Components = make(map[string]*registrypb.ComponentHealth, len(cs))
		for k, c := range cs {
			out.Components[k] = &registrypb.ComponentHealth{
				Name: c.GetName(), Status: healthStatusToAPI(c.GetStatus()), Message: c.GetMessage(),
			}
		}
	}
	return out
}

// healthOf is the status serviceHealthToAPI shows; a service that never said
// anything about itself counts as healthy.
func healthOf(s *commandpb.Service) commonpb.HealthStatus {
	if s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED || s.DrainSinceMs > 0 {
		return commonpb.HealthStatus_HEALTH_STATUS_UNHEALTHY
	}
	if st := s.Health.GetStatus(); st != commandpb.HealthStatus_HEALTH_STATUS_UNSPECIFIED {
		return healthStatusToAPI(st)
	}
	return commonpb.HealthStatus_HEALTH_STATUS_HEALTHY
}

// healthFromAPI returns nil for nil.
func healthFromAPI(h *registrypb.ServiceHealth) *commandpb.Health {
	if h == nil {
		return nil
	}
	out := &commandpb.Health{Status: commandpb.HealthStatus(h.GetStatus()), Message: h.GetMessage()}
	if len(h.GetComponents()) > 0 {
		out.Components = make(map[string]*commandpb.ComponentHealth, len(h.GetComponents()))
		for k, c := range h.GetComponents() {
			out.Components[k] = &commandpb.ComponentHealth{
				Name: c.GetName(), Status: commandpb.HealthStatus(c.GetStatus()), Message: c.GetMessage(),
			}
		}
	}
	return out
}
