package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/snap"
)

// writeCategory labels this package's writes in disk statistics.
const writeCategory vfs.DiskWriteCategory = "backup-archive"

// syncBytes is how much is written between two requests to the kernel to begin
// writing back: gigabytes of dirty pages would stall the log on the same disk.
const syncBytes = 1 << 20

// filesAhead is how many files may wait to become durable when nobody waits for it yet:
// they stay open, and with tables of the usual size are some hundred megabytes.
const filesAhead = 64

// syncers is how many of those become durable at a time.
const syncers = 2

// Extract unpacks the archive that r holds into dir, which must not exist while
// its parent must, and makes it durable, the entry of dir in its parent
// excepted. What it leaves is an image with its manifest, as snap.OpenDir reads
// and snap.Check checks it.
//
// Everything is checked while it is written. On any error, and when ctx is
// done, dir is removed; the error then says so if that failed too.
//
// The header is returned as far as it was read, also with an error.
func Extract(ctx context.Context, r io.Reader, limits Limits, fsys vfs.FS, dir string) (h Header, info snap.Info, err error) {
	d := &directory{fs: fsys, dir: dir, reserve: limits.ReserveBytes, most: 1, syncBytes: syncBytes}
	if h, info, err = d.unpack(ctx, r, limits); err != nil {
		return h, info, err
	}
	return h, info, d.settle()
}

// Unpacked is a directory that an archive was unpacked into and that may not be durable
// yet. It is not safe for concurrent use.
type Unpacked struct {
	Header Header
	Info   snap.Info
	d      *directory
}

// Unpack is Extract that does not wait for the disk, which takes as long as all the rest:
// the files of the image can be read at once, while they are made durable. Its manifest
// comes with Settle. The disk has nothing but that to do meanwhile, so Unpack is not for
// a node that serves. The caller ends with Settle or Abandon; the header is returned as
// by Extract.
func Unpack(ctx context.Context, r io.Reader, limits Limits, fsys vfs.FS, dir string) (*Unpacked, error) {
	u := &Unpacked{d: &directory{fs: fsys, dir: dir, reserve: limits.ReserveBytes, most: filesAhead}}
	var err error
	if u.Header, u.Info, err = u.d.unpack(ctx, r, limits); err != nil {
		return nil, err
	}
	return u, nil
}

// Settle waits until everything is durable, as Extract leaves it. On an error dir is removed.
func (u *Unpacked) Settle() error { return u.d.settle() }

// Abandon ends without that, and removes dir. After Settle it does nothing.
func (u *Unpacked) Abandon() error {
	if u.d.settled {
		return nil
	}
	return u.d.remove(nil)
}

// directory is the sink that Extract writes to.
type directory struct {
	fs      vfs.FS
	dir     string
	reserve int64
	// most is how many files may wait to become durable while another one is written,
	// syncBytes how much of one is written before that begins, 0 for all of it.
	most, syncBytes int
	manifest        []byte
	created         bool
	settled         bool
	// file is being written; before are those before it that are not durable yet.
	file   *sideFile
	before []*sideFile
	turns  chan struct{}
	// spare are blocks of a file that was finished.
	spare [2][]byte
}

// unpack writes everything but does not wait for the disk.
func (d *directory) unpack(ctx context.Context, r io.Reader, limits Limits) (h Header, info snap.Info, err error) {
	switch _, err := d.fs.Stat(d.dir); {
	case err == nil:
		return h, info, fmt.Errorf("archive: extract: %s exists already: %w", d.dir, fs.ErrExist)
	case !errors.Is(err, fs.ErrNotExist):
		return h, info, fmt.Errorf("archive: extract: %w", err)
	}
	d.turns = make(chan struct{}, syncers)
	if h, info, err = parse(ctx, r, limits, d); err != nil {
		err = d.remove(err)
	}
	return h, info, err
}

// remove takes back what was made, because of err.
func (d *directory) remove(err error) error {
	d.settled = true
	if !d.created {
		return err
	}
	d.abandon()
	if rerr := d.fs.RemoveAll(d.dir); rerr != nil {
		err = errors.Join(err, fmt.Errorf("archive: remove what was extracted so far: %w", rerr))
	}
	return err
}

func (d *directory) accept(_ *Header, info *snap.Info, manifest []byte) error {
	d.manifest = manifest
	usage, err := d.fs.GetDiskUsage(d.fs.PathDir(d.dir))
	need := uint64(info.Size) + uint64(max(d.reserve, 0))
	if err == nil && usage.AvailBytes < need {
		return fmt.Errorf("%w: the backup has %d bytes, %d are free of which %d must stay so; nothing was written: %w",
			snap.ErrNoSpace, info.Size, usage.AvailBytes, d.reserve, syscall.ENOSPC)
	}
	d.created = true
	// The parent exists, so this makes one directory.
	if err := d.fs.MkdirAll(d.dir, 0o750); err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	return nil
}

func (d *directory) create(f snap.File) error { return d.open(f.Name) }

func (d *directory) open(name string) error {
	f, err := d.fs.Create(d.fs.PathJoin(d.dir, name), writeCategory)
	if err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	if d.syncBytes > 0 {
		f = vfs.NewSyncingFile(f, vfs.SyncingFileOptions{BytesPerSync: d.syncBytes})
	}
	d.file = newSideFile(f, d.spare)
	d.spare = [2][]byte{}
	return nil
}

func (d *directory) write(p []byte) error {
	if err := d.file.write(p); err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	return nil
}

// finish ends the file. It becomes durable while others are unpacked.
func (d *directory) finish() error {
	if err := d.await(d.most - 1); err != nil {
		return err
	}
	blocks, err := d.file.finish(d.turns)
	if err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	d.spare = blocks
	d.before, d.file = append(d.before, d.file), nil
	return nil
}

// await waits until no more than so many of the files that were finished are not durable.
func (d *directory) await(left int) error {
	for len(d.before) > left {
		err := d.before[0].wait()
		d.before = d.before[1:]
		if err != nil {
			return fmt.Errorf("archive: extract: %w", err)
		}
	}
	return nil
}

// abandon closes what is open.
func (d *directory) abandon() {
	for _, f := range d.before {
		f.givenUp.Store(true) // all of them first: nobody waits for the disk in vain
	}
	for _, f := range d.before {
		f.abandon()
	}
	if d.file != nil {
		d.file.abandon()
	}
	d.file, d.before = nil, nil
}

// settle waits for the disk, and then writes the manifest: without it the directory is no
// image, however the machine stops.
func (d *directory) settle() (err error) {
	defer func() {
		if err != nil {
			err = d.remove(err)
		}
	}()
	if err := d.await(0); err != nil {
		return err
	}
	if err := d.open(snap.ManifestName); err != nil {
		return err
	}
	if err := d.write(d.manifest); err != nil {
		return err
	}
	if err := d.finish(); err != nil {
		return err
	}
	if err := d.await(0); err != nil {
		return err
	}
	f, err := d.fs.OpenDir(d.dir)
	if err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	d.settled = true
	return nil
}
