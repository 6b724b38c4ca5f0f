package recovery

import (
	"testing"
	"testing/synctest"
	"time"
)

// While commands are written an archive leaves them most processors, and soon after the
// last of them it has all.
func TestSpareProcessors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pass := func(d time.Duration) { <-time.NewTimer(d).C }
		for _, c := range []struct{ processors, busy, idle int }{{1, 1, 2}, {2, 1, 3}, {4, 1, 5}, {16, 4, 17}} {
			written := int64(0)
			spare := spareProcessors(c.processors, func() int64 { return written })
			if got := spare(); got != c.idle {
				t.Errorf("of %d processors %d may be taken before the first command, want %d", c.processors, got, c.idle)
			}
			for range 3 {
				written += 100
				for range 4 {
					if got := spare(); got != c.busy {
						t.Errorf("of %d processors %d may be taken beside commands, want %d", c.processors, got, c.busy)
					}
					pass(busyFor / 5)
				}
			}
			pass(busyFor)
			if got := spare(); got != c.idle {
				t.Errorf("of %d processors %d may be taken after the last command, want %d", c.processors, got, c.idle)
			}
		}
	})
}
