package backup

import (
	"errors"
	"fmt"
)

// The errors of the package, to be compared with errors.Is.
var (
	// ErrNotFound: the store holds no backup of this id.
	ErrNotFound = errors.New("no such backup")
	// ErrExists: it holds one already. Nothing was written.
	ErrExists = errors.New("the backup exists already")
	// ErrIncomplete: an upload of this id was not finished; it is no backup.
	ErrIncomplete = errors.New("the backup is incomplete")
	// ErrDamaged: what is stored is not what was written. The error is a
	// *DamagedError.
	ErrDamaged = errors.New("damaged backup")
	// ErrInvalidID: the text cannot be the id of a backup.
	ErrInvalidID = errors.New("invalid backup id")
	// ErrInvalidURL: the text cannot name a place of backups.
	ErrInvalidURL = errors.New("invalid backup location")
)

// DamagedError says which object of a backup is not as it was written. It
// matches ErrDamaged.
type DamagedError struct {
	// ID is the backup, Object one of its two.
	ID, Object string
	// Detail says what is wrong.
	Detail string
}

// Error implements error.
func (e *DamagedError) Error() string {
	return fmt.Sprintf("damaged backup %s: %s: %s; do not restore from it: use another backup, and delete this one",
		clip(e.ID), e.Object, e.Detail)
}

// Is makes errors.Is(err, ErrDamaged) true.
func (e *DamagedError) Is(target error) bool { return target == ErrDamaged }

// clip bounds foreign text in messages.
func clip(s string) string {
	if len(s) > 128 {
		return s[:128] + "..."
	}
	return s
}
