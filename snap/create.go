package snap

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"
)

// Create makes an image of what build writes. build gets the path of a
// directory that does not exist yet, creates it with plain files inside (no
// subdirectories) on the store's file system, and returns what they hold.
// Hard links are welcome; the files must not change any more.
//
// Create reads for the checksums what was in no image before, was not received and not
// warmed (see Warm), so it is slow in proportion to that; it holds up nothing else
// meanwhile. On an error, or a crash at
// any point, no image appears. Cancelling ctx ends it early.
//
// When exactly this image exists already, Create returns that one.
func (s *Store) Create(ctx context.Context, build func(dir string) (Meta, error)) (Info, error) {
	dir := s.temp(creatingPrefix)
	// After publish has renamed dir, this finds nothing.
	defer s.removeLeftover(dir)

	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	meta, err := build(dir)
	if err != nil {
		return Info{}, err
	}
	if meta.Format != 0 && meta.Format != formatVersion {
		return Info{}, fmt.Errorf("snap: create: cannot write image format %d, only %d", meta.Format, formatVersion)
	}
	info := &Info{
		Meta: meta,
		// Whole milliseconds, as the manifest stores them: what Create returns
		// is what a restart finds.
		Created: time.UnixMilli(s.opts.Now().UnixMilli()),
	}
	info.Format = formatVersion
	if info.Files, err = s.seal(ctx, dir); err != nil {
		return Info{}, err
	}
	raw, err := encodeManifest(info)
	if err != nil {
		return Info{}, err
	}
	if int64(len(raw)) > s.opts.MaxManifestBytes {
		return Info{}, manifestTooLarge("being made", int64(len(raw)), &s.opts)
	}
	info.ID = imageID(raw, info.Index, info.Term)
	if err := info.complete(info.ID, int64(len(raw)), &s.opts); err != nil {
		return Info{}, err
	}
	// The manifest comes last: as long as it is missing or torn, nothing in
	// this directory can be taken for an image, whatever else a crash kept.
	if err := writeFile(s.fs, s.fs.PathJoin(dir, manifestName), raw); err != nil {
		return Info{}, err
	}
	if err := syncDir(s.fs, dir); err != nil {
		return Info{}, err
	}
	return s.publish(dir, info)
}

// seal makes the files in dir durable and returns them with their checksums.
func (s *Store) seal(ctx context.Context, dir string) ([]File, error) {
	names, err := s.fs.List(dir)
	if err != nil {
		return nil, fmt.Errorf("snap: create: list what was built: %w", err)
	}
	if len(names) > s.opts.MaxFiles {
		return nil, fmt.Errorf("%w: the image being made has %d files, the limit is %d",
			ErrTooLarge, len(names), s.opts.MaxFiles)
	}
	slices.Sort(names)
	s.opts.Sums.begin()
	files := make([]File, 0, len(names))
	buf := make([]byte, readBlock)
	for _, name := range names {
		if why := badFileName(name); why != "" {
			return nil, fmt.Errorf("snap: create: file name %q cannot be in an image: %s", clip(name), why)
		}
		f, err := s.sealFile(ctx, s.fs.PathJoin(dir, name), name, buf)
		if err != nil {
			return nil, err
		}
		f.Name = name
		files = append(files, f)
	}
	return files, nil
}

func (s *Store) sealFile(ctx context.Context, path, name string, buf []byte) (file File, err error) {
	f, err := s.fs.Open(path)
	if err != nil {
		return File{}, fmt.Errorf("snap: create: open %s: %w", path, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return File{}, fmt.Errorf("snap: create: stat %s: %w", path, err)
	}
	if !st.Mode().IsRegular() {
		return File{}, fmt.Errorf("snap: create: %s is not a plain file: images are flat", path)
	}
	id, known := identify(st)
	known = known && immutable(name)
	if known {
		// The common table of an image was written through Summing, or is in an
		// image already: to sync it again would only wait in line behind the log.
		if crc, durable, ok := s.opts.Sums.get(id); ok && durable {
			return File{Size: id.size, CRC: crc}, nil
		}
	}
	// fsync needs no write permission on the descriptor, and the files may be
	// hard links into a live database that must not be opened for writing.
	if err := f.Sync(); err != nil {
		return File{}, fmt.Errorf("snap: create: fsync %s: %w", path, err)
	}
	file, _, err = s.opts.Sums.sum(ctx, f, name, math.MaxInt64, buf)
	if err != nil {
		return File{}, fmt.Errorf("snap: create: read %s: %w", path, err)
	}
	if known && file.Size == id.size {
		s.opts.Sums.settled(id)
	}
	return file, nil
}
