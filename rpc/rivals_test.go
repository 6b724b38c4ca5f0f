package rpc

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// from is a call that comes from an address.
func (a *api) from(host string) context.Context {
	ctx := grpcpeer.NewContext(a.ctx(), &grpcpeer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(host), Port: 40000}})
	return grpc.NewContextWithServerTransportStream(ctx, noTransport{})
}

// Goal: of two pods with one sidecar id the one that registered last has it. The
// other is told to stop, its beats keep nothing alive, and the operator is told;
// restarted, it takes the id back.
func TestTwoPodsWithOneID(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.PlacementWait = time.Millisecond })
	api := &sidecarAPI{Server: a.Server}
	register := func(pod, host string) *sidecarpb.RegisterSidecarResponse {
		req := sidecarRequest("ns/one", "transform")
		req.PodName, req.SidecarEndpoint = pod, net.JoinHostPort(host, "50053")
		resp, err := a.sidecar.RegisterSidecar(a.ctx(), req)
		noError(t, err)
		a.caughtUp()
		return resp
	}
	beat := func(host string) *sidecarpb.HeartbeatResponse {
		resp, err := api.Heartbeat(a.from(host), &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/one"})
		noError(t, err)
		return resp
	}
	if resp := register("first", "10.0.0.1"); len(resp.Warnings) != 0 {
		t.Fatal(resp)
	}
	a.create(chain("p", "src", "transform", "sink"))
	a.assign("ns/one", "p")
	a.caughtUp()
	if resp := beat("10.0.0.1"); len(resp.Commands) != 1 || resp.Commands[0].GetAssign() == nil || resp.Reason != "" {
		t.Fatal(resp)
	}
	if resp := register("second", "10.0.0.2"); len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "ns/first at 10.0.0.1:50053") {
		t.Fatal(resp)
	}
	beats := a.beats.count("ns/one", "")
	resp := beat("10.0.0.1")
	if !resp.Acknowledged || len(resp.Commands) != 1 || resp.Commands[0].GetRevoke().GetPipelineId() != "p" ||
		!strings.Contains(resp.Reason, "ns/second at 10.0.0.2:50053") {
		t.Fatal(resp)
	}
	if a.beats.count("ns/one", "") != beats {
		t.Fatal("a beat of the pod that lost the id counts for the one that has it")
	}
	if alarms := a.rivals.alarms(a.clock.Now()); len(alarms) != 1 || !strings.Contains(alarms[0], "ns/first at 10.0.0.1") {
		t.Fatal(alarms)
	}
	if resp := beat("10.0.0.2"); len(resp.Commands) != 1 || resp.Commands[0].GetAssign() == nil || a.beats.count("ns/one", "") != beats+1 {
		t.Fatal(resp)
	}
	register("first", "10.0.0.1")
	if resp := beat("10.0.0.1"); resp.Reason != "" || len(resp.Commands) != 1 || resp.Commands[0].GetAssign() == nil {
		t.Fatal(resp)
	}
	if resp := beat("10.0.0.2"); resp.Reason == "" {
		t.Fatal(resp)
	}
	a.clock.advance(2 * rivalAlarm)
	if alarms := a.rivals.alarms(a.clock.Now()); len(alarms) != 0 {
		t.Fatalf("the other has been quiet since: %q", alarms)
	}
}

// Goal: the memory of rivals is bounded, and whoever is on this machine is no
// rival: it may be a proxy.
func TestRivalsAreBounded(t *testing.T) {
	var r rivals
	for i := range maxRivals + 100 {
		id := fmt.Sprint("s", i)
		r.replaced(&commandpb.Sidecar{SidecarId: id, Endpoint: "127.0.0.1:1"}, &commandpb.Sidecar{SidecarId: id, Endpoint: "10.0.0.2:1"})
	}
	if len(r.by) != maxRivals {
		t.Fatal(len(r.by))
	}
	ctx := grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP("127.0.0.1")}})
	for id := range r.by {
		if reason := r.find(ctx, id, time.Now()); reason != "" {
			t.Fatal(reason)
		}
	}
}

