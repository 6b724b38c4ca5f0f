package rpc

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// Goal: of a stage that runs with a service which was deregistered in peace it is said
// which that is and until when, in the status of its pipeline and in its explanation;
// not of other stages, nor of a service whose place another one takes.
func TestStageWithALeavingServiceIsNamed(t *testing.T) {
	a := newStudiedAPI(t)
	a.offer("ns/one", "x:source", "y:sink") // at 127.0.0.1:9000 and :9001
	a.create(chain("p", "x", "y"))
	req := func(id string, port uint32) *registrypb.RegisterRequest {
		return &registrypb.RegisterRequest{
			Identity:  &commonpb.ServiceIdentity{ServiceId: id, Name: "X", ServiceType: commonpb.ServiceType_SERVICE_TYPE_SOURCE},
			Endpoint:  &commonpb.Endpoint{Host: "10.0.0.1", Port: port},
			SidecarId: "ns/one",
		}
	}
	a.register(req("svc", 8080))
	a.place()
	said := func(what string, stage int, want string) {
		t.Helper()
		r, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
		noError(t, err)
		e, err := a.cluster.ExplainPipeline(a.ctx(), &clusterpb.ExplainPipelineRequest{PipelineId: "p"})
		noError(t, err)
		shown, explained := r.Status.Placements[stage], e.Stages[stage]
		if shown.DrainingReason != explained.DrainingReason || len(shown.SidecarIds) != 1 {
			t.Fatalf("%s: shown as %v, explained as %v", what, shown, explained)
		}
		if got := shown.DrainingReason; !strings.Contains(got, want) || (want == "") != (got == "") {
			t.Fatalf("%s: %q, want %q", what, got, want)
		}
	}
	said("nothing drains", 0, "")
	resp, err := a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "svc", Graceful: true, DrainTimeout: durationpb.New(time.Minute)})
	noError(t, err)
	said("it drains", 0, "service svc of sidecar ns/one was deregistered and is removed by "+clock(resp.RemovedBy.AsTime())+"; what runs with it moves")
	said("another stage", 1, "")
	a.register(req("next", 8081))
	said("another one goes on", 0, "")
	_, err = a.registry.Deregister(a.ctx(), &registrypb.DeregisterRequest{ServiceId: "next"})
	noError(t, err)
	said("alone again", 0, "service svc of")
	a.register(req("svc", 8080))
	said("it is back", 0, "")
}
