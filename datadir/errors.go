package datadir

import "errors"

// The reasons a data directory is refused. Nothing in it was changed.
var (
	// ErrInUse: another process holds the data directory.
	ErrInUse = errors.New("the data directory is in use")
	// ErrForeign: the data directory belongs to another cluster or node.
	ErrForeign = errors.New("the data directory belongs to another cluster or node")
	// ErrNewer: the data directory was written by a newer version.
	ErrNewer = errors.New("the data directory was written by a newer version")
	// ErrIncomplete: parts of the data directory are missing or unreadable.
	ErrIncomplete = errors.New("the data directory is not complete")
)
