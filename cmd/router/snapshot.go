package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"conveyor.etl/router/backup/archive"
	_ "conveyor.etl/router/backup/stores" // s3://, gs:// and azblob://
	"conveyor.etl/router/config"
	"conveyor.etl/router/offline"
	"conveyor.etl/router/output"
	"conveyor.etl/router/server"
)

func newSnapshotCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Make a backup of a stopped node, or a new cluster from a backup",
		Long: `Make a backup of the data directory of a node that does not run, or the data
directories of a new cluster from a backup. To back up or restore a running
cluster, use 'router backup'.`,
	}
	cmd.AddCommand(newSnapshotSaveCommand(a), newSnapshotRestoreCommand(a))
	return cmd
}

func newSnapshotSaveCommand(a *app) *cobra.Command {
	var dir, compression string
	var o offline.SaveOptions
	cmd := &cobra.Command{
		Use:   "save --data-dir DIR ARCHIVE",
		Short: "Write a backup of a node that does not run",
		Long: `Write a backup of the data directory of a node that does not run to the file
ARCHIVE, which must not exist, or with - to standard output. It holds the state
with the entries of the log applied that are known to be committed; the directory
is only read.

Exit codes: 0 done, 2 wrong use, 3 no data directory, 4 a node runs on it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if o.Compression, err = archive.ParseCompression(compression); err != nil {
				return usageError{cmd, err}
			}
			o.Version, o.Logger = server.ReadBuild().Version, quietLogger(a.stderr)
			d, err := offline.Open(dir)
			if err != nil {
				return err
			}
			var saved *offline.Saved
			report := a.stdout
			if args[0] == "-" {
				report = a.stderr
				saved, err = offline.Save(cmd.Context(), d, a.stdout, o)
			} else {
				saved, err = offline.SaveFile(cmd.Context(), d, args[0], o)
			}
			if err = errors.Join(err, d.Close()); err != nil {
				return err
			}
			return output.Print(report, a.format, saved, func() *output.Grid {
				h := &saved.Header
				g := &output.Grid{}
				g.Add("ARCHIVE", args[0])
				g.Add("BYTES", saved.Bytes)
				g.Add("CLUSTER", fmt.Sprintf("%s (%s)", h.ClusterName, h.ClusterID))
				g.Add("ENTRY", fmt.Sprintf("%d (term %d), revision %d, epoch %d", h.Index, h.Term, h.Revision, h.Epoch))
				g.Add("CONTENT", h.StateHash)
				if saved.Uncommitted > 0 {
					g.Add("LEFT OUT", fmt.Sprintf("%d entries at the end of the log that are not known to be committed", saved.Uncommitted))
				}
				return g
			})
		},
	}
	dataDirFlag(cmd, &dir)
	cmd.Flags().StringVar(&compression, "compression", "zstd", "zstd, gzip or none")
	cmd.Flags().StringVar(&o.Scratch, "scratch", "", "directory for the copy the log is applied to; default: that of temporary files")
	_ = cmd.MarkFlagDirname("scratch")
	_ = cmd.RegisterFlagCompletionFunc("compression", cobra.FixedCompletions([]string{"zstd", "gzip", "none"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func newSnapshotRestoreCommand(a *app) *cobra.Command {
	var o offline.RestoreOptions
	var peers []string
	cmd := &cobra.Command{
		Use:   "restore --data-dir DIR --node-id N [--peers ID:HOST:PORT]... ARCHIVE",
		Short: "Make the data directory of a member of a new cluster from a backup",
		Long: `Make the data directory of one member of a new cluster from the backup in the file
ARCHIVE, with - on standard input, or in a store, as LOCATION/ID with a location such
as file:///backups, s3://bucket/prefix, gs://... or azblob://... Run it once for each member, with the same
backup, --cluster-name, --peers and --token: the members then begin at the same
entry of the same new cluster, and a start of 'router serve' with the same settings
brings it up. Nodes of the cluster the backup is of cannot reach it.

Everything in the backup is checked first. DIR is made, or must be empty; on an
error nothing is left in it.

Exit codes: 0 done, 2 wrong use, 3 no such backup, 4 the directory is not empty, 8 the
backup is damaged or not what it says.`,
		Example: `  for i in 1 2 3; do
    router snapshot restore --data-dir /mnt/node-$i --node-id $i \
      --peers 1:10.0.0.1:50052 --peers 2:10.0.0.2:50052 --peers 3:10.0.0.3:50052 backup.tar.zst
  done`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := config.ParsePeers(peers)
			if err != nil {
				return usageError{cmd, fmt.Errorf("--peers: %w", err)}
			}
			if o.NodeID == 0 {
				return usageError{cmd, errors.New("--node-id is missing")}
			}
			if o.Members, err = foundingMembers(o.NodeID, list); err != nil {
				return usageError{cmd, err}
			}
			o.Logger = quietLogger(a.stderr)
			res, err := a.restore(cmd.Context(), args[0], o)
			if err != nil {
				return restoreError(err)
			}
			return output.Print(a.stdout, a.format, res, func() *output.Grid {
				g := &output.Grid{}
				g.Add("FROM", fmt.Sprintf("%s (%s), entry %d, made %s", res.From.ClusterName, res.From.ClusterID, res.From.Index,
					res.From.Created().Format("2006-01-02T15:04:05Z")))
				g.Add("NEW CLUSTER", fmt.Sprintf("%s (%s)", res.ClusterName, res.ClusterID))
				g.Add("MEMBER", fmt.Sprintf("%d of %v", res.NodeID, res.Members))
				g.Add("BEGINS BEHIND", fmt.Sprintf("entry %d (term %d), revision %d", res.Index, res.Term, res.Revision))
				g.Add("CONTENT", res.StateHash)
				return g
			})
		},
	}
	dataDirFlag(cmd, &o.Dir)
	flags := cmd.Flags()
	flags.Uint64VarP(&o.NodeID, "node-id", "n", 0, "id of the node the directory is for (required)")
	flags.StringArrayVar(&peers, "peers", nil, "ID:HOST:PORT of a member, as for 'router serve'; repeat for each")
	flags.StringVar(&o.ClusterName, "cluster-name", "conveyor", "name of the new cluster, as for 'router serve'")
	flags.StringVar(&o.Token, "token", "", "any text, the same for all members: tells clusters apart that are made from one backup with the same name and members")
	flags.Int64Var(&o.MaxBytes, "max-bytes", 0, "refuse a backup whose state is larger; 0: 64 GiB")
	return cmd
}

// foundingMembers are those of a new cluster, by the rule of 'router serve', which is
// started with the same settings: peers may leave the node itself out, but an odd
// number of others is a whole cluster, and one more is what a wrong id looks like. It
// would found a cluster that the others are no part of.
func foundingMembers(node uint64, peers []config.Peer) ([]uint64, error) {
	ids := []uint64{}
	for _, p := range peers {
		ids = append(ids, p.ID)
	}
	switch n := len(ids); {
	case slices.Contains(ids, node):
		return ids, nil
	case n >= 3 && n%2 == 1:
		return nil, fmt.Errorf("--node-id %d is none of --peers (%s): list every voter, this node too; nothing was made", node, idList(ids))
	}
	return append(ids, node), nil
}

// restore runs one restore from wherever name points to.
func (a *app) restore(ctx context.Context, name string, o offline.RestoreOptions) (*offline.Restored, error) {
	in, err := offline.OpenSource(ctx, name, a.stdin)
	if err != nil {
		return nil, err
	}
	res, err := offline.Restore(ctx, in, o)
	return res, errors.Join(err, in.Close())
}

// restoreError says of a backup that cannot be used that nothing was made of it.
func restoreError(err error) error {
	if exitCode(err) == exitCheckFailed {
		return fmt.Errorf("%w; nothing was made", err)
	}
	return err
}
