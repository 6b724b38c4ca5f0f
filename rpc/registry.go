package rpc

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// initialCredits is what a registered service may send before it is granted
// more; the number existing services were written against.
const initialCredits = 10_000

// maxAnswerBytes bounds a listing without pages; a larger one would have to be
// built in memory whole only to be refused by most clients.
const maxAnswerBytes = 64 << 20

// registryAPI implements ServiceRegistry.
type registryAPI struct {
	registrypb.UnimplementedServiceRegistryServer
	*Server
}

// lease returns the silence after which a service counts as expired: three of
// its own intervals when it named one, but never less than the default.
func (s *Server) lease(intervalMs uint64) time.Duration {
	return max(3*time.Duration(intervalMs)*time.Millisecond, s.cfg.ServiceTTL)
}

// roomOn refuses one more service that names a sidecar when that has as many as it
// could report itself. The placement looks at all of them whenever one changes. Those
// that are registered at the same moment may exceed the bound by their number.
func (a *registryAPI) roomOn(sidecar, service string) error {
	if sidecar == "" {
		return nil
	}
	v := a.cfg.State.Latest()
	defer v.Close()
	if s, err := v.Service(service); err != nil || s.GetSidecarId() == sidecar {
		return err
	}
	alive := 0
	if err := v.ServicesOfSidecar(sidecar, func(s *commandpb.Service) bool {
		if s.State != commandpb.ServiceState_SERVICE_STATE_EXPIRED {
			alive++
		}
		return alive < MaxLocalServices
	}); err != nil {
		return err
	}
	if alive >= MaxLocalServices {
		return invalid("sidecar_id", "%d services are registered with sidecar %s already, the limit; deregister some, or name another sidecar", alive, sidecar)
	}
	return nil
}

// Register stores a service, or replaces its earlier registration.
func (a *registryAPI) Register(ctx context.Context, req *registrypb.RegisterRequest) (*registrypb.RegisterResponse, error) {
	if err := checkRegister(req); err != nil {
		return nil, err
	}
	request, err := requestID(ctx)
	if err != nil {
		return nil, err
	}
	id := req.Identity.ServiceId
	if err := a.roomOn(req.SidecarId, id); err != nil {
		return nil, err
	}
	registration := registrationID(request, id)
	rec := serviceFromAPI(req, registration)
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_RegisterService{
		RegisterService: &commandpb.RegisterService{Service: rec},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return nil, FromRejection(rej).Err()
	}
	a.cfg.Beats.Touch("", id)
	return &registrypb.RegisterResponse{
		Success:        true,
		RegistrationId: registration,
		LeaseId:        registration,
		LeaseTtl:       durationMs(uint64(a.lease(rec.HeartbeatIntervalMs).Milliseconds())),
		InitialCredits: initialCredits,
		Revision:       res.GetRevision(),
	}, nil
}

// registrationID makes the id of one registration. With a request id it follows
// from that, so that a repeated request, whose command is not applied again,
// answers the id that the first one stored.
func registrationID(request, service string) string {
	if request == "" {
		return uuid.NewString()
	}
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte("conveyor registration\x00"+request+"\x00"+service)).String()
}

// defaultServiceDrain is how long a service that is deregistered in peace has, unless
// the request says.
const defaultServiceDrain = 30 * time.Second

