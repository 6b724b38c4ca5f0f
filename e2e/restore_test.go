package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// restoreOutcome says what a call of RestoreSnapshot leaves known.
func restoreOutcome(resp *backuppb.RestoreSnapshotResponse, err error) Known {
	switch {
	case err == nil && resp.GetSuccess():
		return Done
	case err == nil:
		return Refused // rolled back whole
	}
	return outcome(err)
}

// TestRestoreIsOneStep backs a cluster up and restores the backup while clients
// read and write through all nodes. Goal: some order explains every answer in
// which the restore is a single step; all nodes end with the same state, and the
// content is again exactly what was backed up once the load is taken away.
// Method: porcupine with save and restore as operations on every key; a second
// restore without load compares content hashes.
func TestRestoreIsOneStep(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 3))
	c := NewCluster(t, Options{})
	fill := NewFiller(t, "restored", 128<<10)
	fill.Fill(4<<20, 8, c.Nodes...)
	load := StartLoad(c, LoadOptions{Seed: seed, Clients: 6})
	const keys = 8
	pause(t, 500*time.Millisecond)
	var snapshot string
	known := load.Everywhere(keys, false, func() Known {
		resp, err := c.Nodes[rng.IntN(3)].Backups().CreateSnapshot(t.Context(), &backuppb.CreateSnapshotRequest{})
		snapshot = resp.GetSnapshotId()
		if err != nil {
			t.Errorf("create: %v", err)
		}
		return outcome(err)
	})
	if known != Done {
		t.FailNow()
	}
	for i := range 3 {
		pause(t, time.Duration(300+rng.IntN(500))*time.Millisecond)
		load.Everywhere(keys, true, func() Known {
			resp, err := c.Nodes[rng.IntN(3)].Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: snapshot})
			if err != nil || !resp.GetSuccess() {
				t.Errorf("restore %d: %v %v", i, resp.GetMessage(), err)
			}
			if got := resp.GetEpoch(); got != uint64(i+1) {
				t.Errorf("epoch %d after restore %d", got, i+1)
			}
			return restoreOutcome(resp, err)
		})
	}
	pause(t, 300*time.Millisecond)
	load.Stop()
	load.FinalReads(c, keys)
	load.Check(c)
	fill.Check(c.Nodes...)
	c.WaitSameState()
	t.Logf("longest time without an acknowledged write: %v", load.LongestGap())

	// Without load the state is what was backed up, exactly.
	resp, err := c.Nodes[0].Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: snapshot})
	if err != nil || !resp.GetSuccess() {
		t.Fatalf("restore: %v %v", resp, err)
	}
	check, err := c.Nodes[1].Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: snapshot, ValidateOnly: true})
	if err != nil || !check.GetSuccess() {
		t.Fatalf("validate: %v %v", check, err)
	}
	for _, d := range check.GetDifference() {
		if d.Added+d.Removed+d.Changed != 0 {
			t.Errorf("the restored state differs from its backup: %v", d)
		}
	}
	if check.GetState().GetStateHash() == "" {
		t.Error("no hash of the content was told")
	}
	c.WaitSameState()
}

// TestRestoreSurvivesKills kills a node, the leader or the one that carries the
// restore out among them, in every phase of a restore. Goal: the restore ends,
// done or rolled back whole, never half, and acknowledged writes are explained
// by one order. Method: the operation's record tells the phase; the victim comes
// back; porcupine and state hashes.
func TestRestoreSurvivesKills(t *testing.T) {
	for _, phase := range []string{"verify", "stage", "prepare", "swap"} {
		for _, who := range []string{"leader", "owner", "follower"} {
			t.Run(phase+"/"+who, func(t *testing.T) { restoreWithKill(t, phase, who) })
		}
	}
}

