package e2e

import (
	"sync"
	"time"
)

// weather remembers when which node was struck by a fault of the test, so that
// afterwards one can tell what the cluster had no chance to know.
type weather struct {
	mu     sync.Mutex
	struck map[uint64][]spell
}

type spell struct{ from, to time.Time }

// recovery is how long after a fault a node is given to be as the others again.
const recovery = 2 * time.Second

func newWeather() *weather { return &weather{struck: map[uint64][]spell{}} }

// strike says that nodes are at fault from now on, clear that they are well again.
func (w *weather) strike(nodes ...*Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range nodes {
		w.struck[n.ID] = append(w.struck[n.ID], spell{from: time.Now()})
	}
}

func (w *weather) clear(nodes ...*Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range nodes {
		if all := w.struck[n.ID]; len(all) > 0 && all[len(all)-1].to.IsZero() {
			all[len(all)-1].to = time.Now().Add(recovery)
		}
	}
}

// fine says whether a node was well all the time between two moments.
func (w *weather) fine(node uint64, from, to time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.struck[node] {
		if s.from.Before(to) && (s.to.IsZero() || s.to.After(from)) {
			return false
		}
	}
	return node != 0
}
