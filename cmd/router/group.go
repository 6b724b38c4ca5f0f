package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newGroupCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "group", Aliases: []string{"groups"}, Short: "Show the consumer groups"}
	cmd.AddCommand(newGroupListCommand(a), newGroupGetCommand(a))
	return cmd
}

func newGroupListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the consumer groups",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var all []*clusterpb.GroupInfo
				req := &clusterpb.ListGroupsRequest{}
				for {
					reply, err := c.Cluster.ListGroups(ctx, req)
					if err != nil {
						return err
					}
					all = append(all, reply.GetGroups()...)
					if req.PageToken = reply.GetNextPageToken(); req.PageToken == "" {
						break
					}
				}
				return output.Print(a.stdout, a.format, output.Messages(all), func() *output.Grid {
					g := &output.Grid{Header: []string{"GROUP", "STAGE", "GENERATION", "MEMBERS", "PARTITIONS"}}
					for _, gr := range all {
						g.Add(gr.GetGroupId(), gr.GetStageId(), gr.GetGeneration(), len(gr.GetMembers()), gr.GetPartitionCount())
					}
					return g
				})
			})
		},
	}
}

func newGroupGetCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "get ID",
		Short: "Show one group: its members and their partitions",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.GetGroup(ctx, &clusterpb.GetGroupRequest{GroupId: args[0]})
				if err != nil {
					return err
				}
				if !reply.GetFound() {
					return notFound("there is no group %q; see 'router group list'", args[0])
				}
				gr := reply.GetGroup()
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, gr)
				}
				head := &output.Grid{}
				head.Add("GROUP", gr.GetGroupId())
				head.Add("STAGE", gr.GetStageId())
				head.Add("GENERATION", gr.GetGeneration())
				head.Add("PARTITIONS", gr.GetPartitionCount())
				if err := head.Write(a.stdout); err != nil {
					return err
				}
				fmt.Fprintln(a.stdout)
				g := &output.Grid{Header: []string{"MEMBER", "JOINED AT GENERATION", "PARTITIONS"}}
				for _, m := range gr.GetMembers() {
					g.Add(m.GetServiceId(), m.GetJoinedGeneration(), partitions(m.GetPartitions()))
				}
				return g.Write(a.stdout)
			})
		},
	}
}

// partitions shows an ascending list with ranges: 0-3,7.
func partitions(list []uint32) string {
	var parts []string
	for i := 0; i < len(list); {
		j := i
		for j+1 < len(list) && list[j+1] == list[j]+1 {
			j++
		}
		text := strconv.FormatUint(uint64(list[i]), 10)
		if j > i {
			text += "-" + strconv.FormatUint(uint64(list[j]), 10)
		}
		parts = append(parts, text)
		i = j + 1
	}
	return strings.Join(parts, ",")
}
