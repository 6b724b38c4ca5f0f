package router

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2"

	"conveyor.etl/router/router/commandpb"
)

// Apply applies entries in log order and moves Applied to the last of them. It
// returns one slice per entry: a result per command for those with Local set,
// nil for the others. Entries must follow each other and Applied without a
// gap. An error means this replica must stop; some of the earlier entries may
// then have been applied, whole.
func (s *FSM) Apply(entries []Entry) ([][]*commandpb.Result, error) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	d, err := s.writable()
	if err != nil {
		return nil, err
	}
	results := make([][]*commandpb.Result, len(entries))
	t, pending := s.newTx(d), false
	for i := range entries {
		e := &entries[i]
		if e.Index != t.pos.Index+1 {
			return nil, s.breakdown(fmt.Errorf("router: entry %d handed in after %d: entries must follow each other", e.Index, t.pos.Index))
		}
		t.revision, t.term = e.Index+t.clock.RevisionBase, e.Term
		if e.Local {
			results[i] = make([]*commandpb.Result, 0, len(e.Commands))
		}
		for _, raw := range e.Commands {
			res, err := t.command(raw, e.Local)
			if err != nil {
				return nil, s.breakdown(fmt.Errorf("router: entry %d: %w", e.Index, err))
			}
			if e.Local {
				results[i] = append(results[i], res)
			}
		}
		t.endEntry()
		t.pos.Index, t.pos.Term, pending = e.Index, e.Term, true
		if t.swap != nil || t.bytes > s.o.BatchBytes || e.Index%sumEvery == 0 {
			if err := s.commit(t); err != nil {
				return nil, s.breakdown(err)
			}
			if t.swap != nil {
				if d, err = s.performSwap(); err != nil {
					return nil, s.breakdown(err)
				}
			}
			t, pending = s.newTx(d), false
		}
	}
	if pending {
		if err := s.commit(t); err != nil {
			return nil, s.breakdown(err)
		}
	}
	return results, nil
}

// ApplyMembership records a committed change of the group's configuration and
// moves Applied to pos. Errors are as with Apply.
func (s *FSM) ApplyMembership(pos Position) error {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	d, err := s.writable()
	if err != nil {
		return err
	}
	t := s.newTx(d)
	if pos.Index <= t.pos.Index {
		return s.breakdown(fmt.Errorf("router: membership of entry %d handed in after %d was applied", pos.Index, t.pos.Index))
	}
	t.pos, t.membership = pos.clone(), true
	if err := s.commit(t); err != nil {
		return s.breakdown(err)
	}
	return nil
}

// writable returns the database to apply to.
func (s *FSM) writable() (*database, error) {
	s.mu.RLock()
	d, closed := s.cur, s.closed
	s.mu.RUnlock()
	if closed {
		return nil, ErrClosed
	}
	if s.broken != nil {
		return nil, s.broken
	}
	return d, d.failed()
}

// breakdown makes err the answer to every later Apply: cells in memory may
// already show what never reached Pebble.
func (s *FSM) breakdown(err error) error {
	s.broken = err
	return err
}

func (s *FSM) newTx(d *database) *tx {
	s.mu.RLock()
	pos := s.pos // what it points to is replaced, never changed
	s.mu.RUnlock()
	return &tx{s: s, home: d, db: d.db, clock: s.clock, pos: pos, buf: make(key, 0, keyBytesToStartWith)}
}

// sortFrom is how many changes a run must have to be written in the order of keys:
// then Pebble finds the place of each in its memtable from the one before, which
// is nearer to it than the top of the list the more of them there are.
const sortFrom = 128

