package rpc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

func registration(id, name string) *registrypb.RegisterRequest {
	return &registrypb.RegisterRequest{
		Identity: &commonpb.ServiceIdentity{ServiceId: id, ServiceType: commonpb.ServiceType_SERVICE_TYPE_TRANSFORM, Name: name},
		Endpoint: &commonpb.Endpoint{Host: "10.0.0.9", Port: 8080},
	}
}

func (a *api) register(req *registrypb.RegisterRequest) *registrypb.RegisterResponse {
	a.t.Helper()
	resp, err := a.registry.Register(a.ctx(), req)
	noError(a.t, err)
	if !resp.Success || resp.RegistrationId == "" || resp.LeaseId == "" || resp.InitialCredits == 0 {
		a.t.Fatal(resp)
	}
	return resp
}

// Goal: a service comes back as it was registered: type LOOKUP, IPv6 without and
// with brackets, TLS, labels, weight, times.
func TestRegisterRoundTrip(t *testing.T) {
	a := newAPI(t)
	req := &registrypb.RegisterRequest{
		Identity: &commonpb.ServiceIdentity{
			ServiceId: "svc-1", ServiceType: commonpb.ServiceType_SERVICE_TYPE_LOOKUP, Name: "Geo-Lookup",
			Version: "1.2", Capabilities: []string{"batch"}, GroupId: "g",
		},
		Endpoint:          &commonpb.Endpoint{Host: "[2001:db8::5]", Port: 443, UseTls: true},
		Metadata:          &registrypb.ServiceMetadata{Labels: map[string]string{"zone": "a"}, RecordTypesHandled: []string{"order"}, MaxConcurrentRequests: 7, Weight: 3},
		HeartbeatInterval: durationpb.New(20 * time.Second),
		SidecarId:         "ns/pod",
	}
	resp := a.register(req)
	if resp.LeaseTtl.AsDuration() != time.Minute {
		t.Fatalf("lease %v, three intervals expected", resp.LeaseTtl.AsDuration())
	}
	list, err := a.registry.ListServices(a.ctx(), &registrypb.ListServicesRequest{})
	noError(t, err)
	if len(list.Services) != 1 {
		t.Fatal(list)
	}
	got := list.Services[0]
	req.Endpoint.Host = "2001:db8::5"
	if !proto.Equal(got.Identity, req.Identity) || !proto.Equal(got.Endpoint, req.Endpoint) || !proto.Equal(got.Metadata, req.Metadata) ||
		got.SidecarId != "ns/pod" || got.RegisteredAt == nil || got.LastHeartbeat == nil ||
		got.Health.Status != commonpb.HealthStatus_HEALTH_STATUS_HEALTHY || got.ModRevision != resp.Revision {
		t.Fatal(got)
	}
	if a.beats.count("", "svc-1") != 1 {
		t.Fatal("a registration is a sign of life")
	}
	short := a.register(registration("svc-2", "x"))
	if short.LeaseTtl.AsDuration() != 30*time.Second {
		t.Fatal(short.LeaseTtl)
	}
}

// Goal: filters filter; unhealthy and expired ones are shown only when asked for.
func TestListServices(t *testing.T) {
	a := newAPI(t)
	add := func(id string, typ commonpb.ServiceType, labels map[string]string) {
		r := registration(id, id)
		r.Identity.ServiceType, r.Metadata = typ, &registrypb.ServiceMetadata{Labels: labels}
		a.register(r)
	}
	add("src", commonpb.ServiceType_SERVICE_TYPE_SOURCE, map[string]string{"zone": "a", "tier": "1"})
	add("sink", commonpb.ServiceType_SERVICE_TYPE_SINK, map[string]string{"zone": "a"})
	add("sick", commonpb.ServiceType_SERVICE_TYPE_SINK, map[string]string{"zone": "b"})
	add("gone", commonpb.ServiceType_SERVICE_TYPE_SINK, nil)
	a.setHealth("sick", commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY, 0)
	a.setHealth("gone", 0, commandpb.ServiceState_SERVICE_STATE_EXPIRED)
	ids := func(req *registrypb.ListServicesRequest) []string {
		t.Helper()
		resp, err := a.registry.ListServices(a.ctx(), req)
		noError(t, err)
		var out []string
		for _, s := range resp.Services {
			out = append(out, s.Identity.ServiceId)
		}
		return out
	}
	for _, c := range []struct {
		req  *registrypb.ListServicesRequest
		want []string
	}{
		{&registrypb.ListServicesRequest{}, []string{"sink", "src"}},
		{&registrypb.ListServicesRequest{IncludeUnhealthy: true}, []string{"gone", "sick", "sink", "src"}},
		{&registrypb.ListServicesRequest{TypeFilter: commonpb.ServiceType_SERVICE_TYPE_SINK}, []string{"sink"}},
		{&registrypb.ListServicesRequest{LabelSelector: map[string]string{"zone": "a"}}, []string{"sink", "src"}},
		{&registrypb.ListServicesRequest{LabelSelector: map[string]string{"zone": "a", "tier": "1"}}, []string{"src"}},
		{&registrypb.ListServicesRequest{LabelSelector: map[string]string{"zone": "c"}, IncludeUnhealthy: true}, nil},
	} {
		if got := ids(c.req); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.req, got, c.want)
		}
	}
}

