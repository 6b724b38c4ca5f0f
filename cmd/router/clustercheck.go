package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newClusterCheckCommand(a *app) *cobra.Command {
	var full bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Compare the states of all members",
		Long: `Compare the states of all members as they are after one and the same entry of
the log, by the sums each keeps of its tables. The leader does so by itself every
few seconds; a member that differs from the majority rebuilds its state.

With --full every member also reads everything it holds: this finds what a disk
has changed since it was written. It takes as long as reading the whole state
twice, so give it time with --timeout.

Exits with code 8 unless all members were compared and are equal.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.CheckState(ctx, &clusterpb.CheckStateRequest{Full: full})
				if err != nil {
					return readError{err}
				}
				if a.format != output.Table {
					err = output.Document(a.stdout, a.format, reply)
				} else {
					err = printCheck(a, reply)
				}
				if err == nil && !reply.GetEqual() {
					return silentError{exitCheckFailed}
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&full, "full", false, "read and hash everything on every member")
	return cmd
}

// printCheck shows every member, and the tables in which one differs from the
// first that is right.
func printCheck(a *app, reply *clusterpb.CheckStateResponse) error {
	var right *clusterpb.MemberState
	for _, m := range reply.GetMembers() {
		if m.GetEqual() && right == nil {
			right = m
		}
	}
	g := &output.Grid{Header: []string{"NODE", "INDEX", "EQUAL", "DETAIL"}}
	for _, m := range reply.GetMembers() {
		equal, differs := yesNo(m.GetEqual()), rpc.Plain(m.GetError())
		if differs != "" {
			equal = "unknown" // it could not be asked, which does not make it differ
		}
		if differs == "" && !m.GetEqual() && right != nil {
			for _, table := range slices.Sorted(maps.Keys(m.GetHashes())) {
				if m.GetHashes()[table] != right.GetHashes()[table] {
					if differs == "" {
						differs = "differs in "
					} else {
						differs += ", "
					}
					differs += table
				}
			}
		}
		g.Add(m.GetNodeId(), known(m.GetIndex()), equal, output.Clean(differs))
	}
	if err := g.Write(a.stdout); err != nil {
		return err
	}
	_, err := fmt.Fprintf(a.stdout, "\n%s\n", output.Clean(reply.GetMessage()))
	return err
}
