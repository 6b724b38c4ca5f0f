package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// The swap of a restore. The entry that asks for it is committed to the old
// database, with a record that the swap is due; then the swap is done, and done
// again after a crash until CURRENT names the new database:
//
//  1. The old state is kept as the undo point.
//  2. The prepared database gets clock, position and operations.
//  3. CURRENT moves.

// undoPrefix begins the names of undo points; the epoch of the state they hold
// follows.
const undoPrefix = "undo-"

const unfinished = ".tmp"

func undoName(epoch uint64) string { return fmt.Sprintf("%s%06d", undoPrefix, epoch) }

// UndoPoint is the state that the last restore replaced, on this node's disk.
type UndoPoint struct {
	// Dir holds an image, for OpenImage. It is removed by the next restore.
	Dir string
	// Of the state in it.
	Revision, Epoch, Index, Term uint64
	TimeMs                       uint64
}

// UndoPoint returns the state that the last restore replaced; false when there
// was none since this node holds a state, or the node got its state from another
// one afterwards.
func (s *FSM) UndoPoint() (UndoPoint, bool) {
	if u := s.undo.Load(); u != nil {
		return *u, true
	}
	return UndoPoint{}, false
}

// clockAfter returns the clock of the state that a restore of a backup at an
// index makes of old: its numbers go on, whatever those of the backup are.
func clockAfter(old *commandpb.Clock, index uint64, backup *commandpb.Clock) *commandpb.Clock {
	c := proto.Clone(backup).(*commandpb.Clock)
	c.Epoch = old.Epoch + 1
	// Later than every revision of the old state and of the backup: who asks for
	// the changes after one of those, without naming the epoch, must be told that
	// they are not there.
	c.RevisionBase = old.RevisionBase
	if next := max(old.Revision, backup.Revision) + 1; next > index {
		c.RevisionBase = max(c.RevisionBase, next-index)
	}
	c.Revision = index + c.RevisionBase
	c.TimeMs = max(old.TimeMs, backup.TimeMs)
	c.OperationHead, c.OperationTail = old.OperationHead, old.OperationTail
	for len(c.Counts) < int(countKinds) {
		c.Counts = append(c.Counts, 0)
	}
	c.Counts[countOperations] = old.Counts[countOperations]
	return c
}

// performSwap does the swap that is due, if one is, and returns the database
// then in use. An error leaves the record that it is due: this replica must stop,
// and does it when it is opened again. applyMu is held, or nobody else is there.
func (s *FSM) performSwap() (*database, error) {
	old := s.cur
	rec, err := readStage(old.db, metaSwap)
	if rec == nil || err != nil {
		return old, err
	}
	s.stage.mu.Lock()
	defer s.stage.mu.Unlock()
	if err := s.keepUndo(old); err != nil {
		return nil, fmt.Errorf("router: restore %s: keep the old state for undoing: %w", rec.OperationId, err)
	}
	p, err := s.build(context.Background(), old, rec)
	if err != nil {
		return nil, err
	}
	s.stage.ready = nil // whatever happens now, it is no longer a prepared one
	path := s.fs.PathJoin(s.root, p.name)
	d, err := openDatabase(s.fs, path, p.name, s.o, false)
	if err != nil {
		return nil, err
	}
	if err := s.complete(d, old, rec, p); err != nil {
		return nil, errors.Join(fmt.Errorf("router: restore %s: complete the new state: %w", rec.OperationId, err), d.release())
	}
	if err := writeMarker(s.fs, s.root, p.name); err != nil {
		return nil, errors.Join(fmt.Errorf("router: restore %s: switching CURRENT failed, restart to find out which state is in force: %w", rec.OperationId, err), d.release())
	}
	if err := s.adopt(d); err != nil {
		return nil, err
	}
	s.replaced(old)
	s.o.Logger.Warn("state: replaced by a backup", "operation", rec.OperationId, "snapshot", rec.SnapshotId,
		"epoch", s.Epoch(), "revision", s.Revision())
	return d, nil
}

// keepUndo makes the old state the undo point, durably, and the record that the
// swap is due with it. One that is there is of the same state: nothing is applied
// between the record and the swap.
func (s *FSM) keepUndo(old *database) error {
	if err := old.flush(); err != nil {
		return err
	}
	dir := s.fs.PathJoin(s.root, undoName(s.clock.Epoch))
	if _, err := s.fs.Stat(dir); err == nil {
		return nil
	}
	tmp := dir + unfinished
	if err := s.fs.RemoveAll(tmp); err != nil {
		return err
	}
	if err := old.db.Checkpoint(tmp); err != nil {
		return err
	}
	if err := s.fs.Rename(tmp, dir); err != nil {
		return err
	}
	return syncDir(s.fs, s.root)
}

