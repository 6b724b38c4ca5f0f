package rpc

import (
	"context"
	"sync"
	"time"

	"conveyor.etl/router/rpc/peerpb"
)

// maxBeatsPending bounds the heartbeats a follower holds: one per sidecar and
// service, so this is the largest cluster that can be, not a queue.
const maxBeatsPending = 1 << 18

// BeatsConfig wires Beats; EnsureDefaults fills zero limits.
type BeatsConfig struct {
	// Node says who leads; required.
	Node ProposeNode
	// Forwarder passes heartbeats on while another node leads; required.
	Forwarder *Forwarder
	// Sink takes heartbeats while this node leads; required. It must not block.
	Sink func(sidecarID, serviceID string)
	// Interval is how long heartbeats are gathered. Default 50 ms.
	Interval time.Duration
}

type beatKey struct{ sidecar, service string }

// Beats brings the heartbeats that this node receives to the leader, which
// alone judges who is alive. They are no commands: one that is lost is replaced
// by the next. Its methods are safe for concurrent use.
type Beats struct {
	c    BeatsConfig
	wake chan struct{}

	mu      sync.Mutex
	pending map[beatKey]struct{}
	lost    uint64
}

// NewBeats returns a collector; Run makes it work.
func NewBeats(c BeatsConfig) *Beats {
	setDefault(&c.Interval, 50*time.Millisecond)
	return &Beats{c: c, wake: make(chan struct{}, 1), pending: map[beatKey]struct{}{}}
}

// Touch takes one heartbeat, of a sidecar, a service, or both. It never blocks.
func (b *Beats) Touch(sidecarID, serviceID string) {
	if b.c.Node.Leadership().Leading {
		b.c.Sink(sidecarID, serviceID)
		return
	}
	b.mu.Lock()
	first := len(b.pending) == 0
	key := beatKey{sidecarID, serviceID}
	if _, known := b.pending[key]; !known && len(b.pending) >= maxBeatsPending {
		b.lost++
	} else {
		b.pending[key] = struct{}{}
	}
	b.mu.Unlock()
	if first {
		select {
		case b.wake <- struct{}{}:
		default:
		}
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
		select {
		case <-ctx.Done():
			return
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

// flush sends what waits and reports whether anything is left. Without a
// leader, heartbeats wait: a sidecar that reported itself just before an
// election must not have to do so again.
func (b *Beats) flush() (more bool) {
	b.mu.Lock()
	pending := b.pending
	if len(pending) == 0 {
		b.mu.Unlock()
		return false
	}
	b.pending = make(map[beatKey]struct{}, len(pending))
	b.mu.Unlock()

	if b.c.Node.Leadership().Leading {
		for k := range pending {
			b.c.Sink(k.sidecar, k.service)
		}
		return b.waiting()
	}
	batch := make([]*peerpb.Beat, 0, min(len(pending), maxBeatsQueued))
	for k := range pending {
		if len(batch) == cap(batch) {
			break
		}
		batch = append(batch, &peerpb.Beat{SidecarId: k.sidecar, ServiceId: k.service})
	}
	if b.c.Forwarder.SendBeats(batch) {
		for _, beat := range batch {
			delete(pending, beatKey{beat.GetSidecarId(), beat.GetServiceId()})
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for k := range pending {
		b.pending[k] = struct{}{}
	}
	return len(b.pending) > 0
}

func (b *Beats) waiting() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.pending) > 0
}
