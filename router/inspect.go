package router

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// CurrentDir returns the directory of the database that is in force in the
// state directory root, without changing anything. It is for tools that work on
// the state of a node that does not run. When there is no state yet the error
// matches fs.ErrNotExist.
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
	return "", fmt.Errorf("router: there is no state in %s: %w", root, fs.ErrNotExist)
}

// ReadPosition returns the position of the database in dir, which may be an
// image, without changing anything. Nobody may write it meanwhile.
func ReadPosition(f vfs.FS, dir string) (Position, error) {
	im, err := OpenImage(f, dir, Options{})
	if err != nil {
		return Position{}, err
	}
	return im.Position(), im.Close()
}

// UndoDirs returns the directories below the state directory root that hold what
// restores replaced; each can be opened as an image. One that is being made or
// removed is left out.
func UndoDirs(f vfs.FS, root string) ([]string, error) {
	names, err := f.List(root)
	if err != nil {
		return nil, fmt.Errorf("router: list %s: %w", root, err)
	}
	var out []string
	for _, name := range names {
		if epoch, ok := strings.CutPrefix(name, undoPrefix); ok {
			if n, err := strconv.ParseUint(epoch, 10, 64); err == nil && name == undoName(n) {
				out = append(out, f.PathJoin(root, name))
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// UndoID is what the undo point of a state of an epoch is called among the snapshots
// of a node.
func UndoID(epoch uint64) string { return fmt.Sprintf("undo-%d", epoch) }

// UndoDir returns the directory below the state directory root that holds the
// state which the last restore of a state of an epoch replaced, "" when there is
// none or it cannot be opened.
func UndoDir(f vfs.FS, root string, epoch uint64) string {
	if epoch == 0 {
		return ""
	}
	dir := f.PathJoin(root, undoName(epoch-1))
	if u, err := readUndo(f, dir, Options{}.EnsureDefaults()); err != nil || u.Epoch != epoch-1 {
		return ""
	}
	return dir
}

// KeepUndo makes what UndoDir returned the undo point of the state directory root,
// durably, unless that has one of the same epoch. Tables are linked where the file
// system allows it. After an error there is none, or it is whole.
func KeepUndo(f vfs.FS, dir, root string) error {
	to := f.PathJoin(root, f.PathBase(dir))
	if _, err := f.Stat(to); err == nil {
		return nil
	}
	tmp := to + unfinished
	if err := f.RemoveAll(tmp); err != nil {
		return err
	}
	if err := copyFiles(f, dir, tmp); err != nil {
		return err
	}
	if err := syncDir(f, tmp); err != nil {
		return err
	}
	if err := f.Rename(tmp, to); err != nil {
		return err
	}
	return syncDir(f, root)
}

// AllGroupOffsets lists the offsets of all groups, also of those without
// members.
func (v *View) AllGroupOffsets(fn func(group, source string, partition uint32, o *commandpb.Offset) bool) error {
	var bad error
	err := listRecords(v, key(nil).table(prefixGroupOffset), nil, 0, func(k []byte, o *commandpb.Offset) bool {
		group, source, p, err := decodeGroupOffset(k)
		if bad = err; err != nil {
			return false
		}
		return fn(group, source, p, o)
	})
	return errors.Join(err, bad)
}

// Check verifies every invariant of the state the view shows, as Image.Check
// does.
func (v *View) Check(ctx context.Context) error { return v.check(ctx, true) }

// Dir returns the directory of the state.
func (s *FSM) Dir() string { return s.root }
