package offline

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
)

// ErrContent: an archive is whole, but what it holds is not what its header
// says. Nothing was made.
var ErrContent = errors.New("the content of the backup is not what it says")

// RestoreOptions say what to make of a backup.
type RestoreOptions struct {
	Settings
	// Dir is made, or must be empty.
	Dir         string
	ClusterName string
	NodeID      uint64
	// Members are the ids of all first voters of the new cluster; the same for
	// each of them.
	Members []uint64
	// Token tells clusters apart that are made from one backup with the same
	// name and members. The same for all members.
	Token string
	// MaxBytes bounds what is unpacked; 0 = the default of package archive.
	MaxBytes int64
}

func (o *RestoreOptions) validate() error {
	const longest = 256
	if o.Dir == "" {
		return errors.New("the data directory is missing")
	}
	if o.ClusterName == "" || len(o.ClusterName) > longest || len(o.Token) > longest {
		return fmt.Errorf("the name of the cluster has 1 to %d bytes, the token at most %d", longest, longest)
	}
	slices.Sort(o.Members)
	return checkMembers(o.Members, o.NodeID)
}

// Restored is the outcome of a restore.
type Restored struct {
	ClusterID   string   `json:"cluster_id"`
	ClusterName string   `json:"cluster_name"`
	NodeID      uint64   `json:"node_id"`
	Members     []uint64 `json:"members"`
	Index       uint64   `json:"index"`
	Term        uint64   `json:"term"`
	Revision    uint64   `json:"revision"`
	// StateHash is of the content, computed from the archive's records.
	StateHash string         `json:"state_hash"`
	From      archive.Header `json:"from"`
}

// Restore makes the data directory of one member of a new cluster from the
// archive in source. It depends on the archive and o alone, so that members made
// on their own begin identically: same cluster id, same position, same state.
// Everything is checked before it counts; on an error nothing is left.
func Restore(ctx context.Context, source io.Reader, o RestoreOptions) (*Restored, error) {
	o.ensureDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	res := &Restored{ClusterName: o.ClusterName, NodeID: o.NodeID, Members: o.Members}
	err := makeMember(o.Dir, &o.Settings, func(dir string) (id datadir.Identity, pos raftnode.Position, err error) {
		unpacked := filepath.Join(dir, "archive")
		limits := archive.Limits{MaxBytes: o.MaxBytes, ReserveBytes: spareBytes + 2*o.SegmentBytes}
		if res.From, _, err = archive.Extract(ctx, source, limits, vfs.Default, unpacked); err != nil {
			return id, pos, err
		}
		o.Point(stepUnpacked)
		counts, err := checkArchive(ctx, unpacked, &res.From)
		if err != nil {
			return id, pos, err
		}
		id = datadir.Identity{
			FormatVersion: datadir.FormatVersion, ClusterID: restoredID(&res.From, &o), ClusterName: o.ClusterName,
			NodeID: o.NodeID, Members: o.Members, CreatedAt: time.Now().UTC().Truncate(time.Second), Initialized: true,
		}
		res.ClusterID = fmt.Sprintf("%016x", id.ClusterID)
		pos, err = restoreState(dir, unpacked, counts, res, &o)
		if err == nil {
			err = os.RemoveAll(unpacked)
		}
		return id, pos, err
	})
	if err != nil {
		return nil, err
	}
	return res, nil
}

const stepUnpacked = "unpacked"

// restoredID derives the id of a cluster that is made from the backup h, so that
// every member comes to the same one and it differs from that of the backup.
func restoredID(h *archive.Header, o *RestoreOptions) uint64 {
	for n := 0; ; n++ {
		b := fmt.Appendf(nil, "conveyor cluster %q of", o.ClusterName)
		for _, id := range o.Members {
			b = fmt.Appendf(b, " %d", id)
		}
		b = fmt.Appendf(b, " restored from %s at %d (term %d, epoch %d) %s token %q %d",
			h.ClusterID, h.Index, h.Term, h.Epoch, h.StateHash, o.Token, n)
		if id := datadir.NonZero(xxhash.Sum64(b)); fmt.Sprintf("%016x", id) != h.ClusterID {
			return id
		}
	}
}

// checkArchive verifies the content of an unpacked archive, every invariant of a
// state included, and compares it with its header. It returns how many records
// there are, but for checkpoints, and the operations, which a new cluster begins
// without.
func checkArchive(ctx context.Context, dir string, h *archive.Header) (router.Counts, error) {
	image, err := router.OpenImage(vfs.Default, dir, router.Options{})
	if err != nil {
		return router.Counts{}, err
	}
	defer image.Close()
	source, err := image.CheckedSource(ctx)
	if err != nil {
		return router.Counts{}, err
	}
	v := image.View()
	defer v.Close()
	counts, err := v.QuickCounts()
	counts.Operations = 0
	hash := hex.EncodeToString(source.ContentHash)
	if err == nil && h.StateHash != "" && h.StateHash != hash {
		err = fmt.Errorf("%w: its header has the hash %.64s, its records have %s; take another backup", ErrContent, h.StateHash, hash)
	}
	// An archive without a hash is taken for what it holds, and the members made
	// from it still have to come to one cluster id.
	h.StateHash = hash
	return counts, err
}

// restoreState makes the state below dir from the image in unpacked, which has
// these counts, behind the entry that the new cluster begins after.
func restoreState(dir, unpacked string, counts router.Counts, res *Restored, o *RestoreOptions) (pos raftnode.Position, err error) {
	var members []raftnode.Member
	for _, id := range o.Members {
		members = append(members, raftnode.Member{ID: id})
	}
	// The index goes on, so that revisions do; the term is above that of every
	// entry the state came from.
	pos = groupOf(res.From.Index+1, res.From.Term+1, members)
	raw, err := rpc.EncodePosition(pos)
	if err != nil {
		return pos, err
	}
	root := filepath.Join(dir, datadir.StateName)
	if err := router.CreateFrom(vfs.Default, root, unpacked, raw, router.Options{Logger: o.Logger}); err != nil {
		return pos, err
	}
	name, err := router.CurrentDir(vfs.Default, root)
	if err != nil {
		return pos, err
	}
	image, err := router.OpenImage(vfs.Default, name, router.Options{})
	if err != nil {
		return pos, err
	}
	defer image.Close()
	// Its tables are the files that checkArchive has read a moment ago, under
	// other names, and one batch more: to read all of them again would tell
	// nothing new for a third of the time of the restore. What that batch could
	// have spoilt are the counters.
	v := image.View()
	defer v.Close()
	made, err := v.QuickCounts()
	if err != nil {
		return pos, err
	}
	if made != counts {
		return pos, fmt.Errorf("%w: the backup holds %+v, the state made from it %+v", ErrContent, counts, made)
	}
	res.StateHash, res.Revision = res.From.StateHash, v.Revision()
	res.Index, res.Term = pos.Index, pos.Term
	return pos, nil
}
