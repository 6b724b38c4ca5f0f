package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/config"
	"conveyor.etl/router/internal/freeport"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
	"conveyor.etl/router/server"
)

// TestMain lets scripts run this very program as "router".
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"router": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Environ())
			stop()
			os.Exit(code)
		},
	})
}

// Goal: the commands do, print and exit as documented. Method: each script in
// testdata/script runs them against a real node of its own, whose client address
// is in the environment; $ADDR1 to $ADDR4 are free addresses.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			for i := 1; i <= 4; i++ {
				addr, err := freeport.Addr()
				if err != nil {
					return err
				}
				env.Setenv(fmt.Sprintf("ADDR%d", i), addr)
			}
			examples, err := filepath.Abs("../../examples")
			if err != nil {
				return err
			}
			env.Setenv("EXAMPLES", examples)
			s, err := startNode(filepath.Join(env.WorkDir, "node"))
			if err != nil {
				return err
			}
			env.Defer(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				if err := s.Stop(ctx); err != nil {
					env.T().Log(err)
				}
			})
			env.Setenv("CONVEYOR_ROUTER_SERVER", s.Addr())
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exitcode":   exitCodeOf,
			"await":      await,
			"awaitout":   awaitout,
			"damage":     damage,
			"populate":   populate,
			"heartbeats": heartbeats,
			"leave":      leave,
		},
	})
}

func startNode(dir string) (*server.Server, error) {
	loaded, err := config.Load(config.Input{Environ: []string{
		"CONVEYOR_ROUTER_NODE_ID=1", "CONVEYOR_ROUTER_DATA_DIR=" + dir,
		"CONVEYOR_ROUTER_LISTEN_ADDR=127.0.0.1:0", "CONVEYOR_ROUTER_RAFT_ADDR=127.0.0.1:0",
		// Those whom populate registers send no heartbeats, and must outlive the script.
		"CONVEYOR_ROUTER_LIVENESS_SUSPECT_AFTER=10m", "CONVEYOR_ROUTER_LIVENESS_EXPIRE_AFTER=15m",
	}})
	if err != nil {
		return nil, err
	}
	s := server.New(loaded.Config, server.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.Start(ctx); err != nil {
		return nil, err
	}
	_, err = s.Node().ReadIndex(ctx)
	return s, err
}

// exitCodeOf runs a program and demands an exit code: exitcode N PROGRAM ARGS.
func exitCodeOf(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode N program args...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("exit code %s, want %s", got, args[0])
	}
}

// await repeats a program until it succeeds: await PROGRAM ARGS.
func await(ts *testscript.TestScript, neg bool, args []string) {
	repeat(ts, func() error { return ts.Exec(args[0], args[1:]...) })
}

// awaitout repeats a program until what it prints matches: awaitout PATTERN PROGRAM
// ARGS. Its exit code does not matter.
func awaitout(ts *testscript.TestScript, neg bool, args []string) {
	want := regexp.MustCompile("(?m)" + args[0])
	repeat(ts, func() error {
		err := ts.Exec(args[1], args[2:]...)
		if want.MatchString(ts.ReadFile("stdout")) {
			return nil
		}
		return fmt.Errorf("%q was not printed (%v)", args[0], err)
	})
}

// repeat calls try until it succeeds.
func repeat(ts *testscript.TestScript, try func() error) {
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	pause := time.NewTicker(50 * time.Millisecond)
	defer pause.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-pause.C:
		case <-deadline.C:
			ts.Fatalf("did not succeed in time: %v", err)
		}
	}
}

// damage inverts one byte of a file: damage FILE OFFSET.
func damage(ts *testscript.TestScript, neg bool, args []string) {
	offset, err := strconv.Atoi(args[1])
	ts.Check(err)
	raw := []byte(ts.ReadFile(args[0]))
	raw[offset] ^= 0xff
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), raw, 0o600))
}

