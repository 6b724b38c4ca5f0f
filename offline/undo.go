package offline

import (
	"errors"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/router"
)

// What there is of the state that the last restore replaced.
const (
	UndoKept = "kept"
	UndoLost = "lost"
)

// epochOf returns the restore epoch of the database in dir.
func epochOf(f vfs.FS, dir string) (uint64, error) {
	im, err := router.OpenImage(f, dir, router.Options{})
	if err != nil {
		return 0, err
	}
	v := im.View()
	epoch := v.Epoch()
	return epoch, errors.Join(v.Close(), im.Close())
}

// undo says what d has of the state before the last restore of a state of an epoch:
// beside the state, or among the snapshots, which a recovery leaves in their place.
func (d *Directory) undo(epoch uint64) string {
	if epoch == 0 {
		return ""
	}
	if router.UndoDir(d.fs, filepath.Dir(d.state), epoch) != "" || d.undoSnapshot(epoch) {
		return UndoKept
	}
	return UndoLost
}

// undoSnapshot says whether a running node has put it among its snapshots.
func (d *Directory) undoSnapshot(epoch uint64) bool {
	_, err := d.fs.Stat(filepath.Join(d.Path, datadir.BackupsName, router.UndoID(epoch)+".json"))
	return err == nil
}

// keepUndo carries the undo point of d over to the state in the directory next,
// unless applying the log has made it there, and says what there is. A state of
// another epoch has no use for it.
func keepUndo(d *Directory, next string, epoch uint64) (string, error) {
	root := filepath.Join(next, datadir.StateName)
	if epoch == 0 {
		return "", nil
	}
	if router.UndoDir(vfs.Default, root, epoch) != "" {
		return UndoKept, nil
	}
	dir := router.UndoDir(d.fs, filepath.Dir(d.state), epoch)
	if dir == "" {
		if d.undoSnapshot(epoch) {
			return UndoKept, nil
		}
		return UndoLost, nil
	}
	return UndoKept, router.KeepUndo(vfs.Default, dir, root)
}
