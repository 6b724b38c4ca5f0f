package offline

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/wal"
)

// Settings are what the commands that make directories share; the zero value is
// for production.
type Settings struct {
	// Logger receives what is worth knowing; discarded when nil.
	Logger *slog.Logger
	// SegmentBytes is the size of a segment of the new log, 0 = the default. A
	// node may use another.
	SegmentBytes int64
	// Point is called at each durable step; tests stop there.
	Point func(step string)
}

func (s *Settings) ensureDefaults() {
	if s.Logger == nil {
		s.Logger = slog.New(slog.DiscardHandler)
	}
	if s.Point == nil {
		s.Point = func(string) {}
	}
	if s.SegmentBytes == 0 {
		s.SegmentBytes = wal.DefaultSegmentBytes
	}
}

// The steps before those of datadir.Replacement.
const (
	stepBegin    = "begin"
	stepState    = "state"
	stepLog      = "log"
	stepIdentity = "identity"
)

// ErrNoRoom: the disk has not enough space; nothing was changed.
var ErrNoRoom = errors.New("not enough free space")

// spareBytes is left free beside what is needed: a node refuses writes when its
// disk has less.
const spareBytes = 256 << 20

// demandRoom checks that the file system of dir has need bytes to spare.
func demandRoom(dir string, need uint64) error {
	free, err := datadir.FreeBytes(dir)
	if err != nil {
		return err
	}
	if free < need+spareBytes {
		return fmt.Errorf("%w in %s: about %d MiB are needed, %d MiB are free; nothing was changed, make room and try again",
			ErrNoRoom, dir, (need+spareBytes)>>20, free>>20)
	}
	return nil
}

// openState opens a state below dir to work on. The position is overwritten by
// what is installed.
func openState(dir string, log *slog.Logger) (*router.FSM, raftnode.StateMachine, error) {
	begin, err := rpc.EncodePosition(raftnode.Position{Index: 1, Term: 1, ConfState: &raftpb.ConfState{}})
	if err != nil {
		return nil, nil, err
	}
	fsm, err := router.Open(vfs.Default, filepath.Join(dir, datadir.StateName), router.Options{Bootstrap: begin, Logger: log})
	if err != nil {
		return nil, nil, err
	}
	sm, err := rpc.NewStateMachine(fsm)
	if err != nil {
		return nil, nil, errors.Join(err, fsm.Close())
	}
	return fsm, sm, nil
}

// installInto makes the state below dir a copy of the one below state, which is
// closed.
func installInto(dir, state string, s *Settings) error {
	from, err := router.CurrentDir(vfs.Default, state)
	if err != nil {
		return err
	}
	fsm, _, err := openState(dir, s.Logger)
	if err != nil {
		return err
	}
	_, err = fsm.Install(from)
	return errors.Join(err, fsm.Close())
}

// groupOf is the position of a group of voters at an entry.
func groupOf(index, term uint64, members []raftnode.Member) raftnode.Position {
	p := raftnode.Position{Index: index, Term: term, ConfState: &raftpb.ConfState{}, Members: members}
	for _, m := range members {
		p.ConfState.Voters = append(p.ConfState.Voters, m.ID)
	}
	return p
}

// makeRest completes dir, which has its state at pos already, with everything
// else a node expects: an empty log behind pos, no images and the identity.
func makeRest(dir string, id datadir.Identity, pos raftnode.Position, s *Settings) error {
	l, _, err := wal.Open(filepath.Join(dir, datadir.WALName), wal.Identity{ClusterID: id.ClusterID, NodeID: id.NodeID},
		wal.Start{Index: pos.Index, Term: pos.Term, ConfState: pos.ConfState},
		wal.Options{Logger: s.Logger, SegmentBytes: s.SegmentBytes})
	if err != nil {
		return err
	}
	if err := l.Close(); err != nil {
		return err
	}
	s.Point(stepLog)
	if err := os.Mkdir(filepath.Join(dir, datadir.ImagesName), 0o750); err != nil {
		return err
	}
	if err := datadir.WriteIdentity(dir, id); err != nil {
		return err
	}
	s.Point(stepIdentity)
	return datadir.SyncDir(dir)
}

// newClusterID draws the id of a cluster that goes on from an older one.
func newClusterID(not uint64) (uint64, error) {
	for {
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return 0, fmt.Errorf("draw a cluster id: %w", err)
		}
		if id := datadir.NonZero(binary.BigEndian.Uint64(b[:])); id != not {
			return id, nil
		}
	}
}

// checkMembers refuses a group that cannot be: ids, sorted, with self among
// them.
func checkMembers(ids []uint64, self uint64) error {
	const most = 9
	switch {
	case len(ids) == 0 || len(ids) > most:
		return fmt.Errorf("a cluster has 1 to %d members, not %d", most, len(ids))
	case ids[0] == 0:
		return errors.New("0 is no node id")
	case !slices.Contains(ids, self):
		return fmt.Errorf("node %d is not among the members %v", self, ids)
	}
	for i := range ids[1:] {
		if ids[i] >= ids[i+1] {
			return fmt.Errorf("member %d is named twice", ids[i+1])
		}
	}
	return nil
}
