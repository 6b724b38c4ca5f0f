package router

import (
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// heldCompactions lets no compaction begin until it is released. Pebble may begin
// those that are due while it opens a database, and then waits for them before it
// has opened it: up to seconds in which a node that was started, or that takes over
// an image, answers nobody.
type heldCompactions struct {
	// Pebble's usual scheduler, without the timer that notices that more may run
	// side by side than before: here it is always one.
	*pebble.ConcurrencyLimitScheduler
	db       pebble.DBForCompaction
	released atomic.Bool
}

func holdCompactions() *heldCompactions {
	return &heldCompactions{ConcurrencyLimitScheduler: pebble.NewConcurrencyLimitSchedulerWithNoPeriodicGrantingForTest()}
}

// release lets compactions run, the one that has been waiting first. The database
// is open.
func (h *heldCompactions) release() {
	h.released.Store(true)
	if ok, grant := h.TrySchedule(); ok && !h.db.Schedule(grant) {
		grant.Done() // none is waiting
	}
}

// Register implements pebble.CompactionScheduler.
func (h *heldCompactions) Register(perCompaction int, db pebble.DBForCompaction) {
	h.db = db
	h.ConcurrencyLimitScheduler.Register(perCompaction, heldDatabase{db, h})
}

// heldDatabase says that no compaction may run, until they are released.
type heldDatabase struct {
	pebble.DBForCompaction
	held *heldCompactions
}

// GetAllowedWithoutPermission implements pebble.DBForCompaction.
func (d heldDatabase) GetAllowedWithoutPermission() int {
	if !d.held.released.Load() {
		return 0
	}
	return d.DBForCompaction.GetAllowedWithoutPermission()
}