func (a *api) setHealth(id string, h commandpb.HealthStatus, s commandpb.ServiceState) {
	a.t.Helper()
	up := &commandpb.UpdateServiceHealth{ServiceId: id, State: s}
	if h != 0 {
		up.Health = &commandpb.Health{Status: h}
	}
	a.node.must(a.t, &commandpb.Command{Op: &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: up}})
}

// Goal: endpoints are found by name whatever its spelling, by type and group,
// with weight, health and partitions, and without the unusable.
func TestGetServiceEndpoints(t *testing.T) {
	a := newAPI(t)
	for _, id := range []string{"f1", "f2", "f3"} {
		r := registration(id, "Filter-Active")
		r.Metadata = &registrypb.ServiceMetadata{Weight: 5}
		if id != "f3" {
			r.Identity.GroupId = "g"
		}
		a.register(r)
	}
	join, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "f1", GroupId: "g", PartitionCount: 3})
	noError(t, err)
	find := func(req *registrypb.GetServiceEndpointsRequest) map[string]*registrypb.EndpointInfo {
		t.Helper()
		resp, err := a.registry.GetServiceEndpoints(a.ctx(), req)
		noError(t, err)
		out := make(map[string]*registrypb.EndpointInfo)
		for _, e := range resp.Endpoints {
			out[e.ServiceId] = e
		}
		return out
	}
	all := find(&registrypb.GetServiceEndpointsRequest{ServiceName: "filteractive"})
	if len(all) != 3 || all["f1"].Weight != 5 || all["f1"].Endpoint.Port != 8080 || !slices.Equal(all["f1"].AssignedPartitions, join.AssignedPartitions) {
		t.Fatal(all)
	}
	if got := find(&registrypb.GetServiceEndpointsRequest{ServiceName: "filter_active", GroupId: "g"}); len(got) != 2 {
		t.Fatal(got)
	}
	if got := find(&registrypb.GetServiceEndpointsRequest{GroupId: "g"}); len(got) != 2 {
		t.Fatal(got)
	}
	if got := find(&registrypb.GetServiceEndpointsRequest{ServiceName: "filteractive", ServiceType: commonpb.ServiceType_SERVICE_TYPE_SINK}); len(got) != 0 {
		t.Fatal(got)
	}
	a.setHealth("f2", commandpb.HealthStatus_HEALTH_STATUS_DEGRADED, 0)
	a.setHealth("f3", commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY, 0)
	got := find(&registrypb.GetServiceEndpointsRequest{ServiceName: "filteractive"})
	if len(got) != 2 || got["f2"].Health != commonpb.HealthStatus_HEALTH_STATUS_DEGRADED {
		t.Fatal(got)
	}
}

// Goal: deregistration is idempotent, and a predecessor cannot remove its
// successor.
func TestDeregister(t *testing.T) {
	a := newAPI(t)
	first := a.register(registration("svc", "x"))
	second := a.register(registration("svc", "x"))
	dereg := func(id string) (*registrypb.DeregisterResponse, error) {
		return a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "svc", RegistrationId: id})
	}
	_, err := dereg(first.RegistrationId)
	wantCode(t, err, codes.Aborted)
	resp, err := dereg(second.RegistrationId)
	noError(t, err)
	if !resp.Success || !resp.Existed {
		t.Fatal(resp)
	}
	resp, err = dereg("")
	noError(t, err)
	if !resp.Success || resp.Existed {
		t.Fatal(resp)
	}
}

