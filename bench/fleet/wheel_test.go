package fleet

import (
	"math/rand/v2"
	"testing"
	"time"
)

// Goal: what is added is due once, not early and at most a tick late. Method:
// random entries and random steps of the clock.
func TestWheel(t *testing.T) {
	const seed = 1
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	w := newWheel(500)
	due := make(map[int32]time.Duration)
	var now time.Duration
	for range 20_000 {
		if i := r.IntN(500); r.IntN(3) > 0 {
			if _, waits := due[int32(i)]; !waits {
				d := time.Duration(r.Int64N(int64(wheelSpan)))
				w.add(i, d)
				// The wheel knows the time of its last step.
				due[int32(i)] = now/wheelTick*wheelTick + max(wheelTick, d/wheelTick*wheelTick)
			} else {
				w.add(i, 0) // changes nothing
			}
			continue
		}
		now += time.Duration(r.Int64N(int64(2 * time.Second)))
		for _, i := range w.advance(now, nil) {
			at, waits := due[i]
			if !waits {
				t.Fatalf("at %v: %d is due and was not added", now, i)
			}
			if at > now {
				t.Fatalf("at %v: %d is due, which it is at %v", now, i, at)
			}
			delete(due, i)
		}
		for i, at := range due {
			if at <= now {
				t.Fatalf("at %v: %d was due at %v", now, i, at)
			}
		}
	}
}
