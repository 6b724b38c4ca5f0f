package rpc

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// Goal: a service that is deregistered in peace stays, is offered to nobody, is shown
// as what it is to who watches or lists, is told to drain on its heartbeats, and joins
// no group. Registering again takes it back; deregistering without grace removes it.
func TestGracefulDeregistration(t *testing.T) {
	a := newAPI(t)
	reg := a.register(registration("svc", "filter"))
	join, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "svc", GroupId: "g", PartitionCount: 2})
	noError(t, err)
	if len(join.AssignedPartitions) != 2 {
		t.Fatal(join)
	}
	watch, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{})
	noError(t, err)
	next := func(want registrypb.EventType) *registrypb.ServiceEvent {
		t.Helper()
		for {
			ev, err := watch.Recv()
			noError(t, err)
			if ev.EventType == want {
				return ev
			}
		}
	}
	next(registrypb.EventType_EVENT_TYPE_SYNCED)
	beats, err := a.registry.Heartbeat(a.ctx())
	noError(t, err)
	beat := func(registration string) *registrypb.HeartbeatResponse {
		t.Helper()
		noError(t, beats.Send(&registrypb.HeartbeatRequest{ServiceId: "svc", RegistrationId: registration}))
		resp, err := beats.Recv()
		noError(t, err)
		return resp
	}
	beat(reg.RegistrationId)
	deregister := func(req *registrypb.DeregisterRequest) *registrypb.DeregisterResponse {
		t.Helper()
		req.ServiceId = "svc"
		resp, err := a.registry.Deregister(a.ctx(), req)
		noError(t, err)
		return resp
	}
	resp := deregister(&registrypb.DeregisterRequest{RegistrationId: reg.RegistrationId, Graceful: true, DrainTimeout: durationpb.New(time.Minute)})
	if !resp.Success || !resp.Existed || !resp.Draining || !resp.RemovedBy.AsTime().Equal(a.clock.Now().Add(time.Minute)) || resp.PendingRecords != 0 {
		t.Fatal(resp)
	}
	pushed, err := beats.Recv()
	noError(t, err)
	drain := pushed.Commands[0].GetDrain()
	if !pushed.Acknowledged || drain.GetTimeout().AsDuration() != time.Minute || drain.GetReason() == "" {
		t.Fatal(pushed)
	}
	if r := beat(reg.RegistrationId); !r.Acknowledged || len(r.Commands) != 0 {
		t.Fatalf("told again: %v", r)
	}
	ev := next(registrypb.EventType_EVENT_TYPE_HEALTH_CHANGED)
	if s := ev.Service; s.Health.Status != commonpb.HealthStatus_HEALTH_STATUS_UNHEALTHY || s.RemovedBy == nil || s.Health.Message == "" {
		t.Fatal(ev)
	}
	list := func(all bool) []*registrypb.RegisteredService {
		t.Helper()
		resp, err := a.registry.ListServices(a.ctx(), &registrypb.ListServicesRequest{IncludeUnhealthy: all})
		noError(t, err)
		return resp.Services
	}
	if len(list(false)) != 0 || len(list(true)) != 1 || list(true)[0].RemovedBy == nil || len(list(true)[0].AssignedPartitions) != 0 {
		t.Fatal(list(true))
	}
	found, err := a.registry.GetServiceEndpoints(a.ctx(), &registrypb.GetServiceEndpointsRequest{ServiceName: "filter"})
	noError(t, err)
	if len(found.Endpoints) != 0 {
		t.Fatalf("work is sent to it: %v", found)
	}
	refused, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "svc", GroupId: "other", PartitionCount: 2})
	if err == nil && refused.Success {
		t.Fatal("it joins another group")
	}
	// The default, and bounds.
	if resp := deregister(&registrypb.DeregisterRequest{Graceful: true}); !resp.RemovedBy.AsTime().Equal(a.clock.Now().Add(defaultServiceDrain)) {
		t.Fatal(resp)
	}
	by := a.clock.Now().Add(defaultServiceDrain)
	for range 3 { // asked again and again, it goes no later, and the answer says so
		a.clock.advance(time.Second)
		if resp := deregister(&registrypb.DeregisterRequest{Graceful: true, DrainTimeout: durationpb.New(time.Hour)}); !resp.Draining || !resp.RemovedBy.AsTime().Equal(by) {
			t.Fatalf("it is removed by %v, which was to be %v", resp.RemovedBy.AsTime(), by)
		}
	}
	for _, d := range []time.Duration{-1, maxDrain + time.Second} {
		_, err := a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "svc", Graceful: true, DrainTimeout: durationpb.New(d)})
		wantCode(t, err, codes.InvalidArgument)
	}
	_, err = a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "svc", RegistrationId: "other", Graceful: true})
	if err == nil {
		t.Fatal("another registration was drained")
	}

	a.register(registration("svc", "filter"))
	if s := list(false); len(s) != 1 || s[0].RemovedBy != nil {
		t.Fatal(s)
	}
	deregister(&registrypb.DeregisterRequest{Graceful: true})
	if resp := deregister(&registrypb.DeregisterRequest{}); !resp.Existed || resp.Draining || resp.RemovedBy != nil {
		t.Fatal(resp)
	}
	if resp := deregister(&registrypb.DeregisterRequest{Graceful: true}); !resp.Success || resp.Existed || resp.Draining {
		t.Fatal(resp)
	}
	if len(list(true)) != 0 {
		t.Fatal(list(true))
	}
}

// Goal: who watches is told that a service is purged.
func TestPurgedServiceIsTold(t *testing.T) {
	a := newAPI(t)
	a.register(registration("svc", "filter"))
	a.setHealth("svc", 0, commandpb.ServiceState_SERVICE_STATE_EXPIRED)
	watch, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{IncludeUnhealthy: true})
	noError(t, err)
	for {
		ev, err := watch.Recv()
		noError(t, err)
		if ev.EventType == registrypb.EventType_EVENT_TYPE_SYNCED {
			break
		}
	}
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_PurgeServices{PurgeServices: &commandpb.PurgeServices{
		Services: []*commandpb.ExpiredService{{ServiceId: "svc", ExpectedRevision: a.node.fsm.Revision()}},
	}}})
	ev, err := watch.Recv()
	noError(t, err)
	if ev.EventType != registrypb.EventType_EVENT_TYPE_REMOVED || ev.Service.Identity.ServiceId != "svc" {
		t.Fatal(ev)
	}
}
