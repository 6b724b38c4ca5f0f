package recovery

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

func raftStopping() error {
	return fmt.Errorf("%w: the restore was not begun; ask another node", raftnode.ErrStopping)
}

// follow does the part of every replica in a restore, and goes on with what this
// node had begun.
func (r *Recovery) follow(ctx context.Context) {
	for ctx.Err() == nil {
		sub, err := r.c.State.Hub().Subscribe(r.c.State.Revision(), router.TableOperations)
		if err != nil {
			if errors.Is(err, router.ErrClosed) {
				return
			}
			if !sleep(ctx, 100*time.Millisecond) {
				return
			}
			continue
		}
		for {
			r.look(ctx)
			if _, _, err := sub.Next(ctx); err != nil {
				break // the state was replaced, or the node stops
			}
		}
		sub.Close()
	}
}

// look does what the present state asks for. It is called after every change of
// an operation, and first of all.
func (r *Recovery) look(ctx context.Context) {
	if err := r.keepUndo(ctx); err != nil && ctx.Err() == nil {
		r.log.Warn("the undo point is not among the snapshots", "err", err)
	}
	v := r.c.State.View()
	stage, err := v.Stage()
	var mine []*commandpb.Operation
	if err == nil {
		err = v.Operations(func(op *commandpb.Operation) bool {
			if (op.Kind == KindRestore || op.Kind == KindBackup) && op.NodeId == r.c.NodeID && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
				mine = append(mine, op)
			}
			return true
		})
	}
	if err = errors.Join(err, v.Close()); err != nil {
		if ctx.Err() == nil {
			r.log.Error("cannot read what is being restored", "err", err)
		}
		return
	}
	for _, op := range mine {
		if op.Kind == KindBackup {
			r.forget(op)
		} else {
			r.resume(ctx, op)
		}
	}
	// Once in each process, whatever it had reported: what was prepared does not
	// outlive it. Begun with the first chunk, not the last one.
	if stage != nil && r.mayPrepare(stage) {
		if id := "prepare " + stage.OperationId; r.claim(id) {
			r.spawn(id, func(ctx context.Context) { r.prepare(ctx, stage.OperationId, contains(stage.Ready, r.c.NodeID)) })
		}
	}
}

// prepareRetry is the pause after a failed preparation, which may have read and
// written gigabytes.
const prepareRetry = 30 * time.Second

func (r *Recovery) mayPrepare(stage *commandpb.RestoreStage) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.prepared[stage.OperationId]
	// Before the stage was sealed nobody could be told of the failure.
	untold := stage.Phase == commandpb.StagePhase_STAGE_PHASE_SEALED && !p.sealed
	return !p.done && (untold || time.Since(p.failed) >= prepareRetry)
}

func contains(list []uint64, v uint64) bool {
	for _, x := range list {
		if x == v {
			return true
		}
	}
	return false
}

// prepare builds the new state and tells the others.
func (r *Recovery) prepare(ctx context.Context, id string, reported bool) {
	start := time.Now()
	err := r.c.State.Prepare(ctx, id)
	if ctx.Err() != nil {
		return
	}
	stage, serr := r.staged(id)
	switch {
	case serr != nil:
		return // the state is closed, or cannot be read, which others say
	case stage == nil && err != nil:
		// A node that was away catches up on a restore that did not wait for it.
		r.log.Info("the restore has ended without this node having prepared for it", "event", "restore_unprepared", "operation", id)
		return
	case stage == nil || errors.Is(err, router.ErrNotStaged):
		return // swapped in, or in another database now: the next look begins again
	}
	r.mu.Lock()
	clear(r.prepared) // there is one restore at a time
	r.prepared[id] = preparation{done: err == nil, failed: time.Now(), sealed: stage.Phase == commandpb.StagePhase_STAGE_PHASE_SEALED}
	r.mu.Unlock()
	if err == nil && reported {
		return
	}
	report := &commandpb.ReportRestore{OperationId: id, NodeId: r.c.NodeID}
	if err != nil {
		r.log.Error("the staged state could not be prepared", "operation", id, "err", err)
		report.Error = clip(err.Error())
	} else {
		r.log.Info("the staged state is prepared", "event", "restore_prepared", "operation", id, "took", time.Since(start))
	}
	_, err = r.submit(ctx, &commandpb.Command{Op: &commandpb.Command_ReportRestore{ReportRestore: report}})
	if err != nil && ctx.Err() == nil {
		r.log.Warn("the others could not be told that the staged state is prepared", "operation", id, "err", err)
	}
}

// staged returns the stage of operation id, nil when there is none any more.
func (r *Recovery) staged(id string) (*commandpb.RestoreStage, error) {
	v := r.c.State.Latest()
	stage, err := v.Stage()
	if err = errors.Join(err, v.Close()); err != nil || stage.GetOperationId() != id {
		return nil, err
	}
	return stage, nil
}

