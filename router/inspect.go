package router

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// CurrentDir returns the directory of the database that is in force in the
// state directory root, without changing anything. It is for tools that work on
// the state of a node that does not run. When there is no state yet the error
// matches ErrNoState.
func CurrentDir(f vfs.FS, root string) (string, error) {
	name, err := readMarker(f, root)
	if err != nil {
		return "", fmt.Errorf("router: %w", err)
	}
	if name != "" {
		return f.PathJoin(root, name), nil
	}
	creating := f.PathJoin(root, creatingName)
	if _, err := f.Stat(creating); err != nil {
		if left, err := databases(f, root); err == nil && len(left) > 0 {
			return "", fmt.Errorf("%w (found %s)", ErrLostMarker, f.PathJoin(root, dbName(left[len(left)-1])))
		}
	}
	return "", fmt.Errorf("%w in %s", ErrNoState, root)
}

// ErrNoState means that a node has not got as far as making its first state.
var ErrNoState = errors.New("router: there is no state yet")

// ReadPosition returns the position of the database in dir, which may be an
// image, without changing anything. Nobody may write it meanwhile.
func ReadPosition(f vfs.FS, dir string) (Position, error) {
	pos, err := peekPosition(f, dir, Options{}.EnsureDefaults())
	if err != nil {
		return Position{}, fmt.Errorf("router: read %s: %w", dir, err)
	}
	return pos, nil
}
