package e2e

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// wideStages is how many stages the pipeline of TestBadSidecars has: a table of them is
// some tens of kilobytes, so that a few events fill whatever stands between a node
// and a client that does not read.
const wideStages = 200

// widePipeline is a pipeline of so many stages, with other stage ids in each form.
func widePipeline(form int) *adminpb.PipelineConfig {
	p := &adminpb.PipelineConfig{Id: "bad/wide", Name: "wide", Enabled: true}
	for k := range wideStages {
		st := &adminpb.Stage{
			Id: fmt.Sprintf("%0200d-%d", k, form), Name: "s", StageType: adminpb.StageType_STAGE_TYPE_TRANSFORM, Parallelism: 1,
			ServiceSelector: &adminpb.ServiceSelector{ServiceName: fmt.Sprintf("wide-%d", k)},
		}
		switch k {
		case 0:
			st.StageType = adminpb.StageType_STAGE_TYPE_SOURCE
		case wideStages - 1:
			st.StageType = adminpb.StageType_STAGE_TYPE_SINK
		}
		if k > 0 {
			p.Edges = append(p.Edges, &adminpb.Edge{FromStage: p.Stages[k-1].Id, ToStage: st.Id})
		}
		p.Stages = append(p.Stages, st)
	}
	return p
}

// wideSidecar offers all services of widePipeline.
func wideSidecar(id, pod, endpoint string) *sidecarpb.RegisterSidecarRequest {
	r := &sidecarpb.RegisterSidecarRequest{SidecarId: id, PodName: pod, Namespace: "bad", SidecarEndpoint: endpoint}
	for k := range wideStages {
		kind := sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM
		switch k {
		case 0:
			kind = sidecarpb.ServiceType_SERVICE_TYPE_SOURCE
		case wideStages - 1:
			kind = sidecarpb.ServiceType_SERVICE_TYPE_SINK
		}
		r.LocalServices = append(r.LocalServices, &sidecarpb.LocalService{
			ServiceName: fmt.Sprintf("wide-%d", k), ServiceType: kind, LocalEndpoint: fmt.Sprintf("127.0.0.1:%d", 20000+k),
		})
	}
	return r
}

