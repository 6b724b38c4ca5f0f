package offline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// ErrUnfinished: a recovery or a restore of the directory is decided, but its
// parts are not all in their place.
var ErrUnfinished = errors.New("a recovery or restore of this data directory was interrupted after it was decided")

// Directory is the data directory of a node that does not run, held for as long
// as it is open. It is for one goroutine.
type Directory struct {
	Path     string
	Identity datadir.Identity
	// Log is nil when LogErr says why the log cannot be used.
	Log    *wal.Contents
	LogErr error
	// State is where the state on disk stands, StateErr why that is not known.
	State    raftnode.Position
	StateErr error
	// Wrong is why the state, the images made of it, or both must not be used
	// although they can be read; nil when they may.
	Wrong error

	lock  *datadir.DirLock
	fs    vfs.FS
	state string // directory of the database in use
}

// Open opens the data directory path for reading. An error matches one of those
// of package datadir, fs.ErrNotExist or ErrUnfinished; a log or state that
// cannot be read is part of the result.
func Open(path string) (*Directory, error) {
	if err := isDirectory(path); err != nil {
		return nil, err
	}
	lock, err := datadir.LockShared(path)
	if err != nil {
		return nil, err
	}
	d, err := look(path, lock)
	if err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	return d, nil
}

// openExclusive is Open for somebody who is going to change the directory. It
// finishes a replacement that was decided and interrupted; finished tells.
func openExclusive(path string) (d *Directory, finished bool, err error) {
	if err := isDirectory(path); err != nil {
		return nil, false, err
	}
	if _, err := datadir.ReadIdentity(path); errors.Is(err, fs.ErrNotExist) {
		// Not ours to put a lock file into, unless its parts are under way.
		if pending, perr := datadir.Unfinished(path); perr != nil || !pending {
			return nil, false, errors.Join(err, perr)
		}
	}
	lock, err := datadir.Lock(path)
	if err != nil {
		return nil, false, err
	}
	if finished, err = datadir.FinishReplacement(path); err == nil {
		d, err = look(path, lock)
	}
	if err != nil {
		return nil, finished, errors.Join(err, lock.Release())
	}
	return d, finished, nil
}

func isDirectory(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("the data directory: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is no directory; give the one that the node's --data-dir names", path)
	}
	return nil
}

func look(path string, lock *datadir.DirLock) (*Directory, error) {
	pending, err := datadir.Unfinished(path)
	if err != nil {
		return nil, err
	}
	if pending {
		return nil, fmt.Errorf("%w: %s; start its node, or repeat the command that was interrupted, to finish it", ErrUnfinished, path)
	}
	d := &Directory{Path: path, lock: lock, fs: vfs.Default}
	if d.Identity, err = datadir.ReadIdentity(path); err != nil {
		return nil, err
	}
	d.Log, d.LogErr = wal.Inspect(filepath.Join(path, datadir.WALName))
	if d.LogErr == nil {
		if d.LogErr = d.ownLog(d.Log); d.LogErr != nil {
			d.Log = nil
		}
	}
	d.state, d.StateErr = router.CurrentDir(d.fs, filepath.Join(path, datadir.StateName))
	if d.StateErr == nil {
		d.State, d.StateErr = d.position(d.state)
	}
	q, err := datadir.ReadQuarantine(path)
	if err == nil && q != nil {
		err = fmt.Errorf("the state is known to be wrong (%s); take the directory of another node, or remove %s to use it all the same",
			q.Reason, filepath.Join(path, datadir.QuarantineName))
	}
	if err != nil {
		d.Wrong, d.StateErr = err, err
	}
	return d, nil
}

// acceptDamage makes the part of a damaged log that lies before the damage
// stand for the log.
func (d *Directory) acceptDamage() error {
	if d.LogErr == nil || !errors.Is(d.LogErr, wal.ErrCorrupt) {
		return d.LogErr
	}
	log, err := wal.InspectDamaged(filepath.Join(d.Path, datadir.WALName))
	if err != nil {
		return err
	}
	if err := d.ownLog(log); err != nil {
		return err
	}
	d.Log, d.LogErr = log, nil
	return nil
}

// ownLog refuses the log of another node.
func (d *Directory) ownLog(log *wal.Contents) error {
	if log.Identity != (wal.Identity{ClusterID: d.Identity.ClusterID, NodeID: d.Identity.NodeID}) {
		return fmt.Errorf("%w: the log was written by node %d of cluster %016x, the directory is that of node %d of cluster %016x",
			datadir.ErrForeign, log.Identity.NodeID, log.Identity.ClusterID, d.Identity.NodeID, d.Identity.ClusterID)
	}
	return nil
}

