package offline

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/server"
)

// removeAll removes what matches below dir, of which there must be some.
func removeAll(t *testing.T, dir, pattern string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	must(t, err)
	if len(found) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	for _, path := range found {
		must(t, os.RemoveAll(path))
	}
}

// awaitSnapshot waits until a node has a snapshot.
func awaitSnapshot(t *testing.T, s *server.Server, id string) {
	t.Helper()
	client, ctx := backuppb.NewBackupServiceClient(dial(t, s.Addr())), within(t)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		list, err := client.ListSnapshots(ctx, &backuppb.ListSnapshotsRequest{})
		must(t, err)
		if slices.ContainsFunc(list.GetSnapshots(), func(m *backuppb.SnapshotInfo) bool { return m.GetSnapshotId() == id }) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	t.Fatalf("snapshot %s does not come", id)
}

// Goal: the way back from a restore outlives a recovery when any trace of it is in
// the directory: beside the state, as right after the restore, or among the
// snapshots. When none is, plan, outcome and the cluster afterwards say so.
func TestUndoOutlivesRecovery(t *testing.T) {
	c := cluster(t, t.TempDir(), 1)
	s := start(t, c[0])
	commit(t, s, 1, 5)
	backups := backuppb.NewBackupServiceClient(dial(t, s.Addr()))
	made, err := backups.CreateSnapshot(within(t), &backuppb.CreateSnapshotRequest{})
	must(t, err)
	commit(t, s, 6, 8)
	done, err := backups.RestoreSnapshot(within(t), &backuppb.RestoreSnapshotRequest{SnapshotId: made.GetSnapshotId()})
	if err != nil || !done.GetSuccess() {
		t.Fatalf("restore: %v %v", done, err)
	}
	expect(t, s, 5)
	// It is put among the snapshots soon after.
	if _, err := clusterpb.NewClusterClient(dial(t, s.Addr())).UndoRestore(within(t), &clusterpb.UndoRestoreRequest{}); err != nil {
		t.Fatal(err)
	}
	expect(t, s, 8)
	stop(t, s) // epoch 2; the state before it has partitions 1 to 5

	for name, tc := range map[string]struct {
		remove []string
		want   string
	}{
		"all of it":           {nil, UndoKept},
		"beside the state":    {[]string{"backups/undo-*"}, UndoKept},
		"among the snapshots": {[]string{"state/undo-*"}, UndoKept},
		"nothing":             {[]string{"state/undo-*", "backups/undo-*"}, UndoLost},
	} {
		t.Run(name, func(t *testing.T) {
			dir := crashed(t, c[0].DataDir)
			if len(tc.remove) == 1 && tc.remove[0] == "state/undo-*" {
				// The node had come to it before it was lost.
				s := start(t, at(c[0], dir))
				expect(t, s, 8)
				awaitSnapshot(t, s, "undo-2")
				stop(t, s)
			}
			for _, pattern := range tc.remove {
				removeAll(t, dir, pattern)
			}
			o := RecoverOptions{Settings: testSettings(), Dir: dir}
			p, err := PlanRecovery(o)
			must(t, err)
			if got := p.Chosen(); got.Epoch != 2 || got.Undo != tc.want {
				t.Errorf("the plan says %q of epoch %d", got.Undo, got.Epoch)
			}
			res, err := Recover(o, p)
			must(t, err)
			if res.Undo != tc.want {
				t.Errorf("the recovery says %q", res.Undo)
			}
			s := start(t, at(c[0], dir))
			defer stop(t, s)
			expect(t, s, 8)
			_, err = clusterpb.NewClusterClient(dial(t, s.Addr())).UndoRestore(within(t), &clusterpb.UndoRestoreRequest{}, grpc.WaitForReady(true))
			if tc.want == UndoLost {
				if code := status.Code(err); code == codes.OK || code == codes.Internal || code == codes.Unknown {
					t.Errorf("the way back: %v", err)
				}
				expect(t, s, 8)
				return
			}
			must(t, err)
			expect(t, s, 5)
		})
	}
}
