package server

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/config"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/internal/background"
	"conveyor.etl/router/internal/crashpoint"
	"conveyor.etl/router/internal/freeing"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// The position every initial node begins at, without having talked to the
// others: the first entry of the log is the one after it.
const (
	bootstrapIndex = 1
	bootstrapTerm  = 1
)

// storage is everything a node has on disk.
type storage struct {
	dir       string
	points    *crashpoint.Points
	reaper    *freeing.Reaper
	lock      *datadir.DirLock
	id        datadir.Identity
	log       *wal.Log
	recovered wal.Recovered
	fsm       *router.FSM
	machine   raftnode.StateMachine
	images    *snap.Store
	shelf     *shelf.Shelf
	disks     *disks
	// fresh: the directory was empty, and this node founds a cluster with it.
	fresh bool
	// quarantine is non-nil while the state must not be used.
	quarantine *datadir.Quarantine
}

// openStorage opens the data directory of a node, creating it when it is
// absent. On an error everything opened so far is closed again.
func openStorage(c *config.Config, log *slog.Logger, now func() time.Time) (*storage, error) {
	if err := datadir.Make(c.DataDir); err != nil {
		return nil, fmt.Errorf("create the data directory: %w", err)
	}
	points, err := crashpoint.New(os.Environ())
	if err != nil {
		return nil, err
	}
	s := &storage{dir: c.DataDir, points: points, reaper: freeing.New()}
	// Others first: a node that is started reads its log and its state for some tenths of a
	// second, beside clients of nodes on the same machine.
	background.Do(func() { err = s.open(c, log, now) })
	if err != nil {
		// What was opened was not used: there is nothing a failing close could
		// lose.
		_ = s.close()
		return nil, err
	}
	return s, nil
}

func (s *storage) open(c *config.Config, log *slog.Logger, now func() time.Time) error {
	var err error
	if s.lock, err = datadir.Lock(s.dir); err != nil {
		return err
	}
	finished, err := datadir.FinishReplacement(s.dir)
	if err != nil {
		return err
	}
	if finished {
		log.Warn("finished what an interrupted recovery or restore had decided", "data_dir", s.dir)
	}
	if err := removeReplaced(s.dir); err != nil {
		return err
	}
	disk, err := datadir.NewDiskID()
	if err != nil {
		return err
	}
	s.id, s.fresh, err = openIdentity(s.dir, s.points, datadir.Identity{
		DiskID:        disk,
		RaftAddr:      c.AdvertiseRaftAddr,
		FormatVersion: datadir.FormatVersion,
		ClusterID:     datadir.ClusterID(c.ClusterName, c.Members()),
		ClusterName:   c.ClusterName,
		NodeID:        c.NodeID,
		Members:       c.Members(),
		CreatedAt:     now().UTC().Truncate(time.Second),
	})
	if err != nil {
		return err
	}
	if s.disks, err = openDisks(s.dir, s.points); err != nil {
		return err
	}
	if s.quarantine, err = datadir.ReadQuarantine(s.dir); err != nil {
		return err
	}
	walDir := filepath.Join(s.dir, datadir.WALName)
	if s.id.Initialized {
		lost, err := datadir.EmptyOrGone(walDir)
		if err != nil {
			return fmt.Errorf("look at the log: %w", err)
		}
		if lost {
			return fmt.Errorf("%w: %s is gone, and with it what this node promised the others; starting without it could lose acknowledged writes; "+
				"restore it, or remove node %d from the cluster and let a new node with another id join", ErrIncomplete, walDir, s.id.NodeID)
		}
	}
	conf := &raftpb.ConfState{Voters: s.id.Members}
	s.log, s.recovered, err = wal.Open(walDir, wal.Identity{ClusterID: s.id.ClusterID, NodeID: s.id.NodeID},
		wal.Start{Index: bootstrapIndex, Term: bootstrapTerm, ConfState: conf},
		wal.Options{Logger: log.With("part", "wal"), SegmentBytes: c.Raft.SegmentBytes, FailPoint: s.points.WAL(), Remove: s.reaper.Remove})
	if err != nil {
		return s.foreign(err)
	}
	if s.recovered.Repaired > 0 {
		log.Warn("cut an unfinished write off the end of the log; it was never acknowledged", "bytes", s.recovered.Repaired)
	}
	boot, err := rpc.EncodePosition(bootstrapPosition(s.id.Members))
	if err != nil {
		return err
	}
	// One for all who image the state: what one has read no other reads again.
	sums := snap.NewSumCache()
	s.fsm, err = router.Open(sums.Summing(s.files()), filepath.Join(s.dir, datadir.StateName), router.Options{
		Bootstrap:     boot,
		Logger:        log.With("part", "state"),
		MemTableBytes: c.Store.MemTableBytes,
		CacheBytes:    c.Store.CacheBytes,
		HotBytes:      c.Store.HotBytes,
		RecordBytes:   c.Store.RecordBytes,
		HistoryBytes:  c.Store.HistoryBytes,
		Installed:     func(settle func()) { time.AfterFunc(installCalm, settle) },
	})
	if err != nil {
		return s.foreign(err)
	}
	machine, err := rpc.NewStateMachine(s.fsm)
	if err != nil {
		return err
	}
	s.machine = calmMachine{s.points.Machine(machine), s.fsm}
	s.images, err = snap.OpenStore(s.files(), filepath.Join(s.dir, datadir.ImagesName), snap.Options{
		Logger: log.With("part", "images"), Now: now, Sums: sums,
	})
	if err != nil {
		return fmt.Errorf("open the images: %w", err)
	}
	err = s.openShelf(shelf.Options{
		Logger: log.With("part", "snapshots"), Now: now,
		MaxSnapshots: int(c.Backup.KeepSnapshots), MaxBytes: c.Backup.MaxBytes,
		Images: snap.Options{Sums: sums},
	})
	if err != nil {
		return err
	}
	if !s.id.Initialized {
		// The names wal and state in the directory must last before the word
		// that they are there.
		if err := datadir.SyncDir(s.dir); err != nil {
			return fmt.Errorf("sync the data directory: %w", err)
		}
		s.id.Initialized = true
		s.points.Pass("initialized:before")
		if err := datadir.WriteIdentity(s.dir, s.id); err != nil {
			return err
		}
		s.points.Pass("initialized:after")
	}
	return nil
}

// files is the file system of everything but the log.
func (s *storage) files() vfs.FS { return s.points.FS(s.reaper.FS(vfs.Default)) }

// foreign gives the refusals of the parts the sentinel of the whole.
func (s *storage) foreign(err error) error {
	switch {
	case errors.Is(err, wal.ErrForeign):
		return fmt.Errorf("%w: %s: %w", ErrForeign, s.dir, err)
	case errors.Is(err, wal.ErrNewerFormat), errors.Is(err, router.ErrNewerFormat):
		return fmt.Errorf("%w: %s: %w", ErrNewer, s.dir, err)
	case errors.Is(err, wal.ErrLocked):
		return fmt.Errorf("%w: %s: %w", ErrInUse, s.dir, err)
	}
	return err
}

// bootstrapPosition is where the members of a new cluster begin. It carries no
// addresses: every node may know the others by different ones, and the position
// is part of a state that must be the same everywhere.
func bootstrapPosition(ids []uint64) raftnode.Position {
	p := raftnode.Position{Index: bootstrapIndex, Term: bootstrapTerm, ConfState: &raftpb.ConfState{Voters: ids}}
	for _, id := range ids {
		p.Members = append(p.Members, raftnode.Member{ID: id})
	}
	return p
}

// close closes everything, the state before the log it is replayed from, and
// the lock last.
func (s *storage) close() error {
	var errs []error
	if s.fsm != nil {
		errs = append(errs, s.fsm.Close())
	}
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	s.reaper.Close()
	if s.lock != nil {
		errs = append(errs, s.lock.Release())
	}
	return errors.Join(errs...)
}
