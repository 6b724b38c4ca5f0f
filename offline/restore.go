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
	err := makeMember(o.Dir, &o.Settings, func(dir string, rest restMaker) error {
		return restoreInto(ctx, source, dir, rest, res, &o)
	})
	if err != nil {
		return nil, err
	}
	return res, nil
}

const stepUnpacked = "unpacked"

// restoreInto makes the content of dir. The check of what was unpacked takes the
// processors for as long as storing it takes the disk, and neither is needed to make the
// little that is new: it goes on beside both, and nothing counts before both have ended
// well. One after the other, a restore took a third longer.
func restoreInto(ctx context.Context, source io.Reader, dir string, rest restMaker, res *Restored, o *RestoreOptions) (err error) {
	unpacked := filepath.Join(dir, "archive")
	limits := archive.Limits{MaxBytes: o.MaxBytes, ReserveBytes: spareBytes + 2*o.SegmentBytes}
	image, err := archive.Unpack(ctx, source, limits, vfs.Default, unpacked)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, image.Abandon()) }()
	res.From = image.Header
	o.Point(stepUnpacked)

	check := beginCheck(ctx, unpacked, res.From.StateHash)
	defer check.stop()
	if res.From.StateHash == "" {
		// It is taken for what it holds, and the members made from it still have to
		// come to one cluster id.
		if err := check.wait(); err != nil {
			return err
		}
		res.From.StateHash = check.hash
	}
	id := datadir.Identity{
		FormatVersion: datadir.FormatVersion, ClusterID: restoredID(&res.From, o), ClusterName: o.ClusterName,
		NodeID: o.NodeID, Members: o.Members, CreatedAt: time.Now().UTC().Truncate(time.Second), Initialized: true,
	}
	res.ClusterID = fmt.Sprintf("%016x", id.ClusterID)
	pos, made, err := restoreState(dir, unpacked, res, o)
	if err == nil {
		err = rest(id, pos)
	}
	// What is wrong with the backup comes before what came of that.
	if cerr := check.wait(); cerr != nil {
		return cerr
	}
	if err != nil {
		return err
	}
	// The tables of the state are the files that were checked, under other names, and
	// one batch more: to read all of them again would tell nothing new. What that batch
	// could have spoilt are the counters.
	if made != check.counts {
		return fmt.Errorf("%w: the backup holds %+v, the state made from it %+v", ErrContent, check.counts, made)
	}
	// They have to be durable before they count, under whatever name.
	if err := image.Settle(); err != nil {
		return err
	}
	return os.RemoveAll(unpacked)
}

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

// contentCheck verifies the content of an unpacked archive, every invariant of a state
// included, and compares it with the hash in the header, beside whoever began it.
type contentCheck struct {
	cancel context.CancelFunc
	done   chan struct{}
	// Valid once wait has returned: how many records there are, but for checkpoints,
	// and the operations, which a new cluster begins without; and their hash.
	counts router.Counts
	hash   string
	err    error
}

// beginCheck begins to check the image in dir; want is the hash of the header, "" if it
// has none. The caller calls stop in the end.
func beginCheck(ctx context.Context, dir, want string) *contentCheck {
	ctx, cancel := context.WithCancel(ctx)
	c := &contentCheck{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		if c.err = c.run(ctx, dir); c.err == nil && want != "" && want != c.hash {
			c.err = fmt.Errorf("%w: its header has the hash %.64s, its records have %s; take another backup", ErrContent, want, c.hash)
		}
	}()
	return c
}

func (c *contentCheck) run(ctx context.Context, dir string) error {
	image, err := router.OpenImage(vfs.Default, dir, router.Options{})
	if err != nil {
		return err
	}
	defer image.Close()
	source, err := image.CheckedSource(ctx)
	if err != nil {
		return err
	}
	v := image.View()
	defer v.Close()
	c.counts, err = v.QuickCounts()
	c.counts.Operations = 0
	c.hash = hex.EncodeToString(source.ContentHash)
	return err
}

// wait returns how it went.
func (c *contentCheck) wait() error {
	<-c.done
	return c.err
}

// stop ends the check, if it has not ended by itself, and waits for that: it reads files
// that are removed then.
func (c *contentCheck) stop() {
	c.cancel()
	<-c.done
}

// restoreState makes the state below dir from the image in unpacked, behind the entry that
// the new cluster begins after, and returns what it counts.
func restoreState(dir, unpacked string, res *Restored, o *RestoreOptions) (pos raftnode.Position, made router.Counts, err error) {
	var members []raftnode.Member
	for _, id := range o.Members {
		members = append(members, raftnode.Member{ID: id})
	}
	// The index goes on, so that revisions do; the term is above that of every
	// entry the state came from.
	pos = groupOf(res.From.Index+1, res.From.Term+1, members)
	raw, err := rpc.EncodePosition(pos)
	if err != nil {
		return pos, made, err
	}
	root := filepath.Join(dir, datadir.StateName)
	if err := router.CreateFrom(vfs.Default, root, unpacked, raw, router.Options{Logger: o.Logger}); err != nil {
		return pos, made, err
	}
	name, err := router.CurrentDir(vfs.Default, root)
	if err != nil {
		return pos, made, err
	}
	image, err := router.OpenImage(vfs.Default, name, router.Options{})
	if err != nil {
		return pos, made, err
	}
	defer image.Close()
	v := image.View()
	defer v.Close()
	made, err = v.QuickCounts()
	res.StateHash, res.Revision = res.From.StateHash, v.Revision()
	res.Index, res.Term = pos.Index, pos.Term
	return pos, made, err
}
