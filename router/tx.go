package router

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// tx collects the effects of a run of entries. Reads see them at once; Pebble
// sees only the last value of each key, when the run is committed.
type tx struct {
	s     *FSM
	home  *database
	db    *pebble.DB
	clock *commandpb.Clock
	pos   Position
	dirty []*cell
	scans map[byte]*scanIndex // of dirty
	bytes int64
	sets  []*changeSet
	buf   key
	op    uint32 // field number of the running command's operation

	// membership is set when that of pos is a new one.
	membership bool
	// wipeStage is set when all chunks go before anything else is written.
	wipeStage bool
	// staged is set when there is something new for who builds from the stage.
	staged bool

	// Of the running entry.
	revision uint64 // its index plus the clock's revision base
	term     uint64 // that of the entry
	set      *changeSet
	swap     *commandpb.RestoreStage // takes effect at its end

	// Of the running command.
	now     uint64
	res     *commandpb.Result
	scratch commandpb.Result
	changed bool
	wanted  bool // somebody sees the result
	swapped bool // the result is of the state after the swap
	undo    []undoCell
	undoSet int // changes of set to keep on rollback
	counts  []uint64
	chain   uint64   // of checkpoints
	marked  []string // sources whose mark index this command touched
	// revocations are those of sidecars that had too many.
	revocations map[string]*revocationHeap

	// err is the first read or decode failure. It ends the run: a command that
	// saw a wrong state must not take effect.
	err error
}

type undoCell struct {
	c     *cell
	val   []byte
	obj   any
	dirty bool
}

// hotTable reports whether the cells of a key survive the batch.
func hotTable(prefix byte) bool {
	switch prefix {
	case prefixSourceOffset, prefixWatermark, prefixGroupOffset, prefixGroup:
		return true
	}
	return false
}

// fail records a failure that ends the run.
func (t *tx) fail(err error) {
	if t.err == nil && err != nil {
		t.err = err
	}
}

// cell returns the cell of k with its value.
func (t *tx) cell(k []byte) *cell {
	hot := hotTable(k[0])
	if hot {
		if c := t.s.hot.get(k); c != nil {
			return c
		}
	} else if c := t.s.overlay[string(k)]; c != nil {
		if c.blind && !c.dirty {
			c.val, c.blind = t.fetch(k), false
		}
		return c
	}
	c := &cell{key: string(k), val: t.fetch(k)}
	t.keep(c, hot)
	return c
}

func (t *tx) fetch(k []byte) []byte {
	v, err := getCopy(t.db, k)
	if err != nil {
		t.fail(fmt.Errorf("router: read %q: %w", k, err))
	}
	return v
}

// blind returns the cell of k without reading its value, for a write that does
// not depend on it.
func (t *tx) blind(k []byte) *cell {
	if c := t.s.overlay[string(k)]; c != nil {
		return c
	}
	c := &cell{key: string(k), blind: true}
	t.keep(c, false)
	return c
}

func (t *tx) keep(c *cell, hot bool) {
	if hot {
		t.s.hot.add(c)
	} else {
		t.s.overlay[c.key] = c
	}
}

func (t *tx) put(c *cell, v []byte, obj any) {
	if !c.summed {
		// Nothing was changed since it was read. Of a blind one there is no sum.
		if !c.blind {
			c.sum = recordHash(xxhash.Sum64String(c.key), c.val)
		}
		c.summed = true
	}
	t.undo = append(t.undo, undoCell{c, c.val, c.obj, c.dirty})
	c.val, c.obj = v, obj
	t.bytes += int64(len(v))
	if !c.dirty {
		c.dirty = true
		t.dirty = append(t.dirty, c)
		t.bytes += int64(len(c.key)) + 16
	}
}

// drop deletes the record of a cell.
func (t *tx) drop(c *cell) { t.put(c, nil, nil) }