// Goal: a group gets the partitions asked for, else those of its stage, else 16;
// every partition has exactly one owner throughout.
func TestGroups(t *testing.T) {
	a := newAPI(t)
	cfg := chain("p", "src", "filter", "sink")
	cfg.Stages[1].Parallelism = 6
	a.create(cfg)
	for _, id := range []string{"a", "b", "c"} {
		a.register(registration(id, "filter"))
	}
	join := func(service, group, stage string, count uint32) *registrypb.JoinGroupResponse {
		t.Helper()
		resp, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{
			ServiceId: service, GroupId: group, StageId: stage, PartitionCount: count,
		})
		noError(t, err)
		return resp
	}
	if r := join("a", "by-count", "", 5); !r.Success || r.PartitionCount != 5 || len(r.AssignedPartitions) != 5 || r.Generation == 0 {
		t.Fatal(r)
	}
	if r := join("a", "by-default", "", 0); r.PartitionCount != 16 {
		t.Fatal(r)
	}
	join("a", "by-stage", "filter-stage", 0)
	join("b", "by-stage", "filter-stage", 0)
	last := join("c", "by-stage", "filter-stage", 0)
	if last.PartitionCount != 6 || len(last.AssignedPartitions) != 2 {
		t.Fatal(last)
	}
	owners := func() map[uint32]string {
		t.Helper()
		v := a.node.fsm.View()
		defer v.Close()
		g, err := v.Group("by-stage")
		noError(t, err)
		out := make(map[uint32]string)
		for _, m := range g.Members {
			for _, p := range m.Partitions {
				if out[p] != "" {
					t.Fatalf("partition %d belongs to %s and %s", p, out[p], m.ServiceId)
				}
				out[p] = m.ServiceId
			}
		}
		if len(out) != 6 {
			t.Fatalf("owners: %v", out)
		}
		return out
	}
	owners()
	if again := join("c", "by-stage", "filter-stage", 0); again.Generation != last.Generation || !slices.Equal(again.AssignedPartitions, last.AssignedPartitions) {
		t.Fatal(again)
	}
	if r := join("a", "by-stage", "another-stage", 0); r.Success || r.Error == "" {
		t.Fatalf("one group, two stages: %v", r)
	}
	leave, err := a.registry.LeaveGroup(a.ctx(), &registrypb.LeaveGroupRequest{ServiceId: "b", GroupId: "by-stage"})
	noError(t, err)
	if !leave.Success || !leave.WasMember || leave.Generation <= last.Generation {
		t.Fatal(leave)
	}
	if slices.Contains(values(owners()), "b") {
		t.Fatal("b owns something still")
	}
	leave, err = a.registry.LeaveGroup(a.ctx(), &registrypb.LeaveGroupRequest{ServiceId: "b", GroupId: "by-stage"})
	noError(t, err)
	if !leave.Success || leave.WasMember {
		t.Fatal(leave)
	}
	_, err = a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "unregistered", GroupId: "by-stage"})
	wantCode(t, err, codes.NotFound)
}

func values(m map[uint32]string) []string {
	var out []string
	for _, v := range m {
		out = append(out, v)
	}
	return out
}

// Goal: heartbeats are acknowledged with their deadline, cost no entries, and
// only the current registration's count.
func TestRegistryHeartbeat(t *testing.T) {
	a := newAPI(t)
	reg := a.register(registration("svc", "x"))
	stream, err := a.registry.Heartbeat(a.ctx())
	noError(t, err)
	beat := func(req *registrypb.HeartbeatRequest) *registrypb.HeartbeatResponse {
		t.Helper()
		noError(t, stream.Send(req))
		resp, err := stream.Recv()
		noError(t, err)
		return resp
	}
	before := a.node.entryCount()
	for range 10 {
		resp := beat(&registrypb.HeartbeatRequest{ServiceId: "svc", RegistrationId: reg.RegistrationId})
		if !resp.Acknowledged || resp.NextHeartbeatDeadline.AsDuration() != 30*time.Second {
			t.Fatal(resp)
		}
	}
	if a.node.entryCount() != before || a.beats.count("", "svc") != 11 {
		t.Fatal("heartbeats became entries, or were not noted")
	}
	for _, req := range []*registrypb.HeartbeatRequest{
		{ServiceId: "svc", RegistrationId: "an older one"}, {ServiceId: "nobody"},
	} {
		if resp := beat(req); resp.Acknowledged {
			t.Fatalf("%v was acknowledged", req)
		}
	}
	if a.beats.count("", "svc") != 11 {
		t.Fatal("a heartbeat of another registration counted")
	}
	// Health becomes a command when it changes, and only then.
	sick := &registrypb.ServiceHealth{Status: commonpb.HealthStatus_HEALTH_STATUS_DEGRADED, Message: "slow: 5 ms"}
	beat(&registrypb.HeartbeatRequest{ServiceId: "svc", Health: sick})
	beat(&registrypb.HeartbeatRequest{ServiceId: "svc", Health: &registrypb.ServiceHealth{Status: sick.Status, Message: "slow: 6 ms"}})
	if n := a.node.entryCount() - before; n != 1 {
		t.Fatalf("%d entries for one change of health", n)
	}
	list, err := a.registry.ListServices(a.ctx(), &registrypb.ListServicesRequest{})
	noError(t, err)
	if list.Services[0].Health.Status != sick.Status {
		t.Fatal(list)
	}
	noError(t, stream.CloseSend())
	if _, err := stream.Recv(); err == nil || err.Error() != "EOF" {
		t.Fatal(err)
	}
}

