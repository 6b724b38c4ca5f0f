package recovery

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// KindRestore is the kind of the operations of this package.
const KindRestore = "restore"

// The phases of a restore, as its operation shows them.
const (
	phaseVerify  = "verify"
	phaseStage   = "stage"
	phasePrepare = "prepare"
	phaseSwap    = "swap"
)

// Validation is what a look at a snapshot found.
type Validation struct {
	Record shelf.Record
	Counts map[string]uint64
	// Diff compares the snapshot with the live state, table by table.
	Diff []router.TableDiff
}

// Validate reads everything in snapshot id, decodes it, compares it with its
// counters and its hash, and says how the live state differs from it. The live
// state is only read. It takes some seconds for a million records.
func (r *Recovery) Validate(ctx context.Context, id string) (*Validation, error) {
	s, err := r.c.Shelf.Open(id)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	image, _, err := r.verified(ctx, s)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	kept, live := image.View(), r.c.State.View()
	defer kept.Close()
	defer live.Close()
	out := &Validation{Record: s.Record()}
	counts, err := kept.Counts()
	if err != nil {
		return nil, err
	}
	out.Counts = counts.ByName()
	out.Diff, err = router.Diff(ctx, live, kept)
	return out, err
}

// verified opens the image of s after it has checked all of it, and describes
// it.
func (r *Recovery) verified(ctx context.Context, s *shelf.Reader) (*router.Image, *commandpb.RestoreSource, error) {
	image, err := router.OpenImage(r.c.FS, s.Dir(), router.Options{})
	if err != nil {
		return nil, nil, damaged(s, err)
	}
	src, err := r.examine(ctx, image, s.Record())
	if err != nil {
		return nil, nil, errors.Join(damaged(s, err), image.Close())
	}
	return image, src, nil
}

func (r *Recovery) examine(ctx context.Context, image *router.Image, rec shelf.Record) (*commandpb.RestoreSource, error) {
	src, err := image.CheckedSource(ctx)
	if err != nil {
		return nil, err
	}
	src.ClusterId, src.ClusterName = rec.ClusterID, rec.ClusterName
	got := hex.EncodeToString(src.ContentHash)
	switch {
	case rec.ContentHash == "":
		v := image.View()
		defer v.Close()
		counts, cerr := v.Counts()
		if err = cerr; err == nil {
			err = r.c.Shelf.SetContent(rec.ID, got, counts.ByName())
		}
	case rec.ContentHash != got:
		// Of an uploaded snapshot it is what its maker computed.
		err = fmt.Errorf("%w: its content has hash %s, %s was recorded when it was made", router.ErrCorrupt, got, rec.ContentHash)
	}
	return src, err
}

// damaged says of which snapshot err is, and that it is the snapshot's fault.
func damaged(s *shelf.Reader, err error) error {
	if errors.Is(err, router.ErrCorrupt) {
		return fmt.Errorf("%w: %s: %w; it cannot be restored, the live state was not touched", ErrDamaged, s.Record().ID, err)
	}
	return fmt.Errorf("recovery: snapshot %s cannot be restored: %w", s.Record().ID, err)
}

// Restore begins to put snapshot id of this node in the place of the live state
// and returns the operation that shows how it goes, under the name source when
// that is given: what users call the snapshot. Restores run one at a time.
func (r *Recovery) Restore(ctx context.Context, id, source string) (string, error) {
	if source == "" {
		source = "snapshot " + id
	}
	s, err := r.c.Shelf.Open(id)
	if err != nil {
		return "", err
	}
	if err := r.alone(); err != nil {
		return "", errors.Join(err, s.Close())
	}
	opID := "restore-" + uuid.NewString()
	r.claim(opID)
	op, err := r.begin(ctx, &commandpb.Operation{
		OperationId: opID, Kind: KindRestore, Subject: source, SnapshotId: id, Phase: phaseVerify,
	})
	if err != nil {
		r.release(opID)
		return "", errors.Join(err, s.Close())
	}
	if !r.spawn(opID, func(ctx context.Context) { r.drive(ctx, op, s) }) {
		if err := op.end(ctx, commandpb.OperationState_OPERATION_STATE_FAILED, "node "+fmt.Sprint(r.c.NodeID)+" is stopping"); err != nil {
			// It is recorded, and goes on when this node is back.
			return "", errors.Join(fmt.Errorf("%w: the node is stopping", raftnode.ErrAmbiguous), err, s.Close())
		}
		return "", errors.Join(raftStopping(), s.Close())
	}
	return opID, nil
}

