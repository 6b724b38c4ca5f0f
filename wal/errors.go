package wal

import (
	"errors"
	"fmt"
)

var (
	// ErrCorrupt: bytes that were once durable cannot be read back. Compare
	// with errors.Is; the value is always a *CorruptError.
	ErrCorrupt = errors.New("wal: the log is damaged")
	// ErrForeign: the log belongs to another node or another cluster.
	ErrForeign = errors.New("wal: the log belongs to another node")
	// ErrNewerFormat: the log was written by a newer version of this program.
	// Nothing was changed.
	ErrNewerFormat = errors.New("wal: the log has a newer format than this program knows; start the version that wrote it, or a later one")
	// ErrLocked: another process, or another Log of this one, has the log open.
	ErrLocked = errors.New("wal: the log is in use by another process")
	// ErrClosed: the Log was closed. Nothing was written.
	ErrClosed = errors.New("wal: the log is closed")
	// ErrRefused: the call would break an invariant of the log. Nothing was
	// written and the Log remains usable, but its caller has a bug.
	ErrRefused = errors.New("wal: refused, nothing was written")
	// ErrFailed: an earlier or this write did not complete. What it carried may
	// or may not be on disk; the Log accepts no further call. Restart the node.
	ErrFailed = errors.New("wal: the log failed and accepts no further writes; restart the node")
)

// wayOut ends the text of every CorruptError.
const wayOut = "the node must not start from this log: stop it, keep a copy of its data directory, then either remove the node from the cluster and let it rejoin with an empty data directory, or restore the cluster from a backup"

// CorruptError says where the log stops being readable.
type CorruptError struct {
	// File is the path of the damaged segment, or the directory when a whole
	// segment is missing.
	File string
	// Offset is the byte offset in File of the first record that cannot be used.
	Offset int64
	// Reason says what is wrong there.
	Reason string
}

// Error implements error.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("wal: the log is damaged in %s at byte %d: %s; %s", e.File, e.Offset, e.Reason, wayOut)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}
