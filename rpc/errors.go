package rpc

import (
	"errors"
	"fmt"
)

// The errors of the package, to be compared with errors.Is. Status gives each
// of them its gRPC code.
var (
	// ErrNoSpace: the disk of the leader is nearly full, so commands that make
	// the state grow are refused. The command was not proposed.
	ErrNoSpace = errors.New("rpc: the leader's disk is nearly full: commands that add data are refused " +
		"until space is freed; deletes still work; nothing was changed")
	// ErrUnreachable: the node that should have taken the command could not be
	// reached. The command was not sent.
	ErrUnreachable = errors.New("rpc: the leader cannot be reached from this node; the command was not sent")
	// ErrInvalidCommand: this node, or the leader it was sent to, cannot decode
	// the command or does not know its operation, as when the other one runs a
	// newer release. It was not proposed.
	ErrInvalidCommand = errors.New("rpc: the command is not one this release understands; nothing was changed")
	// ErrNotProposed: the caller's deadline passed, or the caller left, while
	// the command waited for a leader. It was not and will not be proposed.
	ErrNotProposed = errors.New("rpc: the call ended before the command was proposed; nothing was changed")
	// ErrInvalidMetadata: a conveyor-* metadata value of the request cannot be
	// understood. Nothing was done.
	ErrInvalidMetadata = errors.New("rpc: invalid request metadata")
	// ErrBehind: this node has not yet applied the revision the caller asked
	// for. Nothing was read.
	ErrBehind = errors.New("rpc: this node has not reached the requested revision yet")
	// ErrFutureRevision: the caller asked for a revision that no command of
	// this cluster has reached. It is a *FutureRevisionError.
	ErrFutureRevision = errors.New("rpc: this revision does not exist yet")
	// ErrEpoch: the state was replaced by a backup since the caller read it. It is
	// an *EpochError.
	ErrEpoch = errors.New("rpc: the state was restored from a backup")
	// ErrRefused: the other node refused the handshake, or was refused. It is
	// a *RefusedError.
	ErrRefused = errors.New("rpc: handshake refused")
	// ErrSuperseded: the stream belongs to a connection whose node has made a
	// later one. What it carried last was dropped, as best effort allows.
	ErrSuperseded = errors.New("rpc: a later connection of the same node took over")
	// ErrMemberRemoved: a node asks to come back under the id of a member that was
	// removed, and not only to come back. Nothing was done; the id is spent.
	ErrMemberRemoved = errors.New("rpc: the member of this id was removed")
	// ErrOtherDisk: a node asks to join under the id of a member that has another
	// data directory. Nothing was changed.
	ErrOtherDisk = errors.New("rpc: the member of this id has another data directory")
	// ErrPreflight: a condition of a replacement is not met; nothing was begun.
	ErrPreflight = errors.New("rpc: the preflight failed")
	// ErrOperationRunning: one of its kind is running. Nothing was begun.
	ErrOperationRunning = errors.New("rpc: an operation of this kind is running")
	// ErrMalformed: a peer sent something that no version of this program
	// sends. The stream was ended.
	ErrMalformed = errors.New("rpc: malformed message from a peer")
	// ErrSnapshotUnreachable: the snapshot may lie on a node that does not
	// answer. Nothing was done.
	ErrSnapshotUnreachable = errors.New("rpc: the snapshot cannot be reached")
	// ErrStalled: the client of a transfer stands still. The transfer was ended,
	// and nothing of an upload was kept.
	ErrStalled = errors.New("rpc: the transfer stands still")
	// ErrQuarantined: the state of this node differs from that of the other
	// members, or nobody knows whose is right. Nothing was read or changed;
	// another node may answer.
	ErrQuarantined = errors.New("rpc: this node does not answer from its state; nothing was done")
	// ErrClosed: the component was closed. Nothing was done.
	ErrClosed = errors.New("rpc: closed")
)

// EpochError refuses a call by somebody who knows a state that a backup has
// replaced since. Nothing was done. It matches ErrEpoch.
type EpochError struct {
	// Known is the epoch of the request, Current that of the state, Revision the
	// state's newest.
	Known, Current, Revision uint64
}

// Error implements error.
func (e *EpochError) Error() string {
	return fmt.Sprintf("rpc: the call is about restore epoch %d, the state is at epoch %d: "+
		"it was replaced by a backup; nothing was done, read everything again", e.Known, e.Current)
}

// Is makes errors.Is(err, ErrEpoch) true.
func (e *EpochError) Is(target error) bool { return target == ErrEpoch }

// FutureRevisionError refuses a read at a revision that no command of this
// cluster has reached. Nothing was read. It matches ErrFutureRevision.
type FutureRevisionError struct {
	// Asked is the revision of the request.
	Asked uint64
	// Current is a revision no older than the newest at the time.
	Current uint64
}

// Error implements error.
func (e *FutureRevisionError) Error() string {
	return fmt.Sprintf("rpc: revision %d does not exist yet, the newest is at most %d; nothing was read: "+
		"check that the revision came from this cluster", e.Asked, e.Current)
}

// Is makes errors.Is(err, ErrFutureRevision) true.
func (e *FutureRevisionError) Is(target error) bool { return target == ErrFutureRevision }

// RefusedError says which two nodes do not talk and why. It matches
// ErrRefused.
type RefusedError struct {
	// Peer is the id of the other node as far as it is known, 0 otherwise.
	Peer uint64
	// Reason is a sentence for people.
	Reason string
	// Kind is set for what the refused node acts on; ClientAddr is then where the
	// refusing node serves clients.
	Kind       Refusal
	ClientAddr string
	// Applied is the index the refusing node had applied: what it says of the
	// members was so then. Of refusals with a Kind.
	Applied uint64
	// Told: it is this node that was refused.
	Told bool
}

// Error implements error.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("rpc: handshake with node %d refused: %s", e.Peer, e.Reason)
}

// Is makes errors.Is(err, ErrRefused) true.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }
