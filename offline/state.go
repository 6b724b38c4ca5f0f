package offline

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

// State is a state open for reading.
type State struct {
	*router.View
	// Position is the newest entry the view reflects.
	Position raftnode.Position
	// Following entries of the log lie behind it, of which Committed are known
	// to be committed.
	Following, Committed uint64
	// FromImage is the image it was rebuilt from, "" for the state on disk.
	FromImage string

	close func() error
	// fsm and scratch, the directory it lies in, are there after a replay only.
	fsm     *router.FSM
	scratch string
}

// Close gives everything back.
func (s *State) Close() error { return errors.Join(s.View.Close(), s.close()) }

// OpenState opens the state on disk as it is. A node that was killed has newer
// entries in its log only; Following counts them.
func (d *Directory) OpenState() (*State, error) {
	if d.StateErr != nil {
		return nil, d.StateErr
	}
	s := &State{Position: d.State}
	if d.Log != nil {
		s.behind(d, d.State)
	}
	if err := s.open(d.state, d); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *State) behind(d *Directory, pos raftnode.Position) {
	if d.Log.LastIndex > pos.Index {
		s.Following = d.Log.LastIndex - pos.Index
	}
	if c := d.Log.Commit(); c > pos.Index {
		s.Committed = c - pos.Index
	}
}

func (s *State) open(dir string, d *Directory) error {
	image, err := router.OpenImage(d.fs, dir, router.Options{})
	if err != nil {
		return err
	}
	s.View, s.close = image.View(), image.Close
	return nil
}

// ReplayState opens the state with the entries of the log applied that are known
// to be committed, as a node that starts would have it. The work is done on a
// copy below scratch ("" for the system's directory of temporary files), which
// Close removes; tables are linked into it where that is possible.
func (d *Directory) ReplayState(scratch string, log *slog.Logger) (_ *State, err error) {
	b, err := d.base()
	if err != nil {
		return nil, err
	}
	need, err := datadir.Size(b.dir)
	if err != nil {
		return nil, err
	}
	logBytes, err := datadir.Size(filepath.Join(d.Path, datadir.WALName))
	if err != nil {
		return nil, err
	}
	if scratch == "" {
		scratch = os.TempDir()
	}
	if err := demandRoom(scratch, need+2*logBytes); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(scratch, "router-replay-")
	if err != nil {
		return nil, fmt.Errorf("make a scratch directory: %w", err)
	}
	fsm, sm, err := openState(dir, log)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	release := func() error { return errors.Join(fsm.Close(), os.RemoveAll(dir)) }
	if _, err = fsm.Install(b.dir); err == nil {
		err = d.replay(b, min(d.commit(b), max(d.Log.LastIndex, b.pos.Index)), sm)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("apply the log to a copy of the state: %w", err), release())
	}
	s := &State{View: fsm.View(), Position: sm.Applied(), FromImage: b.image, close: release, fsm: fsm, scratch: dir}
	if b.fit != raftnode.FitInstalled {
		s.behind(d, s.Position)
	}
	return s, nil
}
