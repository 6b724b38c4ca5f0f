package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

func newOffsetCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "offset", Aliases: []string{"offsets"}, Short: "Show and commit offsets of sources and groups"}
	cmd.AddCommand(newOffsetGetCommand(a), newOffsetCommitCommand(a))
	return cmd
}

// offsetRow is one committed offset in a document.
type offsetRow struct {
	Group     string `json:"group,omitempty"`
	Source    string `json:"source"`
	Partition uint32 `json:"partition"`
	Offset    uint64 `json:"offset"`
	Time      string `json:"time,omitempty"`
}

func newOffsetGetCommand(a *app) *cobra.Command {
	var group string
	var partition uint32
	cmd := &cobra.Command{
		Use:   "get SOURCE | get --group GROUP [SOURCE]",
		Short: "Show the committed offsets of a source, or of a group",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			source := ""
			if len(args) == 1 {
				source = args[0]
			}
			if source == "" && group == "" {
				return usageError{cmd, fmt.Errorf("name a source, or a group with --group")}
			}
			var only *uint32
			if cmd.Flags().Changed("partition") {
				only = &partition
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				rows, err := readOffsets(ctx, c, group, source, only)
				if err != nil {
					return err
				}
				if len(rows) == 0 && only != nil {
					return notFound("nothing was committed for partition %d", partition)
				}
				if len(rows) == 0 {
					return notFound("nothing was committed for %s", offsetOwner(group, source))
				}
				return output.Print(a.stdout, a.format, rows, func() *output.Grid {
					if group != "" { // the reply says no times for groups
						g := &output.Grid{Header: []string{"SOURCE", "PARTITION", "OFFSET"}}
						for _, r := range rows {
							g.Add(r.Source, r.Partition, r.Offset)
						}
						return g
					}
					g := &output.Grid{Header: []string{"SOURCE", "PARTITION", "OFFSET", "TIME"}}
					for _, r := range rows {
						g.Add(r.Source, r.Partition, r.Offset, r.Time)
					}
					return g
				})
			})
		},
	}
	cmd.Flags().StringVar(&group, "group", "", "offsets of this consumer group")
	cmd.Flags().Uint32VarP(&partition, "partition", "p", 0, "only this partition")
	return cmd
}

// offsetOwner names a source, a group, or a group's share of a source.
func offsetOwner(group, source string) string {
	switch {
	case group == "":
		return output.Clean(source)
	case source == "":
		return "group " + output.Clean(group)
	}
	return "group " + output.Clean(group) + " on " + output.Clean(source)
}

func readOffsets(ctx context.Context, c *clients, group, source string, only *uint32) ([]offsetRow, error) {
	rows := []offsetRow{}
	if group == "" {
		reply, err := c.Checkpoint.GetSourceOffset(ctx, &checkpointpb.GetOffsetRequest{SourceId: source, Partition: only})
		if err != nil {
			return nil, err
		}
		for _, p := range slices.Sorted(maps.Keys(reply.GetOffsets())) {
			row := offsetRow{Source: source, Partition: p, Offset: reply.GetOffsets()[p]}
			if t := reply.GetTimestamps()[p]; t != nil {
				row.Time = when(t)
			}
			rows = append(rows, row)
		}
		return rows, nil
	}
	req := &checkpointpb.GetGroupOffsetsRequest{GroupId: group}
	if source != "" {
		req.SourceId = &source
	}
	reply, err := c.Checkpoint.GetGroupOffsets(ctx, req)
	if err != nil {
		return nil, err
	}
	for _, src := range slices.Sorted(maps.Keys(reply.GetSourceOffsets())) {
		offsets := reply.GetSourceOffsets()[src].GetOffsets()
		for _, p := range slices.Sorted(maps.Keys(offsets)) {
			if only == nil || *only == p {
				rows = append(rows, offsetRow{Group: group, Source: src, Partition: p, Offset: offsets[p]})
			}
		}
	}
	return rows, nil
}

func newOffsetCommitCommand(a *app) *cobra.Command {
	var group, member string
	var generation uint64
	var force bool
	cmd := &cobra.Command{
		Use:   "commit SOURCE PARTITION OFFSET",
		Short: "Commit an offset by hand, of a source or of a group",
		Long: `Commit an offset by hand, of a source or of a group. Offsets only move forward:
to set one back, which makes records be read again, --force is needed.`,
		Args: cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			partition, err := strconv.ParseUint(args[1], 10, 32)
			if err != nil {
				return usageError{cmd, fmt.Errorf("the partition %q is not a whole number from 0 to 4294967295", args[1])}
			}
			offset, err := strconv.ParseUint(args[2], 10, 64)
			if err != nil {
				return usageError{cmd, fmt.Errorf("the offset %q is not a whole number of 0 or more", args[2])}
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var done bool
				var text string
				var current uint64
				if group == "" {
					reply, err := c.Checkpoint.CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{
						SourceId: args[0], Partition: uint32(partition), Offset: offset, Timestamp: timestamppb.Now(), Force: force,
					})
					if err != nil {
						return err
					}
					done, text, current = reply.GetSuccess(), reply.GetError(), reply.GetCurrentOffset()
				} else {
					req := &checkpointpb.CommitGroupOffsetRequest{
						GroupId: group, SourceId: args[0], Partition: uint32(partition), Offset: offset,
						Timestamp: timestamppb.Now(), Force: force, ServiceId: member,
					}
					if cmd.Flags().Changed("generation") {
						req.Generation = &generation
					}
					reply, err := c.Checkpoint.CommitGroupOffset(ctx, req)
					if err != nil {
						return err
					}
					done, text, current = reply.GetSuccess(), reply.GetError(), reply.GetCurrentOffset()
				}
				if !done {
					return codedError{exitConflict, fmt.Errorf("the offset was not committed: %s (the stored offset is %d)", text, current)}
				}
				row := offsetRow{Group: group, Source: args[0], Partition: uint32(partition), Offset: current}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, row)
				}
				fmt.Fprintf(a.stdout, "offset of %s partition %d is %d\n", offsetOwner(group, args[0]), partition, current)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&group, "group", "", "commit for this consumer group")
	cmd.Flags().StringVar(&member, "member", "", "commit as this member of the group, fenced by --generation")
	cmd.Flags().Uint64Var(&generation, "generation", 0, "generation the member was assigned the partition in")
	cmd.Flags().BoolVar(&force, "force", false, "allow the offset to move backwards")
	return cmd
}
