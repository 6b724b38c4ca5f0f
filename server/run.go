package server

import (
	"context"
	"errors"
	"fmt"

	"conveyor.etl/router/config"
)

// Run runs a node until ctx is done (nil) or the node fails. A node whose state
// turns out to be wrong is stopped and started again within it, which rebuilds
// the state. So is one that turns out to be a member whose data directory was
// lost, which then joins again.
func Run(ctx context.Context, c *config.Config, o Options) error {
	o.ensureDefaults()
	for {
		s := New(*c, o)
		if err := s.Start(ctx); err != nil {
			stopped := ctx.Err() != nil
			if errors.Is(err, errRejoin) && !stopped {
				continue
			}
			// Whoever starts a node next that has to join again finds the note.
			if stopped && (errors.Is(err, ctx.Err()) || errors.Is(err, errRejoin)) {
				o.Logger.Info("stopped before the node could serve", "event", "stopped", "err", err)
				return nil
			}
			return fmt.Errorf("the node did not start: %w", err)
		}
		again := false
		select {
		case <-ctx.Done():
			o.Logger.Info("stopping", "event", "stopping")
		case <-s.Failed():
		case <-s.Quarantined():
			again = true
		}
		stopCtx, cancel := context.WithTimeout(context.Background(), c.ShutdownTimeout)
		stopErr := s.Stop(stopCtx)
		cancel()
		if errors.Is(s.Err(), errRejoin) {
			if ctx.Err() != nil {
				return stopErr
			}
			if stopErr != nil {
				return fmt.Errorf("the node could not be started again: %w", stopErr)
			}
			continue
		}
		if err := s.Err(); err != nil {
			return fmt.Errorf("the node failed: %w", err)
		}
		if stopErr != nil || !again || ctx.Err() != nil {
			return stopErr
		}
	}
}
