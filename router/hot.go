package router

// cell is one key as the running batch sees it.
type cell struct {
	key string
	val []byte // nil = absent; never modified in place, Pebble and undo may hold it
	// obj is val decoded, when somebody did so; immutable.
	obj any
	// dirty is set while val is not in Pebble yet.
	dirty bool
	// blind is set when val was never read from Pebble. It then means nothing
	// unless dirty: a rollback may have taken the written value back.
	blind bool
	// sum is what the value in Pebble counts in the sum of its table; valid once
	// summed is set, which the first change does.
	sum    uint64
	summed bool
}

func (c *cell) bytes() int64 { return 160 + int64(len(c.key)) + 2*int64(len(c.val)) }

// hotCache keeps the cells of small records that are written again and again,
// so that a commit of a known offset costs no read. It holds two generations:
// what was not touched during a whole generation is forgotten with it. That is
// bounded and needs no list to maintain per hit.
type hotCache struct {
	max        int64
	bytes      int64 // of young
	young, old map[string]*cell
}

func newHotCache(max int64) *hotCache {
	return &hotCache{max: max / 2, young: map[string]*cell{}, old: map[string]*cell{}}
}

func (h *hotCache) get(k []byte) *cell {
	if c := h.young[string(k)]; c != nil {
		return c
	}
	c := h.old[string(k)]
	if c != nil {
		delete(h.old, c.key)
		h.add(c)
	}
	return c
}

func (h *hotCache) add(c *cell) {
	h.young[c.key] = c
	h.bytes += c.bytes()
}

// age starts a new generation when the young one is full. It must not be
// called while cells are dirty: a forgotten dirty cell would be read back from
// Pebble with its old value.
func (h *hotCache) age() {
	if h.bytes < h.max {
		return
	}
	h.old, h.young, h.bytes = h.young, make(map[string]*cell, len(h.young)/2), 0
}
