package router

import (
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/internal/pace"
)

// restTimes is for how long a flush or a compaction rests, in times of what it worked: it
// gets a fifth of a processor, in turns of a millisecond. A flush of what the log holds
// between two truncations, a tenth of a second of work, then takes half a second, where
// the quickest clients need two seconds to fill the next one.
const restTimes = 4

// heldRestTimes is the same of a compaction that was under way when compactions were
// held: it all but stands still. At its usual pace one lasts for seconds, so that many an
// image would be sent beside one.
const heldRestTimes = 20

// Categories that Pebble creates the files of its background work under.
const (
	flushCategory      vfs.DiskWriteCategory = "pebble-memtable-flush"
	compactionCategory vfs.DiskWriteCategory = "pebble-compaction"
	rewriteCategory    vfs.DiskWriteCategory = "pebble-blob-file-rewrite"
)

// background is the pace of the flushes and the compactions of one database. Writes go
// first while there are any, and as long as the work keeps up with them: at its slow
// pace it must not come to what Pebble makes writes wait for, full memtables and a high L0.
type background struct {
	// Apart, since who waits for a flush does not wait for a compaction, which
	// would get in the way of that flush.
	flushes, compactions *pace.Pace

	memTable uint64
	// held: no compaction may begin.
	held func() bool
	// written counts the bytes of all batches so far; flushing is what it was when the
	// last flush began that has not failed, and flushed when the last one did that has ended.
	written, flushing, flushed atomic.Uint64
	// height returns the height of L0; nil until the database is open.
	height atomic.Pointer[func() int]
}

func newBackground(memTableBytes int64, held func() bool) *background {
	return &background{flushes: pace.New(), compactions: pace.New(), memTable: uint64(memTableBytes), held: held}
}

// files returns fsys for the database.
func (b *background) files(fsys vfs.FS) vfs.FS {
	fsys = b.flushes.Files(fsys, func(c vfs.DiskWriteCategory) func() float64 {
		if c == flushCategory {
			return b.flushTimes
		}
		return nil
	})
	return b.compactions.Files(fsys, func(c vfs.DiskWriteCategory) func() float64 {
		if c == compactionCategory || c == rewriteCategory {
			return b.compactionTimes()
		}
		return nil
	})
}

// opened is called once the database is open.
func (b *background) opened(db *pebble.DB) {
	height := func() int { return int(db.Metrics().Levels[0].Sublevels) }
	b.height.Store(&height)
}

// closing is called before the database is closed, which waits for all that goes on.
func (b *background) closing() {
	b.flushes.Hurry()
	b.compactions.Hurry()
}

// wrote is called after each batch of n bytes.
func (b *background) wrote(n int) {
	b.written.Add(uint64(n))
	b.flushes.Used()
	b.compactions.Used()
}

// flushBegan is called before a flush reads what it flushes, one at a time.
func (b *background) flushBegan() { b.flushing.Store(b.written.Load()) }

// flushEnded is called after each. One that failed is tried again by Pebble.
func (b *background) flushEnded(err error) {
	if err != nil {
		b.flushing.Store(b.flushed.Load())
		return
	}
	b.flushed.Store(b.flushing.Load())
}

// unflushed returns how many bytes were written since the last flush began, and not what was
// written between the rotation of a memtable and its flush, which may wait for another one.
func (b *background) unflushed() int64 { return int64(b.written.Load() - b.flushing.Load()) }

// flushTimes ends all rests once half of the next memtable is full, by the bytes of what
// is written, of which a memtable takes some more.
func (b *background) flushTimes() float64 {
	full := float64(b.unflushed()) / float64(b.memTable)
	return restTimes * max(0, 1-2*full)
}

// heightEvery is for how many rests of a compaction the height of L0 is taken to be the
// same: to ask for it takes Pebble's lock, and a fraction of a second is nothing to L0.
const heightEvery = 32

// compactionTimes returns what ends the rests of one compaction by and by as L0 grows beyond
// the height at which compactions begin: at the latest with the height at which none is held
// any more.
func (b *background) compactionTimes() func() float64 {
	asked, room := 0, 0.0
	return func() float64 {
		if asked++; asked%heightEvery == 1 {
			height := b.height.Load()
			if height == nil {
				asked--
				return 0
			}
			room = min(1, max(0, float64(maxHeldL0-(*height)())/(maxHeldL0-l0CompactionThreshold)))
		}
		if b.held() {
			return heldRestTimes * room
		}
		return restTimes * room
	}
}
