package router

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// TestDueCompactionsRunOnceOpen: a database to which a compaction is due opens
// without it, and the compaction runs then, though nothing is written any more.
func TestDueCompactionsRunOnceOpen(t *testing.T) {
	fs := vfs.NewMem()
	o := Options{}
	o = o.EnsureDefaults()
	cache := pebble.NewCache(1 << 20)
	defer cache.Unref()
	po := pebbleOptions(fs, o, cache)
	po.DisableAutomaticCompactions = true
	db, err := pebble.Open("/db", po)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Set(key(nil).meta(metaFormat), formatNumber(), pebble.NoSync); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * po.L0CompactionThreshold {
		addLevel(t, db, i)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := openDatabase(fs, "/db", "db", o, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.release()
	awaitCompacted(t, d)
	for k := range 100 {
		v, err := getCopy(d.db, fmt.Appendf(nil, "c%03d", k))
		if n, _ := binary.Uvarint(v); err != nil || int(n) != 2*po.L0CompactionThreshold-1 {
			t.Fatalf("record %d is %x, %v", k, v, err)
		}
	}
}

// addLevel flushes a table that covers those before it.
func addLevel(t *testing.T, db *pebble.DB, i int) {
	t.Helper()
	for k := range 100 {
		if err := db.Set(fmt.Appendf(nil, "c%03d", k), binary.AppendUvarint(nil, uint64(i)), pebble.NoSync); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Flush(); err != nil {
		t.Fatal(err)
	}
}

// awaitCompacted waits until L0 of d has fewer tables than make a compaction due.
func awaitCompacted(t *testing.T, d *database) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for d.db.Metrics().Levels[0].TablesCount >= l0CompactionThreshold/2 {
		if ctx.Err() != nil {
			t.Fatalf("nothing was compacted: %v", d.db.Metrics())
		}
		runtime.Gosched()
	}
}

func newTestDatabase(t *testing.T) *database {
	t.Helper()
	o := Options{}
	d, err := openDatabase(vfs.NewMem(), "/db", "db", o.EnsureDefaults(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.release(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// TestHeldCompactions: while one of two holds, nothing is compacted that would be
// otherwise, and everything afterwards.
func TestHeldCompactions(t *testing.T) {
	d := newTestDatabase(t)
	// One is due at half of the threshold.
	for i := range l0CompactionThreshold/2 - 1 {
		addLevel(t, d.db, i)
	}
	first, second := d.holdCompactions(), d.holdCompactions()
	for i := range maxHeldFlushes - 1 {
		addLevel(t, d.db, i)
		if i == 0 {
			first()
			first() // counts once
		}
	}
	const want = l0CompactionThreshold/2 - 1 + maxHeldFlushes - 1
	if m := d.db.Metrics(); m.Levels[0].TablesCount != want || m.Compact.Count > 0 || m.Compact.NumInProgress > 0 {
		t.Fatalf("L0 has %d tables, %d were flushed; %d compactions were made and %d are running",
			m.Levels[0].TablesCount, want, m.Compact.Count, m.Compact.NumInProgress)
	}
	second()
	awaitCompacted(t, d)
}

// TestHoldEndsByItself: who never lets go does not let L0 grow for ever, and cannot
// begin anew while it is high.
func TestHoldEndsByItself(t *testing.T) {
	d := newTestDatabase(t)
	release := d.holdCompactions()
	for i := range l0CompactionThreshold + maxHeldFlushes {
		addLevel(t, d.db, i)
	}
	awaitCompacted(t, d)
	release() // of a hold that is over: the next one stays
	again := d.holdCompactions()
	release()
	if d.held.may.Load() {
		t.Fatal("the end of an old hold has ended another one")
	}
	again()
	if !d.held.may.Load() {
		t.Fatal("compactions are still held")
	}
}

// TestReleaseAfterClose: a hold may be let go of when its database is gone.
func TestReleaseAfterClose(t *testing.T) {
	o := Options{}
	d, err := openDatabase(vfs.NewMem(), "/db", "db", o.EnsureDefaults(), true)
	if err != nil {
		t.Fatal(err)
	}
	release := d.holdCompactions()
	for i := range maxHeldFlushes - 1 {
		addLevel(t, d.db, i)
	}
	if err := d.release(); err != nil {
		t.Fatal(err)
	}
	release()
}

// Goal: a state that is taken over with more levels in L0 than a hold bears compacts at
// once: before the hold ended by its time the entries that follow would have to wait.
func TestOverdueCompactionsAreNotHeld(t *testing.T) {
	fs := vfs.NewMem()
	noError(t, fs.MkdirAll("/", 0o755))
	from, err := Open(fs, "first", testOptions())
	noError(t, err)
	release := from.cur.held.hold()
	for i := range maxHeldL0 + 1 {
		addLevel(t, from.cur.db, i)
		from.cur.held.mu.Lock()
		from.cur.held.flushes = 0 // or the hold ends by itself
		from.cur.held.mu.Unlock()
	}
	_, err = from.Image("image")
	noError(t, err)
	release()
	noError(t, from.Close())
	o := testOptions()
	settle := func() {}
	o.Installed = func(f func()) { settle = f }
	s, err := Open(fs, "state", o)
	noError(t, err)
	defer s.Close()
	_, err = s.Install("image")
	noError(t, err)
	if !s.cur.held.may.Load() {
		t.Fatal("compactions that are overdue are held")
	}
	settle()
}
