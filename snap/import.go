package snap

import (
	"context"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Import takes an image in that did not come through Receive, such as one out
// of an archive. fill gets the path of a directory that does not exist yet and
// creates it with the files of one image, its MANIFEST among them. Import reads
// everything and compares it with the manifest, makes it durable and publishes
// it. On an error, or a crash at any point, no image appears and nothing is
// left behind. Cancelling ctx ends it early.
//
// When exactly this image exists already, Import returns that one.
func (s *Store) Import(ctx context.Context, fill func(dir string) error) (Info, error) {
	dir := s.temp(creatingPrefix)
	// After publish has renamed dir, this finds nothing.
	defer s.removeLeftover(dir)
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	if err := fill(dir); err != nil {
		return Info{}, err
	}
	raw, err := readManifest(s.fs, dir, "being imported", &s.opts)
	if err != nil {
		return Info{}, err
	}
	info, err := decodeManifest(raw, "being imported", &s.opts)
	if err != nil {
		return Info{}, err
	}
	// More files than the manifest names would be opened by whoever installs
	// the image, unchecked.
	if err := s.checkListed(dir, info); err != nil {
		return Info{}, err
	}
	buf := make([]byte, readBlock)
	for _, want := range info.Files {
		have, err := s.sealFile(ctx, s.fs.PathJoin(dir, want.Name), want.Name, buf)
		if err != nil {
			return Info{}, err
		}
		if have.Size != want.Size || have.CRC != want.CRC {
			return Info{}, &CorruptError{Image: info.ID, File: want.Name, Detail: fmt.Sprintf(
				"%d bytes with checksum %08x, the manifest says %d with %08x", have.Size, have.CRC, want.Size, want.CRC)}
		}
	}
	if err := makeDurable(s.fs, s.fs.PathJoin(dir, manifestName)); err != nil {
		return Info{}, err
	}
	if err := syncDir(s.fs, dir); err != nil {
		return Info{}, err
	}
	return s.publish(dir, info)
}

func (s *Store) checkListed(dir string, info *Info) error {
	names, err := s.fs.List(dir)
	if err != nil {
		return fmt.Errorf("snap: list what is imported: %w", err)
	}
	listed := make(map[string]bool, len(info.Files)+1)
	listed[manifestName] = true
	for _, f := range info.Files {
		listed[f.Name] = true
	}
	for _, name := range names {
		if !listed[name] {
			return &CorruptError{Image: info.ID, File: clip(name), Detail: "the manifest does not name it"}
		}
	}
	return nil
}

// makeDurable makes the content of path durable.
func makeDurable(fsys vfs.FS, path string) error {
	f, err := fsys.Open(path)
	if err != nil {
		return fmt.Errorf("snap: open %s: %w", path, err)
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("snap: fsync %s: %w", path, err)
	}
	return nil
}
