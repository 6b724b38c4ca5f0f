package rpc

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	v1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// apiServices are the services a node serves.
var apiServices = []string{
	"sidecar.SidecarCoordinator", "registry.ServiceRegistry", "router.RouterAdmin",
	"checkpoint.CheckpointService", "cluster.Commits", "cluster.Cluster",
}

// Goal: a client built from either package name reaches the same handlers, for
// unary and streaming calls.
func TestBothPackageNames(t *testing.T) {
	a := newAPI(t)
	for _, root := range []string{"conveyor_etl", "conveyor"} {
		var resp checkpointpb.CommitOffsetResponse
		err := a.conn.Invoke(a.ctx(), "/"+root+".checkpoint.CheckpointService/CommitOffset",
			&checkpointpb.CommitOffsetRequest{SourceId: root, Offset: 7}, &resp)
		noError(t, err)
		if !resp.Success || resp.CurrentOffset != 7 {
			t.Fatalf("%s: %v", root, &resp)
		}
		stream, err := a.conn.NewStream(a.ctx(), &clusterpb.Commits_ServiceDesc.Streams[0], "/"+root+".cluster.Commits/Commit")
		noError(t, err)
		noError(t, stream.SendMsg(&clusterpb.CommitRequest{Id: 3, Ops: []*clusterpb.CommitOp{offsetOp(root, 0, 9)}}))
		noError(t, stream.CloseSend())
		var got clusterpb.CommitResponse
		noError(t, stream.RecvMsg(&got))
		if len(got.Results) != 1 || got.Results[0].Outcome != clusterpb.Outcome_OUTCOME_DONE {
			t.Fatalf("%s: %v", root, &got)
		}
	}
}

// Goal: reflection, both versions of it, lists every service under both names and
// describes them so that a generic client can call them.
func TestReflection(t *testing.T) {
	a := newAPI(t)
	ctx, cancel := context.WithCancel(a.ctx())
	defer cancel()
	stream, err := v1.NewServerReflectionClient(a.conn).ServerReflectionInfo(ctx)
	noError(t, err)
	ask := func(req *v1.ServerReflectionRequest) *v1.ServerReflectionResponse {
		t.Helper()
		noError(t, stream.Send(req))
		resp, err := stream.Recv()
		noError(t, err)
		return resp
	}
	list := ask(&v1.ServerReflectionRequest{MessageRequest: &v1.ServerReflectionRequest_ListServices{}})
	var names []string
	for _, s := range list.GetListServicesResponse().GetService() {
		names = append(names, s.Name)
	}
	for _, root := range []string{"conveyor_etl.", "conveyor."} {
		for _, s := range apiServices {
			if !slices.Contains(names, root+s) {
				t.Errorf("%s%s is not listed in %v", root, s, names)
			}
			resp := ask(&v1.ServerReflectionRequest{MessageRequest: &v1.ServerReflectionRequest_FileContainingSymbol{
				FileContainingSymbol: root + s,
			}})
			files := resp.GetFileDescriptorResponse().GetFileDescriptorProto()
			if len(files) == 0 {
				t.Fatalf("%s%s: %v", root, s, resp.GetErrorResponse())
			}
			other := ".conveyor."
			if root == "conveyor." {
				other = ".conveyor_etl."
			}
			for _, b := range files {
				if strings.Contains(string(b), other) {
					t.Errorf("%s%s: a file of it refers to %s", root, s, other)
				}
				var fd descriptorpb.FileDescriptorProto
				noError(t, proto.Unmarshal(b, &fd))
			}
		}
	}
	if !knownByV1Alpha(ctx, t, a.conn, "conveyor.sidecar.PipelineAssignment") {
		t.Fatal("v1alpha does not know the alias package")
	}
	// End both calls before the server has to cut them.
	cancel()
	for {
		if _, err := stream.Recv(); err != nil {
			break
		}
	}
}

