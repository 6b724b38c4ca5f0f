package rpc

import (
	"errors"
	"fmt"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
)

// maxFailureText bounds the text of a failure on the wire.
const maxFailureText = 512

// failureOf says on the wire why a command has no result. Whatever is not known
// to be definite is ambiguous: to the node that forwarded the command, a wrong
// "not done" is a command done twice.
func failureOf(id uint64, err error) forwardedResult {
	r := forwardedResult{id: id}
	var notLeader *raftnode.NotLeaderError
	switch {
	case errors.Is(err, raftnode.ErrAmbiguous):
		r.failure = peerpb.Failure_FAILURE_AMBIGUOUS
	case errors.As(err, &notLeader):
		r.failure, r.leader = peerpb.Failure_FAILURE_NOT_LEADER, notLeader.Leader
	case errors.Is(err, ErrQuarantined):
		// As below; the reason is for the case that no other leader comes.
		r.failure, r.message = peerpb.Failure_FAILURE_NO_LEADER, failureText(err)
	case errors.Is(err, raftnode.ErrNoLeader), errors.Is(err, raftnode.ErrOverwritten):
		// Both mean: certainly not done, and another leader may do it.
		r.failure = peerpb.Failure_FAILURE_NO_LEADER
	case errors.Is(err, raftnode.ErrBusy):
		r.failure = peerpb.Failure_FAILURE_BUSY
	case errors.Is(err, raftnode.ErrTooLarge):
		r.failure = peerpb.Failure_FAILURE_TOO_LARGE
	case errors.Is(err, raftnode.ErrStopping):
		r.failure = peerpb.Failure_FAILURE_STOPPING
	case errors.Is(err, ErrNoSpace):
		r.failure = peerpb.Failure_FAILURE_NO_SPACE
	case errors.Is(err, ErrInvalidCommand):
		r.failure, r.message = peerpb.Failure_FAILURE_INVALID_COMMAND, failureText(err)
	default:
		r.failure, r.message = peerpb.Failure_FAILURE_AMBIGUOUS, failureText(err)
	}
	return r
}

func failureText(err error) string {
	text := err.Error()
	return text[:min(len(text), maxFailureText)]
}

// errorOf is the inverse of failureOf, on the node that forwarded the command
// to node leader.
func errorOf(r *forwardedResult, leader uint64) error {
	switch r.failure {
	case peerpb.Failure_FAILURE_NOT_LEADER:
		if r.leader == 0 {
			return raftnode.ErrNoLeader
		}
		return &raftnode.NotLeaderError{Leader: r.leader}
	case peerpb.Failure_FAILURE_NO_LEADER:
		if r.message != "" {
			return fmt.Errorf("%w: node %d says: %s", raftnode.ErrNoLeader, leader, r.message)
		}
		return raftnode.ErrNoLeader
	case peerpb.Failure_FAILURE_BUSY:
		return raftnode.ErrBusy
	case peerpb.Failure_FAILURE_TOO_LARGE:
		return raftnode.ErrTooLarge
	case peerpb.Failure_FAILURE_STOPPING:
		// The leader stops, not this node: another one will lead.
		return fmt.Errorf("%w: node %d is stopping", raftnode.ErrNoLeader, leader)
	case peerpb.Failure_FAILURE_NO_SPACE:
		return ErrNoSpace
	case peerpb.Failure_FAILURE_INVALID_COMMAND:
		return fmt.Errorf("%w: node %d says: %s", ErrInvalidCommand, leader, r.message)
	}
	if r.message != "" {
		return fmt.Errorf("%w: node %d says: %s", raftnode.ErrAmbiguous, leader, r.message)
	}
	return raftnode.ErrAmbiguous
}
