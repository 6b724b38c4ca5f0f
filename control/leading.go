package control

import (
	"context"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Node is what the loops need of the local replica. *raftnode.Node implements
// it.
type Node interface {
	Leadership() raftnode.Leadership
	// Changed returns a channel that is closed at the next change of
	// Leadership.
	Changed() <-chan struct{}
	ReadIndex(ctx context.Context) (uint64, error)
}

// State is the replicated state as the loops read it. *router.FSM implements
// it.
type State interface {
	View() *router.View
	Hub() *router.Hub
}

// Submitter replicates commands.
type Submitter interface {
	// Submit returns what every replica computed for cmd. A refusal is a
	// result, not an error.
	Submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error)
	// SubmitFunc is Submit without waiting: done is called exactly once, from
	// any goroutine.
	SubmitFunc(cmd *commandpb.Command, done func(result *commandpb.Result, index uint64, err error))
}

// whileLeading runs fn whenever node leads, with a context that ends with its
// leadership, until ctx is done. It returns after fn has.
func whileLeading(ctx context.Context, node Node, fn func(context.Context)) {
	eachReign(ctx, node, func(ctx context.Context, _ uint64) { fn(ctx) })
}

// eachReign is whileLeading for who has to know the term.
func eachReign(ctx context.Context, node Node, fn func(ctx context.Context, term uint64)) {
	for ctx.Err() == nil {
		changed := node.Changed()
		lead := node.Leadership()
		if !lead.Leading {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		reign, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			fn(reign, lead.Term)
		}()
		// A leader that lost and regained its place begins anew: what it
		// remembers is of another reign.
		for now := lead; now.Leading && now.Term == lead.Term && ctx.Err() == nil; now = node.Leadership() {
			select {
			case <-changed:
				changed = node.Changed()
			case <-ctx.Done():
			}
		}
		cancel()
		<-done
	}
}

// caughtUp waits until the local state holds everything that was committed
// before this node came to lead. It returns false when ctx is done first.
func caughtUp(ctx context.Context, node Node, retry time.Duration) bool {
	for {
		if _, err := node.ReadIndex(ctx); err == nil {
			return true
		}
		if !sleep(ctx, retry) {
			return false
		}
	}
}

// confirmed reports whether this node still led term after the call began: a
// quorum has said so since. It takes no longer than limit.
func confirmed(ctx context.Context, node Node, term uint64, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if _, err := node.ReadIndex(ctx); err != nil {
		return false
	}
	// The answer may have come through a leader that took this one's place.
	lead := node.Leadership()
	return lead.Leading && lead.Term == term
}

// sleep waits for d; it returns false when ctx is done first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