func restoreWithKill(t *testing.T, phase, who string) {
	seed := newSeed(t)
	c := NewCluster(t, Options{})
	leader := c.Leader()
	followers := c.Followers(leader)
	owner, other := followers[0], followers[1]
	victim := map[string]*Node{"leader": leader, "owner": owner, "follower": other}[who]
	watcher := leader
	if victim == leader {
		watcher = other
	}
	fill := NewFiller(t, "kill", 128<<10)
	fill.Fill(6<<20, 8, c.Nodes...)
	load := StartLoad(c, LoadOptions{Seed: seed, Clients: 4})
	const keys = 8
	var snapshot string
	if load.Everywhere(keys, false, func() Known {
		resp, err := owner.Backups().CreateSnapshot(t.Context(), &backuppb.CreateSnapshotRequest{})
		snapshot = resp.GetSnapshotId()
		if err != nil {
			t.Errorf("create: %v", err)
		}
		return outcome(err)
	}) != Done {
		t.FailNow()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		waitPhase(ctx, watcher, phase)
		victim.Kill()
		victim.Start()
	}()
	load.Everywhere(keys, true, func() Known {
		resp, err := owner.Backups().RestoreSnapshot(ctx, &backuppb.RestoreSnapshotRequest{SnapshotId: snapshot, Detach: true})
		if err != nil {
			return outcome(err)
		}
		<-killed
		var op *clusterpb.Operation
		eventually(t, 90*time.Second, "the restore has ended", func(ctx context.Context) error {
			op, err = watcher.Cluster().GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: resp.OperationId})
			if err == nil && op.State == clusterpb.OperationState_OPERATION_STATE_RUNNING {
				err = fmt.Errorf("still in phase %s", op.Phase)
			}
			return err
		})
		t.Logf("ended as %v: %s", op.State, op.Message)
		if op.State == clusterpb.OperationState_OPERATION_STATE_DONE {
			return Done
		}
		return NotDone
	})
	<-killed
	c.WaitServing(c.Nodes...)
	load.Stop()
	load.FinalReads(c, keys)
	load.Check(c)
	fill.Check(c.Nodes...)
	c.WaitSameState()
}

// waitPhase returns when some restore is in a phase, or has ended.
func waitPhase(ctx context.Context, n *Node, phase string) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		list, err := n.Cluster().ListOperations(ctx, &clusterpb.ListOperationsRequest{Kind: "restore"})
		if err == nil && len(list.GetOperations()) > 0 {
			op := list.GetOperations()[0]
			if op.GetPhase() == phase || op.GetState() != clusterpb.OperationState_OPERATION_STATE_RUNNING {
				return
			}
		}
		<-tick.C
	}
}

