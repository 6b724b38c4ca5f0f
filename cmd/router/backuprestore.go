package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/output"
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
				return a.restoreSnapshot(cmd, c, id, &o)
			}
			return withStore(cmd.Context(), o.source.text, false, func(s *backup.Store) error {
				return a.restoreBackup(cmd, s, id, &o)
			})
		},
	}
	a.sourceFlag(cmd, &o.source)
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
	shown := a.progress("upload "+id, true)
	reply, err := c.Upload(ctx, func(ctx context.Context) (io.ReadCloser, error) {
		r, _, err := s.Get(ctx, id)
		return r, err
	}, o.patience, func(sent int64) { shown.Set(sent, int64(m.SizeBytes)) })
	if err != nil {
		shown.End()
		if status.Code(err) == codes.DataLoss {
			err = checkFailed(err)
		}
		return about("upload of backup "+id, err)
	}
	shown.Done(int64(m.SizeBytes))
	// The copy is needed no more once all is over, and by the restore until then.
	remove := func() {
		ctx, cancel := tidy(ctx)
		defer cancel()
		_, err := c.Backup().DeleteSnapshot(ctx, &backuppb.DeleteSnapshotRequest{SnapshotId: reply.GetSnapshotId()})
		a.noteKept(reply.GetSnapshotId(), err)
	}
	err = a.restoreSnapshot(cmd, c, reply.GetSnapshotId(), o)
	if !errors.As(err, new(goesOnError)) {
		remove()
	}
	return err
}

func (a *app) restoreSnapshot(cmd *cobra.Command, c *client.Client, id string, o *restoring) error {
	if !o.yes || o.validateOnly {
		reply, err := a.validate(cmd, c, id)
		if err != nil {
			return err
		}
		if a.format != output.Table {
			return output.Document(a.stdout, a.format, reply)
		}
		if err := a.printDifference(reply); err != nil || o.validateOnly {
			return err
		}
		if err := a.confirm("Replace the state of the cluster at " + c.Endpoint() + " by this?"); err != nil {
			return err
		}
	}
	ctx, cancel := a.slow(cmd, cmd.Context())
	defer cancel()
	reply, err := c.Backup().RestoreSnapshot(ctx, &backuppb.RestoreSnapshotRequest{SnapshotId: id, Detach: true})
	if err != nil {
		return about("restore of snapshot "+id, err)
	}
	if reply.GetOperationId() == "" {
		// A server without operations answers when all is over.
		if !reply.GetSuccess() {
			return checkFailed(fmt.Errorf("the restore failed: %s", reply.GetMessage()))
		}
		return output.Print(a.stdout, a.format, reply, func() *output.Grid {
			g := &output.Grid{}
			g.Add("RESTORED", reply.GetMessage())
			return g
		})
	}
	return a.follow(cmd, c, reply.GetOperationId(), "restore")
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
	phase := ""
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
			shown.Set(int64(op.GetDone()), int64(op.GetTotal()))
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
	var yes bool
	cmd := &cobra.Command{
		Use:   "undo-restore",
		Short: "Go back to the state that the last restore replaced",
		Long: `Go back to the state that the last restore replaced. What was written since is
gone then, and is itself what the next undo-restore goes back to.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !yes {
				if err := a.confirm("Go back to the state before the last restore, and lose what was written since?"); err != nil {
					return err
				}
			}
			c, err := a.cluster(cmd, a.servers)
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := a.slow(cmd, cmd.Context())
			defer cancel()
			reply, err := c.Cluster().UndoRestore(ctx, &clusterpb.UndoRestoreRequest{Detach: true})
			if err != nil {
				return err
			}
			return a.follow(cmd, c, reply.GetOperation().GetOperationId(), "undo")
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
