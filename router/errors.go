package router

import (
	"errors"
	"fmt"
)

var (
	// ErrNotStaged means that there is nothing to prepare: the restore was
	// abandoned, is swapped in already, or is still being staged.
	ErrNotStaged = errors.New("router: this restore is not staged completely, or no longer; nothing was prepared")

	// ErrBadChunk means that staged records cannot be used: they are damaged, out
	// of order, or not what was announced. No replica can prepare them.
	ErrBadChunk = errors.New("router: the staged records are damaged or not what was announced; nothing was changed: abandon the restore and check the backup")

	// ErrStateExists means that a state was to be made where there is something
	// already. Nothing was changed; use an empty directory.
	ErrStateExists = errors.New("router: there is a state already, or something else; use an empty directory")

	// ErrClosed means that the state machine or the view was closed before the
	// call; nothing was done.
	ErrClosed = errors.New("router: state is closed")

	// ErrCompacted means that a subscription asked for changes the history no
	// longer holds: read a View, then subscribe from its revision.
	ErrCompacted = errors.New("router: the changes after this revision are no longer kept; read the current state and subscribe from its revision")

	// ErrFutureRevision means that a revision was named this replica has not
	// reached: it is behind, or the revision belongs to another cluster.
	ErrFutureRevision = errors.New("router: this revision is not reached here yet; read from a node that is up to date or wait")

	// ErrResync means that a subscription cannot go on without a gap: it was
	// overrun, or the whole state was replaced by an image. Read a View and
	// subscribe again.
	ErrResync = errors.New("router: the subscription lost its place; read the current state and subscribe from its revision")

	// ErrNewerFormat means that a newer release wrote the state on disk.
	// Nothing was changed; run that release, or rejoin with an empty directory.
	ErrNewerFormat = errors.New("router: the stored state has a newer format than this release can read")

	// ErrUnknownCommand means that a committed command is of a kind this
	// release does not know or cannot decode. Skipping it would make this
	// replica differ from the others, so the node has to stop.
	ErrUnknownCommand = errors.New("router: the log holds a command this release does not understand; nothing of its entry was applied; run the release of the other nodes")

	// ErrNoSpace means that the disk is full. What is applied stays readable
	// and is replayed from the log after a restart; make room.
	ErrNoSpace = errors.New("router: no space left for the state; nothing durable was lost; free disk space")

	// ErrCorrupt means that stored bytes contradict themselves. The replica has
	// to be rebuilt from another node.
	ErrCorrupt = errors.New("router: the stored state is corrupt; rejoin this node with an empty data directory")

	// ErrLostMarker means that the file CURRENT is missing although there is
	// state it should point to. Opening would start from nothing.
	ErrLostMarker = errors.New("router: the file CURRENT is missing but databases with state exist; restore it with the name of the newest db-* directory as its only line")
)

// RevisionError says which revision was asked for and what is there. It
// unwraps to ErrCompacted, ErrFutureRevision or ErrResync.
type RevisionError struct {
	Kind      error
	Requested uint64
	// Current is the newest revision of this replica.
	Current uint64
}

// Error describes the failure with both revisions.
func (e *RevisionError) Error() string {
	return fmt.Sprintf("%v (asked for %d, current is %d)", e.Kind, e.Requested, e.Current)
}

// Unwrap returns the sentinel.
func (e *RevisionError) Unwrap() error { return e.Kind }
