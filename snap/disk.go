package snap

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// writeCategory labels this package's writes in disk statistics.
const writeCategory vfs.DiskWriteCategory = "snapshot-image"

// readBlock is the unit of checksumming: large enough to keep a disk
// streaming, small enough to notice a cancelled context within milliseconds.
const readBlock = 256 << 10

// syncDir makes the entries of dir durable.
func syncDir(fsys vfs.FS, dir string) error {
	d, err := fsys.OpenDir(dir)
	if err != nil {
		return fmt.Errorf("snap: open directory %s to fsync it: %w", dir, err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("snap: fsync directory %s: %w", dir, err)
	}
	return nil
}

// mkdirDurable creates dir and its missing parents so that all of them survive
// power loss: MkdirAll alone leaves entries that a crash may take away together
// with every image inside.
func mkdirDurable(fsys vfs.FS, dir string) error {
	var toSync []string
	for d := dir; ; {
		_, err := fsys.Stat(d)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("snap: stat %s: %w", d, err)
		}
		parent := fsys.PathDir(d)
		if parent == d {
			break
		}
		toSync = append(toSync, parent)
		d = parent
	}
	if err := fsys.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("snap: create directory %s: %w", dir, err)
	}
	for i := len(toSync) - 1; i >= 0; i-- {
		if err := syncDir(fsys, toSync[i]); err != nil {
			return err
		}
	}
	return nil
}

// writeFile creates path with the given content and makes the content (not the
// directory entry) durable.
func writeFile(fsys vfs.FS, path string, content []byte) error {
	f, err := fsys.Create(path, writeCategory)
	if err != nil {
		return fmt.Errorf("snap: create %s: %w", path, err)
	}
	// vfs allows Write to scribble over its argument.
	_, err = f.Write(append([]byte(nil), content...))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("snap: write %s: %w", path, err)
	}
	return nil
}

// readManifest reads the manifest in dir. A missing one, or a dir that is not
// there, is an error that matches fs.ErrNotExist.
func readManifest(fsys vfs.FS, dir, image string, o *Options) (raw []byte, err error) {
	path := fsys.PathJoin(dir, manifestName)
	f, err := fsys.Open(path)
	if err != nil {
		return nil, fmt.Errorf("snap: open %s: %w", path, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("snap: stat %s: %w", path, err)
	}
	if st.Size() > o.MaxManifestBytes {
		return nil, manifestTooLarge(image, st.Size(), o)
	}
	raw = make([]byte, st.Size())
	if _, err := io.ReadFull(f, raw); err != nil {
		return nil, fmt.Errorf("snap: read %s: %w", path, err)
	}
	return raw, nil
}

// checksum reads f to its end and returns its size and crc32c. It stops early
// when ctx is done, and once more than limit bytes were read, so that a file
// that has grown beyond its declared size is not read in full.
func checksum(ctx context.Context, f vfs.File, limit int64, buf []byte) (size int64, crc uint32, err error) {
	for {
		if err := ctx.Err(); err != nil {
			return size, crc, err
		}
		n, err := f.Read(buf)
		size += int64(n)
		crc = crc32.Update(crc, castagnoli, buf[:n])
		if errors.Is(err, io.EOF) || err == nil && size > limit {
			return size, crc, nil
		}
		if err != nil {
			return size, crc, err
		}
	}
}

// removeLeftover removes a directory that is no image. A failure is only worth
// a log line: the next OpenStore removes it.
func (s *Store) removeLeftover(dir string) {
	if err := s.fs.RemoveAll(dir); err != nil {
		s.opts.Logger.Warn("could not remove a leftover directory; the next start tries again",
			"dir", dir, "err", err)
	}
}
