package router

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// CreateFrom makes the state directory of a node of a new cluster out of an
// image: the content of the image at position pos. Operations, whatever was
// staged and the restores of the old cluster are left out; revisions go on where
// those of the image end. Equal images and positions make equal states, so that
// every node of a new cluster can be made from the same backup.
//
// stateDir must not exist or be empty, or the call fails with ErrStateExists; its
// parent is made when it is missing. When it returns without an error the state
// is durable. After an error or a crash there is no stateDir, and the call can be
// repeated; what it left beside it is removed then. imageDir is only read.
func CreateFrom(f vfs.FS, stateDir, imageDir string, pos Position, o Options) error {
	o = o.EnsureDefaults()
	o.Bootstrap = pos
	if err := o.Validate(); err != nil {
		return err
	}
	if err := createFrom(f, stateDir, imageDir, pos, o); err != nil {
		return fmt.Errorf("router: create a state in %s from the image in %s: no state was made: %w", stateDir, imageDir, err)
	}
	return nil
}

func createFrom(f vfs.FS, stateDir, imageDir string, pos Position, o Options) error {
	tmp := stateDir + unfinished
	if err := f.RemoveAll(tmp); err != nil {
		return err
	}
	if names, err := f.List(stateDir); err == nil && len(names) > 0 {
		return ErrStateExists
	} else if err == nil {
		if err := f.Remove(stateDir); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Opened first: what is no image is told from a fault of this directory.
	im, err := OpenImage(f, imageDir, o)
	if err != nil {
		return err
	}
	if err := im.Close(); err != nil {
		return err
	}
	if err := makeDir(f, tmp); err != nil {
		return err
	}
	name := dbName(1)
	path := f.PathJoin(tmp, name)
	if err := copyFiles(f, imageDir, path); err != nil {
		return err
	}
	if err := syncDir(f, path); err != nil {
		return err
	}
	d, err := openDatabase(f, path, name, o, false)
	if err != nil {
		return err
	}
	if err = errors.Join(relocate(d, pos), d.release()); err != nil {
		return err
	}
	// CURRENT syncs the directory it is in; then the whole gets its name.
	if err := writeMarker(f, tmp, name); err != nil {
		return err
	}
	if err := f.Rename(tmp, stateDir); err != nil {
		return err
	}
	return syncDir(f, f.PathDir(stateDir))
}

// relocate makes the content of a database the beginning of another cluster.
func relocate(d *database, pos Position) error {
	clock, err := readClock(d.db)
	if err == nil {
		err = fitSums(d.db, clock)
	}
	if err != nil {
		return err
	}
	begin(clock, pos.Index)
	b := d.db.NewBatch()
	for _, table := range []byte{prefixOperation, prefixOperationEnd, prefixStage} {
		from := key(nil).table(table)
		err = errors.Join(err, b.DeleteRange(from, prefixEnd(from), nil))
	}
	for _, name := range []string{metaStage, metaSwap, metaRestored} {
		err = errors.Join(err, b.Delete(key(nil).meta(name), nil))
	}
	if err = errors.Join(err, putHead(b, pos, clock)); err != nil {
		return errors.Join(err, b.Close())
	}
	if err := b.Commit(pebble.NoSync); err != nil {
		return err
	}
	return errors.Join(b.Close(), d.flush())
}

// begin makes a clock that of a cluster whose log begins after index.
func begin(c *commandpb.Clock, index uint64) {
	c.Epoch, c.RevisionBase = 0, 0
	if c.Revision > index {
		c.RevisionBase = c.Revision - index
	}
	c.OperationHead, c.OperationTail = 0, 0
	c.Counts[countOperations] = 0
	c.Sums[sumOperations], c.Sums[sumOperationEnds] = 0, 0
}