// Goal: what a service holds of a group reaches it as commands: with its next
// heartbeat, and at once when another member comes or goes.
func TestGroupChangesReachMembers(t *testing.T) {
	a := newAPI(t)
	for _, id := range []string{"a", "b"} {
		a.register(registration(id, "x"))
	}
	_, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "a", GroupId: "g", PartitionCount: 4})
	noError(t, err)
	a.caughtUp()
	stream, err := a.registry.Heartbeat(a.ctx())
	noError(t, err)
	noError(t, stream.Send(&registrypb.HeartbeatRequest{ServiceId: "a"}))
	recv := func() []*registrypb.RouterCommand {
		t.Helper()
		resp, err := stream.Recv()
		noError(t, err)
		if !resp.Acknowledged {
			t.Fatal(resp)
		}
		return resp.Commands
	}
	first := recv()
	if len(first) != 1 || len(first[0].GetAssign().GetPartitions()) != 4 {
		t.Fatal(first)
	}
	generation := first[0].GetAssign().Generation
	two, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "b", GroupId: "g"})
	noError(t, err)
	pushed := recv() // without a heartbeat
	if len(pushed) != 2 || !slices.Equal(pushed[0].GetRevoke().GetPartitions(), two.AssignedPartitions) ||
		len(pushed[1].GetAssign().GetPartitions()) != 2 || pushed[1].GetAssign().Generation <= generation {
		t.Fatal(pushed)
	}
	_, err = a.registry.LeaveGroup(a.ctx(), &registrypb.LeaveGroupRequest{ServiceId: "b", GroupId: "g"})
	noError(t, err)
	pushed = recv()
	if len(pushed) != 1 || len(pushed[0].GetAssign().GetPartitions()) != 4 {
		t.Fatal(pushed)
	}
	_, err = a.registry.LeaveGroup(a.ctx(), &registrypb.LeaveGroupRequest{ServiceId: "a", GroupId: "g"})
	noError(t, err)
	pushed = recv()
	if len(pushed) != 1 || len(pushed[0].GetRevoke().GetPartitions()) != 4 {
		t.Fatal(pushed)
	}
	noError(t, stream.Send(&registrypb.HeartbeatRequest{ServiceId: "a"}))
	if cmds := recv(); len(cmds) != 0 {
		t.Fatal(cmds)
	}
}