// Goal: health answers for every name that is asked about in the field, follows
// leadership with a grace, and says NOT_SERVING while stopping.
func TestHealth(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.LeaderGrace = time.Millisecond })
	names := []string{"", "grpc.health.v1.Health"}
	for _, s := range apiServices {
		names = append(names, "conveyor_etl."+s, "conveyor."+s)
	}
	client := healthpb.NewHealthClient(a.conn)
	all := func(want healthpb.HealthCheckResponse_ServingStatus) bool {
		for _, n := range names {
			resp, err := client.Check(a.ctx(), &healthpb.HealthCheckRequest{Service: n})
			noError(t, err)
			if resp.Status != want {
				return false
			}
		}
		return true
	}
	eventually(t, "serving", func() bool { return all(healthpb.HealthCheckResponse_SERVING) })
	a.node.setLeader(0, raftnode.ErrNoLeader)
	eventually(t, "not serving without a leader", func() bool { return all(healthpb.HealthCheckResponse_NOT_SERVING) })
	a.node.setLeader(2, nil)
	eventually(t, "serving again", func() bool { return all(healthpb.HealthCheckResponse_SERVING) })
	_, err := client.Check(a.ctx(), &healthpb.HealthCheckRequest{Service: "nobody.knows.This"})
	wantCode(t, err, codes.NotFound)
	a.health.stop()
	if !all(healthpb.HealthCheckResponse_NOT_SERVING) {
		t.Fatal("serving while stopping")
	}
}

// Goal: a node that has not caught up since its start does not call itself
// serving.
func TestHealthWaitsForReadIndex(t *testing.T) {
	node := newOneNode(t)
	node.setLeader(0, raftnode.ErrNoLeader)
	a := serveAPI(t, node)
	client := healthpb.NewHealthClient(a.conn)
	eventually(t, "a read index was tried", func() bool { return node.readCount() > 0 })
	resp, err := client.Check(a.ctx(), &healthpb.HealthCheckRequest{})
	noError(t, err)
	if resp.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Fatal(resp.Status)
	}
	node.setLeader(1, nil)
	eventually(t, "serving", func() bool {
		resp, err := client.Check(a.ctx(), &healthpb.HealthCheckRequest{})
		noError(t, err)
		return resp.Status == healthpb.HealthCheckResponse_SERVING
	})
}

// Goal: a caller without a deadline, which all existing clients are, is answered
// when nothing works, and is told that nothing was done.
func TestDefaultDeadline(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.CallTimeout = 20 * time.Millisecond })
	a.node.holdAll()
	_, err := a.checkpoint.CommitOffset(context.Background(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
	wantCode(t, err, codes.DeadlineExceeded)
}

// Goal: a panic ends one call, not the process, and says nothing of the inside.
func TestPanicIsContained(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.Alarms = func() []string { panic("secret") } })
	_, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{})
	wantCode(t, err, codes.Internal)
	if strings.Contains(err.Error(), "secret") {
		t.Fatal(err)
	}
	_, err = a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
	noError(t, err)
}

// Goal: replies carry the revision and the cluster, of writes and reads alike.
func TestReplyHeaders(t *testing.T) {
	a := newAPI(t)
	var md metadata.MD
	w, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1}, grpc.Header(&md))
	noError(t, err)
	check := func(want uint64) {
		t.Helper()
		if got := md.Get(MetadataRevision); len(got) != 1 || got[0] != formatUint(want) {
			t.Fatalf("revision header %v, want %d", got, want)
		}
		if got := md.Get(MetadataClusterID); len(got) != 1 || got[0] != "0000000000c0ffee" {
			t.Fatalf("cluster header %v", got)
		}
	}
	check(w.Revision)
	md = nil
	r, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "s"}, grpc.Header(&md))
	noError(t, err)
	check(r.Revision)
	// These read before they write, and may have nothing to write: the headers are of
	// what the reply is about.
	_, err = a.registry.Register(a.ctx(), registration("m", "reader"))
	noError(t, err)
	md = nil
	joined, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "m", GroupId: "g"}, grpc.Header(&md))
	noError(t, err)
	check(joined.Revision)
	cfg := chain("p", "kafka-events", "warehouse")
	for range 2 {
		md = nil
		created, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: cfg}, grpc.Header(&md))
		noError(t, err)
		check(created.Revision)
		md = nil
		updated, err := a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{PipelineId: "p", Config: cfg}, grpc.Header(&md))
		noError(t, err)
		check(updated.Revision)
		cfg.Name = "another name"
	}
	for range 2 {
		md = nil
		disabled, err := a.admin.DisablePipeline(a.ctx(), &adminpb.DisablePipelineRequest{PipelineId: "p"}, grpc.Header(&md))
		noError(t, err)
		check(disabled.Revision)
	}
	for range 2 {
		md = nil
		deleted, err := a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p"}, grpc.Header(&md))
		noError(t, err)
		check(deleted.Revision)
	}
	md = nil
	status, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{}, grpc.Header(&md))
	noError(t, err)
	check(status.Revision)
}

