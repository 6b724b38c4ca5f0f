package router

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Image writes a consistent copy of the state into dir, which must not exist
// while its parent must, and returns the position of the copy. Apply may go
// on: the copy then is of some index between the call and the return. Tables
// are hard links where the file system allows it.
func (s *FSM) Image(dir string) (Position, error) {
	d, err := s.acquire()
	if err != nil {
		return Position{}, err
	}
	defer d.release()
	defer d.holdCompactions()()
	// A checkpoint of a database without its own log leaves the memtables out,
	// silently.
	if err := d.flush(); err != nil {
		return Position{}, fmt.Errorf("router: image: flush: %w", err)
	}
	if err := d.db.Checkpoint(dir); err != nil {
		return Position{}, fmt.Errorf("router: image: checkpoint into %s: %w", dir, err)
	}
	// The position comes from the copy: the live one may have moved on since.
	im, err := OpenImage(s.fs, dir, s.o)
	if err != nil {
		return Position{}, fmt.Errorf("router: image: read back: %w", err)
	}
	return im.Position(), im.Close()
}

// Install replaces the whole state by the image in dir and returns its
// position. After a crash either the old or the new state is found. dir is
// only read. Open views keep showing the old state; every subscription ends
// with ErrResync.
func (s *FSM) Install(dir string) (Position, error) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.RLock()
	old, closed := s.cur, s.closed
	s.mu.RUnlock()
	if closed {
		return Position{}, ErrClosed
	}
	name, err := s.nextName()
	if err != nil {
		return Position{}, fmt.Errorf("router: install: %w", err)
	}
	path := s.fs.PathJoin(s.root, name)
	d, release, err := s.copyImage(dir, path, name)
	if err != nil {
		_ = s.fs.RemoveAll(path)
		return Position{}, fmt.Errorf("router: install %s: nothing was changed: %w", dir, err)
	}
	if err := writeMarker(s.fs, s.root, name); err != nil {
		// CURRENT may or may not have moved. Both databases are whole, so a
		// restart finds one of them; going on could write into the other.
		s.broken = fmt.Errorf("router: install %s: switching CURRENT failed, restart to find out which state is in force: %w", dir, err)
		return Position{}, errors.Join(s.broken, d.release())
	}
	if err := s.adopt(d); err != nil {
		s.broken = err
		return Position{}, fmt.Errorf("router: install %s: %w", dir, err)
	}
	s.broken = nil
	s.stage.outdated(s, d)
	s.unfollowed()
	if s.settle != nil {
		s.settle()
	}
	s.settle = sync.OnceFunc(func() { s.retire(old); release() })
	if s.o.Installed != nil {
		s.o.Installed(s.settle)
	} else {
		s.settle()
	}
	if _, err := s.performSwap(); err != nil {
		// The image was taken between the entry of a restore and its effect.
		return Position{}, s.breakdown(fmt.Errorf("router: install %s: %w", dir, err))
	}
	return s.Applied(), nil
}

// replaced is for a database that another one has taken the place of.
func (s *FSM) replaced(old *database) {
	s.unfollowed()
	s.retire(old)
}

// unfollowed makes who follows the changes read everything again.
func (s *FSM) unfollowed() {
	s.hub.reset(s.revision.Load())
	s.findUndo()
}

// retire closes a database that another one has taken the place of, and removes it.
func (s *FSM) retire(old *database) {
	old.obsolete.Store(true)
	// Nobody waits for it: Pebble ends the compactions it is at first, which may
	// take a second, and large files take time to remove.
	s.retiring.Go(func() {
		if err := old.release(); err != nil {
			s.o.Logger.Warn("state: replaced database did not close cleanly", "dir", old.dir, "error", err)
		}
	})
}

// copyImage copies an image to path, durably, and opens it there. No compaction
// begins before release is called, unless some are overdue.
func (s *FSM) copyImage(dir, path, name string) (_ *database, release func(), err error) {
	f := s.fs
	if err := copyFiles(f, dir, path); err != nil {
		return nil, nil, err
	}
	if err := errors.Join(syncDir(f, path), syncDir(f, s.root)); err != nil {
		return nil, nil, err
	}
	d, release, err := openHeld(f, path, name, s.o, false)
	if err != nil {
		return nil, nil, err
	}
	_, err = readPosition(d.db)
	if err == nil {
		_, err = readClock(d.db)
	}
	if err != nil {
		return nil, nil, errors.Join(err, d.release())
	}
	if int(d.db.Metrics().Levels[0].Sublevels) > maxHeldL0 {
		release() // or the entries that follow would soon have to wait for a compaction
	}
	return d, release, nil
}

// copyFiles makes the files of an image those of a new database directory.
func copyFiles(f vfs.FS, dir, path string) error {
	files, err := f.List(dir)
	if err != nil {
		return err
	}
	if err := f.MkdirAll(path, 0o755); err != nil {
		return err
	}
	for _, file := range files {
		base := f.PathBase(file)
		from := f.PathJoin(dir, base)
		info, err := f.Stat(from)
		if err != nil {
			return err
		}
		if info.IsDir() || base == "LOCK" || base == "MANIFEST" {
			continue // MANIFEST without a number is the image store's own
		}
		if err := place(f, from, f.PathJoin(path, base)); err != nil {
			return err
		}
	}
	return nil
}

// place links a table and copies everything else. Pebble never changes a table
// once written, but it appends to manifests: a linked one would change the
// image.
func place(f vfs.FS, from, to string) error {
	if strings.HasSuffix(from, ".sst") || strings.HasSuffix(from, ".blob") {
		if f.Link(from, to) == nil {
			return nil
		}
	}
	if err := vfs.Copy(f, from, to); err != nil {
		return err
	}
	file, err := f.OpenReadWrite(to, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}
