package server

import "conveyor.etl/router/datadir"

// The reasons a data directory is refused. Nothing in it was changed.
var (
	// ErrInUse: another process holds the data directory.
	ErrInUse = datadir.ErrInUse
	// ErrForeign: the data directory belongs to another cluster or node.
	ErrForeign = datadir.ErrForeign
	// ErrNewer: the data directory was written by a newer version.
	ErrNewer = datadir.ErrNewer
	// ErrIncomplete: parts of the data directory are missing or unreadable.
	ErrIncomplete = datadir.ErrIncomplete
)
