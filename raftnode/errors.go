package raftnode

import (
	"errors"
	"fmt"
)

// The errors of Propose, ReadIndex and the membership calls. Each says whether
// the command can still take effect; nothing else about an error does.
var (
	// ErrNoLeader: no leader is known. The command was not proposed.
	ErrNoLeader = errors.New("raftnode: the cluster has no leader")
	// ErrStopping: the node is shutting down. The command was not proposed.
	ErrStopping = errors.New("raftnode: the node is stopping")
	// ErrBusy: a limit on waiting proposals was reached, or raft dropped the
	// proposal. The command was not proposed; try again later.
	ErrBusy = errors.New("raftnode: too many proposals are waiting")
	// ErrTooLarge: the command exceeds Config.MaxCommandBytes. Not proposed.
	ErrTooLarge = errors.New("raftnode: the command is too large")
	// ErrAmbiguous: the command was proposed, but leadership was lost, the node
	// stopped, or a snapshot overtook it before its result was known. It may or
	// may not take effect.
	ErrAmbiguous = errors.New("raftnode: the outcome of the command is unknown")
	// ErrOverwritten: the command was proposed, but a later leader put another
	// entry in its place. It did not and will not take effect; propose it again.
	ErrOverwritten = errors.New("raftnode: the command was overwritten by a new leader and did not take effect")
	// ErrMembershipPending: another membership change has not been applied yet.
	ErrMembershipPending = errors.New("raftnode: another membership change is in progress")
	// ErrMembershipRefused: the change makes no sense for the present members, or
	// would leave the group without a working majority. Nothing was changed.
	ErrMembershipRefused = errors.New("raftnode: the membership change is refused")
	// ErrTransferFailed: leadership did not move to the chosen node in time.
	ErrTransferFailed = errors.New("raftnode: the leadership transfer did not complete")
	// ErrStateBehindLog: the state machine's applied index precedes the first
	// entry the log still holds, so replaying cannot rebuild it. The caller
	// must install an image of a peer first.
	ErrStateBehindLog = errors.New("raftnode: the state is older than the log's first entry")
	// ErrDiverged: the state machine and the log disagree about an entry both
	// know to be committed. One of them belongs elsewhere or is damaged.
	ErrDiverged = errors.New("raftnode: the state and the log disagree about a committed entry")
	// ErrImageHeld: no image is to be sent to the peer for now, because a user
	// stopped the one before. Nothing was sent.
	ErrImageHeld = errors.New("raftnode: no image is sent to the node for now")
	// ErrDiskStalled: the log's disk has not answered for Config.StallFail.
	ErrDiskStalled = errors.New("raftnode: the disk of the log has stalled")
)

// NotLeaderError refuses a command on a node that does not lead. The command
// was not proposed.
type NotLeaderError struct {
	// Leader is the id of the node to ask instead, never zero.
	Leader uint64
	// Addr is the peer address of Leader, empty when unknown.
	Addr string
	// Term is the term in which Leader leads.
	Term uint64
}

// Error implements error.
func (e *NotLeaderError) Error() string {
	return fmt.Sprintf("raftnode: not the leader: node %d leads term %d", e.Leader, e.Term)
}
