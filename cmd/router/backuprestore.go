package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/client"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// pollInterval is how often a running operation is asked how far it is.
const pollInterval = 300 * time.Millisecond

// restoring is what `backup restore` was asked for.
type restoring struct {
	source       placeFlag
	target       nodesFlag
	validateOnly bool
	yes          bool
	patience     time.Duration
}

func newBackupRestoreCommand(a *app) *cobra.Command {
	var o restoring
	cmd := &cobra.Command{
		Use:   "restore ID [--source URL]",
		Short: "Put a backup in the place of the live state",
		Long: `Put a backup in the place of the live state of a running cluster: the backup is
sent to a node and checked there, what will change is shown, and after a yes the
new state is prepared on all nodes and swapped in at one moment. Up to that moment
nothing has changed; after it, 'router backup undo-restore' goes back. Reads are
answered throughout, and watches start over by themselves.

The cluster is that of --target, else of --server or CONVEYOR_ROUTER_SERVER when
one is given, else the one that the backup names as where it was taken from.
Without --source, ID is a snapshot on the nodes of the cluster.

Ctrl-C before the yes leaves nothing behind. Once the restore has begun, it goes on
without this command; 'router operation wait' follows it, 'router operation cancel'
ends it.`,
		Example: `  router backup restore nightly-7 -s s3://backups/conveyor --validate-only
  router backup restore nightly-7 -s /mnt/backups -t 10.0.0.1:50051,10.0.0.2:50051 --yes`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := args[0]
			if err := backup.CheckID(id); err != nil {
				return usageError{cmd, err}
			}
			if a.format != output.Table && !o.validateOnly && !o.yes {
				return usageError{cmd, errors.New("with -o json or yaml, give --validate-only or --yes: nobody can be asked")}
			}
			if o.source.text == "" {
				c, err := a.cluster(cmd, a.target(cmd, &o, ""))
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = a.restoreSnapshot(cmd, c, snapshotToRestore{id: id, name: "snapshot " + id}, &o)
				return err
			}
			return withStore(cmd.Context(), o.source.text, false, func(s *backup.Store) error {
				return a.restoreBackup(cmd, s, id, &o)
			})
		},
	}
	a.storeFlags(cmd, &o.source, "store of the backup; without it, the snapshots on the nodes")
	flags := cmd.Flags()
	flags.VarP(&o.target, "target", "t", "nodes of the cluster to restore, as --server")
	flags.BoolVar(&o.validateOnly, "validate-only", false, "check the backup and show what would change; change nothing")
	flags.BoolVarP(&o.yes, "yes", "y", false, "do not show what will change and do not ask")
	a.patienceFlag(cmd, &o.patience)
	return cmd
}

// target returns the nodes to restore to; recorded is what the backup names.
func (a *app) target(cmd *cobra.Command, o *restoring, recorded string) []string {
	var named nodesFlag
	switch {
	case len(o.target.nodes) > 0:
		return o.target.nodes
	case cmd.Flags().Changed("server") || a.getenv("CONVEYOR_ROUTER_SERVER") != "" || recorded == "":
		return a.servers
	case named.Set(recorded) != nil:
		return a.servers
	}
	return named.nodes
}

func (a *app) restoreBackup(cmd *cobra.Command, s *backup.Store, id string, o *restoring) (err error) {
	ctx := cmd.Context()
	m, err := s.Describe(ctx, id)
	if err != nil {
		return err
	}
	c, err := a.cluster(cmd, a.target(cmd, o, m.RouterEndpoint))
	if err != nil {
		return err
	}
	defer c.Close()
	if o.yes && !o.validateOnly {
		a.warnForeign(ctx, c, id, &m)
	}
	shown := a.progress("upload "+id, true)
	reply, err := c.Upload(ctx, func(ctx context.Context) (io.ReadCloser, error) {
		r, _, err := s.Get(ctx, id)
		return r, err
	}, o.patience, true, func(sent int64) { shown.Set(sent, int64(m.SizeBytes)) })
	if err != nil {
		shown.End()
		if status.Code(err) == codes.DataLoss {
			err = checkFailed(err)
		}
		return about("upload of backup "+id, err)
	}
	shown.Done(int64(m.SizeBytes))
	begun, err := a.restoreSnapshot(cmd, c, snapshotToRestore{
		id: reply.GetSnapshotId(), name: "backup " + id, source: clipText(fmt.Sprintf("backup %s in %s", id, s.Location())),
	}, o)
	if begun {
		return err // the node removes the copy when the restore has ended
	}
	tctx, cancel := tidy(ctx)
	defer cancel()
	if _, derr := c.Backup().DeleteSnapshot(tctx, &backuppb.DeleteSnapshotRequest{SnapshotId: reply.GetSnapshotId()}); derr != nil {
		a.notice("Warning: the copy of the backup, snapshot %s, was not removed from its node, which removes it by itself within an hour: %s",
			reply.GetSnapshotId(), plain(derr))
	}
	return err
}