// Goal: a sidecar that says which registration it beats for is told when that is
// not in force, and why.
func TestHeartbeatOfAnEarlierRegistration(t *testing.T) {
	a := newAPI(t)
	register := func(endpoint string) string {
		req := sidecarRequest("ns/one", "transform")
		req.SidecarEndpoint = endpoint
		resp, err := a.sidecar.RegisterSidecar(a.ctx(), req)
		noError(t, err)
		return resp.RegistrationId
	}
	beat := func(id, registration string) *sidecarpb.HeartbeatResponse {
		resp, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{SidecarId: id, RegistrationId: registration})
		noError(t, err)
		return resp
	}
	first := register("10.0.0.1:1")
	if resp := beat("ns/one", first); !resp.Acknowledged || resp.Reason != "" {
		t.Fatal(resp)
	}
	second := register("10.0.0.2:1")
	beats := a.beats.count("ns/one", "")
	if resp := beat("ns/one", first); resp.Acknowledged || !strings.Contains(resp.Reason, "10.0.0.2:1") || !strings.Contains(resp.Reason, second) {
		t.Fatal(resp)
	}
	if a.beats.count("ns/one", "") != beats {
		t.Fatal("it counted")
	}
	if resp := beat("ns/one", second); !resp.Acknowledged {
		t.Fatal(resp)
	}
	if resp := beat("ns/nobody", second); resp.Acknowledged || !strings.Contains(resp.Reason, "register it") {
		t.Fatal(resp)
	}
}

// Goal: services of one name are accepted and told of; far too many services are
// refused, and what is no address too, each with what is wrong.
func TestOddRegistrations(t *testing.T) {
	a := newAPI(t)
	req := sidecarRequest("ns/one", "clean", "clean", "other")
	req.LocalServices[1].LocalEndpoint = "127.0.0.1:9001"
	resp, err := a.sidecar.RegisterSidecar(a.ctx(), req)
	noError(t, err)
	if !resp.Success || len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "clean (transform), at 127.0.0.1:9000, 127.0.0.1:9001") {
		t.Fatal(resp)
	}
	again, err := a.sidecar.RegisterSidecar(a.ctx(), sidecarRequest("ns/two", "clean", "clean"))
	noError(t, err)
	if !again.Success || len(again.Warnings) != 0 { // one service, reported twice
		t.Fatal(again)
	}
	many := sidecarRequest("ns/three")
	for i := range 10_000 {
		many.LocalServices = append(many.LocalServices, &sidecarpb.LocalService{ServiceName: fmt.Sprint("s", i), LocalEndpoint: "h:1"})
	}
	_, err = a.sidecar.RegisterSidecar(a.ctx(), many)
	wantCode(t, err, codes.InvalidArgument)
	if !strings.Contains(err.Error(), "10000 services, the limit is 256") {
		t.Fatal(err)
	}
	for _, endpoint := range []string{"", "h", "http://h:1", "h:0", "h:70000", ":1", "a b:1", "h:http"} {
		bad := sidecarRequest("ns/four", "clean")
		bad.LocalServices[0].LocalEndpoint = endpoint
		_, err := a.sidecar.RegisterSidecar(a.ctx(), bad)
		wantCode(t, err, codes.InvalidArgument)
		if !strings.Contains(err.Error(), "local_services[0].local_endpoint") {
			t.Errorf("%q: %v", endpoint, err)
		}
	}
}

// Goal: sidecars are told to beat at slightly different times, on average as
// configured, and never so late that a lease is in danger.
func TestBeatsAreSpread(t *testing.T) {
	s := &Server{cfg: ServerConfig{HeartbeatInterval: 10 * time.Second}}
	seen := map[uint64]bool{}
	var sum uint64
	const n = 2000
	for range n {
		ms := s.nextBeatMs()
		if ms < 9000 || ms > 11000 {
			t.Fatal(ms)
		}
		seen[ms] = true
		sum += ms
	}
	if mean := sum / n; len(seen) < 500 || mean < 9800 || mean > 10200 {
		t.Fatalf("%d different, mean %d", len(seen), sum/n)
	}
	s.cfg.HeartbeatInterval = time.Millisecond
	if ms := s.nextBeatMs(); ms != 1 {
		t.Fatal(ms)
	}
}
