package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/client"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

func newBackupListCommand(a *app) *cobra.Command {
	var dest placeFlag
	var limit int
	cmd := &cobra.Command{
		Use:   "list [--dest URL]",
		Short: "List the backups of a store, or the snapshots on the nodes, the newest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 0 {
				return usageError{cmd, errors.New("--limit must not be negative")}
			}
			if dest.text == "" {
				return a.listSnapshots(cmd, limit)
			}
			return withStore(cmd.Context(), dest.text, false, func(s *backup.Store) error {
				l, err := s.List(cmd.Context())
				if err != nil {
					return err
				}
				return a.printListing(&l, limit)
			})
		},
	}
	a.storeFlags(cmd, &dest, "store of the backups; without it, the snapshots on the nodes are listed")
	cmd.Flags().IntVarP(&limit, "limit", "l", 20, "show only the newest; 0: all")
	return cmd
}

func newest[T any](list []T, limit int) []T {
	if limit > 0 && len(list) > limit {
		return list[:limit]
	}
	return list
}

func (a *app) printListing(l *backup.Listing, limit int) error {
	shown := newest(l.Backups, limit)
	if shown == nil {
		shown = []backup.Metadata{}
	}
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, shown)
	}
	g := &output.Grid{Header: []string{"BACKUP", "CREATED", "SIZE", "REVISION", "EPOCH", "CLUSTER", "COMPRESSION"}}
	for _, m := range shown {
		g.Add(m.BackupID, m.CreatedAt.Format(time.RFC3339), output.Bytes(int64(m.SizeBytes)), m.Revision, m.Epoch, clusterOf(&m), m.Compression)
	}
	if err := g.Write(a.stdout); err != nil {
		return err
	}
	if n := len(l.Backups) - len(shown); n > 0 {
		fmt.Fprintf(a.stdout, "\n%d older ones are not shown; see --limit\n", n)
	}
	for _, b := range l.Broken {
		fmt.Fprintf(a.stderr, "Warning: %s is no backup: %s\n", output.Clean(b.ID), output.Clean(b.Err.Error()))
	}
	return nil
}

func clusterOf(m *backup.Metadata) string {
	if m.ClusterName == "" {
		return m.ClusterID
	}
	return fmt.Sprintf("%s (%s)", m.ClusterName, m.ClusterID)
}

// withCluster runs one command's conversation with the nodes of --server.
func (a *app) withCluster(cmd *cobra.Command, talk func(ctx context.Context, c *client.Client) error) error {
	c, err := a.cluster(cmd, a.servers)
	if err != nil {
		return err
	}
	ctx, cancel := a.quick(cmd.Context())
	defer cancel()
	return errors.Join(talk(ctx, c), c.Close())
}

func (a *app) listSnapshots(cmd *cobra.Command, limit int) error {
	return a.withCluster(cmd, func(ctx context.Context, c *client.Client) error {
		reply, err := c.Backup().ListSnapshots(ctx, &backuppb.ListSnapshotsRequest{})
		if err != nil {
			return readError{err}
		}
		list := newest(reply.GetSnapshots(), limit)
		for _, w := range reply.GetWarnings() {
			fmt.Fprintf(a.stderr, "Warning: %s\n", output.Clean(w))
		}
		return output.Print(a.stdout, a.format, output.Messages(list), func() *output.Grid {
			g := &output.Grid{Header: []string{"SNAPSHOT", "CREATED", "SIZE", "REVISION", "EPOCH", "CLUSTER", "NODE", "ORIGIN"}}
			for _, s := range list {
				origin := s.GetOrigin()
				if s.GetSuspect() != "" {
					origin += ", suspect"
				}
				g.Add(s.GetSnapshotId(), milliseconds(s.GetCreatedAt()), output.Bytes(int64(s.GetSizeBytes())), s.GetRevision(),
					s.GetEpoch(), s.GetClusterId(), s.GetNodeId(), origin)
			}
			return g
		})
	})
}

func milliseconds(ms uint64) string { return time.UnixMilli(int64(ms)).UTC().Format(time.RFC3339) }

