package router

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
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

// Image is a database that is only read: that of an image, or of a node that
// does not run.
type Image struct {
	s *FSM
	d *database
}

// OpenImage opens the database in dir for reading. Nothing is changed, also not
// by Close.
func OpenImage(f vfs.FS, dir string, o Options) (*Image, error) {
	o = o.EnsureDefaults()
	cache := pebble.NewCache(o.CacheBytes)
	defer cache.Unref()
	po := pebbleOptions(f, o, cache)
	po.ReadOnly = true
	po.ErrorIfNotExists = true
	po.FormatMajorVersion = pebble.FormatDefault // take it as it is
	db, err := pebble.Open(dir, po)
	if err != nil {
		return nil, fmt.Errorf("router: open image %s: %w", dir, formatError(err))
	}
	d := &database{db: db, fs: f, dir: dir, log: o.Logger, trouble: make(chan struct{})}
	d.refs.Store(1)
	if err := checkFormat(db); err != nil {
		return nil, errors.Join(fmt.Errorf("router: image %s: %w", dir, err), db.Close())
	}
	pos, err := readPosition(db)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("router: image %s: %w", dir, err), db.Close())
	}
	return &Image{s: &FSM{fs: f, o: o, cur: d, pos: pos, records: newRecordCache(o.RecordBytes)}, d: d}, nil
}

// View returns a view of the image; close it before the image.
func (i *Image) View() *View { return i.s.View() }

// Close closes the image.
func (i *Image) Close() error { return i.d.release() }

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
