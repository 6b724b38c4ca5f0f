package rpc

import (
	"context"
	"sync"
	"time"

	"conveyor.etl/router/raftnode"
)

const (
	// maxBeatsPending bounds the sidecars, and the services, whose heartbeats a
	// follower holds: once each, so this is the largest cluster that can be, not
	// a queue.
	maxBeatsPending = 1 << 18
	// maxBeatsRecent bounds the heartbeats remembered in case their leader dies.
	maxBeatsRecent = 1 << 18
)

// BeatsConfig wires Beats; EnsureDefaults fills zero limits.
type BeatsConfig struct {
	// Node says who leads; required.
	Node ProposeNode
	// Forwarder passes heartbeats on while another node leads; required.
	Forwarder *Forwarder
	// Sink takes heartbeats while this node leads; required. It must not block.
	Sink func(sidecarID, serviceID string)
	// Interval is how long heartbeats are gathered: a batch costs what some
	// tens of heartbeats do. Default 200 ms.
	Interval time.Duration
	// Remember is for how long, and up to twice as long, what was passed on is
	// kept to be told to the next leader as well. Default 3 s.
	Remember time.Duration
}

// Beats brings the heartbeats that this node receives to the leader, which
// alone judges who is alive. They are no commands and nobody acknowledges them.
// One that its leader takes into the grave would leave its sidecar to live on
// what was left of its lease before, so those of the last seconds are told to the
// next leader again, and to the same one when the stream to it has broken. Its
// methods are safe for concurrent use.
type Beats struct {
	c    BeatsConfig
	wake chan struct{}

	mu      sync.Mutex
	pending beatSet
	recent  recentBeats
	lost    uint64

	// Of Run's goroutine.
	spare beatSet
	told  raftnode.Leadership // the last leader that heartbeats went to
}

// NewBeats returns a collector; Run makes it work.
func NewBeats(c BeatsConfig) *Beats {
	setDefault(&c.Interval, 200*time.Millisecond)
	setDefault(&c.Remember, 3*time.Second)
	return &Beats{c: c, wake: make(chan struct{}, 1), pending: newBeatSet(), spare: newBeatSet(), recent: recentBeats{keep: c.Remember}}
}

// Touch takes one heartbeat, of a sidecar, a service, or both. It never blocks.
func (b *Beats) Touch(sidecarID, serviceID string) {
	leading := b.c.Node.Leadership().Leading
	if leading {
		b.c.Sink(sidecarID, serviceID)
	}
	b.mu.Lock()
	if leading {
		// The next leader has to know of it too.
		b.recent.add(time.Now(), sidecarID, serviceID)
		b.mu.Unlock()
		return
	}
	first := b.pending.empty()
	b.lost += b.pending.add(sidecarID, serviceID)
	b.mu.Unlock()
	if first {
		b.poke()
	}
}

// TouchSidecars takes a heartbeat of each of ids, a slice that it does not keep.
func (b *Beats) TouchSidecars(ids []string) {
	leading := b.c.Node.Leadership().Leading
	if leading {
		for _, id := range ids {
			b.c.Sink(id, "")
		}
	}
	b.mu.Lock()
	if leading {
		now := time.Now()
		for _, id := range ids {
			b.recent.add(now, id, "")
		}
		b.mu.Unlock()
		return
	}
	first := b.pending.empty()
	for _, id := range ids {
		b.lost += b.pending.add(id, "")
	}
	b.mu.Unlock()
	if first {
		b.poke()
	}
}

func (b *Beats) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// Sidecar takes one heartbeat of a sidecar.
func (b *Beats) Sidecar(id string) { b.Touch(id, "") }

// Service takes one heartbeat of a service.
func (b *Beats) Service(id string) { b.Touch("", id) }

// Lost counts heartbeats that found the collector full.
func (b *Beats) Lost() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lost
}

// Run passes heartbeats on until ctx is done; those that wait then are lost.
func (b *Beats) Run(ctx context.Context) {
	timer := time.NewTimer(b.c.Interval)
	defer timer.Stop()
	for {
		changed := b.c.Node.Changed() // taken before the look at who leads
		b.follow(b.c.Node.Leadership())
		select {
		case <-ctx.Done():
			return
		case <-changed:
			continue
		case <-b.c.Forwarder.broken:
			b.again()
		case <-b.wake:
		}
		for more := true; more; more = b.flush() {
			timer.Reset(b.c.Interval)
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
		}
	}
}