// Deregister removes a service, or with graceful has it drain: the leader removes it
// once it has nothing left, or when its time is over. An unknown one is a success: the
// wish is fulfilled. A registration id that is no longer the current one is refused, so
// that a late shutdown does not remove its successor.
func (a *registryAPI) Deregister(ctx context.Context, req *registrypb.DeregisterRequest) (*registrypb.DeregisterResponse, error) {
	if err := checkID("service_id", req.GetServiceId()); err != nil {
		return nil, err
	}
	if err := checkText("registration_id", req.GetRegistrationId(), MaxText); err != nil {
		return nil, err
	}
	if err := checkDuration("drain_timeout", req.GetDrainTimeout(), maxDrain); err != nil {
		return nil, err
	}
	if req.GetGraceful() {
		return a.drainService(ctx, req)
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_DeregisterService{
		DeregisterService: &commandpb.DeregisterService{ServiceId: req.ServiceId, RegistrationId: req.RegistrationId},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		if rej.Code == commandpb.Code_CODE_NOT_FOUND {
			return &registrypb.DeregisterResponse{Success: true, Revision: res.GetRevision()}, nil
		}
		return nil, FromRejection(rej).Err()
	}
	return &registrypb.DeregisterResponse{Success: true, Existed: res.GetExisted(), Revision: res.GetRevision()}, nil
}

// drainService has a service drain. It answers once that is recorded, with the time at
// which the service is removed at the latest: nobody waits for it here.
func (a *registryAPI) drainService(ctx context.Context, req *registrypb.DeregisterRequest) (*registrypb.DeregisterResponse, error) {
	// Less than a millisecond is a wish not to wait, which a drain of none would refuse.
	timeout := uint64(max(req.GetDrainTimeout().AsDuration().Milliseconds(), 1))
	if req.GetDrainTimeout().AsDuration() == 0 {
		timeout = uint64(defaultServiceDrain.Milliseconds())
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_DrainService{
		DrainService: &commandpb.DrainService{ServiceId: req.ServiceId, RegistrationId: req.RegistrationId, TimeoutMs: timeout},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return nil, FromRejection(rej).Err()
	}
	resp := &registrypb.DeregisterResponse{Success: true, Existed: res.GetExisted(), Revision: res.GetRevision()}
	if res.GetExisted() {
		resp.Draining, resp.RemovedBy = true, timestampMs(res.GetDeadlineMs())
	}
	return resp, nil
}

// serviceFilter is which services a caller wants to see.
type serviceFilter struct {
	typ    commonpb.ServiceType
	labels map[string]string
	// unhealthy includes services that are unhealthy, that drain, or whose lease
	// expired.
	unhealthy bool
}

func (f *serviceFilter) check() error {
	if err := checkServiceType("type_filter", f.typ); err != nil {
		return err
	}
	return checkLabels("label_selector", f.labels)
}

// matches says whether the service is of the kind asked for, whatever its
// health.
func (f *serviceFilter) matches(s *commandpb.Service) bool {
	if s == nil || (f.typ != commonpb.ServiceType_SERVICE_TYPE_UNSPECIFIED && serviceTypeToAPI(s.Type) != f.typ) {
		return false
	}
	for k, want := range f.labels {
		if got, ok := s.Labels[k]; !ok || got != want {
			return false
		}
	}
	return true
}

// shows says whether the service is listed.
func (f *serviceFilter) shows(s *commandpb.Service) bool {
	return f.matches(s) && (f.unhealthy || usable(s))
}

// usable says whether a service should be sent work: degraded ones are.
func usable(s *commandpb.Service) bool {
	return healthOf(s) != commonpb.HealthStatus_HEALTH_STATUS_UNHEALTHY
}

// partitionIndex holds who holds which partitions, by group and service.
type partitionIndex map[string]map[string][]uint32

// indexPartitions reads all groups of v.
func indexPartitions(v *router.View) (partitionIndex, error) {
	idx := make(partitionIndex)
	err := v.Groups("", 0, func(g *commandpb.Group) bool {
		members := make(map[string][]uint32, len(g.Members))
		for _, m := range g.Members {
			members[m.ServiceId] = m.Partitions
		}
		idx[g.GroupId] = members
		return true
	})
	return idx, err
}

func (idx partitionIndex) of(s *commandpb.Service) []uint32 { return idx[s.GroupId][s.ServiceId] }

// partitionsOf returns what a service holds in the group it names.
func partitionsOf(v *router.View, s *commandpb.Service) ([]uint32, error) {
	if s.GroupId == "" {
		return nil, nil
	}
	g, err := v.Group(s.GroupId)
	if err != nil {
		return nil, err
	}
	return memberPartitions(g, s.ServiceId), nil
}

func memberPartitions(g *commandpb.Group, service string) []uint32 {
	for _, m := range g.GetMembers() {
		if m.ServiceId == service {
			return m.Partitions
		}
	}
	return nil
}

// ListServices lists the services that match, by id.
func (a *registryAPI) ListServices(ctx context.Context, req *registrypb.ListServicesRequest) (*registrypb.ListServicesResponse, error) {
	f := serviceFilter{req.GetTypeFilter(), req.GetLabelSelector(), req.GetIncludeUnhealthy()}
	if err := f.check(); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	idx, err := indexPartitions(v)
	if err != nil {
		return nil, err
	}
	resp := &registrypb.ListServicesResponse{Revision: v.Revision()}
	size := 0
	err = v.Services("", 0, func(s *commandpb.Service) bool {
		if f.shows(s) {
			resp.Services = append(resp.Services, serviceToAPI(s, idx.of(s)))
			size += 64 + s.SizeVT()
		}
		return size <= maxAnswerBytes
	})
	if err != nil {
		return nil, err
	}
	if size > maxAnswerBytes {
		return nil, status.Errorf(codes.ResourceExhausted,
			"the list exceeds %d bytes; narrow it by type or labels, or use WatchServices, which sends the same in pieces", maxAnswerBytes)
	}
	return resp, nil
}

// GetServiceEndpoints returns the usable instances of a service by name, of a
// type and in a group when those are given. Names compare as they do for
// placement: without case, "-", "_" and ".".
func (a *registryAPI) GetServiceEndpoints(ctx context.Context, req *registrypb.GetServiceEndpointsRequest) (*registrypb.GetServiceEndpointsResponse, error) {
	name, group := req.GetServiceName(), req.GetGroupId()
	if err := checkText("service_name", name, MaxText); err != nil {
		return nil, err
	}
	if err := checkOptionalID("group_id", group); err != nil {
		return nil, err
	}
	f := serviceFilter{typ: req.GetServiceType()}
	if err := f.check(); err != nil {
		return nil, err
	}
	if name == "" && group == "" && f.typ == commonpb.ServiceType_SERVICE_TYPE_UNSPECIFIED {
		return nil, invalid("service_name", "give a service name, a type or a group")
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &registrypb.GetServiceEndpointsResponse{Revision: v.Revision()}
	var groupRec *commandpb.Group
	if group != "" {
		if groupRec, err = v.Group(group); err != nil {
			return nil, err
		}
	}
	var inner error
	add := func(s *commandpb.Service) bool {
		if !f.shows(s) {
			return true
		}
		var partitions []uint32
		if group != "" {
			partitions = memberPartitions(groupRec, s.ServiceId)
			if s.GroupId != group && !isMember(groupRec, s.ServiceId) {
				return true
			}
		} else if partitions, inner = partitionsOf(v, s); inner != nil {
			return false
		}
		resp.Endpoints = append(resp.Endpoints, &registrypb.EndpointInfo{
			ServiceId: s.ServiceId, Endpoint: endpointToAPI(s.Endpoint), Weight: s.Weight,
			Health: healthOf(s), AssignedPartitions: partitions,
		})
		return true
	}
	if name != "" {
		err = v.ServicesNamed(name, add)
	} else {
		err = v.Services("", 0, add)
	}
	if err == nil {
		err = inner
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func isMember(g *commandpb.Group, service string) bool {
	for _, m := range g.GetMembers() {
		if m.ServiceId == service {
			return true
		}
	}
	return false
}

// errUnknownService refuses something that needs a registered service.
func errUnknownService(id string) error {
	return FromRejection(&commandpb.Rejection{
		Code:    commandpb.Code_CODE_NOT_FOUND,
		Reason:  fmt.Sprintf("no service %q is registered; register it first", id),
		Subject: "service " + id,
	}).Err()
}