// warnForeign says that a backup is of another cluster, which whoever does not want
// to see what changes does not see there. It stops nothing: that is how a cluster is
// moved.
func (a *app) warnForeign(ctx context.Context, c *client.Client, id string, m *backup.Metadata) {
	ctx, cancel := a.quick(ctx)
	defer cancel()
	live, err := c.Backup().GetStateMetadata(ctx, &backuppb.GetStateMetadataRequest{})
	if err != nil || m.ClusterID == "" || m.ClusterID == live.GetClusterId() {
		return // what goes wrong with the cluster, the restore says itself
	}
	a.notice("Warning: backup %s is of another cluster, %q (%s); it is put in the place of the state of %q (%s)",
		id, m.ClusterName, m.ClusterID, live.GetClusterName(), live.GetClusterId())
}

// clipText bounds what goes into a field of free text.
func clipText(s string) string {
	if len(s) <= rpc.MaxText {
		return s
	}
	return strings.ToValidUTF8(s[:rpc.MaxText-3], "") + "..."
}

// snapshotToRestore is a snapshot on a node. name is what its user calls it,
// source what the operation is to show; empty for a snapshot of its own.
type snapshotToRestore struct{ id, name, source string }

// restoreSnapshot reports whether the restore was begun, and perhaps goes on.
func (a *app) restoreSnapshot(cmd *cobra.Command, c *client.Client, snap snapshotToRestore, o *restoring) (begun bool, err error) {
	if !o.yes || o.validateOnly {
		if done, err := a.showDifference(cmd, c, snap, o.validateOnly); err != nil || done {
			return false, err
		}
		if err := a.confirm(cmd.Context(), "Replace the state of the cluster at "+c.Endpoint()+" by this?"); err != nil {
			return false, err
		}
	}
	ctx, cancel := a.slow(cmd, cmd.Context())
	defer cancel()
	reply, err := c.Backup().RestoreSnapshot(ctx, &backuppb.RestoreSnapshotRequest{SnapshotId: snap.id, Detach: true, Source: snap.source})
	if err != nil {
		// An answer that got lost may have been a yes.
		return client.OutcomeOf(err) == client.Unknown && status.Code(err) != codes.NotFound, about("restore of "+snap.name, err)
	}
	if reply.GetOperationId() == "" {
		// A server without operations answers when all is over.
		if !reply.GetSuccess() {
			return true, checkFailed(fmt.Errorf("the restore failed: %s", reply.GetMessage()))
		}
		return true, output.Print(a.stdout, a.format, reply, func() *output.Grid {
			g := &output.Grid{}
			g.Add("RESTORED", reply.GetMessage())
			return g
		})
	}
	return true, a.follow(cmd, c, reply.GetOperationId(), "restore")
}

// showDifference has a snapshot checked and shows what restoring it would change.
// done is true when only is, or when a program reads the result.
func (a *app) showDifference(cmd *cobra.Command, c *client.Client, snap snapshotToRestore, only bool) (done bool, err error) {
	reply, err := a.validate(cmd, c, snap)
	if err != nil {
		return false, err
	}
	if a.format != output.Table {
		return true, output.Document(a.stdout, a.format, reply)
	}
	return only, a.printDifference(reply)
}

// goesOnError: the command ends before the operation it began.
type goesOnError struct {
	id  string
	err error
}

func (e goesOnError) Error() string {
	return fmt.Sprintf("%v; operation %s goes on without this command: see 'router operation wait %s'", e.err, e.id, e.id)
}
func (e goesOnError) Unwrap() error { return e.err }

// follow shows how far an operation is until it has ended. Nodes may come and
// go meanwhile.
func (a *app) follow(cmd *cobra.Command, c *client.Client, id, title string) error {
	ctx := cmd.Context()
	if cmd.Flags().Changed("timeout") {
		var cancel context.CancelFunc
		ctx, cancel = a.quick(ctx)
		defer cancel()
	}
	shown := a.progress(title, false)
	heard := time.Now()
	phase, said := "", ""
	pause := time.NewTicker(pollInterval)
	defer pause.Stop()
	for {
		op, err := a.operation(ctx, c, id)
		switch {
		case err == nil && op.GetState() != clusterpb.OperationState_OPERATION_STATE_RUNNING:
			shown.End()
			return a.finished(cmd, c, op)
		case err == nil:
			heard = time.Now()
			if op.GetPhase() != phase {
				phase = op.GetPhase()
				shown.Note(phase)
			}
			switch words := op.GetMessage(); {
			case words == "":
				shown.Set(int64(op.GetDone()), int64(op.GetTotal()))
			case said == "":
				shown.Note(words)
			default:
				shown.Tell(words)
			}
			said = op.GetMessage()
		case ctx.Err() == nil && status.Code(err) != codes.Unavailable && status.Code(err) != codes.DeadlineExceeded,
			ctx.Err() == nil && time.Since(heard) > slowCall:
			shown.End()
			return codedError{exitDeadline, goesOnError{id, err}}
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			shown.End()
			return codedError{exitDeadline, goesOnError{id, ctx.Err()}}
		}
	}
}