// message is a stored record.
type message interface {
	proto.Message
	MarshalVT() ([]byte, error)
	UnmarshalVT([]byte) error
}

// load decodes the record under k into m and reports whether it is there.
func (t *tx) load(k []byte, m message) bool { return t.loadFrom(t.cell(k), m) }

// loadFrom decodes the record of a cell into m and reports whether it is there.
func (t *tx) loadFrom(c *cell, m message) bool {
	if c.val == nil {
		return false
	}
	if err := m.UnmarshalVT(c.val); err != nil {
		t.fail(fmt.Errorf("%w: record %q: %w", ErrCorrupt, c.key, err))
		return false
	}
	return true
}

// encode turns a record into its stored bytes, the same on every replica:
// generated code ranges over maps, so records with maps take the slower way.
func encode(m message) ([]byte, error) {
	switch m.(type) {
	case *commandpb.Service, *commandpb.Pipeline, *commandpb.PipelineSpec:
		return proto.MarshalOptions{Deterministic: true}.Marshal(m)
	}
	return m.MarshalVT()
}

// store writes m under k.
func (t *tx) store(k []byte, m message) { t.storeIn(t.cell(k), m) }

// storeIn writes m into a cell.
func (t *tx) storeIn(c *cell, m message) {
	v, err := encode(m)
	if err != nil {
		// Texts are checked before; anything else cannot fail to encode.
		t.fail(fmt.Errorf("router: encode record %q: %w", c.key, err))
		return
	}
	if v == nil {
		v = []byte{}
	}
	t.put(c, v, nil)
}

// remove deletes the record under k.
func (t *tx) remove(k []byte) { t.drop(t.cell(k)) }

// mark writes an index entry: a key without a value.
func (t *tx) mark(k []byte) { t.put(t.blind(k), []byte{}, nil) }

// unmark deletes an index entry.
func (t *tx) unmark(k []byte) { t.drop(t.blind(k)) }

// number reads a counter.
func number(c *cell) uint64 {
	v, _ := binary.Uvarint(c.val)
	return v
}

func (t *tx) setNumber(c *cell, v uint64) {
	if v == 0 {
		t.drop(c)
		return
	}
	t.put(c, binary.AppendUvarint(nil, v), nil)
}

// scan calls fn for every key with the prefix, ascending, as the run sees
// them. fn must not write; values are valid during the call.
func (t *tx) scan(prefix []byte, fn func(k, v []byte)) {
	prefix = bytes.Clone(prefix)
	mine := t.changedWith(string(prefix))
	it, err := t.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: prefixEnd(prefix)})
	if err != nil {
		t.fail(fmt.Errorf("router: scan %q: %w", prefix, err))
		return
	}
	ok := it.First()
	for i := 0; i < len(mine) || ok; {
		order := -1 // mine first
		switch {
		case i == len(mine):
			order = 1
		case ok:
			order = bytes.Compare([]byte(mine[i].key), it.Key())
		}
		if order > 0 {
			v, verr := it.ValueAndErr()
			t.fail(verr)
			fn(it.Key(), v)
			ok = it.Next()
			continue
		}
		if order == 0 {
			ok = it.Next()
		}
		// A cell may be listed twice after a rollback; skip its twin.
		if mine[i].val != nil && (i == 0 || mine[i-1] != mine[i]) {
			fn([]byte(mine[i].key), mine[i].val)
		}
		i++
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		t.fail(fmt.Errorf("router: scan %q: %w", prefix, err))
	}
}

// scanIndex are the changed cells of a table in the order of their keys, up to a place
// in tx.dirty.
type scanIndex struct {
	upTo  int
	cells []*cell
}