// alone refuses a restore while another one runs: the state machine would refuse
// its stage too, but only after everything was read.
func (r *Recovery) alone() error {
	v := r.c.State.View()
	defer v.Close()
	var other *commandpb.Operation
	err := v.Operations(func(op *commandpb.Operation) bool {
		if op.Kind == KindRestore && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
			other = op
		}
		return other == nil
	})
	if err != nil || other == nil {
		return err
	}
	return &RefusedError{&commandpb.Rejection{
		Code: commandpb.Code_CODE_PRECONDITION, Subject: "restore of " + other.Subject,
		Reason: "is under way as operation " + other.OperationId + "; nothing was begun: wait for it, or cancel it",
	}}
}

// drive carries a restore out, from wherever it is, and records its end.
func (r *Recovery) drive(ctx context.Context, op *operation, s *shelf.Reader) {
	defer s.Close()
	id := op.op.OperationId
	if s.Record().Origin == shelf.ForRestore {
		defer func() {
			if ctx.Err() == nil { // otherwise it is needed after the restart
				r.drop(s.Record().ID)
			}
		}()
	}
	log := r.log.With("operation", id, "snapshot", s.Record().ID)
	err := op.beating(ctx, func() error { return r.carryOut(ctx, op, s) })
	if ctx.Err() != nil {
		return // goes on after the restart, or the leader ends it
	}
	state, message := commandpb.OperationState_OPERATION_STATE_DONE, ""
	switch {
	case err == nil:
		epoch := r.c.State.Epoch()
		message = fmt.Sprintf("restored %s; the restore epoch is %d now; 'router backup undo-restore' goes back", op.op.Subject, epoch)
		log.Info("the state was restored", "event", "restored", "epoch", epoch)
		if err := op.end(ctx, state, message); err != nil && ctx.Err() == nil {
			log.Warn("the end of a restore could not be recorded", "err", err)
		}
		return
	case errors.Is(err, errCancelled):
		state, message = commandpb.OperationState_OPERATION_STATE_CANCELLED, "cancelled; the live state was not touched"
	default:
		state = commandpb.OperationState_OPERATION_STATE_FAILED
		message = clip(err.Error()) + "; the live state was not touched"
	}
	log.Warn("a restore has ended", "event", "restore_ended", "err", err)
	if _, err := r.submit(ctx, abandon(id, message)); err != nil && code(err) == 0 {
		log.Warn("what was staged could not be removed; the leader will", "err", err)
	}
	if err := op.end(ctx, state, message); err != nil {
		log.Warn("the end of a restore could not be recorded", "err", err)
	}
}

func abandon(id, reason string) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_AbandonRestore{
		AbandonRestore: &commandpb.AbandonRestore{OperationId: id, Reason: reason},
	}}
}

var errCancelled = errors.New("recovery: cancelled")

// check returns errCancelled when a user wants the operation to end. What this
// node has applied may be behind what it was answered, so it catches up first.
func (r *Recovery) check(ctx context.Context, id string) error {
	if err := r.catchUp(ctx); err != nil {
		return err
	}
	op, err := readOperation(r.c.State, id)
	switch {
	case err != nil:
		return err
	case op == nil:
		return errors.New("recovery: the operation was forgotten")
	case op.CancelRequested:
		return errCancelled
	case op.State != commandpb.OperationState_OPERATION_STATE_RUNNING:
		return fmt.Errorf("recovery: the operation was ended meanwhile: %s", op.Message)
	}
	return nil
}

// catchUp returns when everything acknowledged before is applied here.
func (r *Recovery) catchUp(ctx context.Context) error {
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		_, err := r.c.Node.ReadIndex(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if !sleep(ctx, pause) {
			return ctx.Err()
		}
	}
}

