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
	switch _, err := fsys.Stat(dir); {
	case err == nil:
		return h, info, fmt.Errorf("archive: extract: %s exists already: %w", dir, fs.ErrExist)
	case !errors.Is(err, fs.ErrNotExist):
		return h, info, fmt.Errorf("archive: extract: %w", err)
	}
	d := &directory{fs: fsys, dir: dir, reserve: limits.ReserveBytes}
	defer func() {
		if err == nil || !d.created {
			return
		}
		d.abandon()
		if rerr := fsys.RemoveAll(dir); rerr != nil {
			err = errors.Join(err, fmt.Errorf("archive: remove what was extracted so far: %w", rerr))
		}
	}()
	if h, info, err = parse(ctx, r, limits, d); err != nil {
		return h, info, err
	}
	return h, info, d.seal()
}

// directory is the sink that Extract writes to.
type directory struct {
	fs       vfs.FS
	dir      string
	reserve  int64
	manifest []byte
	created  bool
	// file is being written; before is the one before it, until it is durable.
	file, before *sideFile
	// spare are blocks of a file that was finished.
	spare [2][]byte
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
	d.file = newSideFile(vfs.NewSyncingFile(f, vfs.SyncingFileOptions{BytesPerSync: syncBytes}), d.spare)
	d.spare = [2][]byte{}
	return nil
}

func (d *directory) write(p []byte) error {
	if err := d.file.write(p); err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	return nil
}

// finish ends the file. It becomes durable while the next one is unpacked.
func (d *directory) finish() error {
	if err := d.settle(); err != nil {
		return err
	}
	d.file.finish()
	d.before, d.file = d.file, nil
	return nil
}

// settle waits until what was finished is durable.
func (d *directory) settle() error {
	if d.before == nil {
		return nil
	}
	err := d.before.wait()
	d.spare = d.before.blocks.spare()
	d.before = nil
	if err != nil {
		return fmt.Errorf("archive: extract: %w", err)
	}
	return nil
}

// abandon closes what is open.
func (d *directory) abandon() {
	for _, f := range []*sideFile{d.file, d.before} {
		if f != nil {
			f.abandon()
		}
	}
	d.file, d.before = nil, nil
}

// seal writes the manifest, last: without it the directory is no image, however
// the machine stops.
func (d *directory) seal() error {
	if err := d.settle(); err != nil {
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
	if err := d.settle(); err != nil {
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
	return nil
}
