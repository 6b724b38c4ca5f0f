package rpc

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// Where an operation is. Only who moves it from waiting to sent may propose it
// or put it on the wire; so one that was given up is never sent afterwards.
const (
	opWaiting int32 = iota
	opSent
	opGivenUp
)

// operation is one command on its way to a result.
type operation struct {
	cmd  *commandpb.Command
	size int // of cmd on the wire
	done func(*commandpb.Result, uint64, error)
	// id is the number of the command on its stream, while it is on one.
	id uint64
	// deadline is when waiting for a leader ends. What has been sent is waited
	// for without limit: the leader's raft group answers or the stream breaks.
	deadline time.Time
	state    atomic.Int32
	// ambiguous: an earlier attempt may still take effect. From then on no
	// failure of a later attempt says that the command was not done.
	ambiguous atomic.Bool
	// left: the caller has gone; no further attempt is worth it.
	left atomic.Bool
	// last is why the operation waits; owned by who holds the operation.
	last error
}

// begin moves op from waiting to sent; false when it was given up meanwhile.
func (op *operation) begin() bool { return op.state.CompareAndSwap(opWaiting, opSent) }

// giveUp ends op from the caller's side; false when it is on its way already.
func (op *operation) giveUp() bool { return op.state.CompareAndSwap(opWaiting, opGivenUp) }

// repeatable reports whether cmd may be proposed again although an earlier
// proposal of it may have been, or may yet be, applied.
//
// With a request id the state machine answers the second with the first's
// result. Without one, only commands that move a maximum forward are safe:
// their second application changes nothing whatever came in between. A command
// that sets a value (a checkpoint, a pipeline, a forced offset) is not, even
// when it sets the same value twice: set A, another client's set B, set A again
// would undo B, and a reader would see A, B, A.
func repeatable(cmd *commandpb.Command) bool {
	if cmd.GetRequestId() != "" {
		return true
	}
	switch op := cmd.GetOp().(type) {
	case *commandpb.Command_CommitSourceOffset:
		return !op.CommitSourceOffset.GetForce()
	case *commandpb.Command_AdvanceWatermark:
		return !op.AdvanceWatermark.GetForce()
	case *commandpb.Command_CommitGroupOffset:
		return !op.CommitGroupOffset.GetForce()
	case *commandpb.Command_RenewLease:
		return true
	case *commandpb.Command_CommitBatch:
		for _, o := range op.CommitBatch.GetOps() {
			switch o := o.GetOp().(type) {
			case *commandpb.CommitOp_SourceOffset:
				if o.SourceOffset.GetForce() {
					return false
				}
			case *commandpb.CommitOp_Watermark:
				if o.Watermark.GetForce() {
					return false
				}
			case *commandpb.CommitOp_GroupOffset:
				if o.GroupOffset.GetForce() {
					return false
				}
			default:
				return false
			}
		}
		return true
	}
	return false
}

// certainlyNotDone reports whether err means that another attempt is safe
// and may well succeed elsewhere or later.
func certainlyNotDone(err error) bool {
	var notLeader *raftnode.NotLeaderError
	return !errors.Is(err, raftnode.ErrAmbiguous) &&
		(errors.As(err, &notLeader) || errors.Is(err, raftnode.ErrNoLeader) ||
			errors.Is(err, raftnode.ErrOverwritten) || errors.Is(err, ErrUnreachable))
}

// truthful returns err as the final word on op: when an earlier attempt may
// take effect, a later one's definite failure does not undo that.
func (op *operation) truthful(err error) error {
	if !op.ambiguous.Load() || errors.Is(err, raftnode.ErrAmbiguous) {
		return err
	}
	return fmt.Errorf("%w; the attempt to find out failed: %w", raftnode.ErrAmbiguous, err)
}

// outcome is what op.done gets when an attempt ended with result.
func (op *operation) outcome(result *commandpb.Result) (*commandpb.Result, error) {
	if result.GetRejection() != nil && op.ambiguous.Load() && op.cmd.GetRequestId() == "" {
		// The repeat was refused because of a state the first attempt may have
		// been part of. "Refused" would say that the command had no effect.
		return nil, fmt.Errorf("%w: it was sent again and refused: %s",
			raftnode.ErrAmbiguous, result.GetRejection().GetReason())
	}
	return result, nil
}
