package snap

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Store keeps whole images in one directory, each a directory of files with a
// manifest. Its methods are safe for concurrent use. One process may use a
// directory at a time; the lock of the data directory sees to that.
type Store struct {
	fs   vfs.FS
	dir  string
	opts Options

	// publishMu serialises what changes the set of images: renaming a
	// directory in or out, the fsync that makes it durable, and the matching
	// change of images. It is held across disk operations and taken before mu.
	publishMu sync.Mutex

	// mu guards the fields below and is never held across a disk operation,
	// so List and pinning do not wait for one.
	mu     sync.Mutex
	images map[string]*image
	// damaged holds the directories that look like an image and cannot be
	// used, with the reason.
	damaged  map[string]error
	partials map[string]*partial
	nextTemp uint64
}

// image is one whole image on disk.
type image struct {
	info *Info
	// pins counts open Readers and running verifications.
	pins int
	// doomed: deleted by the user, removed from disk at the last unpin.
	doomed bool
}

// OpenStore opens the images in dir, which is created when missing. It removes
// what an interrupted Create or Delete left behind and keeps partial receives
// within the bounds of o. A directory that looks like an image but cannot be
// read is logged, not listed and left alone: Open and Verify say what is wrong
// with it, Delete removes it.
//
// It reads manifests, not contents: see Verify for those.
func OpenStore(fsys vfs.FS, dir string, o Options) (*Store, error) {
	if err := o.EnsureDefaults().Validate(); err != nil {
		return nil, err
	}
	s := &Store{
		fs:       fsys,
		dir:      dir,
		opts:     o,
		images:   map[string]*image{},
		damaged:  map[string]error{},
		partials: map[string]*partial{},
	}
	if err := mkdirDurable(fsys, dir); err != nil {
		return nil, err
	}
	// What is listed below must not vanish: a process killed between a rename
	// and its fsync leaves an image that its successor sees and a power failure
	// takes away. The same holds for dir itself.
	for _, d := range []string{fsys.PathDir(dir), dir} {
		if err := syncDir(fsys, d); err != nil {
			return nil, err
		}
	}
	names, err := fsys.List(dir)
	if err != nil {
		return nil, fmt.Errorf("snap: list %s: %w", dir, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := s.adopt(name); err != nil {
			return nil, err
		}
	}
	if err := s.evictPartials(""); err != nil {
		return nil, err
	}
	return s, nil
}

// adopt takes in one directory entry found by OpenStore.
func (s *Store) adopt(name string) error {
	path := s.fs.PathJoin(s.dir, name)
	log := s.opts.Logger.With("path", path)
	switch {
	case strings.HasPrefix(name, creatingPrefix), strings.HasPrefix(name, deletingPrefix):
		log.Info("removing what an interrupted image operation left behind")
		if err := s.fs.RemoveAll(path); err != nil {
			return fmt.Errorf("snap: remove leftover %s: %w", path, err)
		}
		return nil
	case strings.HasPrefix(name, receivingPrefix):
		return s.adoptPartial(name[len(receivingPrefix):])
	case CheckID(name) != nil:
		log.Warn("ignoring an entry of the image directory that is not an image")
		return nil
	}
	st, err := s.fs.Stat(path)
	if err != nil {
		return fmt.Errorf("snap: stat %s: %w", path, err)
	}
	if !st.IsDir() {
		log.Warn("ignoring an entry of the image directory that is not an image")
		return nil
	}
	info, _, err := loadManifest(s.fs, path, name, &s.opts)
	if err != nil {
		// Not a reason to refuse to start, read errors included: an image can
		// be made or received again.
		log.Warn("ignoring an image that cannot be used", "err", err)
		s.damaged[name] = err
		return nil
	}
	s.images[name] = &image{info: info}
	return nil
}

// loadManifest reads the manifest of image id in dir and checks that it
// belongs there.
func loadManifest(fsys vfs.FS, dir, id string, o *Options) (*Info, []byte, error) {
	raw, err := readManifest(fsys, dir, id, o)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, &CorruptError{Image: id, File: manifestName, Detail: "the file is missing"}
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := decodeManifest(raw, id, o)
	if err != nil {
		return nil, nil, err
	}
	if info.ID != id {
		return nil, nil, &CorruptError{Image: id, File: manifestName,
			Detail: "it belongs to image " + info.ID}
	}
	return info, raw, nil
}

// Dir returns the directory of image id, whether or not the image exists. Keep
// a Reader open while using it: only a pinned image stays where it is.
func (s *Store) Dir(id string) string { return s.fs.PathJoin(s.dir, id) }

// FS returns the file system the images are on.
func (s *Store) FS() vfs.FS { return s.fs }

// List returns the images, the newest (highest index) first. Images whose
// deletion waits for a pin are not listed.
func (s *Store) List() []Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Info, 0, len(s.images))
	for _, img := range s.images {
		if !img.doomed {
			list = append(list, *img.info)
		}
	}
	slices.SortFunc(list, func(a, b Info) int {
		if newer(&a, &b) {
			return -1
		}
		return 1
	})
	return list
}

// pin finds image id and keeps it on disk until unpin.
func (s *Store) pin(id string) (*image, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if img := s.images[id]; img != nil && !img.doomed {
		img.pins++
		return img, nil
	}
	if err := s.damaged[id]; err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %s", ErrNotFound, id)
}

