package router

import (
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// A hold ends by itself after so many flushes, and is not given while L0 is higher
// than that: what compactions are for, that L0 does not reach the height at which
// writes have to wait, comes first.
const (
	maxHeldFlushes = 6
	maxHeldL0      = l0CompactionThreshold + 4
)

// heldCompactions lets no compaction begin while it is held. It is from the start,
// until the database is open: Pebble may begin those that are due while it opens a
// database, and then waits for them before it has opened it, up to seconds in which
// a node that was started, or that takes over an image, answers nobody.
type heldCompactions struct {
	// Pebble's usual scheduler, without the timer that notices that more may run
	// side by side than before: here it is always one.
	*pebble.ConcurrencyLimitScheduler
	db pebble.DBForCompaction
	// may: a compaction may begin. It is false while there are holds.
	may atomic.Bool

	mu sync.Mutex
	// holds counts those who hold, flushes the flushes since the first of them did.
	holds, flushes int
	// overruled counts how often all holds were ended early.
	overruled int

	// ending guards ended, which is set once the database is being closed: to make
	// it begin a compaction then is not allowed.
	ending sync.Mutex
	ended  bool
}

// holdCompactions returns a scheduler that is held, and what ends that.
func holdCompactions() (*heldCompactions, func()) {
	h := &heldCompactions{ConcurrencyLimitScheduler: pebble.NewConcurrencyLimitSchedulerWithNoPeriodicGrantingForTest()}
	return h, h.hold()
}

// hold keeps compactions from beginning until the function it returns was called,
// once or more.
func (h *heldCompactions) hold() (release func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.holds == 0 {
		h.flushes = 0
	}
	h.holds++
	h.may.Store(false)
	in := h.overruled
	return sync.OnceFunc(func() { h.release(in) })
}

func (h *heldCompactions) release(in int) {
	h.mu.Lock()
	last := false
	if in == h.overruled {
		h.holds--
		last = h.holds == 0
	}
	if last {
		h.may.Store(true)
	}
	h.mu.Unlock()
	if last {
		h.begin()
	}
}

// holding reports whether compactions are held.
func (h *heldCompactions) holding() bool { return !h.may.Load() }

// flushed is called after each flush, with Pebble's lock held.
func (h *heldCompactions) flushed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.holds == 0 {
		return
	}
	if h.flushes++; h.flushes >= maxHeldFlushes {
		h.holds, h.overruled = 0, h.overruled+1
		h.may.Store(true)
		go h.begin() // it needs that lock
	}
}

// begin lets a compaction run that was kept from it; the others follow it.
func (h *heldCompactions) begin() {
	h.ending.Lock()
	defer h.ending.Unlock()
	if h.ended {
		return
	}
	if ok, grant := h.TrySchedule(); ok && !h.db.Schedule(grant) {
		grant.Done() // none is waiting
	}
}

// end is to be called before the database is closed.
func (h *heldCompactions) end() {
	h.ending.Lock()
	defer h.ending.Unlock()
	h.ended = true
}

// Register implements pebble.CompactionScheduler.
func (h *heldCompactions) Register(perCompaction int, db pebble.DBForCompaction) {
	h.db = db
	h.ConcurrencyLimitScheduler.Register(perCompaction, heldDatabase{db, h})
}

// heldDatabase says that no compaction may run, while they are held.
type heldDatabase struct {
	pebble.DBForCompaction
	held *heldCompactions
}

// GetAllowedWithoutPermission implements pebble.DBForCompaction.
func (d heldDatabase) GetAllowedWithoutPermission() int {
	if !d.held.may.Load() {
		return 0
	}
	return d.DBForCompaction.GetAllowedWithoutPermission()
}

// HoldCompactions keeps compactions of the state from beginning until release is
// called, which may be done more than once. It is for who makes an image, or sends
// one: the flush for it often is the one that makes a compaction due, and that would
// then take a processor for a second, just while the image needs one and clients
// write. One that runs already all but stands still while somebody writes. The hold ends
// by itself after some flushes, and when another state takes the place of this one.
// Neither call waits for a compaction.
func (s *FSM) HoldCompactions() (release func()) {
	d, err := s.acquire()
	if err != nil {
		return func() {}
	}
	defer func() { _ = d.release() }() // not the last reference, or an old database
	return d.holdCompactions()
}

func (d *database) holdCompactions() (release func()) {
	if int(d.db.Metrics().Levels[0].Sublevels) > maxHeldL0 {
		return func() {}
	}
	return d.held.hold()
}
