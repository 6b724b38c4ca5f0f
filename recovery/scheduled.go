package recovery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/router/commandpb"
)

// KindBackup is the kind of the operations that scheduled backups are.
const KindBackup = "backup"

// scheduleLook is the longest time between two looks at what is due: the leader
// may change, and so may the clock.
const scheduleLook = 30 * time.Second

// runSchedule makes the backups that are due while this node leads. What was
// made when is read from the operations, which are replicated: a new leader goes
// on in the same rhythm.
func (r *Recovery) runSchedule(ctx context.Context) {
	jitter := r.c.Schedule.Jitter(fmt.Sprintf("%016x", r.c.ClusterID))
	wait := time.Second // a new leader has to apply what its predecessors did
	for sleep(ctx, wait) {
		wait = min(scheduleLook, r.c.Schedule.Every)
		if !r.c.Node.Leadership().Leading || r.catchUp(ctx) != nil {
			continue
		}
		history, _, busy, err := r.backupHistory()
		if err != nil {
			r.log.Error("cannot read which backups were made", "err", err)
			continue
		}
		now := r.c.Now()
		if due := r.c.Schedule.Next(now, history, jitter); due.After(now) {
			wait = min(wait, due.Sub(now))
			continue
		}
		if busy {
			continue
		}
		if err := r.c.Trusted(); err != nil {
			// Nothing can be recorded from here either: the commands are refused for
			// the same reason.
			r.log.Error("a scheduled backup is due and is not made: the state of this node may be wrong", "event", "backup_refused", "err", err)
			continue
		}
		r.scheduled(ctx)
	}
}

// backupHistory returns what the operations say of scheduled backups, why the newest
// failed if it did, and whether one is running.
func (r *Recovery) backupHistory() (h backup.History, why string, busy bool, err error) {
	v := r.c.State.View()
	defer v.Close()
	err = v.Operations(func(op *commandpb.Operation) bool { // the newest first
		if op.Kind != KindBackup {
			return true
		}
		started := time.UnixMilli(int64(op.StartedAtMs))
		switch op.State {
		case commandpb.OperationState_OPERATION_STATE_RUNNING:
			busy = true
		case commandpb.OperationState_OPERATION_STATE_DONE:
			h.Last = started
			return false
		default:
			if h.Failures == 0 {
				h.Failed, why = time.UnixMilli(int64(op.EndedAtMs)), op.Message
			}
			h.Failures++
		}
		return true
	})
	return h, why, busy, err
}

// Alarms returns, while this node leads, that the scheduled backups fail: nobody
// looks for a backup that is missing before it is needed.
func (r *Recovery) Alarms() []string {
	if !r.c.Schedule.Enabled() || !r.c.Node.Leadership().Leading {
		return nil
	}
	h, why, _, err := r.backupHistory()
	if err != nil || h.Failures == 0 {
		return nil
	}
	last := "none was stored before"
	if !h.Last.IsZero() {
		last = "the last that was stored is of " + h.Last.UTC().Format(time.RFC3339)
	}
	often := "once so far"
	if h.Failures > 1 {
		often = fmt.Sprintf("%d times in a row", h.Failures)
	}
	return []string{fmt.Sprintf("scheduled backups fail, %s; %s; the newest, at %s: %s",
		often, last, h.Failed.UTC().Format(time.RFC3339), why)}
}