// Goal: a service on an open stream is told at once that its lease ran out, that
// it is back, and that it was removed.
func TestLeaseEndReachesService(t *testing.T) {
	a := newAPI(t)
	a.register(registration("a", "x"))
	_, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "a", GroupId: "g", PartitionCount: 2})
	noError(t, err)
	a.caughtUp()
	stream, err := a.registry.Heartbeat(a.ctx())
	noError(t, err)
	recv := func() *registrypb.HeartbeatResponse {
		t.Helper()
		resp, err := stream.Recv()
		noError(t, err)
		return resp
	}
	turn := func(to commandpb.ServiceState) {
		a.node.must(t, &commandpb.Command{Op: &commandpb.Command_UpdateServiceHealth{
			UpdateServiceHealth: &commandpb.UpdateServiceHealth{ServiceId: "a", State: to},
		}})
	}
	noError(t, stream.Send(&registrypb.HeartbeatRequest{ServiceId: "a"}))
	recv()
	turn(commandpb.ServiceState_SERVICE_STATE_EXPIRED)
	if r := recv(); !r.Acknowledged || len(r.Commands) != 2 || len(r.Commands[0].GetRevoke().GetPartitions()) != 2 ||
		!strings.Contains(r.Commands[1].GetDrain().GetReason(), "lease") {
		t.Fatal(r)
	}
	noError(t, stream.Send(&registrypb.HeartbeatRequest{ServiceId: "a"}))
	if r := recv(); !r.Acknowledged || len(r.Commands) != 0 {
		t.Fatal(r)
	}
	turn(commandpb.ServiceState_SERVICE_STATE_ALIVE) // as the leader does on that heartbeat
	if r := recv(); !r.Acknowledged || len(r.Commands) != 1 || r.Commands[0].GetResume() == nil {
		t.Fatal(r)
	}
	// Joining is a sign of life too, whatever the leases say.
	turn(commandpb.ServiceState_SERVICE_STATE_EXPIRED)
	recv()
	_, err = a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "a", GroupId: "g", PartitionCount: 2})
	noError(t, err)
	if r := recv(); len(r.Commands) != 2 || len(r.Commands[0].GetAssign().GetPartitions()) != 2 || r.Commands[1].GetResume() == nil {
		t.Fatal(r)
	}
	_, err = a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "a"})
	noError(t, err)
	if r := recv(); r.Acknowledged || len(r.Commands) != 2 || r.Commands[0].GetRevoke() == nil || r.Commands[1].GetDrain() == nil {
		t.Fatal(r)
	}
	noError(t, stream.Send(&registrypb.HeartbeatRequest{ServiceId: "a"}))
	if r := recv(); r.Acknowledged || len(r.Commands) != 0 {
		t.Fatal(r)
	}
}

// Goal: a watch of services sends the state, then events of the right kinds, in
// order, each at its revision.
func TestWatchServices(t *testing.T) {
	a := newAPI(t)
	a.register(registration("old", "x"))
	stream, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{})
	noError(t, err)
	var last uint64
	next := func(kind registrypb.EventType, id string) *registrypb.ServiceEvent {
		t.Helper()
		ev, err := stream.Recv()
		noError(t, err)
		if ev.EventType != kind || ev.GetService().GetIdentity().GetServiceId() != id {
			t.Fatalf("%v, want %v of %q", ev, kind, id)
		}
		if ev.Revision < last {
			t.Fatalf("revision went back from %d to %d", last, ev.Revision)
		}
		last = ev.Revision
		return ev
	}
	next(registrypb.EventType_EVENT_TYPE_ADDED, "old")
	next(registrypb.EventType_EVENT_TYPE_SYNCED, "")
	a.register(registration("new", "x"))
	next(registrypb.EventType_EVENT_TYPE_ADDED, "new")
	moved := registration("new", "x")
	moved.Endpoint.Port = 9999
	a.register(moved)
	if ev := next(registrypb.EventType_EVENT_TYPE_MODIFIED, "new"); ev.Service.Endpoint.Port != 9999 {
		t.Fatal(ev)
	}
	a.setHealth("new", commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY, 0)
	if ev := next(registrypb.EventType_EVENT_TYPE_HEALTH_CHANGED, "new"); ev.Service.Health.Status != commonpb.HealthStatus_HEALTH_STATUS_UNHEALTHY {
		t.Fatal(ev)
	}
	a.setHealth("new", commandpb.HealthStatus_HEALTH_STATUS_HEALTHY, 0)
	next(registrypb.EventType_EVENT_TYPE_HEALTH_CHANGED, "new")
	_, err = a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "new", GroupId: "g", PartitionCount: 2})
	noError(t, err)
	if ev := next(registrypb.EventType_EVENT_TYPE_PARTITIONS_ASSIGNED, "new"); len(ev.Service.AssignedPartitions) != 2 || ev.Service.Identity.GroupId != "g" {
		t.Fatal(ev)
	}
	_, err = a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "old", GroupId: "g"})
	noError(t, err)
	revoked := next(registrypb.EventType_EVENT_TYPE_PARTITIONS_REVOKED, "new")
	assigned := next(registrypb.EventType_EVENT_TYPE_PARTITIONS_ASSIGNED, "old")
	if revoked.Revision != assigned.Revision-1 {
		t.Fatalf("resuming after the first of two events of revision %d, from %d, loses the second", assigned.Revision, revoked.Revision)
	}
	_, err = a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "old"})
	noError(t, err)
	next(registrypb.EventType_EVENT_TYPE_REMOVED, "old")
}

