package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/client"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// creation is what `backup create` was asked for.
type creation struct {
	nodes       nodesFlag
	dest        placeFlag
	compression string
	id          string
	patience    time.Duration
}

func newBackupCreateCommand(a *app) *cobra.Command {
	var o creation
	cmd := &cobra.Command{
		Use:   "create [--dest URL]",
		Short: "Make a backup of the state as it is now, and store it",
		Long: `Make a snapshot of the state as it is now, with everything acknowledged before,
fetch it, check it, store it, and remove the snapshot from its node again. Clients
are not held up. Without --dest the snapshot stays on its node, where
'router backup list' shows it and 'router backup restore ID' restores it.

On an error, and after Ctrl-C, nothing is left in the store.`,
		Example: `  router backup create -d s3://backups/conveyor
  router backup create -d /mnt/backups --id before-upgrade -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			compression, err := archive.ParseCompression(o.compression)
			if err != nil {
				return usageError{cmd, err}
			}
			if o.id == "" {
				o.id = uuid.NewString()
			}
			if err := backup.CheckID(o.id); err != nil {
				return usageError{cmd, err}
			}
			if len(o.nodes.nodes) == 0 {
				o.nodes.nodes = a.servers
			}
			c, err := a.cluster(cmd, o.nodes.nodes)
			if err != nil {
				return err
			}
			defer c.Close()
			if o.dest.text == "" {
				return a.keepSnapshot(cmd, c, o.id)
			}
			return withStore(cmd.Context(), o.dest.text, true, func(s *backup.Store) error {
				m, err := a.createBackup(cmd, c, s, &o, compression)
				if err != nil {
					return err
				}
				return a.printBackup(&m, s.Location().String())
			})
		},
	}
	a.storeFlags(cmd, &o.dest, "store to put the backup in; without it, the snapshot stays on its node")
	flags := cmd.Flags()
	flags.VarP(&o.nodes, "router", "r", "nodes to take the backup from, as --server")
	flags.StringVarP(&o.compression, "compression", "c", "zstd", "zstd, gzip or none")
	flags.StringVar(&o.id, "id", "", "id of the backup; default: a random one")
	a.patienceFlag(cmd, &o.patience)
	_ = cmd.RegisterFlagCompletionFunc("compression", cobra.FixedCompletions([]string{"zstd", "gzip", "none"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) snapshot(cmd *cobra.Command, c *client.Client, id string) (*backuppb.CreateSnapshotResponse, error) {
	// The snapshot may take minutes, and as long would the call be repeated while
	// nobody leads: whether a leader answers at all is asked within --timeout.
	ask, cancel := a.quick(cmd.Context())
	_, err := c.Backup().GetStateMetadata(ask, &backuppb.GetStateMetadataRequest{})
	cancel()
	if err != nil {
		return nil, toChange{readError{err}} // a snapshot is never made of what one node has
	}
	ctx, cancel := a.slow(cmd, cmd.Context())
	defer cancel()
	return c.Backup().CreateSnapshot(ctx, &backuppb.CreateSnapshotRequest{SnapshotId: id})
}

func (a *app) keepSnapshot(cmd *cobra.Command, c *client.Client, id string) error {
	snap, err := a.snapshot(cmd, c, id)
	if err != nil {
		return about("snapshot "+id, err)
	}
	return output.Print(a.stdout, a.format, snap, func() *output.Grid {
		g := &output.Grid{}
		g.Add("SNAPSHOT", snap.GetSnapshotId())
		g.Add("LIES ON", fmt.Sprintf("node %d", snap.GetNodeId()))
		g.Add("SIZE", output.Bytes(int64(snap.GetSizeBytes())))
		g.Add("STATE", fmt.Sprintf("revision %d, epoch %d, entry %d (term %d)", snap.GetRevision(), snap.GetEpoch(), snap.GetCommitIndex(), snap.GetTerm()))
		g.Add("CLUSTER", snap.GetClusterId())
		g.Add("CONTENT", snap.GetStateHash())
		return g
	})
}

// createBackup moves one snapshot into s. The archive is checked on its way: a
// backup that cannot be restored is none.
func (a *app) createBackup(cmd *cobra.Command, c *client.Client, s *backup.Store, o *creation, compression archive.Compression) (backup.Metadata, error) {
	ctx := cmd.Context()
	switch _, err := s.Describe(ctx, o.id); {
	case err == nil:
		return backup.Metadata{}, fmt.Errorf("%w: %s in %s; nothing was done", backup.ErrExists, o.id, s.Location())
	case !errors.Is(err, backup.ErrNotFound) && !errors.Is(err, backup.ErrIncomplete):
		return backup.Metadata{}, err
	}
	snap, err := a.snapshot(cmd, c, o.id)
	if err != nil {
		return backup.Metadata{}, about("snapshot "+o.id, err)
	}
	id := snap.GetSnapshotId()
	defer func() {
		ctx, cancel := tidy(ctx)
		defer cancel()
		_, err := c.Backup().DeleteSnapshot(ctx, &backuppb.DeleteSnapshotRequest{SnapshotId: id})
		a.noteKept(id, err)
	}()
	d := c.Download(ctx, id, compressions[compression], o.patience)
	defer d.Close()
	shown := a.progress("backup "+o.id, true)
	checked := newChecker(ctx, &counted{in: d, moved: func(n int64) {
		total := int64(d.Total())
		if compression != archive.None {
			// The node knows the size before compression only.
			total = 0
		}
		shown.Set(n, total)
	}})
	m, err := s.PutWith(ctx, o.id, checked, func() (backup.Metadata, error) {
		h := checked.header
		return backup.Metadata{
			RouterEndpoint: c.Endpoint(), CommitIndex: h.Index, Term: h.Term, CreatedAt: h.Created(), Compression: compression.String(),
			StateHash: h.StateHash, ClusterID: h.ClusterID, ClusterName: h.ClusterName, Epoch: h.Epoch, Revision: h.Revision,
			Counts: h.Counts, RouterVersion: h.RouterVersion,
		}, nil
	})
	// The checker must not outlive what it reads.
	checked.stop()
	if err != nil {
		shown.End()
		return m, err
	}
	shown.Done(int64(m.SizeBytes))
	return m, nil
}

// counted tells how much was read.
type counted struct {
	in    io.Reader
	n     int64
	moved func(n int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	c.n += int64(n)
	c.moved(c.n)
	return n, err
}

// checker passes an archive on and checks it meanwhile. Its reader gets the end
// only when the whole archive was found to be right.
type checker struct {
	in   io.Reader
	pipe *io.PipeWriter
	done chan struct{}
	// Valid behind done.
	header archive.Header
	err    error
}

func newChecker(ctx context.Context, in io.Reader) *checker {
	out, pipe := io.Pipe()
	c := &checker{in: in, pipe: pipe, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		c.header, _, c.err = archive.Verify(ctx, out, archive.Limits{MaxBytes: 1 << 40})
		// The writer is told why nobody reads on.
		reason := c.err
		if reason == nil {
			reason = io.ErrClosedPipe
		}
		out.CloseWithError(reason)
	}()
	return c
}

// Read implements io.Reader.
func (c *checker) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	if n > 0 {
		if _, werr := c.pipe.Write(p[:n]); werr != nil {
			<-c.done
			if c.err != nil {
				return 0, c.err
			}
			return 0, fmt.Errorf("%w: there is something behind its end", archive.ErrCorrupt)
		}
	}
	if errors.Is(err, io.EOF) {
		c.pipe.Close()
		<-c.done
		if c.err != nil {
			return 0, c.err
		}
	}
	return n, err
}

// stop ends the checking and waits for that.
func (c *checker) stop() {
	c.pipe.CloseWithError(io.ErrUnexpectedEOF)
	<-c.done
}