// scheduled makes one backup and removes those that are too many.
func (r *Recovery) scheduled(ctx context.Context) {
	id := "backup-" + uuid.NewString()
	r.claim(id)
	defer r.release(id)
	op, err := r.begin(ctx, &commandpb.Operation{
		OperationId: id, Kind: KindBackup, Subject: "to " + r.c.Schedule.Dest, Phase: "snapshot",
	})
	if err != nil {
		r.log.Warn("a scheduled backup was not begun", "err", err)
		return
	}
	var name string
	var bytes uint64
	err = op.beating(ctx, func() error {
		var err error
		name, bytes, err = r.backUp(ctx, op)
		return err
	})
	if ctx.Err() != nil {
		return // the next start records it
	}
	state := commandpb.OperationState_OPERATION_STATE_DONE
	message := fmt.Sprintf("backup %s, %d bytes", name, bytes)
	switch {
	case errors.Is(err, errCancelled):
		state, message = commandpb.OperationState_OPERATION_STATE_CANCELLED, "cancelled; nothing was stored"
	case err != nil:
		state, message = commandpb.OperationState_OPERATION_STATE_FAILED, clip(err.Error())
		r.log.Error("a scheduled backup failed", "event", "backup_failed", "err", err)
	default:
		r.log.Info("the state was backed up", "event", "backed_up", "backup", name, "bytes", bytes, "to", r.c.Schedule.Dest)
	}
	if err := op.end(ctx, state, message); err != nil {
		r.log.Warn("the end of a backup could not be recorded", "err", err)
	}
}

// backUp stores a backup and returns its name and size.
func (r *Recovery) backUp(ctx context.Context, op *operation) (string, uint64, error) {
	store, err := backup.Create(ctx, r.c.Schedule.Dest)
	if err != nil {
		return "", 0, err
	}
	defer func() { _ = store.Close() }()
	name := "scheduled-" + r.c.Now().UTC().Format("20060102T150405.000Z")
	rec, err := r.create(ctx, name, shelf.Temporary)
	if err != nil {
		return "", 0, err
	}
	defer func() {
		if _, err := r.c.Shelf.Delete(name); err != nil {
			r.log.Warn("the snapshot of a scheduled backup could not be removed", "snapshot", name, "err", err)
		}
	}()
	if err := op.phase(ctx, "compare", "", 0); err != nil {
		return "", 0, err
	}
	agreed, err := r.awaitAgreed(ctx, op.op.OperationId, rec)
	if err != nil {
		return "", 0, err
	}
	if err := op.phase(ctx, "store", "bytes", uint64(rec.Bytes)); err != nil {
		return "", 0, err
	}
	d, err := r.Stream(ctx, name, archive.Zstd, 0)
	if err != nil {
		return "", 0, err
	}
	defer func() { _ = d.Close() }()
	if rec, err = r.c.Shelf.Get(name); err != nil { // with its hash
		return "", 0, err
	}
	stored, err := store.Put(ctx, backup.Metadata{
		BackupID: name, RouterEndpoint: r.c.Endpoint, CommitIndex: rec.Index, Term: rec.Term,
		CreatedAt: rec.Created(), Compression: archive.Zstd.String(), StateHash: rec.ContentHash,
		ClusterID: fmt.Sprintf("%016x", rec.ClusterID), ClusterName: rec.ClusterName, Epoch: rec.Epoch, Revision: rec.Revision,
		Counts: rec.Counts, RouterVersion: rec.Version, StateAgreed: agreed,
	}, &watchedRead{r: r, ctx: ctx, op: op, d: d})
	if err != nil {
		return "", 0, err
	}
	if r.c.Schedule.Keep > 0 {
		if _, err := store.Cleanup(ctx, r.c.Schedule.Keep); err != nil {
			r.log.Warn("old backups could not be removed; the next backup tries again", "err", err)
		}
	}
	return name, stored.SizeBytes, nil
}

// watchedRead reads a download, tells how far it is, and ends when the operation
// is to be cancelled.
type watchedRead struct {
	r    *Recovery
	ctx  context.Context
	op   *operation
	d    *Download
	next int64
}

// checkBytes is how often a reader looks whether to go on.
const checkBytes = 8 << 20

func (w *watchedRead) Read(p []byte) (int, error) {
	if done := w.d.RawDone(); done >= w.next {
		w.next = done + checkBytes
		if err := w.r.check(w.ctx, w.op.op.OperationId); err != nil {
			return 0, err
		}
		w.op.progress(w.ctx, uint64(done))
	}
	return w.d.Read(p)
}
