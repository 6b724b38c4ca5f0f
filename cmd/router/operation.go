package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newOperationCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "operation", Aliases: []string{"operations"},
		Short: "Show and steer what takes long: restores, replacements, catching up",
	}
	cmd.AddCommand(newOperationListCommand(a), newOperationGetCommand(a), newOperationWaitCommand(a), newOperationCancelCommand(a))
	return cmd
}

func newOperationListCommand(a *app) *cobra.Command {
	req := &clusterpb.ListOperationsRequest{}
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the operations, the newest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.ListOperations(ctx, req)
				if err != nil {
					return err
				}
				return output.Print(a.stdout, a.format, output.Messages(reply.GetOperations()), func() *output.Grid {
					g := &output.Grid{Header: []string{"OPERATION", "KIND", "SUBJECT", "STATE", "PROGRESS", "NODE", "STARTED", "MESSAGE"}}
					for _, op := range reply.GetOperations() {
						g.Add(op.GetOperationId(), op.GetKind(), op.GetSubject(), operationState(op), operationProgress(op),
							op.GetNodeId(), op.GetStartedAt().AsTime().Format(time.RFC3339), op.GetMessage())
					}
					return g
				})
			})
		},
	}
	cmd.Flags().BoolVar(&req.RunningOnly, "running", false, "only those that have not ended")
	cmd.Flags().StringVar(&req.Kind, "kind", "", "only those of a kind: restore, replace, catch-up")
	return cmd
}

func newOperationGetCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "get ID",
		Short: "Show one operation",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				op, err := c.Cluster.GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: args[0]})
				if err != nil {
					return err
				}
				return printOperation(a, op)
			})
		},
	}
}

func newOperationWaitCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "wait ID",
		Short: "Wait until an operation has ended",
		Long: `Wait until an operation has ended and show how. The exit code is 0 when it was
done, 8 when it failed or was cancelled, 7 when --timeout passed first (the
operation goes on).`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				op, err := c.Cluster.WaitOperation(ctx, &clusterpb.WaitOperationRequest{OperationId: args[0]})
				if err != nil {
					return err
				}
				if err := printOperation(a, op); err != nil {
					return err
				}
				return operationOutcome(op)
			})
		},
	}
}

func newOperationCancelCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Ask a running operation to end",
		Long: `Ask a running operation to end. It does so where nothing is half done; a restore
that has swapped the state in is past that, see 'router backup undo-restore'.

Of a node that catches up it stops the image on its way to it, if there is one,
and for ten minutes the node gets no other and is not made a voter by itself. It
stays a member and gets the entries of the log as every member does: whether it is
to go is for 'router member remove' to say. After the ten minutes it is tried again,
as another operation.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				op, err := c.Cluster.CancelOperation(ctx, &clusterpb.CancelOperationRequest{OperationId: args[0]})
				if err != nil {
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, op)
				}
				fmt.Fprintf(a.stdout, "operation %s was asked to end; 'router operation wait %s' tells when it has\n",
					op.GetOperationId(), op.GetOperationId())
				return nil
			})
		},
	}
}

// operationOutcome is the exit code of a command that waited for an operation.
func operationOutcome(op *clusterpb.Operation) error {
	switch op.GetState() {
	case clusterpb.OperationState_OPERATION_STATE_DONE:
		return nil
	case clusterpb.OperationState_OPERATION_STATE_RUNNING:
		return silentError{exitDeadline}
	}
	return silentError{exitCheckFailed}
}

func operationState(op *clusterpb.Operation) string {
	s := short(op.GetState().String(), "OPERATION_STATE_")
	if op.GetCancelRequested() && op.GetState() == clusterpb.OperationState_OPERATION_STATE_RUNNING {
		s += ", to be cancelled"
	}
	return s
}

// operationProgress shows phase, share and, when it can be told, the time left.
func operationProgress(op *clusterpb.Operation) string {
	if op.GetState() != clusterpb.OperationState_OPERATION_STATE_RUNNING {
		return "-"
	}
	text := op.GetPhase()
	amount := func(n uint64) string { return fmt.Sprint(n) }
	unit := " " + op.GetUnit()
	if op.GetUnit() == "bytes" {
		amount, unit = func(n uint64) string { return output.Bytes(int64(n)) }, ""
	}
	if op.GetTotal() > 0 {
		text += " " + amount(op.GetDone()) + " of " + amount(op.GetTotal()) + unit
	}
	if op.GetRate() > 0 {
		text += ", " + amount(op.GetRate()) + "/s"
	}
	if left := time.Duration(op.GetLeftMs()) * time.Millisecond; left > 0 {
		text += fmt.Sprintf(", %v left", max(left, time.Second).Round(time.Second))
	}
	return text
}

func printOperation(a *app, op *clusterpb.Operation) error {
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, op)
	}
	g := &output.Grid{}
	g.Add("OPERATION", op.GetOperationId())
	g.Add("KIND", op.GetKind())
	g.Add("SUBJECT", op.GetSubject())
	g.Add("STATE", operationState(op))
	g.Add("NODE", op.GetNodeId())
	g.Add("PROGRESS", operationProgress(op))
	g.Add("STARTED", op.GetStartedAt().AsTime().Format(time.RFC3339))
	if op.GetEndedAt() != nil {
		g.Add("ENDED", fmt.Sprintf("%s, after %v", op.GetEndedAt().AsTime().Format(time.RFC3339),
			op.GetEndedAt().AsTime().Sub(op.GetStartedAt().AsTime()).Round(time.Millisecond)))
	} else {
		g.Add("UPDATED", op.GetUpdatedAt().AsTime().Format(time.RFC3339))
	}
	if op.GetMessage() != "" {
		g.Add("MESSAGE", op.GetMessage())
	}
	return g.Write(a.stdout)
}

// followOperation waits for the end of an operation, through whichever node
// answers, until ctx is done; it returns the newest that was heard of it.
func followOperation(ctx context.Context, c *clients, op *clusterpb.Operation) *clusterpb.Operation {
	for op.GetState() == clusterpb.OperationState_OPERATION_STATE_RUNNING && ctx.Err() == nil {
		next, err := c.Cluster.WaitOperation(ctx, &clusterpb.WaitOperationRequest{OperationId: op.GetOperationId()})
		if err == nil {
			op = next
			continue
		}
		pause := time.NewTimer(100 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
	return op
}