func newBackupDescribeCommand(a *app) *cobra.Command {
	var source placeFlag
	cmd := &cobra.Command{
		Use:   "describe ID [--source URL]",
		Short: "Show what a backup in a store, or a snapshot on a node, holds",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if source.text == "" {
				return a.describeSnapshot(cmd, args[0])
			}
			return withStore(cmd.Context(), source.text, false, func(s *backup.Store) error {
				m, err := s.Describe(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.printBackup(&m, s.Location().String())
			})
		},
	}
	a.storeFlags(cmd, &source, "store of the backup; without it, the snapshots on the nodes")
	return cmd
}

func (a *app) describeSnapshot(cmd *cobra.Command, id string) error {
	return a.withCluster(cmd, func(ctx context.Context, c *client.Client) error {
		reply, err := c.Backup().ListSnapshots(ctx, &backuppb.ListSnapshotsRequest{})
		if err != nil {
			return readError{err}
		}
		for _, s := range reply.GetSnapshots() {
			if s.GetSnapshotId() != id {
				continue
			}
			return output.Print(a.stdout, a.format, s, func() *output.Grid {
				g := &output.Grid{}
				g.Add("SNAPSHOT", s.GetSnapshotId())
				g.Add("LIES ON", fmt.Sprintf("node %d, %s", s.GetNodeId(), s.GetOrigin()))
				g.Add("CREATED", milliseconds(s.GetCreatedAt()))
				g.Add("SIZE", output.Bytes(int64(s.GetSizeBytes())))
				g.Add("STATE", fmt.Sprintf("revision %d, epoch %d, entry %d (term %d)", s.GetRevision(), s.GetEpoch(), s.GetCommitIndex(), s.GetTerm()))
				g.Add("CLUSTER", s.GetClusterId())
				g.Add("CONTENT", s.GetStateHash())
				if why := s.GetSuspect(); why != "" {
					g.Add("SUSPECT", output.Clean(why)+"; it is not restored")
				}
				return g
			})
		}
		more := ""
		if w := reply.GetWarnings(); len(w) > 0 {
			more = "; " + output.Clean(strings.Join(w, "; "))
		}
		return notFound("no snapshot %s on the nodes of the cluster%s; for one in a store, give --source", output.Clean(id), more)
	})
}

// stored is the document of a backup: its description, and where it lies.
type stored struct {
	backup.Metadata
	Location string `json:"location"`
}

func (a *app) printBackup(m *backup.Metadata, where string) error {
	return output.Print(a.stdout, a.format, stored{*m, where}, func() *output.Grid {
		g := &output.Grid{}
		g.Add("BACKUP", m.BackupID)
		g.Add("LIES IN", where)
		g.Add("CREATED", m.CreatedAt.Format(time.RFC3339))
		g.Add("SIZE", fmt.Sprintf("%s (%d bytes), %s", output.Bytes(int64(m.SizeBytes)), m.SizeBytes, m.Compression))
		g.Add("STATE", fmt.Sprintf("revision %d, epoch %d, entry %d (term %d)", m.Revision, m.Epoch, m.CommitIndex, m.Term))
		g.Add("CLUSTER", clusterOf(m))
		g.Add("HOLDS", countsText(m.Counts))
		g.Add("CONTENT", m.StateHash)
		g.Add("SHA256", m.SHA256)
		g.Add("TAKEN FROM", m.RouterEndpoint)
		if m.StateAgreed {
			g.Add("AGREED", "a majority of the voters held this state")
		}
		return g
	})
}

func countsText(counts map[string]uint64) string {
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(counts)) {
		if counts[kind] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", counts[kind], kind))
		}
	}
	return strings.Join(parts, ", ")
}

