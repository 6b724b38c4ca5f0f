package rpc

import (
	"context"
	"fmt"
	"sync"
	"time"

	"conveyor.etl/router/raftnode"
)

// StateGate stands between the state of this node and everybody who wants to
// rely on it. It is shut when the state is known, or suspected, not to be that
// of the other members: then nothing is read from it and no command is taken,
// because both could make a client believe what is not so. A nil StateGate is
// always open. Its methods are safe for concurrent use.
type StateGate struct {
	mu sync.Mutex
	// reason is why the gate is shut, "" while it is open.
	reason string
	// final: it stays shut until the process has rebuilt the state.
	final bool
	// changed is closed and replaced when the gate opens or shuts.
	changed chan struct{}
	// expiry opens a held gate.
	expiry *time.Timer
}

// NewStateGate returns an open gate.
func NewStateGate() *StateGate { return &StateGate{changed: make(chan struct{})} }

// Quarantine shuts the gate for good.
func (g *StateGate) Quarantine(reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.setLocked(reason)
	g.final = true
}

// Hold shuts the gate for d, or until Release. Another Hold extends it.
func (g *StateGate) Hold(reason string, d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.final {
		return
	}
	g.setLocked(reason)
	var expiry *time.Timer
	expiry = time.AfterFunc(d, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.expiry == expiry {
			g.setLocked("")
		}
	})
	g.expiry = expiry
}

// Release ends a Hold; a quarantine it leaves alone.
func (g *StateGate) Release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.final {
		g.setLocked("")
	}
}

func (g *StateGate) setLocked(reason string) {
	if g.expiry != nil {
		g.expiry.Stop()
		g.expiry = nil
	}
	if (g.reason == "") != (reason == "") {
		close(g.changed)
		g.changed = make(chan struct{})
	}
	g.reason = reason
}

// Changed returns a channel that is closed when the gate next opens or shuts.
func (g *StateGate) Changed() <-chan struct{} {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

// Reason returns why the gate is shut, "" while it is open.
func (g *StateGate) Reason() string {
	if g == nil {
		return ""
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.reason
}

// Err returns an ErrQuarantined while the gate is shut.
func (g *StateGate) Err() error {
	if reason := g.Reason(); reason != "" {
		return fmt.Errorf("%w: %s", ErrQuarantined, reason)
	}
	return nil
}

// Final is Err for those who may still look at a state that is only held.
func (g *StateGate) Final() error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.final {
		return fmt.Errorf("%w: %s", ErrQuarantined, g.reason)
	}
	return nil
}

// result is what a command that was proposed here is answered with. Once the
// gate is shut, a result that this node computed may be wrong, while the command
// itself is in the log.
func (g *StateGate) result(err error) error {
	if err != nil {
		return err
	}
	if reason := g.Reason(); reason != "" {
		return fmt.Errorf("%w: this node's state was found to differ while it applied the command: %s", raftnode.ErrAmbiguous, reason)
	}
	return nil
}

// openStreams ends the streams that were opened under one gate, at the latest when
// the server stops.
type openStreams struct {
	ctx context.Context
	end context.CancelFunc
}

func newOpenStreams(run context.Context) *openStreams {
	ctx, end := context.WithCancel(run)
	return &openStreams{ctx, end}
}

// followGate ends all streams whenever the gate shuts: they go on telling what
// the state says otherwise.
func (s *Server) followGate() {
	for {
		changed := s.cfg.Gate.Changed()
		if s.cfg.Gate.Reason() != "" {
			s.streams.Swap(newOpenStreams(s.run)).end()
		}
		select {
		case <-changed:
		case <-s.run.Done():
			s.streams.Load().end()
			return
		}
	}
}
