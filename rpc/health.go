package rpc

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
)

// healthReporter answers grpc.health.v1 for the empty name, for every service
// under both package names, and for the name "grpc.health.v1.Health" that the
// operator's probes ask about.
//
// A node serves once it has applied a read index, that is, everything that was
// acknowledged before it started; before, it would answer from a state of the
// past. It stops serving when there has been no leader for longer than an
// election takes, and while the state is not to be relied on.
type healthReporter struct {
	*health.Server
	node  ServerNode
	grace time.Duration
	gate  *StateGate
	names []string
	// leaderless: there has been no leader for longer than grace.
	leaderless atomic.Bool
}

func newHealthReporter(node ServerNode, grace time.Duration, gate *StateGate) *healthReporter {
	return &healthReporter{Server: health.NewServer(), node: node, grace: grace, gate: gate}
}

// announce sets the names that are answered for, not serving at first.
func (h *healthReporter) announce(names []string) {
	h.names = names
	h.set(false)
}

func (h *healthReporter) set(serving bool) {
	st := healthgrpc.HealthCheckResponse_NOT_SERVING
	if serving && h.gate.Reason() == "" {
		st = healthgrpc.HealthCheckResponse_SERVING
	}
	for _, name := range h.names {
		h.SetServingStatus(name, st)
	}
}

// stop answers NOT_SERVING from now on, whatever happens.
func (h *healthReporter) stop() { h.Server.Shutdown() }

// follow keeps the answer right until ctx is done.
func (h *healthReporter) follow(ctx context.Context) {
	if !h.caughtUp(ctx) {
		return
	}
	h.set(true)
	for {
		// Taken before looking, so that a change in between wakes us again.
		changed, gate := h.node.Changed(), h.gate.Changed()
		if h.gate.Reason() != "" {
			h.set(false)
		}
		var expired <-chan time.Time
		var timer *time.Timer
		if h.node.Leadership().Leader == 0 {
			timer = time.NewTimer(h.grace)
			expired = timer.C
		} else {
			h.leaderless.Store(false)
			h.set(true)
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				waiting = false
			case <-changed:
				// Without a leader for a while, every lost election is a change
				// too: it must not start the grace again.
				if expired != nil && h.node.Leadership().Leader == 0 {
					changed = h.node.Changed()
					if h.node.Leadership().Leader == 0 {
						continue
					}
				}
				waiting = false
			case <-gate:
				waiting = false
			case <-expired:
				h.leaderless.Store(true)
				h.set(false)
			}
		}
		if timer != nil {
			timer.Stop()
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// caughtUp blocks until this node has applied a read index, and says whether it
// got that far before ctx was done.
func (h *healthReporter) caughtUp(ctx context.Context) bool {
	for {
		changed := h.node.Changed()
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := h.node.ReadIndex(attempt)
		cancel()
		if err == nil {
			return true
		}
		pause := time.NewTimer(250 * time.Millisecond)
		select {
		case <-ctx.Done():
			pause.Stop()
			return false
		case <-changed:
		case <-pause.C:
		}
		pause.Stop()
	}
}
