package pace

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// pass lets d go by on the clock of the bubble.
func pass(d time.Duration) { <-time.NewTimer(d).C }

func constant(times float64) func() float64 { return func() float64 { return times } }

// Work gets the share of the time it is meant to have, whatever its steps are.
func TestRestsForAsLongAsMeant(t *testing.T) {
	for _, step := range []time.Duration{10 * time.Microsecond, 700 * time.Microsecond, 3 * time.Millisecond} {
		for _, times := range []float64{0, 0.5, 4} {
			synctest.Test(t, func(t *testing.T) {
				const worked = 210 * time.Millisecond
				p := New()
				w := p.Begin()
				began := time.Now()
				for range worked / step {
					pass(step)
					p.Used()
					w.Rest(constant(times))
				}
				want := time.Duration(float64(worked) * (1 + times))
				// The last stint may not have rested yet.
				if took := time.Since(began); took > want || took < want-time.Duration(times*float64(2*time.Millisecond)) {
					t.Errorf("steps of %v that rest %g times as long took %v instead of %v", step, times, took, want)
				}
			})
		}
	}
}

// Work that was kept from its processor goes on all the same.
func TestRestIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		w := p.Begin()
		pass(time.Hour)
		p.Used()
		began := time.Now()
		w.Rest(constant(4))
		if took := time.Since(began); took != maxRest {
			t.Errorf("rested %v after an hour, at most %v is meant", took, maxRest)
		}
	})
}

// Who is in a hurry ends a rest at once and keeps others from beginning, until the
// last of those who are has done.
func TestHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		w := p.Begin()
		rest := func() time.Duration {
			p.Used()
			began := time.Now()
			w.Rest(constant(4))
			return time.Since(began)
		}
		pass(4 * time.Millisecond)
		first := make(chan func(), 1)
		go func() {
			pass(time.Millisecond)
			first <- p.Hurry()
		}()
		if took := rest(); took != time.Millisecond {
			t.Errorf("a rest that was cut short after 1 ms took %v", took)
		}
		for _, end := range []func(){<-first, p.Hurry()} {
			pass(4 * time.Millisecond)
			if took := rest(); took != 0 {
				t.Errorf("rested %v while somebody was in a hurry", took)
			}
			end()
			end()
		}
		pass(4 * time.Millisecond)
		if took := rest(); took != 16*time.Millisecond {
			t.Errorf("rested %v once nobody was in a hurry, want 16 ms", took)
		}
	})
}

// Work that has the processors for itself goes on without rests, but not because others
// are waiting for something else at the moment.
func TestRestsOnlyForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		w := p.Begin()
		rests := func() bool {
			pass(2 * time.Millisecond)
			began := time.Now()
			w.Rest(constant(1))
			return time.Since(began) > 0
		}
		if rests() {
			t.Error("work rests before anybody else has had a turn")
		}
		p.Used()
		for range 10 {
			if !rests() {
				t.Fatal("work does not rest while others have turns")
			}
		}
		pass(50 * time.Millisecond)
		if rests() {
			t.Error("work rests for nobody")
		}
	})
}

// slowFS takes a millisecond for each write, on the clock of the bubble.
type slowFS struct{ vfs.FS }

type slowFile struct{ vfs.File }

func (s slowFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := s.FS.Create(name, category)
	return slowFile{f}, err
}

func (f slowFile) Write(p []byte) (int, error) {
	pass(time.Millisecond)
	return f.File.Write(p)
}

// Only files of the categories meant are written with rests, and what is in them is
// what was written.
func TestFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := vfs.NewMem()
		p := New()
		fsys := p.Files(slowFS{mem}, func(c vfs.DiskWriteCategory) func() float64 {
			if c == "slow" {
				return constant(3)
			}
			return nil
		})
		for _, c := range []struct {
			category vfs.DiskWriteCategory
			want     time.Duration
		}{{"slow", 40 * time.Millisecond}, {"other", 10 * time.Millisecond}} {
			name := string(c.category)
			f, err := fsys.Create(name, c.category)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			for range 10 {
				p.Used()
				if n, err := f.Write([]byte("data")); n != 4 || err != nil {
					t.Fatal(n, err)
				}
			}
			if took := time.Since(began); took != c.want {
				t.Errorf("%s: ten writes took %v, want %v", name, took, c.want)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if st, err := mem.Stat(name); err != nil || st.Size() != 40 {
				t.Errorf("%s: %v, %v; want 40 bytes", name, st, err)
			}
		}
	})
}