// follow notes who leads. Whoever is new is told the last heartbeats again.
func (b *Beats) follow(lead raftnode.Leadership) {
	if lead.Leader == 0 || lead.Leader == b.told.Leader && lead.Term == b.told.Term {
		return
	}
	first := b.told.Leader == 0
	b.told = lead
	if !first {
		b.again()
	}
}

// again lets the heartbeats of the last seconds wait to be passed on once more.
func (b *Beats) again() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.recent.each(time.Now(), func(sidecarID, serviceID string) { b.lost += b.pending.add(sidecarID, serviceID) })
	b.recent.clear()
	if !b.pending.empty() {
		b.poke()
	}
}

// flush sends what waits and reports whether anything is left. Without a
// leader, heartbeats wait: a sidecar that reported itself just before an
// election must not have to do so again.
func (b *Beats) flush() (more bool) {
	lead := b.c.Node.Leadership()
	b.follow(lead)
	b.mu.Lock()
	b.pending, b.spare = b.spare, b.pending
	b.mu.Unlock()

	taken := b.spare
	if lead.Leading {
		taken.each(b.c.Sink)
	} else if !b.send(taken) {
		// What was sent already is sent twice, which does no harm.
		b.mu.Lock()
		defer b.mu.Unlock()
		taken.each(func(sidecarID, serviceID string) { b.lost += b.pending.add(sidecarID, serviceID) })
		taken.clear()
		return !b.pending.empty()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	taken.each(func(sidecarID, serviceID string) { b.recent.add(now, sidecarID, serviceID) })
	taken.clear()
	return !b.pending.empty()
}

// send passes on all of a set, or reports that it could not.
func (b *Beats) send(set beatSet) bool {
	batch := beatBatch{sidecars: make([]string, 0, len(set.sidecars)), services: make([]string, 0, len(set.services))}
	for id := range set.sidecars {
		batch.sidecars = append(batch.sidecars, id)
	}
	for id := range set.services {
		batch.services = append(batch.services, id)
	}
	return b.c.Forwarder.sendBeats(batch)
}

// beatSet holds heartbeats that wait, each sidecar and service once.
type beatSet struct{ sidecars, services map[string]struct{} }

func newBeatSet() beatSet { return beatSet{map[string]struct{}{}, map[string]struct{}{}} }

func (s beatSet) empty() bool { return len(s.sidecars)+len(s.services) == 0 }

func (s beatSet) clear() {
	clear(s.sidecars)
	clear(s.services)
}

// add returns how many it had no room for.
func (s beatSet) add(sidecarID, serviceID string) (lost uint64) {
	put := func(in map[string]struct{}, id string) {
		if id == "" {
			return
		}
		if _, known := in[id]; !known && len(in) >= maxBeatsPending {
			lost++
			return
		}
		in[id] = struct{}{}
	}
	put(s.sidecars, sidecarID)
	put(s.services, serviceID)
	return lost
}

func (s beatSet) each(fn func(sidecarID, serviceID string)) {
	for id := range s.sidecars {
		fn(id, "")
	}
	for id := range s.services {
		fn("", id)
	}
}

// recentBeats remembers the heartbeats of the last keep, and up to twice that, in
// two generations: the older one goes as a whole.
type recentBeats struct {
	keep         time.Duration
	young, older []beatKey
	since        time.Time // when young was begun
}

type beatKey struct{ sidecar, service string }

func (l *recentBeats) add(now time.Time, sidecarID, serviceID string) {
	l.turn(now)
	if len(l.young) < maxBeatsRecent {
		l.young = append(l.young, beatKey{sidecarID, serviceID})
	}
}

func (l *recentBeats) turn(now time.Time) {
	age := now.Sub(l.since)
	if age < l.keep {
		return
	}
	l.older, l.young = l.young, l.older
	clear(l.young) // the ids are not ours to keep
	l.young = l.young[:0]
	if age >= 2*l.keep {
		clear(l.older)
		l.older = l.older[:0]
	}
	l.since = now
}

func (l *recentBeats) each(now time.Time, fn func(sidecarID, serviceID string)) {
	l.turn(now)
	for _, generation := range [][]beatKey{l.older, l.young} {
		for _, k := range generation {
			fn(k.sidecar, k.service)
		}
	}
}

func (l *recentBeats) clear() {
	clear(l.older)
	clear(l.young)
	l.older, l.young = l.older[:0], l.young[:0]
}
