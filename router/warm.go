package router

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
)

// warmFrom is how many keys are worth an iterator of their own.
const warmFrom = 32

// keyList gathers keys in one piece of memory: a command that concerns ten thousand
// sidecars asks for forty thousand.
type keyList struct {
	bytes []byte
	ends  []int
}

func (l *keyList) add(k []byte) {
	l.bytes = append(l.bytes, k...)
	l.ends = append(l.ends, len(l.bytes))
}

// ascending returns the keys in their order.
func (l *keyList) ascending() []string {
	all, from := string(l.bytes), 0
	keys := make([]string, len(l.ends))
	for i, end := range l.ends {
		keys[i], from = all[from:end], end
	}
	if !slices.IsSorted(keys) {
		slices.Sort(keys)
	}
	return slices.Compact(keys)
}

// warm reads the values of many keys that the command is about to ask for. It changes
// nothing but what that costs: in the order of keys an iterator finds each from the one
// before, where a read of its own begins at the top of every table of Pebble. The keys
// must not be of hot tables, whose cells live elsewhere.
func (t *tx) warm(l *keyList) {
	if len(l.ends) < warmFrom {
		return
	}
	keys := l.ascending()
	if len(t.s.overlay) > 0 {
		keys = slices.DeleteFunc(keys, func(k string) bool { return t.s.overlay[k] != nil })
	} else if len(keys) > wideOverlay {
		t.s.overlay = make(map[string]*cell, len(keys)+len(keys)/2) // instead of by doubling
	}
	it, err := t.db.NewIter(nil)
	if err != nil {
		t.fail(fmt.Errorf("router: read %d keys: %w", len(keys), err))
		return
	}
	cells := make([]cell, len(keys))
	var values arena
	var k []byte
	for i := range keys {
		k = append(k[:0], keys[i]...)
		c := &cells[i]
		c.key = keys[i]
		// Not SeekGE: that would walk over whatever was deleted behind an absent key.
		if it.SeekPrefixGE(k) && bytes.Equal(it.Key(), k) {
			v, err := it.ValueAndErr()
			t.fail(err)
			c.val = values.copy(v)
		} else if err := it.Error(); err != nil {
			break
		}
		t.s.overlay[c.key] = c
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		t.fail(fmt.Errorf("router: read %d keys: %w", len(keys), err))
	}
}

// warmChanges warms what n changes of assignments look at, and makes room for what they
// write.
func (t *tx) warmChanges(n int, pair func(i int) (sidecar, pipeline string)) {
	t.warmPairs(n, pair, prefixRevokedCount, prefixAssignment, prefixHandover, prefixSidecar)
	t.expect(4*n, 2*n)
}

// warmPairs warms the records of n pairs in tables whose keys are made of them. Table
// by table, by which the keys need no sorting if the pairs and the tables are in order.
func (t *tx) warmPairs(n int, pair func(i int) (sidecar, pipeline string), tables ...byte) {
	size := 0
	for i := range n {
		sidecar, pipeline := pair(i)
		size += len(tables) * (len(sidecar) + len(pipeline) + 3)
	}
	l := keyList{make([]byte, 0, size), make([]int, 0, len(tables)*n)}
	for _, table := range tables {
		for i := range n {
			switch sidecar, pipeline := pair(i); table {
			case prefixAssignment:
				l.add(t.buf.pair(table, sidecar, pipeline))
			case prefixHandover:
				l.add(t.buf.pair(table, pipeline, sidecar))
			default:
				l.add(t.buf.single(table, sidecar))
			}
		}
	}
	t.warm(&l)
}

// arena holds copies of small values, many to an allocation. They live as long as any
// of them does.
type arena struct{ free []byte }

const arenaBytes = 64 << 10

// copy returns a copy of v, never nil.
func (a *arena) copy(v []byte) []byte {
	if len(v) > len(a.free) || a.free == nil {
		if len(v) > arenaBytes/4 {
			return append(make([]byte, 0, len(v)), v...)
		}
		a.free = make([]byte, arenaBytes)
	}
	out := a.free[:len(v):len(v)]
	a.free = a.free[len(v):]
	copy(out, v)
	return out
}

// expect makes room for so many writes and changes to come, instead of by doubling.
func (t *tx) expect(writes, changes int) {
	t.undo = slices.Grow(t.undo, writes)
	t.dirty = slices.Grow(t.dirty, writes)
	if t.set == nil {
		t.set = &changeSet{revision: t.revision}
	}
	t.set.changes = slices.Grow(t.set.changes, changes)
}
