package router

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"

	"conveyor.etl/router/router/commandpb"
)

// View is a read of the state. One from FSM.View shows one revision and never
// changes; Close releases its snapshot. One from FSM.Latest reads what is
// newest at each call, costs nothing to make and needs no Close.
//
// Messages handed out belong to the caller. Lists are in the order of ids; a
// callback that returns false ends them. Methods are safe for concurrent use.
type View struct {
	s        *FSM
	latest   bool
	d        *database
	snap     *pebble.Snapshot
	revision uint64
	applied  uint64
	epoch    uint64
	closed   atomic.Bool
	err      error // why the view could not be made; every read returns it
}

// Point names a state: its revision, and the epoch that is of.
type Point struct{ Revision, Epoch uint64 }

// View returns an immutable view of the newest state. It never fails: on a
// closed state every read of the view returns ErrClosed.
func (s *FSM) View() *View {
	d, err := s.acquire()
	if err != nil {
		return &View{s: s, err: err}
	}
	return viewOf(s, d)
}

// viewOf makes a view of d and takes over the caller's reference to it.
func viewOf(s *FSM, d *database) *View {
	snap := d.db.NewSnapshot()
	v := &View{s: s, d: d, snap: snap}
	// What the snapshot shows is read from it: a batch may have been committed
	// since any number kept in memory was looked at.
	pos, err := readApplied(snap)
	var clock *commandpb.Clock
	if err == nil {
		clock, err = readClock(snap)
	}
	if err != nil {
		v.err = err
		_ = v.Close()
		return v
	}
	v.revision, v.applied, v.epoch = clock.Revision, pos.Index, clock.Epoch
	return v
}

// Latest returns a view for reads of one record: each call sees the newest
// state, and Revision is a lower bound of what they see. Two calls may see two
// revisions; use View when they must agree.
func (s *FSM) Latest() *View {
	v := &View{s: s, latest: true, revision: s.revision.Load(), epoch: s.epoch.Load()}
	s.mu.RLock()
	v.applied = s.pos.Index
	s.mu.RUnlock()
	return v
}

// Revision returns the revision the view shows.
func (v *View) Revision() uint64 { return v.revision }

// Applied returns the index of the newest entry the view shows.
func (v *View) Applied() uint64 { return v.applied }

// Epoch returns how often the state was replaced by a backup. Revisions of two
// epochs must not be compared.
func (v *View) Epoch() uint64 { return v.epoch }

// Close releases the view. It may be called more than once, but not while a
// read is running.
func (v *View) Close() error {
	if v.snap == nil || v.closed.Swap(true) {
		return nil
	}
	return errors.Join(v.snap.Close(), v.d.release())
}

// read runs fn over the view's data.
func (v *View) read(fn func(r pebble.Reader) error) error {
	return v.readDatabase(func(_ *database, r pebble.Reader) error { return fn(r) })
}

// readDatabase is read for those who also need to know whose data it is.
func (v *View) readDatabase(fn func(d *database, r pebble.Reader) error) error {
	switch {
	case v.err != nil:
		return v.err
	case v.latest:
		d, err := v.s.acquire()
		if err != nil {
			return err
		}
		defer d.release()
		return fn(d, d.db)
	case v.closed.Load():
		return ErrClosed
	}
	return fn(v.d, v.snap)
}

// scanKeys calls fn for the keys with a prefix, ascending, beginning after
// the key after when that is not nil.
func scanKeys(r pebble.Reader, prefix, after []byte, fn func(k, v []byte) (bool, error)) error {
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
	if err != nil {
		return err
	}
	ok := false
	if after != nil {
		// The successor of a key is the key with a zero byte.
		ok = it.SeekGE(append(after[:len(after):len(after)], 0))
	} else {
		ok = it.First()
	}
	for ; ok && err == nil; ok = it.Next() {
		var val []byte
		if val, err = it.ValueAndErr(); err == nil {
			ok, err = fn(it.Key(), val)
		}
		if !ok {
			break
		}
	}
	return errors.Join(err, it.Error(), it.Close())
}

// pointer is a record type that can be decoded.
type pointer[T any] interface {
	*T
	message
}

func decodeRecord[T any, P pointer[T]](k, v []byte) (P, error) {
	m := P(new(T))
	if err := m.UnmarshalVT(v); err != nil {
		return nil, fmt.Errorf("%w: record %q: %w", ErrCorrupt, k, err)
	}
	return m, nil
}

// getRecord reads one record; nil when it is absent.
func getRecord[T any, P pointer[T]](v *View, k []byte) (P, error) {
	if v.latest && v.err == nil {
		return getLatest[T, P](v.s, k)
	}
	var out P
	err := v.read(func(r pebble.Reader) error {
		b, err := getCopy(r, k)
		if b == nil || err != nil {
			return err
		}
		out, err = decodeRecord[T, P](k, b)
		return err
	})
	return out, err
}

// getLatest reads the newest value of one record, from memory when it was read
// before and has not changed since.
func getLatest[T any, P pointer[T]](s *FSM, k []byte) (P, error) {
	b, ticket := s.records.get(k)
	// In this order: a database taken before might be replaced by Install
	// between the two, and its value be filled in for the new one's.
	d, err := s.acquire()
	if err != nil {
		return nil, err
	}
	defer d.release()
	if b == nil {
		if b, err = getCopy(d.db, k); b == nil || err != nil {
			return nil, err
		}
		s.records.put(k, b, ticket)
	}
	return decodeRecord[T, P](k, b)
}

// listRecords lists a table of single-id keys after an id, up to limit (0 =
// all).
func listRecords[T any, P pointer[T]](v *View, prefix []byte, after []byte, limit int, fn func(k []byte, m P) bool) error {
	return v.read(func(r pebble.Reader) error {
		n := 0
		return scanKeys(r, prefix, after, func(k, val []byte) (bool, error) {
			m, err := decodeRecord[T, P](k, val)
			if err != nil {
				return false, err
			}
			n++
			return fn(k, m) && (limit <= 0 || n < limit), nil
		})
	})
}

func listTable[T any, P pointer[T]](v *View, prefix byte, after string, limit int, fn func(P) bool) error {
	var from []byte
	if after != "" {
		from = key(nil).single(prefix, after)
	}
	return listRecords[T, P](v, key(nil).table(prefix), from, limit, func(_ []byte, m P) bool { return fn(m) })
}

// follow lists the records an index points to: the second part of each index
// key is their id.
func follow[T any, P pointer[T]](v *View, index byte, first string, target func(second string) []byte, fn func(P) bool) error {
	return v.read(func(r pebble.Reader) error {
		return scanKeys(r, key(nil).group(index, first), nil, func(k, _ []byte) (bool, error) {
			_, second, err := decodePair(k)
			if err != nil {
				return false, err
			}
			tk := target(second)
			b, err := getCopy(r, tk)
			if err != nil {
				return false, err
			}
			if b == nil {
				// Without a snapshot the record may be gone since.
				return true, nil
			}
			m, err := decodeRecord[T, P](tk, b)
			if err != nil {
				return false, err
			}
			return fn(m), nil
		})
	})
}