// complete makes a state of the content in d, durably: everything that is the
// cluster's comes from the old state.
func (s *FSM) complete(d, old *database, rec *commandpb.RestoreStage, p *prepared) error {
	clock := clockAfter(s.clock, s.Applied().Index, rec.Source.Clock)
	clock.Sums = slices.Clone(p.sums)
	clock.Sums[sumOperations] = s.clock.Sums[sumOperations]
	clock.Sums[sumOperationEnds] = s.clock.Sums[sumOperationEnds]
	b := d.db.NewBatch()
	var err error
	for _, table := range []byte{prefixOperation, prefixOperationEnd} {
		err = errors.Join(err, scanKeys(old.db, key(nil).table(table), nil, func(k, v []byte) (bool, error) {
			return true, b.Set(k, v, nil)
		}))
	}
	restored, rerr := rec.MarshalVT()
	if err = errors.Join(err, rerr, putHead(b, s.Applied(), clock), b.Set(key(nil).meta(metaRestored), restored, nil)); err != nil {
		return errors.Join(err, b.Close())
	}
	if err := b.Commit(pebble.NoSync); err != nil {
		return err
	}
	if err := errors.Join(b.Close(), d.flush()); err != nil {
		return err
	}
	return syncDir(s.fs, s.root)
}

// putHead writes what makes a database a state.
func putHead(b *pebble.Batch, pos Position, clock *commandpb.Clock) error {
	c, err := clock.MarshalVT()
	return errors.Join(err,
		b.Set(key(nil).meta(metaFormat), formatNumber(), nil),
		b.Set(key(nil).meta(metaPosition), pos.applied(), nil),
		b.Set(key(nil).meta(metaMembership), pos.membership(), nil),
		b.Set(key(nil).meta(metaClock), c, nil))
}

// findUndo looks for the undo point of the state in use and removes those of
// earlier ones. What it cannot read is no undo point.
func (s *FSM) findUndo() {
	s.undo.Store(nil)
	epoch := s.Epoch()
	names, err := s.fs.List(s.root)
	if err != nil {
		s.o.Logger.Warn("state: the undo point cannot be looked for", "error", err)
		return
	}
	due, err := readStage(s.cur.db, metaSwap)
	for _, n := range names {
		name := s.fs.PathBase(n)
		of, ok := parseUndoName(name)
		path := s.fs.PathJoin(s.root, name)
		switch {
		case !ok:
		case of+1 == epoch && !strings.HasSuffix(name, unfinished):
			if u, err := readUndo(s.fs, path, s.o); err != nil {
				s.o.Logger.Warn("state: the undo point cannot be used", "dir", path, "error", err)
			} else {
				s.undo.Store(&u)
			}
		case of == epoch && (due != nil || err != nil):
			// It belongs to the swap that is about to be finished.
		default:
			if err := s.fs.RemoveAll(path); err != nil {
				s.o.Logger.Warn("state: an old undo point could not be removed", "dir", path, "error", err)
			}
		}
	}
}

// ForgetUndo removes the undo point, durably, when it is that of the restore that
// began epoch; without one it does nothing. It is for one who does not want to go
// back any more, or wants the space.
func (s *FSM) ForgetUndo(epoch uint64) error {
	path, err := s.hideUndo(epoch)
	if path == "" || err != nil {
		return err
	}
	// Beside what goes on: it may be gigabytes. What a crash leaves, the next start
	// removes.
	return s.fs.RemoveAll(path)
}

// hideUndo makes the undo point one that was never finished, and returns where it is.
func (s *FSM) hideUndo(epoch uint64) (string, error) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	u := s.undo.Load()
	if u == nil || u.Epoch+1 != epoch || s.broken != nil {
		return "", nil
	}
	path := u.Dir + unfinished
	if err := errors.Join(s.fs.RemoveAll(path), s.fs.Rename(u.Dir, path), syncDir(s.fs, s.root)); err != nil {
		return "", fmt.Errorf("router: forget the undo point %s: %w", u.Dir, err)
	}
	s.undo.Store(nil)
	return path, nil
}

func parseUndoName(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(strings.TrimSuffix(name, unfinished), undoPrefix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil
}

func readUndo(f vfs.FS, dir string, o Options) (UndoPoint, error) {
	im, err := OpenImage(f, dir, o)
	if err != nil {
		return UndoPoint{}, err
	}
	u := UndoPoint{
		Dir: dir, Revision: im.clock.Revision, Epoch: im.clock.Epoch, Index: im.pos.Index, Term: im.pos.Term, TimeMs: im.clock.TimeMs,
	}
	return u, im.Close()
}
