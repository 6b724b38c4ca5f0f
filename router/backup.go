package router

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// Image is an image that is only read: one made by FSM.Image, an undo point or
// the files of a backup. Its methods are safe for concurrent use.
type Image struct {
	d      *database
	pos    Position
	clock  *commandpb.Clock
	closed atomic.Bool
}

// OpenImage opens an image without changing anything in its directory, so that
// several may have it open. Of o only the sizes of caches and the logger count.
// It fails with ErrNewerFormat or ErrCorrupt; what it does not look at, Check
// does.
func OpenImage(f vfs.FS, dir string, o Options) (*Image, error) {
	o = o.EnsureDefaults()
	cache := pebble.NewCache(min(o.CacheBytes, 8<<20))
	defer cache.Unref()
	po := pebbleOptions(readOnly{f}, o, cache)
	po.ReadOnly = true
	po.ErrorIfNotExists = true
	po.FormatMajorVersion = pebble.FormatDefault // take it as it is
	db, err := pebble.Open(dir, po)
	if err != nil {
		return nil, fmt.Errorf("router: open the image in %s: %w", dir, formatError(err))
	}
	im := &Image{d: &database{db: db, fs: readOnly{f}, dir: dir, log: o.Logger, trouble: make(chan struct{})}}
	im.d.refs.Store(1)
	err = checkFormat(db)
	if err == nil {
		im.pos, err = readPosition(db)
	}
	if err == nil {
		im.clock, err = readClock(db)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("router: the image in %s: %w", dir, err), db.Close())
	}
	return im, nil
}

// View returns a view of the image; the image may be closed before it.
func (im *Image) View() *View {
	if im.closed.Load() || !im.d.hold() {
		return &View{err: ErrClosed}
	}
	return viewOf(nil, im.d)
}

// Position returns where the image stands in the log it was made from.
func (im *Image) Position() Position { return im.pos.clone() }

// sourceOf describes the content, which has this hash, for BeginRestore. Whose
// cluster it was is not known here.
func (im *Image) sourceOf(contentHash []byte) *commandpb.RestoreSource {
	return &commandpb.RestoreSource{
		Epoch: im.clock.Epoch, Index: im.pos.Index, Term: im.pos.Term,
		Clock: proto.Clone(im.clock).(*commandpb.Clock), ContentHash: contentHash,
	}
}

// Close releases the image. Views of it stay readable until they are closed.
func (im *Image) Close() error {
	if im.closed.Swap(true) {
		return nil
	}
	return im.d.release()
}

// readOnly is a file system that cannot be changed, and in which everything is
// locked at once: an image never changes, so there is nothing to lock.
type readOnly struct{ vfs.FS }

var errReadOnly = fmt.Errorf("router: images are only read: %w", fs.ErrPermission)

type noLock struct{}

func (noLock) Close() error { return nil }

func (readOnly) Lock(string) (io.Closer, error) { return noLock{}, nil }
func (readOnly) Create(string, vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, errReadOnly
}
func (readOnly) Link(string, string) error { return errReadOnly }
func (readOnly) OpenReadWrite(string, vfs.DiskWriteCategory, ...vfs.OpenOption) (vfs.File, error) {
	return nil, errReadOnly
}
func (readOnly) Remove(string) error         { return errReadOnly }
func (readOnly) RemoveAll(string) error      { return errReadOnly }
func (readOnly) Rename(string, string) error { return errReadOnly }
func (readOnly) ReuseForWrite(string, string, vfs.DiskWriteCategory) (vfs.File, error) {
	return nil, errReadOnly
}
func (readOnly) MkdirAll(string, fs.FileMode) error { return errReadOnly }