// download returns the archive of a snapshot, from byte offset on.
func download(t *testing.T, n *Node, req *backuppb.StreamSnapshotRequest) []byte {
	t.Helper()
	stream, err := n.Backups().StreamSnapshot(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for {
		chunk, err := stream.Recv()
		if err == io.EOF {
			t.Fatalf("the stream ended after %d bytes without a last chunk", len(out))
		}
		if err != nil {
			t.Fatalf("stream of %v: %v", req, err)
		}
		if chunk.GetOffset() != req.GetOffset()+uint64(len(out)) {
			t.Fatalf("a chunk at %d after %d bytes", chunk.GetOffset(), len(out))
		}
		out = append(out, chunk.GetData()...)
		if chunk.GetIsLast() {
			return out
		}
	}
}

// upload sends an archive in chunks of the size the existing client uses.
func upload(ctx context.Context, n *Node, archive []byte) (*backuppb.UploadSnapshotResponse, error) {
	stream, err := n.Backups().UploadSnapshot(ctx)
	if err != nil {
		return nil, err
	}
	const chunk = 64 << 10
	for at := 0; ; at += chunk {
		end := min(at+chunk, len(archive))
		err := stream.Send(&backuppb.DataChunk{Data: archive[at:end], Offset: uint64(at), IsLast: end == len(archive)})
		if err != nil || end == len(archive) {
			break // CloseAndRecv says why
		}
	}
	return stream.CloseAndRecv()
}

// TestBackupTravels walks a backup through the calls of an existing client: each
// of them may meet another node. Goal: created on one node it is streamed from a
// second in all compressions, resumed, deleted, uploaded to the third and
// restored through the first; damaged archives are refused and leave nothing.
func TestBackupTravels(t *testing.T) {
	c := NewCluster(t, Options{})
	fill := NewFiller(t, "travel", 64<<10)
	fill.Fill(2<<20, 8, c.Nodes...)
	if _, err := c.Nodes[0].Admin().CreatePipeline(t.Context(), &adminpb.CreatePipelineRequest{Config: testPipeline("ns/kept", "kept")}); err != nil {
		t.Fatal(err)
	}
	made, err := c.Nodes[0].Backups().CreateSnapshot(t.Context(), &backuppb.CreateSnapshotRequest{SnapshotId: "nightly-1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Nodes[1].Backups().CreateSnapshot(t.Context(), &backuppb.CreateSnapshotRequest{SnapshotId: "nightly-1"}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a second nightly-1: %v", err)
	}
	archives := map[backuppb.CompressionType][]byte{}
	for _, comp := range []backuppb.CompressionType{0, 1, 2} {
		req := &backuppb.StreamSnapshotRequest{SnapshotId: "nightly-1", Compression: comp}
		archives[comp] = download(t, c.Nodes[1], req)
		req.Offset = uint64(len(archives[comp]) / 3)
		rest := download(t, c.Nodes[2], req)
		if !bytes.Equal(rest, archives[comp][req.Offset:]) {
			t.Errorf("%v: going on at %d gives other bytes", comp, req.Offset)
		}
	}
	if resp, err := c.Nodes[2].Backups().DeleteSnapshot(t.Context(), &backuppb.DeleteSnapshotRequest{SnapshotId: "nightly-1"}); err != nil || !resp.GetExisted() {
		t.Errorf("delete: %v %v", resp, err)
	}
	if resp, err := c.Nodes[0].Backups().DeleteSnapshot(t.Context(), &backuppb.DeleteSnapshotRequest{SnapshotId: "nightly-1"}); err != nil || !resp.GetSuccess() || resp.GetExisted() {
		t.Errorf("delete again: %v %v", resp, err)
	}
	// What happens now is undone by the restore.
	if _, err := c.Nodes[0].Admin().DeletePipeline(t.Context(), &adminpb.DeletePipelineRequest{PipelineId: "ns/kept"}); err != nil {
		t.Fatal(err)
	}
	for comp, archive := range archives {
		up, err := upload(t.Context(), c.Nodes[2], archive)
		if err != nil || !up.GetSuccess() {
			t.Fatalf("upload %v: %v %v", comp, up, err)
		}
		val, err := c.Nodes[0].Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: up.GetSnapshotId(), ValidateOnly: true})
		if err != nil || !val.GetSuccess() || val.GetState().GetPipelineCount() != 1 {
			t.Fatalf("validate %v: %v %v", comp, val, err)
		}
		res, err := c.Nodes[0].Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: up.GetSnapshotId()})
		if err != nil || !res.GetSuccess() {
			t.Fatalf("restore %v: %v %v", comp, res, err)
		}
		if res.GetRevision() <= made.GetRevision() {
			t.Errorf("revision %d after the restore of one of %d: it went back", res.GetRevision(), made.GetRevision())
		}
		for _, n := range c.Nodes {
			got, err := n.Admin().GetPipeline(t.Context(), &adminpb.GetPipelineRequest{PipelineId: "ns/kept"})
			if err != nil || !got.GetFound() || got.GetConfig().GetDescription() != "kept" {
				t.Fatalf("node %d after the restore: %v %v", n.ID, got, err)
			}
		}
		if _, err := c.Nodes[0].Admin().DeletePipeline(t.Context(), &adminpb.DeletePipelineRequest{PipelineId: "ns/kept"}); err != nil {
			t.Fatal(err)
		}
	}
	fill.Check(c.Nodes...)

	// The way back.
	undo, err := c.Nodes[1].Cluster().UndoRestore(t.Context(), &clusterpb.UndoRestoreRequest{})
	if err != nil || undo.GetOperation().GetState() != clusterpb.OperationState_OPERATION_STATE_DONE {
		t.Fatalf("undo: %v %v", undo, err)
	}
	got, err := c.Nodes[2].Admin().GetPipeline(t.Context(), &adminpb.GetPipelineRequest{PipelineId: "ns/kept"})
	if err != nil || got.GetFound() {
		t.Fatalf("before the last restore the pipeline had been deleted, after undoing it: %v %v", got, err)
	}
	refusals(t, c, archives[backuppb.CompressionType_COMPRESSION_ZSTD])
	c.WaitSameState()
}