// unpin undoes one pin and carries out a deletion that waited for it.
func (s *Store) unpin(id string, img *image) error {
	s.mu.Lock()
	img.pins--
	last := img.doomed && img.pins == 0
	s.mu.Unlock()
	if !last {
		return nil
	}
	// Between the unlock and here, Receive may have called the deletion off:
	// remove looks again.
	err := s.remove(id, true)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// Delete removes image id. A pinned image disappears from List and Open at
// once and from the disk when its last Reader is closed; after a restart
// before that, it is back. After an error other than ErrNotFound the image may
// be there or not, but if it is there, it is whole: Delete it again.
func (s *Store) Delete(id string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	return s.remove(id, false)
}

// Purge deletes all images but the keep newest ones, as Delete does. It tries
// them all and returns every error.
func (s *Store) Purge(keep int) error {
	if keep < 0 {
		return fmt.Errorf("snap: cannot keep %d images", keep)
	}
	var errs []error
	for i, info := range s.List() {
		if i < keep {
			continue
		}
		if err := s.remove(info.ID, false); err != nil && !errors.Is(err, ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// remove deletes image id, or marks it for deletion while it is pinned. With
// onlyDoomed, it does so only when the image is marked already.
func (s *Store) remove(id string, onlyDoomed bool) error {
	trash, err := s.retire(id, onlyDoomed)
	if trash != "" && err == nil {
		err = s.fs.RemoveAll(trash)
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("snap: delete image %s: %w", id, err)
	}
	return err
}

// retire takes image id out of the store and returns the directory that
// remains to be removed, "" when the image is pinned.
//
// The directory is renamed before its files are removed: a crash in the middle
// of removing them in place would leave a manifest with half of its files.
func (s *Store) retire(id string, onlyDoomed bool) (trash string, err error) {
	s.publishMu.Lock()
	defer s.publishMu.Unlock()

	s.mu.Lock()
	img, damaged := s.images[id], s.damaged[id]
	switch {
	case img == nil && (damaged == nil || onlyDoomed),
		img != nil && img.doomed != onlyDoomed:
		s.mu.Unlock()
		return "", fmt.Errorf("%w: %s", ErrNotFound, id)
	case img != nil && img.pins > 0:
		img.doomed = true
		s.mu.Unlock()
		return "", nil
	}
	// Out of the maps first: nobody may pin a directory that is about to move.
	delete(s.images, id)
	delete(s.damaged, id)
	s.mu.Unlock()

	trash = s.temp(deletingPrefix)
	if err := s.fs.Rename(s.Dir(id), trash); err != nil {
		s.mu.Lock()
		if img != nil {
			img.doomed = false
			s.images[id] = img
		} else {
			s.damaged[id] = damaged
		}
		s.mu.Unlock()
		return "", err
	}
	// The rename must be durable before the first file goes, for the same
	// reason it is made at all. When it is not, the files stay until the next
	// start.
	if err := syncDir(s.fs, s.dir); err != nil {
		return "", err
	}
	return trash, nil
}

// publish renames the finished image in from to its place, durably, and adds
// it to the store. Contents and directory of from must be durable. When the
// image exists already, it returns that one and leaves from alone.
func (s *Store) publish(from string, info *Info) (Info, error) {
	s.publishMu.Lock()
	defer s.publishMu.Unlock()

	if have := s.revive(info.ID); have != nil {
		return *have, nil
	}
	s.mu.Lock()
	damaged := s.damaged[info.ID]
	s.mu.Unlock()
	to := s.Dir(info.ID)
	if damaged != nil {
		trash := s.temp(deletingPrefix)
		if err := s.fs.Rename(to, trash); err != nil {
			return Info{}, fmt.Errorf("snap: move damaged image %s aside: %w", info.ID, err)
		}
		defer s.removeLeftover(trash)
		s.mu.Lock()
		delete(s.damaged, info.ID)
		s.mu.Unlock()
	}
	if err := s.fs.Rename(from, to); err != nil {
		return Info{}, fmt.Errorf("snap: publish image %s: %w", info.ID, err)
	}
	if err := syncDir(s.fs, s.dir); err != nil {
		// The image may or may not outlive a crash. The caller is told that
		// there is none, so take it away again; should even that fail, the
		// next Receive or Create of it will.
		trash := s.temp(deletingPrefix)
		if rerr := s.fs.Rename(to, trash); rerr != nil {
			s.mu.Lock()
			s.damaged[info.ID] = err
			s.mu.Unlock()
			return Info{}, errors.Join(err, rerr)
		}
		s.removeLeftover(trash)
		return Info{}, err
	}
	s.mu.Lock()
	s.images[info.ID] = &image{info: info}
	s.mu.Unlock()
	return *info, nil
}

// revive returns image id when the store has it, calling off a deletion that
// waits for a pin: the image is whole and somebody wants it.
func (s *Store) revive(id string) *Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	img := s.images[id]
	if img == nil {
		return nil
	}
	img.doomed = false
	return img.info
}

// temp returns the path of a directory of its own for one operation.
func (s *Store) temp(prefix string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextTemp++
	return s.fs.PathJoin(s.dir, fmt.Sprintf("%s%d", prefix, s.nextTemp))
}