// commit writes the run to Pebble, then tells subscribers and readers.
func (s *FSM) commit(t *tx) error {
	if t.err != nil {
		return t.err
	}
	b := t.db.NewBatchWithSize(int(t.bytes) + 512)
	if t.wipeStage {
		if err := wipe(b); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	if len(t.dirty) >= sortFrom {
		slices.SortFunc(t.dirty, func(a, b *cell) int { return strings.Compare(a.key, b.key) })
	}
	for _, c := range t.dirty {
		if !c.dirty {
			continue // rolled back, or listed twice
		}
		c.dirty = false
		t.settle(c)
		var err error
		if c.val == nil {
			err = b.Delete([]byte(c.key), nil)
		} else {
			err = b.Set([]byte(c.key), c.val, nil)
		}
		if err != nil {
			return errors.Join(err, b.Close())
		}
	}
	clock, err := t.clock.MarshalVT()
	if err == nil {
		err = b.Set(t.buf.meta(metaClock), clock, nil)
	}
	if err == nil {
		err = b.Set(t.buf.meta(metaPosition), t.pos.applied(), nil)
	}
	// Also the first batch onto what an earlier release has left, which must not be
	// read by it any more: it would find no members, or not see who has yet to let go
	// of a stage.
	if err == nil && (t.membership || !t.home.current) {
		err = errors.Join(b.Set(t.buf.meta(metaMembership), t.pos.membership(), nil),
			b.Set(t.buf.meta(metaFormat), formatNumber(), nil))
	}
	if err != nil {
		return errors.Join(err, b.Close())
	}
	s.hub.announce(t.clock.Revision)
	s.records.block(t.dirty)
	if err := b.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("router: write entries up to %d: %w", t.pos.Index, err)
	}
	t.home.current = true
	s.records.unblock()
	t.home.pace.wrote(b.Len())
	if err := b.Close(); err != nil {
		return err
	}
	s.clearOverlay()
	s.hot.age()
	s.mu.Lock()
	s.pos = t.pos
	s.sums.now(t.pos.Index, t.clock, clock)
	s.mu.Unlock()
	s.publishClock(t.clock)
	s.hub.publish(t.sets, t.clock.Revision)
	if t.staged {
		s.stage.moved.ring()
	}
	if t.wipeStage {
		s.stage.abandoned(s)
	}
	if t.swap == nil { // otherwise the state of this index is still to come
		s.serveAwaited()
	}
	return nil
}

// wideOverlay is the number of cells from which on the map of a run is not used again:
// to clear one takes as long as it was ever large, and every later run would pay for it.
const wideOverlay = 4096

func (s *FSM) clearOverlay() {
	if len(s.overlay) > wideOverlay {
		s.overlay = make(map[string]*cell)
		return
	}
	clear(s.overlay)
}

// command applies one command. An error is this replica's, never the caller's.
func (t *tx) command(raw []byte, local bool) (*commandpb.Result, error) {
	var c commandpb.Command
	if err := c.UnmarshalVT(raw); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnknownCommand, err)
	}
	if u := c.ProtoReflect().GetUnknown(); len(u) > 0 {
		return nil, fmt.Errorf("%w (unknown field in a command of %d bytes)", ErrUnknownCommand, len(raw))
	}
	t.begin(c.TimeMs, local || c.RequestId != "")
	t.clock.TimeMs = t.now
	h := handler{name: "none", run: func(*tx, any) *commandpb.Rejection {
		return invalid("command", "the command names no operation")
	}}
	if c.Op != nil {
		var ok bool
		if h, ok = t.s.handlers[reflect.TypeOf(c.Op)]; !ok {
			return nil, fmt.Errorf("%w (%T)", ErrUnknownCommand, c.Op)
		}
	}
	t.op = h.op
	// Before the request id, and not remembered under it: the caller reads again
	// and sends the same request for the new epoch.
	rej := first(t.checkEpoch(&c), t.checkTerm(&c))
	strange := rej != nil
	var digest uint64
	if c.RequestId != "" && !strange {
		if rej = checkID("request id", c.RequestId); rej == nil {
			digest = digestOf(&c)
			result, again := t.remembered(c.RequestId, h, digest)
			if again || t.err != nil {
				return result, t.err
			}
		}
	}
	if rej == nil {
		rej = h.run(t, c.Op)
	}
	if t.err != nil {
		return nil, t.err
	}
	if rej != nil {
		t.rollback()
		t.res.Rejection = rej
	} else if t.changed {
		t.clock.Revision = t.revision
		t.res.Changed = true
	}
	t.res.Revision, t.res.TimeMs, t.res.Epoch = t.clock.Revision, t.now, t.clock.Epoch
	if rej == nil && t.swapped {
		after := clockAfter(t.clock, t.revision-t.clock.RevisionBase, t.swap.Source.Clock)
		t.res.Revision, t.res.Epoch = after.Revision, after.Epoch
	}
	if c.RequestId != "" && !strange && checkID("request id", c.RequestId) == nil {
		t.remember(c.RequestId, h, digest)
	}
	return t.res, t.err
}