func newBackupVerifyCommand(a *app) *cobra.Command {
	var source placeFlag
	cmd := &cobra.Command{
		Use:   "verify ID [--source URL]",
		Short: "Read a whole backup and compare it with all its checksums",
		Long: `Read a whole backup from its store and compare it with all its checksums; no node
is needed. Without --source, a node loads its snapshot into a state of its own,
checks every rule as well and says how it differs from the live state.

Exit code 8 when the backup is damaged.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if source.text == "" {
				return a.verifySnapshot(cmd, args[0])
			}
			return withStore(cmd.Context(), source.text, false, func(s *backup.Store) error {
				return a.verifyBackup(cmd.Context(), s, args[0])
			})
		},
	}
	a.storeFlags(cmd, &source, "store of the backup; without it, the snapshots on the nodes")
	return cmd
}

func (a *app) verifyBackup(ctx context.Context, s *backup.Store, id string) error {
	r, m, err := s.Get(ctx, id)
	if err != nil {
		return err
	}
	shown := a.progress("verify "+id, true)
	h, info, err := archive.Verify(ctx, &counted{in: r, moved: func(n int64) { shown.Set(n, int64(m.SizeBytes)) }},
		archive.Limits{MaxBytes: 1 << 40})
	if err = errors.Join(err, r.Close()); err != nil {
		shown.End()
		return err
	}
	shown.Done(int64(m.SizeBytes))
	if m.StateHash != "" && m.StateHash != h.StateHash || m.CommitIndex != h.Index || m.Term != h.Term {
		return &backup.DamagedError{ID: id, Object: backup.MetadataName, Detail: fmt.Sprintf(
			"it says entry %d (term %d) with content %q, the archive is of %d (%d) with %q", m.CommitIndex, m.Term, m.StateHash, h.Index, h.Term, h.StateHash)}
	}
	verified := struct {
		stored
		Format     int    `json:"format"`
		Files      int    `json:"files"`
		StateBytes int64  `json:"state_bytes"`
		Result     string `json:"result"`
	}{stored{m, s.Location().String()}, h.Format, len(info.Files), info.Bytes, "intact"}
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, verified)
	}
	fmt.Fprintf(a.stdout, "backup %s is intact: %d files with %s, revision %d of cluster %s\n", output.Clean(id), len(info.Files),
		output.Bytes(info.Bytes), h.Revision, output.Clean(h.ClusterID))
	return nil
}

func (a *app) verifySnapshot(cmd *cobra.Command, id string) error {
	c, err := a.cluster(cmd, a.servers)
	if err != nil {
		return err
	}
	defer c.Close()
	reply, err := a.validate(cmd, c, snapshotToRestore{id: id, name: "snapshot " + id})
	if err != nil {
		return err
	}
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, reply)
	}
	return a.printDifference(reply)
}

// validate lets the cluster check a snapshot of its own.
func (a *app) validate(cmd *cobra.Command, c *client.Client, snap snapshotToRestore) (*backuppb.RestoreSnapshotResponse, error) {
	ctx, cancel := a.slow(cmd, cmd.Context())
	defer cancel()
	reply, err := c.Backup().RestoreSnapshot(ctx, &backuppb.RestoreSnapshotRequest{SnapshotId: snap.id, ValidateOnly: true})
	switch {
	case err != nil:
		return nil, readError{about(snap.name, err)}
	case !reply.GetSuccess():
		return nil, checkFailed(fmt.Errorf("%s cannot be restored: %s", snap.name, reply.GetMessage()))
	}
	return reply, nil
}

func newBackupDeleteCommand(a *app) *cobra.Command {
	var dest placeFlag
	var force bool
	cmd := &cobra.Command{
		Use:   "delete ID [--dest URL]",
		Short: "Delete a backup from a store, or a snapshot from the nodes",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := args[0]
			if err := backup.CheckID(id); err != nil {
				return usageError{cmd, err}
			}
			ask := func(what string) error {
				if force {
					return nil
				}
				return a.confirm(cmd.Context(), "Delete "+what+" for good?")
			}
			if dest.text != "" {
				return withStore(cmd.Context(), dest.text, false, func(s *backup.Store) error {
					what := "backup " + id
					m, err := s.Describe(cmd.Context(), id)
					switch {
					case err == nil:
						what += " of " + m.CreatedAt.Format(time.RFC3339)
					case errors.Is(err, backup.ErrIncomplete), errors.Is(err, backup.ErrDamaged):
						what += ", which cannot be restored,"
					default:
						return err
					}
					if err := ask(what); err != nil {
						return err
					}
					if err := s.Delete(cmd.Context(), id); err != nil {
						return err
					}
					return a.printDeleted(id)
				})
			}
			if err := ask("snapshot " + id); err != nil {
				return err
			}
			return a.withCluster(cmd, func(ctx context.Context, c *client.Client) error {
				reply, err := c.Backup().DeleteSnapshot(ctx, &backuppb.DeleteSnapshotRequest{SnapshotId: id})
				if err != nil {
					return about("snapshot "+id, err)
				}
				for _, w := range reply.GetWarnings() {
					fmt.Fprintf(a.stderr, "Warning: %s\n", output.Clean(w))
				}
				if !reply.GetExisted() {
					return notFound("no snapshot %s on the nodes of the cluster; for a backup in a store, give --dest", id)
				}
				return a.printDeleted(id)
			})
		},
	}
	a.storeFlags(cmd, &dest, "store of the backup; without it, the snapshot is deleted from the nodes")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.Flags().BoolVarP(&force, "yes", "y", false, "as --force")
	return cmd
}

func (a *app) printDeleted(id string) error {
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, map[string]string{"deleted": id})
	}
	fmt.Fprintf(a.stdout, "deleted %s\n", id)
	return nil
}

func newBackupCleanupCommand(a *app) *cobra.Command {
	var dest placeFlag
	var keep int
	var yes bool
	cmd := &cobra.Command{
		Use:   "cleanup --dest URL",
		Short: "Delete all but the newest backups of a store",
		Long: `Delete all but the newest backups of a store, and uploads that were not finished
within a day. What cannot be read is left alone and does not count.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if keep < 1 {
				return usageError{cmd, errors.New("--keep must be at least 1; the last backup is deleted by its id")}
			}
			if dest.text == "" {
				return usageError{cmd, errors.New("give the store by --dest")}
			}
			return withStore(cmd.Context(), dest.text, false, func(s *backup.Store) error {
				return a.cleanup(cmd.Context(), s, keep, yes)
			})
		},
	}
	a.storeFlags(cmd, &dest, "store of the backups (required)")
	cmd.Flags().IntVarP(&keep, "keep", "k", 10, "how many of the newest are kept")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *app) cleanup(ctx context.Context, s *backup.Store, keep int, yes bool) error {
	plan, err := s.PlanCleanup(ctx, keep)
	if err != nil {
		return err
	}
	if !yes && len(plan.Expired)+len(plan.Abandoned) > 0 {
		for _, m := range plan.Expired {
			fmt.Fprintf(a.stderr, "  %s of %s, %s\n", m.BackupID, m.CreatedAt.Format(time.RFC3339), output.Bytes(int64(m.SizeBytes)))
		}
		for _, b := range plan.Abandoned {
			fmt.Fprintf(a.stderr, "  %s, never finished, %s\n", b.ID, output.Bytes(b.Bytes))
		}
		if err := a.confirm(ctx, fmt.Sprintf("Delete these for good and keep the newest %d?", len(plan.Kept))); err != nil {
			return err
		}
	}
	done, err := s.CarryOut(ctx, plan)
	result := struct {
		Deleted    []string `json:"deleted"`
		Unfinished []string `json:"unfinished"`
		Kept       int      `json:"kept"`
	}{[]string{}, []string{}, len(done.Kept)}
	for _, m := range done.Expired {
		result.Deleted = append(result.Deleted, m.BackupID)
	}
	for _, b := range done.Abandoned {
		result.Unfinished = append(result.Unfinished, b.ID)
	}
	if a.format != output.Table {
		return errors.Join(output.Document(a.stdout, a.format, result), err)
	}
	_, werr := io.WriteString(a.stdout, fmt.Sprintf("deleted %d backups and %d unfinished uploads, kept %d\n",
		len(result.Deleted), len(result.Unfinished), result.Kept))
	return errors.Join(err, werr)
}
