package recovery

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"conveyor.etl/router/backup/shelf"
)

// compareAgain is how often a comparison of the members' states is asked for by who
// waits for one.
const compareAgain = time.Second

// agreement is the newest word that the state of this node is that of a majority.
type agreement struct {
	mu           sync.Mutex
	index, epoch uint64
	changed      chan struct{} // closed and replaced with each word
}

// Agreed takes note that the state of this node was that of a majority at index, of an
// epoch.
func (r *Recovery) Agreed(index, epoch uint64) {
	a := &r.agreement
	a.mu.Lock()
	defer a.mu.Unlock()
	if epoch < a.epoch || epoch == a.epoch && index <= a.index {
		return
	}
	a.index, a.epoch = index, epoch
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *agreement) get() (index, epoch uint64, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.index, a.epoch, a.changed
}

// awaitAgreed waits until the state that rec holds, or a later one of this node, was
// found to be that of a majority, and returns true; false when the members are never
// compared. A record that was applied wrongly stays so until somebody writes it anew, so
// that a later state that is right speaks for the earlier ones; comparing at the very
// index would need all members to be asked at it. Without waiting a leader whose state
// went wrong a moment ago, and who is about to be told, would still store a backup that
// looks good, and let go of an old one for it.
func (r *Recovery) awaitAgreed(ctx context.Context, operation string, rec shelf.Record) (bool, error) {
	if r.c.Compare == nil {
		return false, nil
	}
	bound, cancel := context.WithTimeout(ctx, r.c.CompareWait)
	defer cancel()
	late := func() error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("recovery: the state of node %d at entry %d was not seen to be that of a majority of the voters within %v; "+
			"nothing was stored: see 'router cluster check'", r.c.NodeID, rec.Index, r.c.CompareWait)
	}
	tick := time.NewTicker(compareAgain)
	defer tick.Stop()
	for {
		index, epoch, changed := r.agreement.get()
		switch {
		case epoch == rec.Epoch && index >= rec.Index:
			return true, nil
		case epoch > rec.Epoch:
			return false, errors.New("recovery: the state was restored while it was backed up; nothing was stored")
		}
		if err := r.c.Trusted(); err != nil {
			return false, fmt.Errorf("recovery: nothing was stored, for the state of this node may be wrong: %w", err)
		}
		// It asks the leader: without one it would wait for as long as there is none.
		if err := r.check(bound, operation); err != nil {
			if bound.Err() != nil {
				err = late()
			}
			return false, err
		}
		r.c.Compare()
		select {
		case <-changed:
		case <-tick.C:
		case <-bound.Done():
			return false, late()
		}
	}
}