// changedWith returns the changed cells whose keys begin with prefix, in order. Those of
// the table are kept in order from one scan to the next: a run that has changed ten
// thousand would be gone through by each of ten thousand scans otherwise.
func (t *tx) changedWith(prefix string) (mine []*cell) {
	byKey := func(a, b *cell) int { return strings.Compare(a.key, b.key) }
	x := t.scans[prefix[0]]
	if x == nil {
		if t.scans == nil {
			t.scans = make(map[byte]*scanIndex)
		}
		x = &scanIndex{}
		t.scans[prefix[0]] = x
	}
	known := len(x.cells)
	for _, c := range t.dirty[x.upTo:] {
		if c.key[0] == prefix[0] {
			x.cells = append(x.cells, c)
		}
	}
	x.upTo = len(t.dirty)
	if fresh := x.cells[known:]; len(fresh) > 8+known/64 {
		slices.SortFunc(x.cells, byKey)
	} else {
		few := slices.Clone(fresh)
		x.cells = x.cells[:known]
		for _, c := range few {
			at, _ := slices.BinarySearchFunc(x.cells, c, byKey)
			x.cells = slices.Insert(x.cells, at, c)
		}
	}
	from, _ := slices.BinarySearchFunc(x.cells, prefix, func(c *cell, k string) int { return strings.Compare(c.key, k) })
	for _, c := range x.cells[from:] {
		if !strings.HasPrefix(c.key, prefix) {
			break
		}
		if c.dirty {
			mine = append(mine, c)
		}
	}
	return mine
}

// count adds to a row counter.
func (t *tx) count(kind countKind, delta int) {
	t.clock.Counts[kind] = uint64(int64(t.clock.Counts[kind]) + int64(delta))
}

// emit publishes a change of this entry and notes that the state changed.
func (t *tx) emit(table Table, k string, prev, next proto.Message) {
	t.changed = true
	if t.set == nil {
		t.set = &changeSet{revision: t.revision}
	}
	t.set.add(Change{Revision: t.revision, Table: table, Key: k, Prev: prev, Next: next})
}

// maxTimeMS is far beyond every real time, and far enough below the largest
// number to add retentions to.
const maxTimeMS = 1 << 48

// begin starts a command.
func (t *tx) begin(timeMS uint64, wanted bool) {
	if timeMS > maxTimeMS {
		// A clock set before 1970 says so. It must not set ours, which never
		// goes back.
		timeMS = 0
	}
	t.now = max(t.clock.TimeMs, timeMS)
	t.changed, t.wanted, t.swapped, t.revocations = false, wanted, false, nil
	if wanted {
		t.res = &commandpb.Result{}
	} else {
		t.scratch.Reset()
		t.res = &t.scratch
	}
	t.savepoint()
}

// savepoint makes what has been done so far safe from rollback.
func (t *tx) savepoint() {
	clear(t.undo)
	t.undo = t.undo[:0]
	t.marked = t.marked[:0]
	t.counts = append(t.counts[:0], t.clock.Counts...)
	t.chain = t.clock.Sums[sumCheckpoints]
	t.undoSet = 0
	if t.set != nil {
		t.undoSet = len(t.set.changes)
	}
}

// rollback takes back everything since the savepoint.
func (t *tx) rollback() {
	for i := len(t.undo) - 1; i >= 0; i-- {
		u := t.undo[i]
		u.c.val, u.c.obj, u.c.dirty = u.val, u.obj, u.dirty
	}
	copy(t.clock.Counts, t.counts)
	t.clock.Sums[sumCheckpoints] = t.chain
	for _, source := range t.marked {
		t.s.marks.forget(source)
	}
	if t.set != nil && len(t.set.changes) > t.undoSet {
		kept := t.set.changes[:t.undoSet]
		t.set = nil
		for _, c := range kept {
			t.emit(c.Table, c.Key, c.Prev, c.Next)
		}
	}
	t.changed, t.revocations = false, nil
	t.savepoint()
}

// endEntry closes the change set of the running entry.
func (t *tx) endEntry() {
	if t.set != nil && len(t.set.changes) > 0 {
		t.sets = append(t.sets, t.set)
	}
	t.set = nil
}