// forget ends a backup that an earlier process of this node had begun. What it
// has stored is no backup without its description; the next cleanup removes it.
func (r *Recovery) forget(op *commandpb.Operation) {
	if !r.claim(op.OperationId) {
		return
	}
	r.spawn(op.OperationId, func(ctx context.Context) {
		if err := r.fail(ctx, op, fmt.Sprintf("node %d was restarted", r.c.NodeID)); err != nil && ctx.Err() == nil {
			r.log.Warn("the end of a backup could not be recorded", "operation", op.OperationId, "err", err)
		}
	})
}

// resume goes on with a restore that this node had begun before it was
// restarted.
func (r *Recovery) resume(ctx context.Context, op *commandpb.Operation) {
	id := op.OperationId
	if !r.claim(id) {
		return
	}
	snapshot := op.SnapshotId
	if snapshot == "" { // begun by an older release
		snapshot = strings.TrimPrefix(op.Subject, "snapshot ")
	}
	s, err := r.c.Shelf.Open(snapshot)
	if err != nil {
		r.spawn(id, func(ctx context.Context) {
			if r.catchUp(ctx) != nil {
				return
			}
			if done, err := r.swapped(id); err == nil && done {
				op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, "the state was restored"
				if _, err := r.submit(ctx, putOperation(op, false)); err != nil && ctx.Err() == nil {
					r.log.Warn("the end of a restore could not be recorded", "operation", id, "err", err)
				}
				return
			}
			message := fmt.Sprintf("node %d was restarted and cannot go on with snapshot %s (%v); the live state was not touched", r.c.NodeID, snapshot, err)
			_, _ = r.submit(ctx, abandon(id, message))
			if err := r.fail(ctx, op, message); err != nil {
				r.log.Warn("the end of a restore could not be recorded", "operation", id, "err", err)
			}
		})
		return
	}
	resumed := &operation{r: r, op: op, last: r.c.Now()}
	if !r.spawn(id, func(ctx context.Context) {
		r.log.Info("going on with a restore", "event", "restore_resumed", "operation", id)
		r.drive(ctx, resumed, s)
	}) {
		s.Close()
	}
}

func (r *Recovery) fail(ctx context.Context, op *commandpb.Operation, message string) error {
	op.State, op.Message = commandpb.OperationState_OPERATION_STATE_FAILED, message
	_, err := r.submit(ctx, putOperation(op, false))
	return err
}

// watch ends, on the leader, the restores that stand still: their node is gone
// with the only copy of the snapshot, and what they have staged takes room on
// every node.
func (r *Recovery) watch(ctx context.Context) {
	interval := r.c.StallAfter / 12
	// When this leader first saw an operation in its present state. Its own
	// clock, not the stamps in the state: those are of other nodes.
	type sight struct {
		revision uint64
		since    time.Time
	}
	seen := map[string]sight{}
	for sleep(ctx, interval) {
		r.tidy()
		if !r.c.Node.Leadership().Leading {
			clear(seen)
			continue
		}
		v := r.c.State.View()
		var still []*commandpb.Operation
		err := v.Operations(func(op *commandpb.Operation) bool {
			if op.Kind != KindRestore && op.Kind != KindBackup || op.State != commandpb.OperationState_OPERATION_STATE_RUNNING {
				delete(seen, op.OperationId)
				return true
			}
			at, known := seen[op.OperationId]
			if !known || at.revision != op.ModRevision {
				seen[op.OperationId] = sight{op.ModRevision, r.c.Now()}
			} else if r.c.Now().Sub(at.since) >= r.c.StallAfter {
				still = append(still, op)
			}
			return true
		})
		if err = errors.Join(err, v.Close()); err != nil {
			r.log.Error("cannot read what is being restored", "err", err)
			continue
		}
		for _, op := range still {
			if done, err := r.swapped(op.OperationId); err != nil {
				continue
			} else if done {
				// Its node stopped between the swap and the record of it.
				op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, "the state was restored"
				if _, err := r.submit(ctx, putOperation(op, false)); err != nil {
					r.log.Warn("the end of a restore could not be recorded", "operation", op.OperationId, "err", err)
				}
				continue
			}
			message := fmt.Sprintf("node %d, which carried it out, has not gone on for %v; the live state was not touched", op.NodeId, r.c.StallAfter)
			r.log.Warn("giving up an operation that stands still", "event", "operation_given_up", "operation", op.OperationId, "node_of", op.NodeId)
			// Changes nothing if it is no restore.
			if _, err := r.submit(ctx, abandon(op.OperationId, message)); err != nil && code(err) == 0 {
				continue
			}
			// The state machine refuses the word that a restore failed whose state
			// was swapped in meanwhile.
			if err := r.fail(ctx, op, message); err != nil {
				r.log.Warn("the end of a restore could not be recorded", "operation", op.OperationId, "err", err)
			}
		}
	}
}
