package recovery

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// transfer is one upload or download in progress.
type transfer struct {
	what  string
	since time.Time
}

// transfer admits one upload or download, which what names; the caller calls the
// function it gets at its end. Who finds no place is told who has them: without
// that an operator can only guess what to stop.
func (r *Recovery) transfer(what string) (func(), error) {
	t := &transfer{what: what, since: r.c.Now()}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.transfers) >= r.c.MaxTransfers {
		return nil, fmt.Errorf("%w: node %d carries out %d, which is as many as it may (%s); nothing was done: "+
			"wait until one has ended, or end one by stopping its client; an upload can also go to another node",
			ErrBusy, r.c.NodeID, len(r.transfers), r.runningLocked())
	}
	r.transfers[t] = struct{}{}
	return func() {
		r.mu.Lock()
		delete(r.transfers, t)
		r.mu.Unlock()
	}, nil
}

// runningLocked names the transfers, the oldest first.
func (r *Recovery) runningLocked() string {
	var list []*transfer
	for t := range r.transfers {
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *transfer) int { return a.since.Compare(b.since) })
	var parts []string
	for _, t := range list {
		parts = append(parts, fmt.Sprintf("%s for %v", t.what, r.c.Now().Sub(t.since).Round(time.Second)))
	}
	return strings.Join(parts, ", ")
}
