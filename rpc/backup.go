package rpc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// backupAPI implements BackupService. A snapshot lies on the node that made or
// received it; a client that comes back to another node finds it through that
// one.
type backupAPI struct {
	backuppb.UnimplementedBackupServiceServer
	*Server
}

// askTimeout bounds how long another node may take to say which snapshots it
// has.
const askTimeout = 2 * time.Second

func (a *backupAPI) recovery() (*recovery.Recovery, error) {
	if a.cfg.Recovery == nil {
		return nil, fmt.Errorf("%w: this node keeps no snapshots", ErrNotProposed)
	}
	return a.cfg.Recovery, nil
}

// others returns the members besides this node.
func (a *backupAPI) others() []uint64 {
	var out []uint64
	for _, m := range raftnode.Live(a.cfg.Node.Status().Position.Members) {
		if m.ID != a.cfg.NodeID {
			out = append(out, m.ID)
		}
	}
	return out
}

// ask calls fn for every other member at once and returns, per member, why it
// failed.
func (a *backupAPI) ask(ctx context.Context, fn func(ctx context.Context, node uint64, c backuppb.BackupServiceClient) error) map[uint64]error {
	if relayed(ctx) != "" {
		return nil // the node that passed the call on asks the others itself
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	failed := map[uint64]error{}
	for _, id := range a.others() {
		wg.Go(func() {
			conn, rctx, err := a.relay.to(ctx, id)
			if err == nil {
				err = fn(rctx, id, backuppb.NewBackupServiceClient(conn))
			}
			if err != nil {
				mu.Lock()
				failed[id] = err
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return failed
}

// list returns the snapshots of all members that answer, and of which members
// nothing is known.
func (a *backupAPI) list(ctx context.Context) ([]*backuppb.SnapshotInfo, map[uint64]error) {
	var mu sync.Mutex
	var out []*backuppb.SnapshotInfo
	failed := a.ask(ctx, func(ctx context.Context, _ uint64, c backuppb.BackupServiceClient) error {
		resp, err := c.ListSnapshots(ctx, &backuppb.ListSnapshotsRequest{LocalOnly: true})
		if err == nil {
			mu.Lock()
			out = append(out, resp.GetSnapshots()...)
			mu.Unlock()
		}
		return err
	})
	return out, failed
}

// holder returns another node that has snapshot id.
func (a *backupAPI) holder(ctx context.Context, id string) (uint64, error) {
	list, failed := a.list(ctx)
	for _, s := range list {
		if s.GetSnapshotId() == id {
			return s.GetNodeId(), nil
		}
	}
	if len(failed) > 0 {
		return 0, fmt.Errorf("%w: %s is on no node that answers, but %s; nothing was done: try again when they are back",
			ErrSnapshotUnreachable, id, describeFailed(failed))
	}
	return 0, fmt.Errorf("%w on any node: %s", shelf.ErrNotFound, id)
}

func describeFailed(failed map[uint64]error) string {
	var ids []uint64
	for id := range failed {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var parts []string
	for _, id := range ids {
		parts = append(parts, fmt.Sprintf("node %d did not answer", id))
	}
	return strings.Join(parts, ", ")
}

func snapshotInfo(node uint64, r *shelf.Record) *backuppb.SnapshotInfo {
	return &backuppb.SnapshotInfo{
		SnapshotId: r.ID, SizeBytes: uint64(r.Bytes), CommitIndex: r.Index, Term: r.Term, CreatedAt: uint64(r.CreatedMS),
		NodeId: node, Revision: r.Revision, Epoch: r.Epoch, ClusterId: fmt.Sprintf("%016x", r.ClusterID),
		Origin: string(r.Origin), StateHash: r.ContentHash, Suspect: r.Suspect,
	}
}

// CreateSnapshot makes a snapshot of the state as it is now, everything
// acknowledged before the call included. Writes go on meanwhile.
func (a *backupAPI) CreateSnapshot(ctx context.Context, req *backuppb.CreateSnapshotRequest) (*backuppb.CreateSnapshotResponse, error) {
	r, err := a.recovery()
	if err != nil {
		return nil, err
	}
	id := req.GetSnapshotId()
	if id == "" {
		id = uuid.NewString()
	} else {
		if err := shelf.CheckID(id); err != nil {
			return nil, err
		}
		list, _ := a.list(ctx)
		for _, s := range list {
			if s.GetSnapshotId() == id {
				return nil, fmt.Errorf("%w: %s, on node %d", shelf.ErrExists, id, s.GetNodeId())
			}
		}
	}
	if err := a.reader.Wait(ctx); err != nil {
		return nil, err
	}
	rec, err := r.Create(ctx, id)
	if err != nil {
		return nil, err
	}
	a.reader.SetHeader(ctx, rec.Revision, rec.Epoch)
	return &backuppb.CreateSnapshotResponse{
		SnapshotId: id, SizeBytes: uint64(rec.Bytes), CommitIndex: rec.Index, Term: rec.Term, Timestamp: uint64(rec.CreatedMS),
		Revision: rec.Revision, Epoch: rec.Epoch, NodeId: a.cfg.NodeID, ClusterId: fmt.Sprintf("%016x", rec.ClusterID),
		StateHash: rec.ContentHash,
	}, nil
}

// ListSnapshots lists the snapshots of all nodes, the newest first.
func (a *backupAPI) ListSnapshots(ctx context.Context, req *backuppb.ListSnapshotsRequest) (*backuppb.ListSnapshotsResponse, error) {
	r, err := a.recovery()
	if err != nil {
		return nil, err
	}
	resp := &backuppb.ListSnapshotsResponse{}
	for _, rec := range r.List() {
		resp.Snapshots = append(resp.Snapshots, snapshotInfo(a.cfg.NodeID, &rec))
	}
	if req.GetLocalOnly() {
		return resp, nil
	}
	more, failed := a.list(ctx)
	resp.Snapshots = append(resp.Snapshots, more...)
	slices.SortStableFunc(resp.Snapshots, func(x, y *backuppb.SnapshotInfo) int {
		switch {
		case x.CreatedAt != y.CreatedAt && x.CreatedAt > y.CreatedAt:
			return -1
		case x.CreatedAt != y.CreatedAt:
			return 1
		}
		return strings.Compare(x.SnapshotId, y.SnapshotId)
	})
	for id, err := range failed {
		resp.Warnings = append(resp.Warnings, fmt.Sprintf("node %d could not be asked, its snapshots are not listed: %s", id, Plain(err.Error())))
	}
	slices.Sort(resp.Warnings)
	return resp, nil
}

// DeleteSnapshot removes a snapshot from every node that has it. One that does
// not exist is a success.
func (a *backupAPI) DeleteSnapshot(ctx context.Context, req *backuppb.DeleteSnapshotRequest) (*backuppb.DeleteSnapshotResponse, error) {
	r, err := a.recovery()
	if err != nil {
		return nil, err
	}
	if err := shelf.CheckID(req.GetSnapshotId()); err != nil {
		return nil, err
	}
	existed, err := r.Delete(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	failed := a.ask(ctx, func(ctx context.Context, _ uint64, c backuppb.BackupServiceClient) error {
		resp, err := c.DeleteSnapshot(ctx, req)
		mu.Lock()
		existed = existed || resp.GetExisted()
		mu.Unlock()
		return err
	})
	if len(failed) > 0 && !existed {
		return nil, fmt.Errorf("%w: %s was found on no node that answers, but %s; it may still be there",
			ErrSnapshotUnreachable, req.GetSnapshotId(), describeFailed(failed))
	}
	resp := &backuppb.DeleteSnapshotResponse{Success: true, Existed: existed}
	for id, err := range failed {
		resp.Warnings = append(resp.Warnings, fmt.Sprintf("node %d could not be asked, and keeps %s if it has it; delete it again when the node is back: %s",
			id, req.GetSnapshotId(), Plain(err.Error())))
	}
	slices.Sort(resp.Warnings)
	return resp, nil
}

// GetStateMetadata describes the live state.
func (a *backupAPI) GetStateMetadata(ctx context.Context, _ *backuppb.GetStateMetadataRequest) (*backuppb.StateMetadata, error) {
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	counts, err := v.Counts()
	if err != nil {
		return nil, err
	}
	st := a.cfg.Node.Status()
	return &backuppb.StateMetadata{
		CommitIndex: v.Applied(), Term: st.Term,
		ServiceCount: uint32(counts.Services), PipelineCount: uint32(counts.Pipelines), Version: a.cfg.Version,
		ClusterId: fmt.Sprintf("%016x", a.cfg.ClusterID), ClusterName: a.cfg.ClusterName,
		Revision: v.Revision(), Epoch: v.Epoch(), Counts: counts.ByName(),
	}, nil
}

// metadataOf describes the state in a snapshot.
func metadataOf(r *shelf.Record) *backuppb.StateMetadata {
	return &backuppb.StateMetadata{
		CommitIndex: r.Index, Term: r.Term, Version: r.Version,
		ServiceCount: uint32(r.Counts["services"]), PipelineCount: uint32(r.Counts["pipelines"]),
		ClusterId: fmt.Sprintf("%016x", r.ClusterID), ClusterName: r.ClusterName,
		Revision: r.Revision, Epoch: r.Epoch, StateHash: r.ContentHash, Counts: r.Counts,
	}
}

// RestoreSnapshot puts a snapshot in the place of the live state, or with
// validate_only says what that would do. It answers when the restore has ended;
// when the caller leaves earlier, the restore goes on.
func (a *backupAPI) RestoreSnapshot(ctx context.Context, req *backuppb.RestoreSnapshotRequest) (*backuppb.RestoreSnapshotResponse, error) {
	r, err := a.recovery()
	if err != nil {
		return nil, err
	}
	id := req.GetSnapshotId()
	if err := shelf.CheckID(id); err != nil {
		return nil, err
	}
	if err := checkText("source", req.GetSource(), MaxText); err != nil {
		return nil, err
	}
	rec, err := a.cfg.Recovery.Get(id)
	if err != nil {
		if relayed(ctx) != "" {
			return nil, err
		}
		node, herr := a.holder(ctx, id)
		if herr != nil {
			return nil, herr
		}
		conn, rctx, rerr := a.relay.to(ctx, node)
		if rerr != nil {
			return nil, rerr
		}
		resp, err := backuppb.NewBackupServiceClient(conn).RestoreSnapshot(rctx, req)
		return resp, relayedErr(err)
	}
	if req.GetValidateOnly() {
		return a.validate(ctx, r, id)
	}
	if err := a.reader.Wait(ctx); err != nil {
		return nil, err
	}
	op, err := r.Restore(ctx, id, req.GetSource())
	if err != nil {
		return nil, err
	}
	resp := &backuppb.RestoreSnapshotResponse{OperationId: op, State: metadataOf(&rec)}
	if req.GetDetach() {
		resp.Success, resp.Message = true, "the restore has begun as operation "+op
		return resp, nil
	}
	return resp, a.awaitRestore(ctx, resp)
}

// awaitRestore fills resp in when its operation has ended.
func (a *backupAPI) awaitRestore(ctx context.Context, resp *backuppb.RestoreSnapshotResponse) error {
	op, err := recovery.Wait(ctx, a.cfg.State, resp.OperationId)
	if err != nil {
		return err
	}
	switch op.GetState() {
	case commandpb.OperationState_OPERATION_STATE_DONE:
		resp.Success = true
		resp.Message = op.GetMessage()
	case commandpb.OperationState_OPERATION_STATE_RUNNING:
		return fmt.Errorf("%w: the restore goes on as operation %s", ctx.Err(), resp.OperationId)
	default:
		resp.Message = op.GetMessage()
	}
	resp.Revision, resp.Epoch = a.cfg.State.Revision(), a.cfg.State.Epoch()
	a.reader.SetHeader(ctx, resp.Revision, resp.Epoch)
	return nil
}

// maxExamples bounds the ids named for a table.
const maxExamples = 10

func (a *backupAPI) validate(ctx context.Context, r *recovery.Recovery, id string) (*backuppb.RestoreSnapshotResponse, error) {
	found, err := r.Validate(ctx, id)
	if err != nil {
		return nil, err
	}
	resp := &backuppb.RestoreSnapshotResponse{Success: true, State: metadataOf(&found.Record), Epoch: a.cfg.State.Epoch(), Revision: a.cfg.State.Revision()}
	var records, changes uint64
	for _, d := range found.Diff {
		records += d.InSnapshot
		changes += d.Added + d.Removed + d.Changed
		resp.Difference = append(resp.Difference, &backuppb.TableDifference{
			Table: d.Table, InSnapshot: d.InSnapshot, Live: d.Live, Added: d.Added, Removed: d.Removed, Changed: d.Changed,
			Examples: d.Examples[:min(len(d.Examples), maxExamples)],
		})
	}
	resp.Message = fmt.Sprintf("the snapshot is whole and can be restored: %d records, every checksum and rule checked; "+
		"a restore now would change %d records of the live state; nothing was changed", records, changes)
	if found.Record.ClusterID != a.cfg.ClusterID {
		resp.Message += fmt.Sprintf("; it is of another cluster, %q (%016x)", found.Record.ClusterName, found.Record.ClusterID)
	}
	return resp, nil
}
