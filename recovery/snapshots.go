package recovery

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"time"

	"github.com/google/uuid"

	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/snap"
)

// Create makes snapshot id (chosen here when empty) of this node's state, which
// holds everything that was acknowledged before the call. Writes go on: it
// flushes what is in memory and links the rest. Errors are those of the shelf.
func (r *Recovery) Create(ctx context.Context, id string) (shelf.Record, error) {
	if id == "" {
		id = uuid.NewString()
	}
	return r.create(ctx, id, shelf.Created)
}

func (r *Recovery) create(ctx context.Context, id string, origin shelf.Origin) (shelf.Record, error) {
	if err := shelf.CheckID(id); err != nil {
		return shelf.Record{}, err
	}
	defer r.c.State.HoldCompactions()()
	rec, err := r.c.Shelf.Create(ctx, id, origin, func(dir string) (snap.Meta, error) {
		pos, err := r.c.State.Image(dir)
		// A backup holds state only: neither members nor votes.
		return snap.Meta{Index: pos.Index, Term: pos.Term}, err
	}, func(dir string, rec *shelf.Record) error { return r.describe(dir, rec) })
	if err != nil {
		return rec, err
	}
	r.log.Info("a snapshot was made", "event", "snapshot_created", "snapshot", id, "index", rec.Index, "bytes", rec.Bytes)
	return rec, nil
}

// describe reads out of the image in dir what its record says.
func (r *Recovery) describe(dir string, rec *shelf.Record) error {
	image, err := router.OpenImage(r.c.FS, dir, router.Options{})
	if err != nil {
		return err
	}
	v := image.View()
	counts, err := v.QuickCounts()
	rec.Revision, rec.Epoch = v.Revision(), v.Epoch()
	if err = errors.Join(err, v.Close(), image.Close()); err != nil {
		return err
	}
	rec.Counts = counts.ByName()
	rec.Version = r.c.Version
	if rec.Origin != shelf.Uploaded && rec.Origin != shelf.ForRestore {
		rec.ClusterID, rec.ClusterName = r.c.ClusterID, r.c.ClusterName
	}
	return nil
}

// List returns the snapshots of this node, the newest first.
func (r *Recovery) List() []shelf.Record { return r.c.Shelf.List() }

// Delete removes a snapshot of this node and reports whether there was one. With the
// undo point of the last restore goes the state it is made of, or it would be back at
// the next look.
func (r *Recovery) Delete(id string) (bool, error) {
	r.undoMu.Lock()
	defer r.undoMu.Unlock()
	undo, ok := r.c.State.UndoPoint()
	if !ok || id != router.UndoID(undo.Epoch+1) {
		return r.c.Shelf.Delete(id)
	}
	// Killed in between, the node has it again after its next start, whole.
	_, err := r.c.Shelf.Delete(id)
	return true, errors.Join(err, r.c.State.ForgetUndo(undo.Epoch+1))
}

// hash returns the hash of a snapshot's content, computing it the first time,
// which reads everything.
func (r *Recovery) hash(ctx context.Context, s *shelf.Reader) (string, error) {
	rec, err := r.c.Shelf.Get(s.Record().ID)
	if err == nil && rec.ContentHash != "" {
		return rec.ContentHash, nil
	}
	image, err := router.OpenImage(r.c.FS, s.Dir(), router.Options{})
	if err != nil {
		return "", err
	}
	v := image.View()
	sum, err := v.ContentHash(ctx)
	counts, cerr := v.Counts()
	if err = errors.Join(err, cerr, v.Close(), image.Close()); err != nil {
		return "", err
	}
	hash := hex.EncodeToString(sum)
	// Deleted meanwhile: the reader still has it.
	if err := r.c.Shelf.SetContent(s.Record().ID, hash, counts.ByName()); err != nil && !errors.Is(err, shelf.ErrNotFound) {
		return "", err
	}
	return hash, nil
}

// Download is an archive on its way to a client.
type Download struct {
	*archive.Archive
	release func()
}

// Close ends the download.
func (d *Download) Close() error {
	err := d.Archive.Close()
	d.release()
	return err
}

// Stream opens snapshot id as an archive, from byte offset of its stream on. The
// same snapshot and compression give the same stream every time. The caller
// closes it.
func (r *Recovery) Stream(ctx context.Context, id string, c archive.Compression, offset int64) (*Download, error) {
	done, err := r.transfer("download of " + id)
	if err != nil {
		return nil, err
	}
	s, err := r.c.Shelf.Open(id)
	if err != nil {
		done()
		return nil, err
	}
	d := &Download{release: func() {
		if err := s.Close(); err != nil {
			r.log.Warn("a deleted snapshot could not be removed from disk; the next start tries again", "snapshot", id, "err", err)
		}
		done()
	}}
	if d.Archive, err = r.open(ctx, s, c, offset); err != nil {
		d.release()
		return nil, err
	}
	return d, nil
}

func (r *Recovery) open(ctx context.Context, s *shelf.Reader, c archive.Compression, offset int64) (*archive.Archive, error) {
	hash, err := r.hash(ctx, s)
	if err != nil {
		return nil, err
	}
	rec := s.Record()
	if now, err := r.c.Shelf.Get(rec.ID); err == nil {
		rec = now // with its counts
	}
	a, err := archive.NewArchive(ctx, s.Reader, header(rec, hash), c, offset)
	if err == nil {
		a.Limit(spareProcessors(runtime.GOMAXPROCS(0), func() int64 {
			written, _ := r.c.State.Written()
			return written
		}))
	}
	return a, err
}