// TestBadSidecars: what sidecars can get wrong, at one node. Goal: each is answered
// clearly, memory stays bounded, and a sidecar that behaves is told of every change
// meanwhile. Method: watchers that never read while a large table changes and changes,
// then the bad calls; a good watcher has to see each change before the next is made.
func TestBadSidecars(t *testing.T) {
	c := NewCluster(t, Options{})
	n := c.Followers(c.Leader())[0]
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	reg, err := n.Sidecars().RegisterSidecar(ctx, wideSidecar("bad/wide", "one", "10.0.0.1:1"))
	if err := ok(err, reg.GetSuccess(), reg.GetError()); err != nil {
		t.Fatal(err)
	}
	good, err := n.Sidecars().WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{SidecarId: "bad/wide"})
	if err != nil {
		t.Fatal(err)
	}
	view := &assignmentView{}
	view.begin()
	form := 0
	// changed makes one change and waits until the good watcher has been told.
	changed := func() {
		t.Helper()
		form++
		r, err := n.Admin().UpdatePipeline(ctx, &adminpb.UpdatePipelineRequest{PipelineId: "bad/wide", Config: widePipeline(form)})
		if err := ok(err, r.GetSuccess(), r.GetError()); err != nil {
			t.Fatal(err)
		}
		for {
			ev, err := good.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if fault := view.take(ev); fault != "" {
				t.Fatal(fault)
			}
			if a := view.held["bad/wide"]; a != nil && strings.HasSuffix(a.Stages[0].StageId, fmt.Sprintf("-%d", form)) {
				return
			}
		}
	}
	for range 10 {
		changed()
	}

	// They open their streams and read nothing, ever.
	conn, err := grpc.NewClient("passthrough:///"+n.Client, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const stuck, changes = 300, 40
	for range stuck {
		if _, err := sidecarpb.NewSidecarCoordinatorClient(conn).WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{SidecarId: "bad/wide"}); err != nil {
			t.Fatal(err)
		}
	}
	before := residentOf(t, n)
	for range changes {
		changed()
	}
	grown := residentOf(t, n) - before
	table := 0
	for _, st := range view.held["bad/wide"].Stages {
		table += len(st.StageId) + len(st.GetLocalEndpoint()) + 8
	}
	t.Logf("%d watchers that do not read, %d changes of %d KiB each: the node grew by %d MiB", stuck, changes, table>>10, grown>>20)
	// The state, its log and what is garbage grow as well, by about a hundred MiB.
	if all := stuck * changes * table; grown > all/2 { // each may hold one table and a window
		t.Errorf("the node grew by %d MiB; all that was not read comes to %d MiB", grown>>20, all>>20)
	}

	for _, tc := range []struct {
		name string
		call func(ctx context.Context) (string, error)
		code codes.Code
		text string
	}{
		{"10,000 services", func(ctx context.Context) (string, error) {
			r := &sidecarpb.RegisterSidecarRequest{SidecarId: "bad/many", SidecarEndpoint: "10.0.0.9:1"}
			for i := range 10_000 {
				r.LocalServices = append(r.LocalServices, &sidecarpb.LocalService{ServiceName: fmt.Sprint("s", i), LocalEndpoint: "127.0.0.1:1"})
			}
			_, err := n.Sidecars().RegisterSidecar(ctx, r)
			return "", err
		}, codes.InvalidArgument, "10000 services, the limit is 256"},
		{"health of 10,000 services", func(ctx context.Context) (string, error) {
			r := &sidecarpb.SidecarHeartbeatRequest{SidecarId: "bad/wide"}
			for i := range 10_000 {
				r.ServiceHealth = append(r.ServiceHealth, &sidecarpb.LocalServiceHealth{ServiceName: fmt.Sprint("s", i)})
			}
			_, err := n.Sidecars().Heartbeat(ctx, r)
			return "", err
		}, codes.InvalidArgument, "10000 services, the limit is 256"},
		{"10,000 registrations for one sidecar", func(ctx context.Context) (string, error) {
			for i := range 10_000 {
				_, err := n.Registry().Register(ctx, &registrypb.RegisterRequest{
					Identity: &commonpb.ServiceIdentity{ServiceId: fmt.Sprint("bad-", i), Name: "bad"},
					Endpoint: &commonpb.Endpoint{Host: "10.0.0.9", Port: 1}, SidecarId: "bad/wide",
				})
				if err != nil {
					return fmt.Sprintf("number %d:", i), err
				}
			}
			return "accepted", nil
		}, codes.InvalidArgument, "256 services are registered with sidecar bad/wide already"},
		{"an endpoint that is none", func(ctx context.Context) (string, error) {
			_, err := n.Sidecars().RegisterSidecar(ctx, wideSidecar("bad/other", "one", "http://10.0.0.1:1"))
			return "", err
		}, codes.InvalidArgument, "sidecar_endpoint"},
		{"two services of one name", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{
				SidecarId: "bad/twins", SidecarEndpoint: "10.0.0.3:1", LocalServices: []*sidecarpb.LocalService{
					{ServiceName: "twin", LocalEndpoint: "127.0.0.1:1"}, {ServiceName: "twin", LocalEndpoint: "127.0.0.1:2"},
				}})
			return strings.Join(r.GetWarnings(), " "), err
		}, codes.OK, "2 services of this pod are called twin"},
		{"a second pod of one id", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().RegisterSidecar(ctx, wideSidecar("bad/wide", "two", "10.0.0.2:1"))
			return strings.Join(r.GetWarnings(), " "), err
		}, codes.OK, "was registered by pod bad/one at 10.0.0.1:1, which was alive until now"},
		{"a heartbeat of the first", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "bad/wide", RegistrationId: reg.RegistrationId})
			return fmt.Sprint(accepted(r.GetAcknowledged()), r.GetReason()), err
		}, codes.OK, "refused registration"},
		{"a heartbeat of nobody", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "bad/nobody"})
			return fmt.Sprint(accepted(r.GetAcknowledged()), r.GetReason()), err
		}, codes.OK, `refused no sidecar "bad/nobody" is registered`},
		{"a watch of nobody", func(ctx context.Context) (string, error) {
			return firstEvent(ctx, n, &sidecarpb.WatchAssignmentsRequest{SidecarId: "bad/nobody"})
		}, codes.NotFound, `no sidecar "bad/nobody" is registered`},
		{"a watch from the future", func(ctx context.Context) (string, error) {
			return firstEvent(ctx, n, &sidecarpb.WatchAssignmentsRequest{SidecarId: "bad/wide", FromRevision: 1 << 50})
		}, codes.OK, "EVENT_TYPE_RESYNC revision 1125899906842624 does not exist in this cluster"},
		{"a watch from another epoch", func(ctx context.Context) (string, error) {
			return firstEvent(ctx, n, &sidecarpb.WatchAssignmentsRequest{SidecarId: "bad/wide", FromRevision: 1, FromEpoch: 9})
		}, codes.OK, "EVENT_TYPE_RESYNC the state was restored from a backup"},
		{"a change of the future that was applied", func(ctx context.Context) (string, error) {
			r, err := n.Sidecars().Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "bad/wide", AppliedRevision: 1 << 50})
			return r.GetReason(), err
		}, codes.OK, "revision 1125899906842624 of restore epoch 0, said to be applied, does not exist"},
	} {
		call, cancel := context.WithTimeout(ctx, 2*time.Minute)
		text, err := tc.call(call)
		cancel()
		if text += " " + status.Convert(err).Message(); status.Code(err) != tc.code || !strings.Contains(text, tc.text) {
			t.Errorf("%s: answered %v %.300q, want %v and %q", tc.name, status.Code(err), text, tc.code, tc.text)
		}
		changed()
	}
	c.WaitSameState()
}

// firstEvent opens a watch and returns the kind and the reason of its first event.
func firstEvent(ctx context.Context, n *Node, req *sidecarpb.WatchAssignmentsRequest) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := n.Sidecars().WatchPipelineAssignments(ctx, req)
	if err != nil {
		return "", err
	}
	ev, err := stream.Recv()
	return fmt.Sprint(ev.GetEventType(), " ", ev.GetReason()), err
}

// residentOf returns the memory of a node's process, in bytes.
func residentOf(t *testing.T, n *Node) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", n.PID()))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(raw))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