// Goal: consistency metadata is honoured: a stale read works without a leader, a
// linearizable one does not, a revision that cannot exist is refused.
func TestReadConsistency(t *testing.T) {
	a := newAPI(t)
	hasty := serveAPI(t, a.node, func(c *ServerConfig) { c.CallTimeout = 20 * time.Millisecond })
	_, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 5})
	noError(t, err)
	a.node.setLeader(0, raftnode.ErrNoLeader)
	_, err = hasty.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	wantCode(t, err, codes.Unavailable)
	got, err := a.checkpoint.GetSourceOffset(a.with(MetadataConsistency, "stale"), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	noError(t, err)
	if got.Offsets[0] != 5 {
		t.Fatal(got)
	}
	a.node.setLeader(1, nil)
	_, err = a.checkpoint.GetSourceOffset(a.with(MetadataMinRevision, "999999"), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	wantCode(t, err, codes.OutOfRange)
	_, err = a.checkpoint.GetSourceOffset(a.with(MetadataConsistency, "sometimes"), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	wantCode(t, err, codes.InvalidArgument)
}

// Goal: a repeated request id returns the first result and does nothing again,
// on every kind of mutation; a malformed one is refused.
func TestRequestID(t *testing.T) {
	a := newAPI(t)
	ctx := a.with(MetadataRequestID, "r1")
	first, err := a.checkpoint.CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 5, Force: true})
	noError(t, err)
	_, err = a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 9})
	noError(t, err)
	again, err := a.checkpoint.CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 5, Force: true})
	noError(t, err)
	if again.Revision != first.Revision || again.CurrentOffset != 5 {
		t.Fatalf("repeat %v, first %v", again, first)
	}
	got, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{SourceId: "s"})
	noError(t, err)
	if got.Offsets[0] != 9 {
		t.Fatalf("the repeat was applied: %v", got)
	}
	// A registration made twice answers the id the first one stored.
	reg := a.with(MetadataRequestID, "r2")
	one, err := a.registry.Register(reg, registration("svc", "orders"))
	noError(t, err)
	two, err := a.registry.Register(reg, registration("svc", "orders"))
	noError(t, err)
	if one.RegistrationId != two.RegistrationId {
		t.Fatalf("%q then %q", one.RegistrationId, two.RegistrationId)
	}
	for _, bad := range []string{strings.Repeat("x", MaxRequestID+1), "tab\tinside"} {
		_, err = a.checkpoint.CommitOffset(a.with(MetadataRequestID, bad), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 10})
		if err == nil {
			t.Fatalf("request id %q was taken", bad)
		}
	}
}