// populate plays the part of a pod: its sidecar offers the services of the
// example pipeline orders, and one of its services is a member of a group and
// has saved a checkpoint.
func populate(ts *testscript.TestScript, neg bool, args []string) {
	conn, err := grpc.NewClient("passthrough:///"+ts.Getenv("CONVEYOR_ROUTER_SERVER"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	local := func(name string, kind sidecarpb.ServiceType) *sidecarpb.LocalService {
		return &sidecarpb.LocalService{ServiceName: name, ServiceType: kind, LocalEndpoint: "127.0.0.1:9000"}
	}
	_, err = sidecarpb.NewSidecarCoordinatorClient(conn).RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{
		SidecarId: "default/pod-1", PodName: "pod-1", Namespace: "default", SidecarEndpoint: "10.0.0.1:50053",
		LocalServices: []*sidecarpb.LocalService{
			local("KafkaOrders", sidecarpb.ServiceType_SERVICE_TYPE_SOURCE),
			local("filter_valid", sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM),
			local("enrich-customer", sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM),
			local("s3archive", sidecarpb.ServiceType_SERVICE_TYPE_SINK),
		},
	})
	ts.Check(err)
	registry := registrypb.NewServiceRegistryClient(conn)
	_, err = registry.Register(ctx, &registrypb.RegisterRequest{
		Identity:  &commonpb.ServiceIdentity{ServiceId: "svc-1", Name: "s3archive", ServiceType: commonpb.ServiceType_SERVICE_TYPE_SINK},
		Endpoint:  &commonpb.Endpoint{Host: "10.0.0.1", Port: 9000},
		Metadata:  &registrypb.ServiceMetadata{Labels: map[string]string{"zone": "a"}},
		SidecarId: "default/pod-1",
	})
	ts.Check(err)
	_, err = registry.JoinGroup(ctx, &registrypb.JoinGroupRequest{ServiceId: "svc-1", GroupId: "archivers", StageId: "orders-sink", PartitionCount: 6})
	ts.Check(err)
	checkpoints := checkpointpb.NewCheckpointServiceClient(conn)
	_, err = checkpoints.SaveCheckpoint(ctx, &checkpointpb.SaveCheckpointRequest{ServiceId: "svc-1", CheckpointId: "c-1", Data: []byte("state"),
		SourceOffsets: map[string]*checkpointpb.PartitionOffsets{"orders": {Offsets: map[uint32]uint64{3: 30, 1: 10}}}})
	ts.Check(err)
	_, err = checkpoints.CommitGroupOffset(ctx, &checkpointpb.CommitGroupOffsetRequest{GroupId: "archivers", SourceId: "orders", Partition: 2, Offset: 20})
	ts.Check(err)
}

// heartbeats sends heartbeats of populate's sidecar: heartbeats COUNT.
func heartbeats(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	conn, err := grpc.NewClient("passthrough:///"+ts.Getenv("CONVEYOR_ROUTER_SERVER"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for range n {
		reply, err := sidecarpb.NewSidecarCoordinatorClient(conn).Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "default/pod-1"})
		ts.Check(err)
		if !reply.GetAcknowledged() {
			ts.Fatalf("the heartbeat was not acknowledged")
		}
	}
}

// leave deregisters a service in peace, which has an hour for it: leave SERVICE.
func leave(ts *testscript.TestScript, neg bool, args []string) {
	conn, err := grpc.NewClient("passthrough:///"+ts.Getenv("CONVEYOR_ROUTER_SERVER"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	reply, err := registrypb.NewServiceRegistryClient(conn).Deregister(ctx, &registrypb.DeregisterRequest{
		ServiceId: args[0], Graceful: true, DrainTimeout: durationpb.New(time.Hour),
	})
	ts.Check(err)
	if !reply.GetDraining() {
		ts.Fatalf("it does not drain: %v", reply)
	}
}

// Every command has help, every flag of a command too.
func TestHelpIsComplete(t *testing.T) {
	a := &app{}
	var walk func(path string)
	root := newRootCommand(a)
	seen := 0
	walk = func(path string) {
		cmd, _, err := root.Find(strings.Fields(path))
		if err != nil {
			t.Fatal(err)
		}
		for _, sub := range cmd.Commands() {
			if sub.Short == "" {
				t.Errorf("%s has no help", sub.CommandPath())
			}
			seen++
			walk(path + " " + sub.Name())
		}
	}
	walk("")
	if seen < 30 {
		t.Errorf("only %d commands found", seen)
	}
}