func (r *Recovery) carryOut(ctx context.Context, op *operation, s *shelf.Reader) error {
	id := op.op.OperationId
	if err := r.catchUp(ctx); err != nil {
		return err
	}
	if swapped, err := r.swapped(id); swapped || err != nil {
		return err // a node that was restarted after the swap
	}
	image, src, err := r.verified(ctx, s)
	if err != nil {
		return err
	}
	defer image.Close()
	if err := r.check(ctx, id); err != nil {
		return err
	}
	rec := s.Record()
	if err := r.checkRoom(rec.Bytes); err != nil {
		return err
	}
	_, err = r.submit(ctx, &commandpb.Command{Op: &commandpb.Command_BeginRestore{BeginRestore: &commandpb.BeginRestore{
		OperationId: id, SnapshotId: rec.ID, Owner: r.c.NodeID, Source: src,
	}}})
	if err != nil {
		return err
	}
	var total uint64
	if now, err := r.c.Shelf.Get(rec.ID); err == nil {
		for _, n := range now.Counts {
			total += n
		}
	}
	if err := op.phase(ctx, phaseStage, "records", total); err != nil {
		return err
	}
	chunks, records, err := r.stage(ctx, op, image)
	if err != nil {
		return err
	}
	_, err = r.submit(ctx, &commandpb.Command{Op: &commandpb.Command_SealRestore{SealRestore: &commandpb.SealRestore{
		OperationId: id, Chunks: chunks, Records: records,
	}}})
	if err != nil {
		return err
	}
	if err := op.phase(ctx, phasePrepare, "nodes", uint64(len(raftnode.Live(r.c.Node.Status().Position.Members)))); err != nil {
		return err
	}
	if err := r.awaitReady(ctx, op); err != nil {
		return err
	}
	if err := op.phase(ctx, phaseSwap, "", 0); err != nil {
		return err
	}
	if err := r.swap(ctx, id); err != nil {
		return err
	}
	return r.catchUp(ctx)
}

// How many chunks are cut ahead of the one being replicated, and how often a user
// may have asked for the end of a restore before it is noticed.
const (
	chunksAhead = 4
	cancelLook  = 200 * time.Millisecond
)

// restoreReserve is the free disk space that a restore leaves.
const restoreReserve = 512 << 20

// checkRoom refuses a restore this node has no room for: the chunks, the state
// built out of them, and the one that is kept. The other nodes are as large.
func (r *Recovery) checkRoom(bytes int64) error {
	usage, err := r.c.FS.GetDiskUsage(r.c.State.Dir())
	if err != nil {
		return nil // not a file system that can tell
	}
	if need := uint64(3*bytes) + restoreReserve; usage.AvailBytes < need {
		return fmt.Errorf("recovery: the restore needs about %d MiB of disk on every node, %d MiB are free here: %w",
			need>>20, usage.AvailBytes>>20, syscall.ENOSPC)
	}
	return nil
}

// stage proposes what is not staged yet. Chunks are read and compressed while the
// one before is replicated.
func (r *Recovery) stage(ctx context.Context, op *operation, image *router.Image) (chunks, records uint64, err error) {
	id := op.op.OperationId
	if err := r.catchUp(ctx); err != nil {
		return 0, 0, err
	}
	live := r.c.State.Latest()
	stage, err := live.Stage()
	if err = errors.Join(err, live.Close()); err != nil {
		return 0, 0, err
	}
	if stage.GetOperationId() != id {
		return 0, 0, errors.New("recovery: what was staged is gone")
	}
	done := stage.Records
	g, gctx := errgroup.WithContext(ctx)
	ahead := make(chan router.Chunk, chunksAhead)
	g.Go(func() error {
		defer close(ahead)
		v := image.View()
		defer v.Close()
		var err error
		chunks, records, err = v.Chunks(gctx, stage.Chunks, func(c router.Chunk) error {
			select {
			case ahead <- c:
				return nil
			case <-gctx.Done():
				return gctx.Err()
			}
		})
		return err
	})
	g.Go(func() error {
		var looked time.Time
		for c := range ahead {
			if now := time.Now(); now.Sub(looked) >= cancelLook {
				looked = now
				if err := r.check(gctx, id); err != nil {
					return err
				}
			}
			_, err := r.submit(gctx, &commandpb.Command{Op: &commandpb.Command_StageRestore{StageRestore: &commandpb.StageRestore{
				OperationId: id, Sequence: c.Sequence, Data: c.Data, Records: c.Records,
			}}})
			if err != nil {
				return err
			}
			done += c.Records
			op.progress(gctx, done)
		}
		return nil
	})
	err = g.Wait()
	return chunks, records, err
}