// Goal: an oversized message is refused by the transport, everything else over a
// limit by name; nothing reaches the log.
func TestLimits(t *testing.T) {
	a := newAPI(t)
	before := a.node.entryCount()
	_, err := a.checkpoint.SaveCheckpoint(a.ctx(), &checkpointpb.SaveCheckpointRequest{ServiceId: "s", Data: make([]byte, MaxRequestBytes)})
	wantCode(t, err, codes.ResourceExhausted)
	long := strings.Repeat("x", 300)
	for name, call := range map[string]func() error{
		"checkpoint data": func() error {
			_, err := a.checkpoint.SaveCheckpoint(a.ctx(), &checkpointpb.SaveCheckpointRequest{ServiceId: "s", Data: make([]byte, MaxCheckpointBytes+1)})
			return err
		},
		"source id": func() error {
			_, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: long})
			return err
		},
		"empty source id": func() error {
			_, err := a.checkpoint.GetSourceOffset(a.ctx(), &checkpointpb.GetOffsetRequest{})
			return err
		},
		"path in an id": func() error {
			_, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "a/../b"})
			return err
		},
		"missing watermark": func() error {
			_, err := a.checkpoint.ReportWatermark(a.ctx(), &checkpointpb.WatermarkRequest{})
			return err
		},
		"sidecar endpoint": func() error {
			_, err := a.sidecar.RegisterSidecar(a.ctx(), &sidecarpb.RegisterSidecarRequest{SidecarId: "a/b", SidecarEndpoint: "no-port"})
			return err
		},
		"sidecar services": func() error {
			r := &sidecarpb.RegisterSidecarRequest{SidecarId: "a/b", SidecarEndpoint: "h:1"}
			for range MaxLocalServices + 1 {
				r.LocalServices = append(r.LocalServices, &sidecarpb.LocalService{ServiceName: "x", LocalEndpoint: "h:1"})
			}
			_, err := a.sidecar.RegisterSidecar(a.ctx(), r)
			return err
		},
		"heartbeat of no sidecar": func() error {
			_, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{})
			return err
		},
		"service without identity": func() error {
			_, err := a.registry.Register(a.ctx(), &registrypb.RegisterRequest{Endpoint: &commonpb.Endpoint{Host: "h", Port: 1}})
			return err
		},
		"service without endpoint": func() error {
			_, err := a.registry.Register(a.ctx(), &registrypb.RegisterRequest{Identity: &commonpb.ServiceIdentity{ServiceId: "s", Name: "n"}})
			return err
		},
		"service port": func() error {
			r := registration("s", "n")
			r.Endpoint.Port = 70000
			_, err := a.registry.Register(a.ctx(), r)
			return err
		},
		"labels": func() error {
			r := registration("s", "n")
			r.Metadata = &registrypb.ServiceMetadata{Labels: map[string]string{"": "x"}}
			_, err := a.registry.Register(a.ctx(), r)
			return err
		},
		"endpoints of nothing": func() error {
			_, err := a.registry.GetServiceEndpoints(a.ctx(), &registrypb.GetServiceEndpointsRequest{})
			return err
		},
		"partition count": func() error {
			_, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "s", GroupId: "g", PartitionCount: MaxPartitions + 1})
			return err
		},
		"pipeline without config": func() error {
			_, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{})
			return err
		},
		"pipeline ids differ": func() error {
			_, err := a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{PipelineId: "x", Config: chain("y", "a", "b")})
			return err
		},
		"pipeline description": func() error {
			c := chain("p", "a", "b")
			c.Description = strings.Repeat("x", MaxLongText+1)
			_, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: c})
			return err
		},
		"watch of an unknown table": func() error {
			s, err := a.cluster.WatchChanges(a.ctx(), &clusterpb.WatchChangesRequest{Tables: []string{"tables"}})
			noError(t, err)
			_, err = s.Recv()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { wantCode(t, call(), codes.InvalidArgument) })
	}
	if n := a.node.entryCount(); n != before {
		t.Fatalf("%d refused requests reached the log", n-before)
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1:50053":     "10.0.0.1:50053",
		"host.ns.svc:1":      "host.ns.svc:1",
		"[fe80::1]:50053":    "[fe80::1]:50053",
		"fe80::1:50053":      "[fe80::1]:50053", // a sidecar writes IPv6 like this
		"2001:db8:0:1::5:80": "[2001:db8:0:1::5]:80",
	} {
		if got, err := hostPort("f", in); err != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", "host", "host:", ":80", "host:0", "host:65536", "host:x", "http://host:1", "a b:1", "h/x:1", "[::1]", strings.Repeat("h", 300) + ":1"} {
		if got, err := hostPort("f", in); err == nil {
			t.Errorf("%q was taken as %q", in, got)
		}
	}
}

