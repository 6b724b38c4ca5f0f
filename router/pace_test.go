package router

import (
	"fmt"
	"math/rand"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// workingFS lets a millisecond pass, on the clock of the bubble, with each piece of a
// table that is written, as if it had been computed meanwhile. It notes under which
// categories tables were created.
type workingFS struct {
	vfs.FS
	mu         sync.Mutex
	categories map[vfs.DiskWriteCategory]int
	pieces     int
}

type workingFile struct {
	vfs.File
	fs *workingFS
}

func (w *workingFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := w.FS.Create(name, c)
	if err != nil || filepath.Ext(name) != ".sst" {
		return f, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.categories == nil {
		w.categories = map[vfs.DiskWriteCategory]int{}
	}
	w.categories[c]++
	return workingFile{f, w}, nil
}

func (f workingFile) Write(p []byte) (int, error) {
	<-time.NewTimer(time.Millisecond).C
	f.fs.mu.Lock()
	f.fs.pieces++
	f.fs.mu.Unlock()
	return f.File.Write(p)
}

// taken returns how many milliseconds of work were done since the last call.
func (w *workingFS) taken() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.pieces
	w.pieces = 0
	return time.Duration(n) * time.Millisecond
}

func fill(t *testing.T, d *database, r *rand.Rand, records int) {
	t.Helper()
	v := make([]byte, 4<<10)
	for i := range records {
		r.Read(v)
		noError(t, d.db.Set(fmt.Appendf(nil, "c%06d", i), v, pebble.NoSync))
	}
}

// whileWritten calls do while batches of n bytes are written every few milliseconds.
func whileWritten(d *database, n int, do func() error) error {
	end := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				d.pace.wrote(n)
			case <-end:
				return
			}
		}
	})
	err := do()
	close(end)
	writer.Wait()
	return err
}

// Flushes and compactions give way to writes, unless somebody waits for them, nobody
// writes, or they would not keep up.
func TestBackgroundGivesWay(t *testing.T) {
	r := randomness(t)
	synctest.Test(t, func(t *testing.T) {
		fs := &workingFS{FS: vfs.NewMem()}
		o := Options{MemTableBytes: 64 << 20}
		d, err := openDatabase(fs, "/db", "db", o.EnsureDefaults(), true)
		noError(t, err)
		defer func() { noError(t, d.release()) }()
		compact := func() error { return d.db.Compact(t.Context(), []byte("a"), []byte("z"), false) }
		few := 100
		many := int(o.MemTableBytes / 800) // half of a memtable is full after two seconds
		for _, c := range []struct {
			what     string
			written  int
			do       func() error
			min, max float64 // in times of what was worked
		}{
			{"a flush beside writes", few, d.flushAtEase, 4, 5.5},
			{"a flush somebody waits for", few, d.flush, 1, 1.2},
			{"a flush nobody writes beside", 0, d.flushAtEase, 1, 1.2},
			{"a flush beside so many writes that the next is due soon", many, d.flushAtEase, 1.5, 3},
			{"a compaction beside writes", few, compact, 4, 5.5},
			{"a compaction nobody writes beside", 0, compact, 1, 1.2},
		} {
			fill(t, d, r, 1000)
			fs.taken()
			began := time.Now()
			do := c.do
			if c.written > 0 {
				do = func() error { return whileWritten(d, c.written, c.do) }
			}
			noError(t, do())
			took, worked := time.Since(began), fs.taken()
			if times := float64(took) / float64(worked); worked < 50*time.Millisecond || times < c.min || times > c.max {
				t.Errorf("%s took %v, of which %v were work: %.2f times as long, want %.1f to %.1f",
					c.what, took, worked, times, c.min, c.max)
			}
			// The next case begins when nobody has written for a while.
			<-time.NewTimer(time.Second).C
		}
		// What goes by these names is what must give way; other files must not.
		for category := range fs.categories {
			if category != flushCategory && category != compactionCategory {
				t.Errorf("tables were written under the category %q", category)
			}
		}
		if len(fs.categories) != 2 {
			t.Errorf("tables were written under the categories %v, want those of flushes and compactions", fs.categories)
		}
	})
}

// A compaction stops resting as L0 grows: before Pebble makes writes wait for it.
func TestCompactionsCatchUp(t *testing.T) {
	b := newBackground(1 << 20)
	at := func(height int) float64 {
		h := func() int { return height }
		b.height.Store(&h)
		return b.compactionTimes()()
	}
	if got := b.compactionTimes()(); got != 0 {
		t.Errorf("a compaction rests %g times as long before the database is open", got)
	}
	last := at(0)
	if last != restTimes || at(l0CompactionThreshold) != restTimes {
		t.Errorf("a compaction rests %g times as long at an L0 of height 0, and %g at %d; want %d",
			last, at(l0CompactionThreshold), l0CompactionThreshold, restTimes)
	}
	for height := 1; height <= maxHeldL0; height++ {
		if now := at(height); now > last {
			t.Errorf("a compaction rests longer at height %d (%g) than below (%g)", height, now, last)
		} else {
			last = now
		}
	}
	if last != 0 || at(maxHeldL0+5) != 0 {
		t.Errorf("a compaction still rests %g times as long at height %d", last, maxHeldL0)
	}
}