func (a *app) operation(ctx context.Context, c *client.Client, id string) (*clusterpb.Operation, error) {
	ctx, cancel := a.quick(ctx)
	defer cancel()
	return c.Cluster().GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: id})
}

// finished shows how an operation ended and what the cluster is at now.
func (a *app) finished(cmd *cobra.Command, c *client.Client, op *clusterpb.Operation) error {
	if a.format != output.Table {
		if err := output.Document(a.stdout, a.format, op); err != nil {
			return err
		}
		return operationOutcome(op)
	}
	if err := printOperation(a, op); err != nil {
		return err
	}
	if op.GetState() != clusterpb.OperationState_OPERATION_STATE_DONE {
		fmt.Fprintln(a.stdout, "\nThe state of the cluster is what it was.")
		return operationOutcome(op)
	}
	ctx, cancel := a.quick(cmd.Context())
	defer cancel()
	// Only to say more: what was to be done is done.
	if now, err := c.Backup().GetStateMetadata(ctx, &backuppb.GetStateMetadataRequest{}); err == nil {
		fmt.Fprintf(a.stdout, "\nThe cluster is at revision %d of epoch %d: %s\n'router backup undo-restore' goes back to the state before.\n",
			now.GetRevision(), now.GetEpoch(), output.Clean(countsText(now.GetCounts())))
	}
	return nil
}

// printDifference shows what a restore would change.
func (a *app) printDifference(reply *backuppb.RestoreSnapshotResponse) error {
	st := reply.GetState()
	g := &output.Grid{}
	g.Add("CLUSTER", fmt.Sprintf("%s (%s)", st.GetClusterName(), st.GetClusterId()))
	g.Add("STATE", fmt.Sprintf("revision %d, epoch %d, entry %d (term %d)", st.GetRevision(), st.GetEpoch(), st.GetCommitIndex(), st.GetTerm()))
	g.Add("CONTENT", st.GetStateHash())
	g.Add("RESULT", reply.GetMessage())
	if err := g.Write(a.stdout); err != nil {
		return err
	}
	if len(reply.GetDifference()) == 0 {
		return nil
	}
	fmt.Fprintln(a.stdout)
	table := &output.Grid{Header: []string{"KIND", "BACKUP", "LIVE", "COMES BACK", "GOES", "CHANGES", "SUCH AS"}}
	for _, d := range reply.GetDifference() {
		examples := ""
		for i, e := range d.GetExamples() {
			if i == 3 {
				examples += " ..."
				break
			}
			if i > 0 {
				examples += " "
			}
			examples += e
		}
		table.Add(d.GetTable(), d.GetInSnapshot(), d.GetLive(), d.GetAdded(), d.GetRemoved(), d.GetChanged(), examples)
	}
	return table.Write(a.stdout)
}

func newUndoRestoreCommand(a *app) *cobra.Command {
	var yes, validateOnly bool
	cmd := &cobra.Command{
		Use:   "undo-restore",
		Short: "Go back to the state that the last restore replaced",
		Long: `Go back to the state that the last restore replaced: what will change is shown,
and after a yes it is done. What was written since is gone then, and is itself what
the next undo-restore goes back to.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if a.format != output.Table && !validateOnly && !yes {
				return usageError{cmd, errors.New("with -o json or yaml, give --validate-only or --yes: nobody can be asked")}
			}
			c, err := a.cluster(cmd, a.servers)
			if err != nil {
				return err
			}
			defer c.Close()
			if !yes || validateOnly {
				snap, err := a.undoPoint(cmd, c)
				if err != nil {
					return err
				}
				if done, err := a.showDifference(cmd, c, snap, validateOnly); err != nil || done {
					return err
				}
				if err := a.confirm(cmd.Context(), "Go back to the state before the last restore, and lose what was written since?"); err != nil {
					return err
				}
			}
			ctx, cancel := a.slow(cmd, cmd.Context())
			defer cancel()
			reply, err := c.Cluster().UndoRestore(ctx, &clusterpb.UndoRestoreRequest{Detach: true})
			if err != nil {
				return err
			}
			return a.follow(cmd, c, reply.GetOperation().GetOperationId(), "undo")
		},
	}
	a.serverFlag(cmd)
	cmd.Flags().BoolVar(&validateOnly, "validate-only", false, "show what would change; change nothing")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not show what will change and do not ask")
	return cmd
}

// undoPoint finds the snapshot that the next undo-restore goes back to.
func (a *app) undoPoint(cmd *cobra.Command, c *client.Client) (snapshotToRestore, error) {
	ctx, cancel := a.quick(cmd.Context())
	defer cancel()
	reply, err := c.Backup().ListSnapshots(ctx, &backuppb.ListSnapshotsRequest{})
	if err != nil {
		return snapshotToRestore{}, readError{err}
	}
	for _, s := range reply.GetSnapshots() {
		if s.GetOrigin() == "undo" { // of the last restore: nodes keep no other
			return snapshotToRestore{id: s.GetSnapshotId(), name: "the state before the last restore"}, nil
		}
	}
	return snapshotToRestore{}, codedError{exitConflict, errors.New("there is nothing to go back to: no node has the state before a restore")}
}