// readyPoll is how often a restore that waits for replicas looks again.
const readyPoll = 50 * time.Millisecond

// awaitReady waits until this node and the leader have prepared the new state,
// and for the other members as long as ReadyWait: a replica that has not
// prepared does so while it applies the swap, which holds up its reads, and on
// the leader all writes.
func (r *Recovery) awaitReady(ctx context.Context, op *operation) error {
	id := op.op.OperationId
	begun := r.c.Now()
	// since is when only other members were left to wait for.
	var since time.Time
	for {
		if err := r.check(ctx, id); err != nil {
			return err
		}
		v := r.c.State.View()
		stage, err := v.Stage()
		if err = errors.Join(err, v.Close()); err != nil {
			return err
		}
		if stage == nil || stage.OperationId != id {
			return errors.New("recovery: what was staged is gone")
		}
		ready := map[uint64]bool{}
		for _, n := range stage.Ready {
			ready[n] = true
		}
		lead := r.c.Node.Leadership().Leader
		current, err := readOperation(r.c.State, id)
		if err != nil {
			return err
		}
		st := r.c.Node.Status()
		var waits []string
		for _, m := range raftnode.Live(st.Position.Members) {
			if !ready[m.ID] {
				waits = append(waits, describeWait(st, m.ID))
			}
		}
		all := len(waits) == 0
		for _, n := range []uint64{lead, r.c.NodeID} {
			if why := fmt.Sprintf("node %d cannot prepare", n); !ready[n] && strings.HasPrefix(current.GetMessage(), why) {
				return errors.New(current.GetMessage())
			}
		}
		left := r.c.ReadyWait - r.c.Now().Sub(begun)
		if all || ready[lead] && ready[r.c.NodeID] && left <= 0 {
			return nil
		}
		if !ready[lead] || !ready[r.c.NodeID] {
			since = time.Time{}
		} else if since.IsZero() {
			since = r.c.Now()
		} else if strings.Contains(current.GetMessage(), "cannot prepare") {
			op.say("") // which leaves what was said
		} else if r.c.Now().Sub(since) >= progressEvery {
			// Only when it goes on without them: what else is said of a node may be
			// why it cannot prepare.
			op.say(fmt.Sprintf("waiting for %s; goes on without in %d s", strings.Join(waits, ", "), max(int(left.Round(time.Second)/time.Second), 1)))
		}
		op.progress(ctx, uint64(len(ready)))
		if !sleep(ctx, readyPoll) {
			return ctx.Err()
		}
	}
}

// describeWait names a member that a restore waits for. Only a leader knows who
// is silent.
func describeWait(st raftnode.Status, id uint64) string {
	for _, p := range st.Peers {
		if p.ID == id && p.Silent {
			return fmt.Sprintf("node %d (silent)", id)
		}
	}
	return fmt.Sprintf("node %d", id)
}

// swap puts the staged state in force. A repeat of one that got through changes
// nothing.
func (r *Recovery) swap(ctx context.Context, id string) error {
	_, err := r.submit(ctx, &commandpb.Command{Op: &commandpb.Command_SwapRestore{
		SwapRestore: &commandpb.SwapRestore{OperationId: id},
	}})
	return err
}

// swapped reports whether the state of operation id is in force.
func (r *Recovery) swapped(id string) (bool, error) {
	v := r.c.State.Latest()
	defer v.Close()
	last, err := v.LastRestore()
	return last.GetOperationId() == id, err
}

// clip bounds a text that becomes part of the state.
func clip(s string) string {
	const most = 1000
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