// Goal: stopping ends watches with an answer that tells the client to go
// elsewhere, lets a call in progress finish, and does not hang on an idle one.
func TestShutdown(t *testing.T) {
	a := newAPI(t)
	watch, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{})
	noError(t, err)
	_, err = watch.Recv() // SYNCED
	noError(t, err)
	beat, err := a.registry.Heartbeat(a.ctx())
	noError(t, err)
	noError(t, beat.Send(&registrypb.HeartbeatRequest{ServiceId: "nobody"}))
	_, err = beat.Recv()
	noError(t, err)
	health, err := healthpb.NewHealthClient(a.conn).Watch(a.ctx(), &healthpb.HealthCheckRequest{})
	noError(t, err)
	_, err = health.Recv()
	noError(t, err)

	a.node.holdAll()
	result := make(chan error, 1)
	go func() {
		_, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
		result <- err
	}()
	eventually(t, "the call is in progress", func() bool { return a.node.heldCount() == 1 })
	done := make(chan struct{})
	go func() { a.Shutdown(context.Background()); close(done) }()
	_, err = watch.Recv()
	wantCode(t, err, codes.Unavailable)
	_, err = beat.Recv()
	wantCode(t, err, codes.Unavailable)
	a.node.release()
	noError(t, <-result)
	<-done
}

// Goal: a stopped server refuses new work and Serve returns without an error.
func TestShutdownTwice(t *testing.T) {
	a := newAPI(t)
	a.Shutdown(context.Background())
	a.Shutdown(context.Background())
	lis := bufconn.Listen(1024)
	defer lis.Close()
	if err := a.Serve(lis); err != nil {
		t.Fatal(err)
	}
}

func TestServerConfigValidate(t *testing.T) {
	_, err := NewServer(ServerConfig{})
	if err == nil {
		t.Fatal("taken")
	}
	for _, want := range []string{"Node", "State", "Submitter", "Beats", "NodeID"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not name %s", err, want)
		}
	}
}

// Goal: the casts between the enums of API and log are right.
func TestEnumsAgree(t *testing.T) {
	equal := func(what string, a, b map[int32]string, prefixA, prefixB string) {
		t.Helper()
		if len(a) != len(b) {
			t.Errorf("%s: %v and %v", what, a, b)
		}
		for n, name := range a {
			if strings.TrimPrefix(name, prefixA) != strings.TrimPrefix(b[n], prefixB) {
				t.Errorf("%s: %d is %s and %s", what, n, name, b[n])
			}
		}
	}
	equal("service type", commonpb.ServiceType_name, commandpb.ServiceType_name, "", "")
	equal("health", commonpb.HealthStatus_name, commandpb.HealthStatus_name, "", "")
	equal("stage type", adminpb.StageType_name, commandpb.StageType_name, "", "")
	equal("load balance", adminpb.LoadBalanceStrategy_name, commandpb.LoadBalance_name, "", "")
	equal("sidecar state", clusterpb.SidecarState_name, commandpb.SidecarState_name, "", "")
	for n, name := range sidecarpb.ServiceType_name {
		if commandpb.ServiceType_name[n] != name {
			t.Errorf("sidecar service type %d is %s and %s", n, name, commandpb.ServiceType_name[n])
		}
	}
	for n, name := range commandpb.StageType_name {
		if strings.TrimPrefix(name, "STAGE_TYPE_") != strings.TrimPrefix(commandpb.ServiceType_name[n], "SERVICE_TYPE_") {
			t.Errorf("stage type %d is %s, service type %s", n, name, commandpb.ServiceType_name[n])
		}
	}
}
