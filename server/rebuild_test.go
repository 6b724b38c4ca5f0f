package server

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/config"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// Goal: an operator's note makes a node take the state of the others before it
// answers anybody, at the addresses it has always had; what it holds of the log
// stays. A node alone waits, refuses, and can be stopped.
func TestRebuildOnDemand(t *testing.T) {
	all := settings(t, t.TempDir(), 3)
	var nodes []*Server
	for _, c := range all {
		nodes = append(nodes, start(t, c))
	}
	commit(t, leader(t, nodes...), 1, 42)
	note := func(c config.Config) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(c.DataDir, datadir.QuarantineName), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	backups := func() backuppb.BackupServiceClient {
		return backuppb.NewBackupServiceClient(dial(t, nodes[2].Addr()))
	}
	if _, err := backups().CreateSnapshot(within(t), &backuppb.CreateSnapshotRequest{SnapshotId: "good"}); err != nil {
		t.Fatal(err)
	}
	// It was found to be right since.
	nodes[2].agreed(nodes[2].disk.fsm.Applied().Index, 0)
	commit(t, nodes[2], 3, 44)
	if _, err := backups().CreateSnapshot(within(t), &backuppb.CreateSnapshotRequest{SnapshotId: "bad"}); err != nil {
		t.Fatal(err)
	}
	stop(t, nodes[2])
	note(all[2])
	nodes[2] = start(t, all[2])
	list, err := backups().ListSnapshots(within(t), &backuppb.ListSnapshotsRequest{LocalOnly: true})
	if err != nil || len(list.GetSnapshots()) != 2 {
		t.Fatal(list, err)
	}
	for _, s := range list.GetSnapshots() {
		if suspect := s.GetSuspect() != ""; suspect != (s.GetSnapshotId() == "bad") {
			t.Errorf("after the rebuilding: %v", s)
		}
	}
	for _, validate := range []bool{true, false} {
		_, err := backups().RestoreSnapshot(within(t), &backuppb.RestoreSnapshotRequest{SnapshotId: "bad", ValidateOnly: validate})
		if st := status.Convert(err); st.Code() != codes.FailedPrecondition || rpc.ReasonOf(st) != "SNAPSHOT_SUSPECT" {
			t.Errorf("a snapshot of a wrong state is taken: %v", err)
		}
	}
	if _, err := backups().RestoreSnapshot(within(t), &backuppb.RestoreSnapshotRequest{SnapshotId: "good", ValidateOnly: true}); err != nil {
		t.Errorf("a snapshot from before: %v", err)
	}
	if got := offsets(t, nodes[2]); got[1] != 42 {
		t.Errorf("offsets of the rebuilt node: %v", got)
	}
	if q, err := datadir.ReadQuarantine(all[2].DataDir); q != nil || err != nil {
		t.Errorf("the note is still there: %v %v", q, err)
	}
	kept, err := filepath.Glob(filepath.Join(all[2].DataDir, keptPrefix+"*"))
	if err != nil || len(kept) != 1 {
		t.Errorf("kept %v %v", kept, err)
	}
	commit(t, leader(t, nodes...), 2, 43)
	for _, s := range nodes {
		stop(t, s)
	}

	note(all[2])
	ctx, cancel := context.WithCancel(within(t))
	done := make(chan error, 1)
	go func() { done <- Run(ctx, &all[2], Options{Logger: logTo(t)}) }()
	health := healthgrpc.NewHealthClient(dial(t, all[2].ListenAddr))
	for {
		r, err := health.Check(ctx, &healthgrpc.HealthCheckRequest{})
		if err == nil {
			if r.GetStatus() != healthgrpc.HealthCheckResponse_NOT_SERVING {
				t.Errorf("a node that waits for a state says %v", r.GetStatus())
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("a node that waits for a state was stopped: %v", err)
	}
	if q, err := datadir.ReadQuarantine(all[2].DataDir); q == nil || err != nil {
		t.Errorf("the note went without a rebuilding: %v %v", q, err)
	}
}
