package archive

import (
	"errors"
	"fmt"
)

// The errors of the package, to be compared with errors.Is. After each of them
// nothing of the archive is on disk. Errors of the source and of the disk
// (ENOSPC among them) are passed on as they are, wrapped.
var (
	// ErrNotArchive: the bytes are something else, or do not even begin.
	ErrNotArchive = errors.New("not a backup archive")
	// ErrCorrupt: it is an archive, and not as it was written. The error is a
	// *CorruptError.
	ErrCorrupt = errors.New("corrupt backup archive")
	// ErrNewerFormat: a newer version of the program has written it. It may be
	// whole.
	ErrNewerFormat = errors.New("the backup archive has a newer format than this program reads")
	// ErrTooLarge: it holds more than the Limits allow.
	ErrTooLarge = errors.New("the backup archive is too large")
	// ErrOffset: a stream was to begin behind its end.
	ErrOffset = errors.New("offset behind the end of the archive")
	// ErrClosed: the Archive was closed.
	ErrClosed = errors.New("the archive is closed")
)

// CorruptError says where an archive is damaged and how. It matches ErrCorrupt.
type CorruptError struct {
	// Entry is the file of the archive that was being read, "" outside of any.
	Entry string
	// Offset is where the fault was noticed, in bytes of the tar.
	Offset int64
	// Detail says what is wrong.
	Detail string
}

// Error implements error.
func (e *CorruptError) Error() string {
	where := ""
	if e.Entry != "" {
		where = fmt.Sprintf(" in %q", clip(e.Entry))
	}
	return fmt.Sprintf("corrupt backup archive: byte %d%s: %s; nothing of it was used: "+
		"copy it again from where it came from, or take another backup", e.Offset, where, e.Detail)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// clip bounds foreign text in messages.
func clip(s string) string {
	if len(s) > 128 {
		return s[:128] + "..."
	}
	return s
}