// refusals tries what must not be accepted, and that nothing of it is left.
func refusals(t *testing.T, c *Cluster, archive []byte) {
	n := c.Nodes[0]
	before, err := n.Backups().ListSnapshots(t.Context(), &backuppb.ListSnapshotsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"cut": archive[:len(archive)/2], "empty": {}, "garbage": []byte("this is no archive at all"),
		"longer": append(bytes.Clone(archive), 0), "flipped": func() []byte {
			b := bytes.Clone(archive)
			b[len(b)/2] ^= 1
			return b
		}(),
	} {
		if up, err := upload(t.Context(), n, bad); err == nil {
			t.Errorf("upload of %s was accepted as %v", name, up)
		} else if code := status.Code(err); code == codes.Internal || code == codes.Unknown {
			t.Errorf("upload of %s: %v", name, err)
		}
	}
	for _, id := range []string{"", "..", "../images", "/etc/passwd", "images"} {
		if _, err := n.Backups().DeleteSnapshot(t.Context(), &backuppb.DeleteSnapshotRequest{SnapshotId: id}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("delete %q: %v", id, err)
		}
		if _, err := n.Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: id}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("restore %q: %v", id, err)
		}
	}
	if _, err := n.Backups().RestoreSnapshot(t.Context(), &backuppb.RestoreSnapshotRequest{SnapshotId: "unheard-of"}); status.Code(err) != codes.NotFound {
		t.Errorf("restore of an unknown snapshot: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := n.Backups().UploadSnapshot(ctx)
	if err == nil {
		err = stream.Send(&backuppb.DataChunk{Data: archive[:1000]})
	}
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	after, err := n.Backups().ListSnapshots(t.Context(), &backuppb.ListSnapshotsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(after.GetSnapshots()) != len(before.GetSnapshots()) {
		t.Errorf("snapshots before %v, after %v", before, after)
	}
}

// TestUndoPointIsDeletedEverywhere deletes the state that a restore has replaced while
// one node is down. Goal: it is gone on the nodes that run, for good; the answer says
// where it may still be, and there it is until it is deleted once more.
func TestUndoPointIsDeletedEverywhere(t *testing.T) {
	c := NewCluster(t, Options{})
	if _, known := writeOffset(t, c.Nodes[0], "old", 7); known != Done {
		t.Fatal("not written")
	}
	made, err := c.Nodes[0].Backups().CreateSnapshot(longCall(t), &backuppb.CreateSnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Nodes[0].Backups().RestoreSnapshot(longCall(t), &backuppb.RestoreSnapshotRequest{SnapshotId: made.GetSnapshotId()})
	if err != nil || !res.GetSuccess() {
		t.Fatalf("restore: %v %v", res, err)
	}
	c.WaitSameState()
	const undo = "undo-1"
	held := func(want ...uint64) {
		t.Helper()
		eventually(t, 30*time.Second, "who has the undo point", func(ctx context.Context) error {
			list, err := c.Nodes[1].Backups().ListSnapshots(ctx, &backuppb.ListSnapshotsRequest{})
			if err != nil {
				return err
			}
			var on []uint64
			for _, s := range list.GetSnapshots() {
				if s.GetSnapshotId() == undo {
					on = append(on, s.GetNodeId())
				}
			}
			slices.Sort(on)
			if !slices.Equal(on, want) {
				return fmt.Errorf("it is on %v, want %v (%v)", on, want, list.GetWarnings())
			}
			return nil
		})
	}
	held(1, 2, 3)
	away := c.Nodes[2]
	away.Kill()
	gone, err := c.Nodes[1].Backups().DeleteSnapshot(longCall(t), &backuppb.DeleteSnapshotRequest{SnapshotId: undo})
	if err != nil || !gone.GetExisted() || len(gone.GetWarnings()) != 1 || !strings.Contains(gone.GetWarnings()[0], "node 3 could not be asked") {
		t.Fatalf("delete: %v %v", gone, err)
	}
	held()
	// What a start finds, and the next change of an operation, bring it not back.
	c.Nodes[0].Stop()
	c.Nodes[0].Start()
	away.Start()
	c.WaitServing(c.Nodes...)
	held(3)
	gone, err = c.Nodes[0].Backups().DeleteSnapshot(longCall(t), &backuppb.DeleteSnapshotRequest{SnapshotId: undo})
	if err != nil || !gone.GetExisted() || len(gone.GetWarnings()) != 0 {
		t.Fatalf("delete again: %v %v", gone, err)
	}
	held()
	for _, n := range c.Nodes {
		if _, err := n.Cluster().UndoRestore(longCall(t), &clusterpb.UndoRestoreRequest{}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("node %d goes back to a state that was deleted: %v", n.ID, err)
		}
		left, err := filepath.Glob(filepath.Join(n.DataDir, "state", "undo-*"))
		if err != nil || len(left) != 0 {
			t.Errorf("node %d: %v %v", n.ID, left, err)
		}
	}
}
