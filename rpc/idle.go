package rpc

import (
	"context"
	"fmt"
	"time"
)

// idle ends transfers whose client stands still. A client that is alive for TCP
// and does nothing (suspended, stopped in a debugger, or written to do so) keeps
// a handler inside Send or Recv for as long as it likes, and with it one of the
// few places for transfers, an open snapshot, or half an upload on disk.
type idle struct {
	// after is how long one message may take to come or to go.
	after time.Duration
	// timer is the clock; time.NewTimer, except in tests.
	timer func(d time.Duration) (<-chan time.Time, func() bool)
}

func realTimer(d time.Duration) (<-chan time.Time, func() bool) {
	t := time.NewTimer(d)
	return t.C, t.Stop
}

// bound calls move, which sends or receives one message of a stream, and waits
// for it no longer than the client may stand still and ctx lasts. When it gives
// up, move goes on in the background until the handler has returned, which is
// what ends it: gRPC knows no other way to take a stream away from a call that
// is in it. So the handler must return then, and not touch what move uses.
func (i *idle) bound(ctx context.Context, what string, move func() error) error {
	moved := make(chan error, 1)
	go func() { moved <- move() }()
	passed, stop := i.timer(i.after)
	defer stop()
	select {
	case err := <-moved:
		return err
	case <-passed:
		return fmt.Errorf("%w: the client has %s for %v", ErrStalled, what, i.after)
	case <-ctx.Done():
		return ctx.Err()
	}
}
