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
		for k := range 100 {
			if err := db.Set(fmt.Appendf(nil, "c%03d", k), binary.AppendUvarint(nil, uint64(i)), pebble.NoSync); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := openDatabase(fs, "/db", "db", o, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.release()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for d.db.Metrics().Levels[0].TablesCount > 0 {
		if ctx.Err() != nil {
			t.Fatalf("nothing was compacted: %v", d.db.Metrics())
		}
		runtime.Gosched()
	}
	for k := range 100 {
		v, err := getCopy(d.db, fmt.Appendf(nil, "c%03d", k))
		if n, _ := binary.Uvarint(v); err != nil || int(n) != 2*po.L0CompactionThreshold-1 {
			t.Fatalf("record %d is %x, %v", k, v, err)
		}
	}
}
