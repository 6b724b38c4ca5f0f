package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

func newCheckpointCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "checkpoint", Aliases: []string{"checkpoints"}, Short: "Show checkpoints"}
	cmd.AddCommand(newCheckpointGetCommand(a))
	return cmd
}

func newCheckpointGetCommand(a *app) *cobra.Command {
	var raw bool
	cmd := &cobra.Command{
		Use:   "get SERVICE",
		Short: "Show the newest checkpoint of a service",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Checkpoint.GetCheckpoint(ctx, &checkpointpb.GetCheckpointRequest{ServiceId: args[0]})
				if err != nil {
					return err
				}
				if !reply.GetFound() {
					return notFound("there is no checkpoint of service %q", args[0])
				}
				if raw {
					_, err := a.stdout.Write(reply.GetData())
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, reply)
				}
				head := &output.Grid{}
				head.Add("SERVICE", args[0])
				head.Add("CHECKPOINT", reply.GetCheckpointId())
				head.Add("CREATED", when(reply.GetCreatedAt()))
				head.Add("DATA", fmt.Sprintf("%d bytes (--raw writes them)", len(reply.GetData())))
				if err := head.Write(a.stdout); err != nil {
					return err
				}
				if len(reply.GetSourceOffsets()) == 0 {
					return nil
				}
				fmt.Fprintln(a.stdout)
				g := &output.Grid{Header: []string{"SOURCE", "PARTITION", "OFFSET"}}
				for _, src := range slices.Sorted(maps.Keys(reply.GetSourceOffsets())) {
					offsets := reply.GetSourceOffsets()[src].GetOffsets()
					for _, p := range slices.Sorted(maps.Keys(offsets)) {
						g.Add(src, p, offsets[p])
					}
				}
				return g.Write(a.stdout)
			})
		},
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "write the checkpoint's data and nothing else")
	return cmd
}
