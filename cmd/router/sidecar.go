package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

func newSidecarCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "sidecar", Aliases: []string{"sidecars"}, Short: "Show the sidecars and what they run, and drain them"}
	cmd.AddCommand(newSidecarListCommand(a), newSidecarGetCommand(a), newSidecarAssignmentsCommand(a),
		newSidecarDrainCommand(a), newSidecarUndrainCommand(a))
	return cmd
}

// listSidecars reads every page.
func listSidecars(ctx context.Context, c *clients, namespace string) ([]*clusterpb.SidecarInfo, error) {
	var all []*clusterpb.SidecarInfo
	req := &clusterpb.ListSidecarsRequest{Namespace: namespace}
	for {
		reply, err := c.Cluster.ListSidecars(ctx, req)
		if err != nil {
			return nil, err
		}
		all = append(all, reply.GetSidecars()...)
		if req.PageToken = reply.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

func getSidecar(ctx context.Context, c *clients, id string) (*clusterpb.SidecarInfo, error) {
	reply, err := c.Cluster.GetSidecar(ctx, &clusterpb.GetSidecarRequest{SidecarId: id})
	if err != nil {
		return nil, err
	}
	if !reply.GetFound() {
		return nil, notFound("there is no sidecar %q; see 'router sidecar list'", id)
	}
	return reply.GetSidecar(), nil
}

func newSidecarListCommand(a *app) *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the registered sidecars",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				all, err := listSidecars(ctx, c, namespace)
				if err != nil {
					return err
				}
				return output.Print(a.stdout, a.format, output.Messages(all), func() *output.Grid {
					g := &output.Grid{Header: []string{"ID", "STATE", "ENDPOINT", "SERVICES", "ASSIGNMENTS", "SINCE", "ZONE"}}
					for _, s := range all {
						g.Add(s.GetSidecarId(), sidecarState(s), s.GetEndpoint(),
							len(s.GetLocalServices()), len(s.GetAssignments()), sidecarSince(s), orDash(s.GetZone()))
					}
					return g
				})
			})
		},
	}
	cmd.Flags().StringVar(&namespace, "namespace", "", "only those of this namespace")
	return cmd
}

func newSidecarGetCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "get ID",
		Short: "Show one sidecar, its services and its assignments",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				s, err := getSidecar(ctx, c, args[0])
				if err != nil {
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, s)
				}
				head := &output.Grid{}
				head.Add("ID", s.GetSidecarId())
				head.Add("STATE", livenessOf(s)+" since "+when(s.GetStateChangedAt()))
				if words := drainState(s); words != "" {
					if s.GetDrainSince() != nil { // older nodes do not tell
						words += " since " + when(s.GetDrainSince())
					}
					head.Add("DRAIN", words)
				}
				if s.GetDrainDeadline() != nil {
					head.Add("DRAINED BY", when(s.GetDrainDeadline()))
				}
				if s.GetGraceUntil() != nil {
					head.Add("KEEPS ITS STAGES UNTIL", when(s.GetGraceUntil()))
				}
				head.Add("ENDPOINT", s.GetEndpoint())
				head.Add("ZONE, NODE", orDash(s.GetZone())+", "+orDash(s.GetNode()))
				head.Add("CAPACITY", s.GetCapacity())
				head.Add("REGISTERED", when(s.GetRegisteredAt()))
				if err := head.Write(a.stdout); err != nil {
					return err
				}
				services := &output.Grid{Header: []string{"SERVICE", "TYPE", "ENDPOINT"}}
				for _, l := range s.GetLocalServices() {
					services.Add(l.GetServiceName(), short(l.GetServiceType().String(), "SERVICE_TYPE_"), l.GetLocalEndpoint())
				}
				fmt.Fprintln(a.stdout)
				if err := services.Write(a.stdout); err != nil {
					return err
				}
				fmt.Fprintln(a.stdout)
				if err := assignmentGrid([]*clusterpb.SidecarInfo{s}).Write(a.stdout); err != nil || len(s.GetReleases()) == 0 {
					return err
				}
				releases := &output.Grid{Header: []string{"LETS GO OF PIPELINE", "STAGE", "SINCE REVISION", "AT THE LATEST"}}
				for _, r := range s.GetReleases() {
					releases.Add(r.GetPipelineId(), r.GetStageId(), r.GetRevision(), when(r.GetDeadline()))
				}
				fmt.Fprintln(a.stdout)
				return releases.Write(a.stdout)
			})
		},
	}
}

func newSidecarAssignmentsCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "assignments [ID]",
		Short: "Show which stage runs where, of one sidecar or all",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var list []*clusterpb.SidecarInfo
				if len(args) == 1 {
					s, err := getSidecar(ctx, c, args[0])
					if err != nil {
						return err
					}
					list = []*clusterpb.SidecarInfo{s}
				} else {
					all, err := listSidecars(ctx, c, "")
					if err != nil {
						return err
					}
					list = all
				}
				if a.format == output.Table {
					return assignmentGrid(list).Write(a.stdout)
				}
				// Only what the command is about: who runs what.
				short := make([]*clusterpb.SidecarInfo, len(list))
				for i, s := range list {
					short[i] = &clusterpb.SidecarInfo{SidecarId: s.GetSidecarId(), Assignments: s.GetAssignments()}
				}
				return output.Document(a.stdout, a.format, output.Messages(short))
			})
		},
	}
}

func assignmentGrid(list []*clusterpb.SidecarInfo) *output.Grid {
	g := &output.Grid{Header: []string{"SIDECAR", "PIPELINE", "STAGE", "TARGET", "VERSION", "GENERATION"}}
	for _, s := range list {
		for _, as := range s.GetAssignments() {
			for _, st := range as.GetStages() {
				g.Add(s.GetSidecarId(), as.GetPipelineId(), st.GetStageId(), target(st), as.GetPipelineVersion(), as.GetGeneration())
			}
		}
	}
	return g
}

func target(st *sidecarpb.StageAssignment) string {
	if r := st.GetRemoteSidecar(); r != nil {
		return "forward to " + r.GetSidecarId()
	}
	return "local " + st.GetLocalEndpoint()
}