// Goal: a filtered watch sees services come into and leave its filter, and
// nothing else.
func TestWatchServicesFilter(t *testing.T) {
	a := newAPI(t)
	stream, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{LabelSelector: map[string]string{"zone": "a"}})
	noError(t, err)
	next := func(kind registrypb.EventType, id string) {
		t.Helper()
		ev, err := stream.Recv()
		noError(t, err)
		if ev.EventType != kind || ev.GetService().GetIdentity().GetServiceId() != id {
			t.Fatalf("%v, want %v of %q", ev, kind, id)
		}
	}
	next(registrypb.EventType_EVENT_TYPE_SYNCED, "")
	put := func(id, zone string) {
		r := registration(id, "x")
		r.Metadata = &registrypb.ServiceMetadata{Labels: map[string]string{"zone": zone}}
		a.register(r)
	}
	put("elsewhere", "b")
	put("here", "a")
	next(registrypb.EventType_EVENT_TYPE_ADDED, "here")
	put("elsewhere", "a")
	next(registrypb.EventType_EVENT_TYPE_ADDED, "elsewhere")
	put("here", "b")
	next(registrypb.EventType_EVENT_TYPE_REMOVED, "here")
}

// Goal: a watch that is cut and resumed at any point tells every change exactly
// once, in order; one that cannot be says RESYNC and sends the state.
func TestWatchServicesResume(t *testing.T) {
	a := newAPI(t)
	a.register(registration("seed", "x"))
	from := a.node.fsm.Revision()
	var want []string
	for i := range 40 {
		id := "svc-" + formatUint(uint64(i%7))
		if i%5 == 4 {
			resp, err := a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: id})
			noError(t, err)
			if resp.Existed {
				want = append(want, "REMOVED "+id)
			}
			continue
		}
		v := a.node.fsm.Latest()
		s, err := v.Service(id)
		noError(t, err)
		r := registration(id, "x")
		r.Endpoint.Port = uint32(1000 + i)
		a.register(r)
		if s == nil {
			want = append(want, "ADDED "+id)
		} else {
			want = append(want, "MODIFIED "+id)
		}
	}
	var got []string
	for cut := 0; len(got) < len(want); cut++ {
		ctx, cancel := context.WithCancel(a.ctx())
		stream, err := a.registry.WatchServices(ctx, &registrypb.WatchServicesRequest{FromRevision: from})
		noError(t, err)
		for range 1 + 1 + cut%4 {
			ev, err := stream.Recv()
			noError(t, err)
			from = ev.Revision
			switch ev.EventType {
			case registrypb.EventType_EVENT_TYPE_SYNCED:
			case registrypb.EventType_EVENT_TYPE_RESYNC:
				t.Fatal(ev)
			default:
				got = append(got, ev.EventType.String()[len("EVENT_TYPE_"):]+" "+ev.Service.Identity.ServiceId)
			}
			if len(got) == len(want) {
				break
			}
		}
		cancel()
	}
	if !slices.Equal(got, want) {
		t.Fatalf("%v\nwant %v", got, want)
	}
	stream, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{FromRevision: from + 1_000_000})
	noError(t, err)
	ev, err := stream.Recv()
	noError(t, err)
	if ev.EventType != registrypb.EventType_EVENT_TYPE_RESYNC || ev.Reason == "" {
		t.Fatal(ev)
	}
	ev, err = stream.Recv()
	noError(t, err)
	if ev.EventType != registrypb.EventType_EVENT_TYPE_ADDED {
		t.Fatal(ev)
	}
}

// Goal: no more services register with one sidecar than it could report itself: the
// next one is told so and why. Those that are registered can register again, on
// another sidecar there is room, and one that is gone makes room.
func TestServicesOfOneSidecarAreBounded(t *testing.T) {
	a := newAPI(t)
	try := func(service, sidecar string) error {
		req := registration(service, "x")
		req.SidecarId = sidecar
		_, err := a.registry.Register(a.ctx(), req)
		return err
	}
	for i := range MaxLocalServices {
		noError(t, try(fmt.Sprintf("svc-%04d", i), "ns/pod"))
	}
	err := try("one-more", "ns/pod")
	wantCode(t, err, codes.InvalidArgument)
	if !strings.Contains(err.Error(), "sidecar_id") || !strings.Contains(err.Error(), "256 services are registered with sidecar ns/pod") {
		t.Fatal(err)
	}
	noError(t, try("svc-0000", "ns/pod"))
	noError(t, try("one-more", "ns/other"))
	noError(t, try("and-one", ""))
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
		ServiceId: "svc-0007", State: commandpb.ServiceState_SERVICE_STATE_EXPIRED,
	}}})
	noError(t, try("one-more", "ns/pod"))
}