// header is the first entry of the archive of a snapshot.
func header(rec shelf.Record, hash string) archive.Header {
	return archive.Header{
		ClusterID: fmt.Sprintf("%016x", rec.ClusterID), ClusterName: rec.ClusterName,
		Epoch: rec.Epoch, Revision: rec.Revision, Index: rec.Index, Term: rec.Term,
		StateHash: hash, Counts: rec.Counts, CreatedUnixMsec: rec.CreatedMS, RouterVersion: rec.Version,
	}
}

// uploadReserve is the free disk space an upload leaves: the log needs some.
const uploadReserve = 512 << 20

// Import reads an archive and keeps it as a snapshot with an id chosen here.
// Everything in it is checked; on an error nothing is kept. Archives of other
// clusters are welcome. One with origin shelf.ForRestore is removed when its
// restore has ended, or after an hour in which none used it.
func (r *Recovery) Import(ctx context.Context, in io.Reader, origin shelf.Origin) (shelf.Record, error) {
	done, err := r.transfer("an upload")
	if err != nil {
		return shelf.Record{}, err
	}
	defer done()
	id := uuid.NewString()
	var header archive.Header
	rec, err := r.c.Shelf.Import(ctx, id, origin, func(dir string) error {
		var err error
		header, _, err = archive.Extract(ctx, in, archive.Limits{MaxBytes: r.c.MaxUploadBytes, ReserveBytes: uploadReserve}, r.c.FS, dir)
		return err
	}, func(dir string, rec *shelf.Record) error {
		if err := r.describe(dir, rec); err != nil {
			return err
		}
		var err error
		if rec.ClusterID, err = strconv.ParseUint(header.ClusterID, 16, 64); err != nil {
			return fmt.Errorf("%w: its cluster id is %.40q", archive.ErrCorrupt, header.ClusterID)
		}
		rec.ClusterName, rec.Version = header.ClusterName, header.RouterVersion
		rec.ContentHash = header.StateHash
		return nil
	})
	if err != nil {
		return rec, err
	}
	r.log.Info("a snapshot was uploaded", "event", "snapshot_uploaded", "snapshot", id, "index", rec.Index,
		"bytes", rec.Bytes, "of_cluster", rec.ClusterName, "made", rec.Created().UTC().Format(time.RFC3339))
	return rec, nil
}

// forRestoreKept is how long a snapshot that was brought for a restore waits for
// it. Who brought it may have been killed before asking.
const forRestoreKept = time.Hour

// tidy removes the snapshots brought for a restore that no restore needs.
func (r *Recovery) tidy() {
	var stale []string
	for _, rec := range r.c.Shelf.List() {
		if rec.Origin == shelf.ForRestore && r.c.Now().UnixMilli()-rec.ArrivedMS >= forRestoreKept.Milliseconds() {
			stale = append(stale, rec.ID)
		}
	}
	if len(stale) == 0 {
		return
	}
	needed := map[string]bool{}
	v := r.c.State.View()
	err := v.Operations(func(op *commandpb.Operation) bool {
		if op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
			needed[op.SnapshotId] = true
		}
		return true
	})
	if err = errors.Join(err, v.Close()); err != nil {
		return // the next look tries again
	}
	for _, id := range stale {
		if !needed[id] {
			r.log.Info("removing a snapshot that was brought for a restore nobody began", "snapshot", id)
			r.drop(id)
		}
	}
}

func (r *Recovery) drop(id string) {
	if _, err := r.c.Shelf.Delete(id); err != nil {
		r.log.Warn("a snapshot that is needed no more could not be removed", "snapshot", id, "err", err)
	}
}

// keepUndo puts the undo point of the last restore among the snapshots of this
// node, where it can be looked at, downloaded and restored, and lets go of the
// one before it.
func (r *Recovery) keepUndo(ctx context.Context) error {
	r.undoMu.Lock()
	defer r.undoMu.Unlock()
	undo, ok := r.c.State.UndoPoint()
	if !ok {
		return nil
	}
	id := router.UndoID(undo.Epoch + 1)
	if _, err := r.c.Shelf.Get(id); err == nil {
		return nil
	}
	_, err := r.c.Shelf.Create(ctx, id, shelf.Undo, func(dir string) (snap.Meta, error) {
		return snap.Meta{Index: undo.Index, Term: undo.Term}, linkAll(r.c.FS, undo.Dir, dir)
	}, func(dir string, rec *shelf.Record) error { return r.describe(dir, rec) })
	if err != nil {
		return fmt.Errorf("recovery: keep the state that was replaced: %w", err)
	}
	for _, rec := range r.c.Shelf.List() {
		if rec.Origin == shelf.Undo && rec.ID != id {
			if _, err := r.c.Shelf.Delete(rec.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// UndoID returns the snapshot of the state that the last restore replaced.
func (r *Recovery) UndoID(ctx context.Context) (string, error) {
	epoch := r.c.State.Epoch()
	if epoch == 0 {
		return "", fmt.Errorf("%w: nothing was ever restored here", ErrNoUndo)
	}
	if err := r.keepUndo(ctx); err != nil {
		return "", err
	}
	id := router.UndoID(epoch)
	if _, err := r.c.Shelf.Get(id); err != nil {
		return "", fmt.Errorf("%w: node %d does not have the state before the last restore", ErrNoUndo, r.c.NodeID)
	}
	return id, nil
}

// Get returns the record of a snapshot of this node.
func (r *Recovery) Get(id string) (shelf.Record, error) { return r.c.Shelf.Get(id) }
