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

	"conveyor.etl/router/router/commandpb"
)

// workingFS lets time pass, on the clock of the bubble, with each piece of a table that
// is written, as if it had been computed meanwhile. It notes under which categories
// tables were created.
type workingFS struct {
	vfs.FS
	mu         sync.Mutex
	categories map[vfs.DiskWriteCategory]int
	worked     time.Duration
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
	d := time.Duration(len(p)) * 15 * time.Nanosecond
	<-time.NewTimer(d).C
	f.fs.mu.Lock()
	f.fs.worked += d
	f.fs.mu.Unlock()
	return f.File.Write(p)
}

// taken returns how much work was done since the last call.
func (w *workingFS) taken() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.worked
	w.worked = 0
	return d
}

func fill(t *testing.T, d *database, r *rand.Rand, records int) {
	t.Helper()
	v := make([]byte, 4<<10)
	for i := range records {
		r.Read(v)
		noError(t, d.db.Set(fmt.Appendf(nil, "c%06d", i), v, pebble.NoSync))
	}
}

// workingMemTable is large enough that nothing is flushed that was not asked for.
const workingMemTable = 64 << 20

// openWorking opens a database on a file system of its own.
func openWorking(t *testing.T) (*database, *workingFS) {
	t.Helper()
	fs := &workingFS{FS: vfs.NewMem()}
	o := Options{MemTableBytes: workingMemTable}
	d, err := openDatabase(fs, "/db", "db", o.EnsureDefaults(), true)
	noError(t, err)
	return d, fs
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

// beside returns do as it is called while batches of n bytes are written; not at all for 0.
func beside(d *database, n int, do func() error) func() error {
	if n == 0 {
		return do
	}
	return func() error { return whileWritten(d, n, do) }
}

// timesWorked returns how long do takes, in times of what was worked meanwhile.
func (w *workingFS) timesWorked(t *testing.T, what string, do func() error) float64 {
	t.Helper()
	w.taken()
	began := time.Now()
	noError(t, do())
	took, worked := time.Since(began), w.taken()
	t.Logf("%s took %v, of which %v were work", what, took, worked)
	if worked < 20*time.Millisecond {
		t.Errorf("%s is too little work to tell", what)
	}
	return float64(took) / float64(worked)
}

// calm returns when nobody has written for a while.
func calm() { <-time.NewTimer(time.Second).C }

func within(t *testing.T, what string, times, least, most float64) {
	t.Helper()
	if times < least || times > most {
		t.Errorf("%s took %.2f times as long as it worked, want %.1f to %.1f", what, times, least, most)
	}
}

// Flushes and compactions give way to writes, unless somebody waits for them, nobody
// writes, or they would not keep up.
func TestBackgroundGivesWay(t *testing.T) {
	r := randomness(t)
	synctest.Test(t, func(t *testing.T) {
		d, fs := openWorking(t)
		defer func() { noError(t, d.release()) }()
		compact := func() error { return d.db.Compact(t.Context(), []byte("a"), []byte("z"), false) }
		few := 100
		many := workingMemTable / 48 // half of a memtable is full after an eighth of a second
		for _, c := range []struct {
			what        string
			written     int
			do          func() error
			least, most float64
		}{
			{"a flush beside writes", few, d.flushAtEase, 4, 5.5},
			{"a flush somebody waits for", few, d.flush, 1, 1.2},
			{"a flush nobody writes beside", 0, d.flushAtEase, 1, 1.2},
			{"a flush beside so many writes that the next is due soon", many, d.flushAtEase, 1.5, 3},
			{"a compaction beside writes", few, compact, 4, 5.5},
			{"a compaction nobody writes beside", 0, compact, 1, 1.2},
		} {
			fill(t, d, r, 1000)
			calm()
			within(t, c.what, fs.timesWorked(t, c.what, beside(d, c.written, c.do)), c.least, c.most)
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

// Who waits for a flush, or for the end, does not wait for a compaction that goes on, and
// does not set it going faster.
func TestHurryIsOfFlushes(t *testing.T) {
	r := randomness(t)
	synctest.Test(t, func(t *testing.T) {
		d, fs := openWorking(t)
		fill(t, d, r, 2000)
		noError(t, d.flush())
		fill(t, d, r, 2000)
		noError(t, d.flush())
		compacted := make(chan error, 1)
		noError(t, whileWritten(d, 100, func() error {
			go func() { compacted <- d.db.Compact(t.Context(), []byte("a"), []byte("z"), false) }()
			<-time.NewTimer(20 * time.Millisecond).C
			fill(t, d, r, 400)
			// Both write: what was worked is more than the time it took if the compaction hurries too.
			times := fs.timesWorked(t, "a flush beside a compaction", func() error { return d.flush() })
			within(t, "a flush beside a compaction", times, 0.7, 1)
			select {
			case <-compacted:
				t.Fatal("the compaction has ended already")
			default:
			}
			times = fs.timesWorked(t, "closing", d.release)
			within(t, "closing", times, 0.9, 1.2) // a piece may have been begun before
			return nil
		}))
		if err := <-compacted; err != nil {
			t.Log(err) // of a database that is closed
		}
	})
}

// The state itself is at that pace: what the log is truncated for gives way to commands,
// an image does not.
func TestStateGivesWay(t *testing.T) {
	r := randomness(t)
	synctest.Test(t, func(t *testing.T) {
		fs := &workingFS{FS: vfs.NewMem()}
		o := testOptions()
		o.MemTableBytes = workingMemTable
		s, err := Open(fs, "state", o)
		noError(t, err)
		defer func() { noError(t, s.Close()) }()
		fill := func() {
			for i := range 500 {
				data := make([]byte, 8<<10)
				r.Read(data)
				apply(t, s, &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: &commandpb.SaveCheckpoint{
					ServiceId: fmt.Sprintf("s%d", i), CheckpointId: "c", Data: data}}})
			}
		}
		// One command each 5 ms, as clients would send them.
		serving := func(do func() error) func() error {
			return func() error {
				done := make(chan error, 1)
				go func() { done <- do() }()
				for {
					select {
					case err := <-done:
						return err
					case <-time.NewTimer(5 * time.Millisecond).C:
						apply(t, s, command(t, `save_checkpoint { service_id: "busy" checkpoint_id: "c" }`))
					}
				}
			}
		}
		flush := func() error { _, err := s.Flush(); return err }
		image := func() error { _, err := s.Image("image"); return err }
		fill()
		calm()
		within(t, "a flush for the log", fs.timesWorked(t, "a flush for the log", serving(flush)), 4, 5.5)
		fill()
		calm()
		within(t, "an image", fs.timesWorked(t, "an image", serving(image)), 1, 1.2)
		fill()
		calm()
		within(t, "a flush nobody is served beside", fs.timesWorked(t, "a flush nobody is served beside", flush), 1, 1.2)
	})
}

// A compaction stops resting as L0 grows: before Pebble makes writes wait for it.
func TestCompactionsCatchUp(t *testing.T) {
	held := false
	b := newBackground(1<<20, func() bool { return held })
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
	held = true
	if got := at(l0CompactionThreshold); got != heldRestTimes {
		t.Errorf("a compaction rests %g times as long while compactions are held, want %d", got, heldRestTimes)
	}
	if got := at(maxHeldL0); got != 0 {
		t.Errorf("a compaction rests %g times as long while compactions are held and L0 is high", got)
	}
	held = false
	if last != 0 || at(maxHeldL0+5) != 0 {
		t.Errorf("a compaction still rests %g times as long at height %d", last, maxHeldL0)
	}
}