// position reads where the database or image in dir stands.
func (d *Directory) position(dir string) (raftnode.Position, error) {
	raw, err := router.ReadPosition(d.fs, dir)
	if err != nil {
		return raftnode.Position{}, err
	}
	return rpc.DecodePosition(raw)
}

// Close gives the directory back.
func (d *Directory) Close() error { return d.lock.Release() }

// problem returns why the directory cannot be used as a whole, nil when it can.
func (d *Directory) problem() error { return errors.Join(d.LogErr, d.StateErr) }

// base is where rebuilding the newest state begins.
type base struct {
	dir string // of a database or an image
	pos raftnode.Position
	fit raftnode.Fit
	// image is the id of the image, "" when dir is the state itself.
	image string
}

// base returns what a node that starts would begin with: the state on disk, or,
// when the log no longer reaches back to it, the newest image that does.
func (d *Directory) base() (base, error) {
	if err := d.problem(); err != nil {
		return base{}, err
	}
	fit, err := d.judge(d.State)
	if err != nil || fit != raftnode.FitBehind {
		return base{dir: d.state, pos: d.State, fit: fit}, err
	}
	behind := fmt.Errorf("%w: the state reflects entry %d, the log begins at %d", raftnode.ErrStateBehindLog, d.State.Index, d.Log.FirstIndex)
	images, err := listImages(d.fs, filepath.Join(d.Path, datadir.ImagesName))
	if err != nil {
		return base{}, errors.Join(behind, err)
	}
	for _, im := range images {
		if im.Err != nil || im.Info.Index+1 < d.Log.FirstIndex || im.Info.Index > d.Log.LastIndex {
			continue
		}
		if t, err := d.Log.Term(im.Info.Index); err != nil || t != im.Info.Term {
			continue
		}
		if err := snap.Check(d.fs, im.Dir); err != nil {
			behind = errors.Join(behind, err)
			continue
		}
		pos, err := d.position(im.Dir)
		if err != nil {
			return base{}, errors.Join(behind, err)
		}
		if fit, err = d.judge(pos); err == nil && fit == raftnode.FitOK {
			return base{dir: im.Dir, pos: pos, fit: fit, image: im.Name}, nil
		}
	}
	return base{}, fmt.Errorf("%w, and no intact image in %s lies between", behind, datadir.ImagesName)
}

func (d *Directory) judge(pos raftnode.Position) (raftnode.Fit, error) {
	return raftnode.JudgeFit(pos, d.Log.FirstIndex, d.Log.LastIndex, d.Log.Commit(), d.Log.Term)
}

// last returns index and term of the newest entry the directory holds, in the
// log or already in the state.
func (d *Directory) last(b base) (index, term uint64, err error) {
	if b.fit == raftnode.FitInstalled {
		return b.pos.Index, b.pos.Term, nil
	}
	term, err = d.Log.Term(d.Log.LastIndex)
	return d.Log.LastIndex, term, err
}

// commit returns the newest index that is known here to be committed.
func (d *Directory) commit(b base) uint64 { return max(d.Log.Commit(), b.pos.Index) }

// replay applies the entries behind b up to index to onto sm, which stands at
// b.
func (d *Directory) replay(b base, to uint64, sm raftnode.StateMachine) error {
	if b.fit == raftnode.FitInstalled || to <= b.pos.Index {
		return nil
	}
	r := raftnode.NewReplay(sm, replayBytes)
	if err := d.Log.Entries(b.pos.Index+1, to, func(e *raftpb.Entry) error { return r.Add(e) }); err != nil {
		return err
	}
	return r.Flush()
}

// replayBytes bounds the entries handed to the state at a time.
const replayBytes = 4 << 20

// membership is a state machine that keeps nothing but the configuration.
type membership struct {
	raftnode.StateMachine // nil: Replay calls only the methods below
	pos                   raftnode.Position
}

func (m *membership) Applied() raftnode.Position { return m.pos }

func (m *membership) Apply(batches []raftnode.Batch) ([][]any, error) {
	last := batches[len(batches)-1]
	m.pos.Index, m.pos.Term = last.Index, last.Term
	return nil, nil
}

func (m *membership) ApplyMembership(pos raftnode.Position) error {
	m.pos = pos
	return nil
}

// configuration returns the group's configuration at the newest entry the
// directory holds: a change counts from its entry on, committed or not.
func (d *Directory) configuration(b base) (raftnode.Position, error) {
	index, _, err := d.last(b)
	if err != nil {
		return raftnode.Position{}, err
	}
	m := &membership{pos: b.pos}
	err = d.replay(b, index, m)
	return m.pos, err
}
