package offline

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
)

// makeMember makes the content of an empty data directory: fill makes the state, and
// calls rest with whose it is and where it stands, which makes everything else. What fill
// returns after that decides as well. On an error nothing is left in it, and the directory
// itself only if it was there before.
func makeMember(dir string, s *Settings, fill func(dir string, rest restMaker) error) (err error) {
	_, statErr := os.Stat(dir)
	created := errors.Is(statErr, os.ErrNotExist)
	if !created {
		// Before a lock file is put into it.
		if pending, err := datadir.Unfinished(dir); err != nil {
			return err
		} else if !pending {
			if err := demandEmpty(dir); err != nil {
				return err
			}
		}
	}
	if err := datadir.Make(dir); err != nil {
		return fmt.Errorf("create the data directory: %w", err)
	}
	lock, err := datadir.Lock(dir)
	if err != nil {
		return err
	}
	decided := false
	defer func() {
		if !decided {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, datadir.LockName)))
			if created {
				_ = os.Remove(dir) // somebody else may have put something in
			}
		}
		err = errors.Join(err, lock.Release())
	}()
	if finished, err := datadir.FinishReplacement(dir); err != nil || finished {
		decided = true
		if err == nil {
			err = fmt.Errorf("%w: %s was made by an earlier call that was interrupted at its end, and is complete now", ErrNotEmpty, dir)
		}
		return err
	}
	if err := demandEmpty(dir); err != nil {
		decided = true // what is there is not ours
		return err
	}
	r, err := datadir.BeginReplacement(dir, s.Point)
	if err != nil {
		return err
	}
	defer func() {
		if !decided {
			err = errors.Join(err, r.Discard())
		}
	}()
	s.Point(stepBegin)
	err = fill(r.Dir(), func(id datadir.Identity, pos raftnode.Position) error {
		s.Point(stepState)
		return makeRest(r.Dir(), id, pos, s)
	})
	if err != nil {
		return err
	}
	decided, err = r.Commit()
	return err
}

// restMaker makes what a data directory holds beside the state, which stands at pos.
type restMaker func(id datadir.Identity, pos raftnode.Position) error

// ErrNotEmpty: a new data directory must be empty.
var ErrNotEmpty = errors.New("the data directory is not empty")

func demandEmpty(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, datadir.IdentityName)); err == nil {
		return fmt.Errorf("%w: %s holds the data of a node; nothing was changed, give another directory or move that one away", ErrNotEmpty, dir)
	}
	name, err := datadir.Foreign(dir)
	if err == nil && name != "" {
		err = fmt.Errorf("%w: %s holds %q; nothing was changed", ErrNotEmpty, dir, name)
	}
	return err
}

// unmakeMember takes back what makeMember made in dir, which was empty before.
func unmakeMember(dir string) (err error) {
	lock, err := datadir.Lock(dir)
	if err != nil {
		return fmt.Errorf("take back the data directory %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	// The identity first: without it, no node starts from the rest.
	for _, name := range []string{datadir.IdentityName, datadir.WALName, datadir.StateName, datadir.ImagesName, datadir.LockName} {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, name)))
	}
	return errors.Join(err, datadir.SyncDir(dir))
}
