package snap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Check reads the image in dir completely and returns nil when every byte of
// it is the one that was written, and an error that matches ErrCorrupt (or
// ErrNewerFormat) when not. It needs no Store, changes nothing, may run beside
// a live one, and takes a copy of an image under any directory name.
func Check(fsys vfs.FS, dir string) error {
	info, err := Inspect(fsys, dir)
	if err != nil {
		return err
	}
	return checkFiles(context.Background(), fsys, dir, &info, false, nil)
}

// Inspect reads the manifest of the image in dir, and nothing else.
func Inspect(fsys vfs.FS, dir string) (Info, error) {
	info, _, err := inspect(fsys, dir)
	if err != nil {
		return Info{}, err
	}
	return *info, nil
}

func inspect(fsys vfs.FS, dir string) (*Info, []byte, error) {
	o := new(Options).EnsureDefaults()
	if _, err := fsys.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: %s", ErrNotFound, dir)
	}
	raw, err := readManifest(fsys, dir, dir, o)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, &CorruptError{Image: dir, File: manifestName, Detail: "the file is missing"}
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := decodeManifest(raw, dir, o)
	if err != nil {
		return nil, nil, err
	}
	return info, raw, nil
}

// ParseManifest checks and decodes a manifest that has come by another way
// than Receive. from names where it was found, for errors.
func ParseManifest(raw []byte, from string) (Info, error) {
	info, err := decodeManifest(raw, from, new(Options).EnsureDefaults())
	if err != nil {
		return Info{}, err
	}
	return *info, nil
}

// Verify reads image id completely, as Check does, and keeps it from being
// removed meanwhile.
func (s *Store) Verify(id string) error {
	return s.VerifyContext(context.Background(), id)
}

// VerifyContext is Verify for large images: it ends early when ctx is done.
func (s *Store) VerifyContext(ctx context.Context, id string) error {
	img, err := s.pin(id)
	if err != nil {
		return err
	}
	info, _, err := loadManifest(s.fs, s.Dir(id), id, &s.opts)
	if err == nil {
		err = checkFiles(ctx, s.fs, s.Dir(id), info, false, nil)
	}
	return errors.Join(err, s.unpin(id, img))
}

// checkFiles compares the files in dir with those of info and, with sync, makes
// their contents durable. With those that are still what done says, in the order of
// info, both was done; nil = with none.
func checkFiles(ctx context.Context, fsys vfs.FS, dir string, info *Info, sync bool, done []fileIdentity) error {
	names, err := fsys.List(dir)
	if err != nil {
		return fmt.Errorf("snap: list %s: %w", dir, err)
	}
	expected := make(map[string]bool, len(info.Files)+1)
	expected[manifestName] = true
	for _, f := range info.Files {
		expected[f.Name] = true
	}
	for _, name := range names {
		// A database opened on the directory would read these too.
		if !expected[name] {
			return &CorruptError{Image: info.ID, File: clip(name), Detail: "the manifest does not list it"}
		}
	}
	buf := make([]byte, readBlock)
	for i, want := range info.Files {
		if done != nil && unchanged(fsys, fsys.PathJoin(dir, want.Name), done[i]) {
			continue
		}
		if err := checkFile(ctx, fsys, dir, info.ID, want, sync, buf); err != nil {
			return err
		}
	}
	return nil
}

// unchanged reports whether the file at path is the one that was id.
func unchanged(fsys vfs.FS, path string, id fileIdentity) bool {
	if id == (fileIdentity{}) {
		return false
	}
	st, err := fsys.Stat(path)
	if err != nil {
		return false // to be found out by who reads it
	}
	now, ok := identify(st)
	return ok && now == id
}

func checkFile(ctx context.Context, fsys vfs.FS, dir, image string, want File, sync bool, buf []byte) error {
	path := fsys.PathJoin(dir, want.Name)
	bad := func(format string, args ...any) error {
		return &CorruptError{Image: image, File: want.Name, Detail: fmt.Sprintf(format, args...)}
	}
	f, err := fsys.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return bad("the file is missing")
	}
	if err != nil {
		return fmt.Errorf("snap: open %s: %w", path, err)
	}
	defer f.Close()
	if sync {
		if err := f.Sync(); err != nil {
			return fmt.Errorf("snap: fsync %s: %w", path, err)
		}
	}
	size, crc, err := checksum(ctx, f, want.Size, buf)
	switch {
	case err != nil:
		return fmt.Errorf("snap: read %s: %w", path, err)
	case size != want.Size:
		return bad("%d bytes were found, the manifest says %d", size, want.Size)
	case crc != want.CRC:
		return bad("checksum %08x, the manifest says %08x", crc, want.CRC)
	}
	return nil
}
