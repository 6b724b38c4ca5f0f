package router

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// runBytes is about how much is read before it is handed on; runsAhead bounds how
// many runs wait for whoever is slower than the reading.
const (
	runBytes  = 128 << 10
	runsAhead = 4
)

// run is records of one table, one after the other, as appendRecord writes them.
type run struct {
	plain []byte
	// users counts those who have not finished with it.
	users atomic.Int32
}

// everything is the prefix of all keys.
func everything() [][]byte { return [][]byte{nil} }

// prefixes returns the prefixes of the keys of tables, in this order.
func prefixes(tables string) [][]byte {
	var out [][]byte
	for i := range len(tables) {
		out = append(out, key(nil).table(tables[i]))
	}
	return out
}

// tableCheck looks at a record; k and v are valid during the call. A table that is
// ordered is looked at record by record, in the order of its keys, by the first of
// those who look.
type tableCheck struct {
	ordered func(table byte) bool
	// look has an element for each goroutine that looks.
	look []func(k, v []byte) error
}

// traverse reads the records whose keys begin with one of keys, in their order, and returns how many there are
// by table. What belongs to the content is added to digest, in order, unless it is
// nil. check, unless it is nil, sees all records. Reading, hashing and looking go on
// side by side: each of them takes about as long as the others, and one processor
// doing all of them by turns is what a restore waits for. The first error ends it.
func traverse(ctx context.Context, r pebble.Reader, keys [][]byte, digest *recordDigest, check *tableCheck) (rows [256]uint64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &traversal{ctx: ctx}
	var users sync.WaitGroup
	use := func(in []chan *run, fn func(*run) error) {
		users.Go(func() {
			if err := s.use(in, fn); err != nil {
				cancel(err)
			}
		})
	}
	if digest != nil {
		s.hash = make(chan *run, runsAhead)
		use([]chan *run{s.hash}, func(r *run) error {
			digest.addPlain(r.plain)
			return nil
		})
	}
	if check != nil {
		s.first, s.any, s.ordered = make(chan *run, runsAhead), make(chan *run, runsAhead), check.ordered
		for i, look := range check.look {
			in := []chan *run{s.any}
			if i == 0 {
				in = append(in, s.first)
			}
			use(in, func(r *run) error { return eachRecord(r.plain, look) })
		}
	}
	for _, prefix := range keys {
		if err = s.read(r, prefix, &rows); err != nil {
			break
		}
	}
	for _, c := range []chan *run{s.hash, s.first, s.any} {
		if c != nil {
			close(c)
		}
	}
	users.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return rows, err
}

type traversal struct {
	ctx              context.Context
	hash, first, any chan *run
	ordered          func(table byte) bool
	spare            sync.Pool
}

// read reads what begins with prefix.
func (s *traversal) read(r pebble.Reader, prefix []byte, rows *[256]uint64) error {
	at := s.next()
	table := byte(0)
	err := scanKeys(r, prefix, nil, func(k, v []byte) (bool, error) {
		if len(at.plain) > 0 && (k[0] != table || len(at.plain) >= runBytes) {
			if err := s.pass(at, table); err != nil {
				return false, err
			}
			at = s.next()
		}
		table = k[0]
		rows[table]++
		at.plain = appendRecord(at.plain, k, v)
		return true, nil
	})
	if err == nil && len(at.plain) > 0 {
		err = s.pass(at, table)
	}
	return err
}

func (s *traversal) next() *run {
	if r, ok := s.spare.Get().(*run); ok {
		r.plain = r.plain[:0]
		return r
	}
	return &run{plain: make([]byte, 0, runBytes+runBytes/4)}
}

// pass hands a run of a table to everybody who is to have it.
func (s *traversal) pass(r *run, table byte) error {
	var to []chan *run
	if s.hash != nil && dataTable(table) {
		to = append(to, s.hash)
	}
	switch {
	case s.any == nil:
	case s.ordered(table):
		to = append(to, s.first)
	default:
		to = append(to, s.any)
	}
	r.users.Store(int32(len(to)))
	for _, c := range to {
		select {
		case c <- r:
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
	}
	return nil
}

// use calls fn with the runs that come through one or two channels until these
// are closed, or fn fails: whoever reads is told, and hands nothing more on.
func (s *traversal) use(in []chan *run, fn func(*run) error) error {
	var a, b chan *run = in[0], nil
	if len(in) > 1 {
		b = in[1]
	}
	for a != nil || b != nil {
		var r *run
		var ok bool
		select {
		case r, ok = <-a:
			if !ok {
				a = nil
			}
		case r, ok = <-b:
			if !ok {
				b = nil
			}
		}
		if !ok {
			continue
		}
		if err := fn(r); err != nil {
			return err
		}
		if r.users.Add(-1) == 0 && cap(r.plain) <= 4*runBytes {
			s.spare.Put(r)
		}
	}
	return nil
}
