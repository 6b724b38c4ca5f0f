package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

func newServiceCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "service", Aliases: []string{"services"}, Short: "Show the registered services"}
	cmd.AddCommand(newServiceListCommand(a))
	return cmd
}

func newServiceListCommand(a *app) *cobra.Command {
	var kind string
	var labels map[string]string
	var healthy bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the services of the registry",
		Long: `List the services of the registry, with their health: one whose heartbeats stay out for
longer than its lease is unhealthy. When the last heartbeat came is in no list, since
heartbeats are not written down; that a lease has run out is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			filter, err := serviceType(kind)
			if err != nil {
				return usageError{cmd, err}
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Registry.ListServices(ctx, &registrypb.ListServicesRequest{
					TypeFilter: filter, LabelSelector: labels, IncludeUnhealthy: !healthy,
				})
				if err != nil {
					return err
				}
				list := reply.GetServices()
				return output.Print(a.stdout, a.format, output.Messages(list), func() *output.Grid {
					g := &output.Grid{Header: []string{"ID", "NAME", "TYPE", "ENDPOINT", "HEALTH", "GROUP", "SIDECAR", "REGISTERED"}}
					for _, s := range list {
						id, ep := s.GetIdentity(), s.GetEndpoint()
						health := short(s.GetHealth().GetStatus().String(), "HEALTH_STATUS_")
						if s.GetRemovedBy() != nil {
							health = "draining"
						}
						g.Add(id.GetServiceId(), id.GetName(), short(id.GetServiceType().String(), "SERVICE_TYPE_"),
							net.JoinHostPort(ep.GetHost(), strconv.FormatUint(uint64(ep.GetPort()), 10)),
							health, id.GetGroupId(), s.GetSidecarId(), when(s.GetRegisteredAt()))
					}
					return g
				})
			})
		},
	}
	cmd.Flags().StringVar(&kind, "type", "", "only source, transform, sink or lookup services")
	cmd.Flags().StringToStringVar(&labels, "label", nil, "only services with this label, NAME=VALUE; repeatable")
	cmd.Flags().BoolVar(&healthy, "healthy", false, "only healthy services")
	return cmd
}

func serviceType(name string) (commonpb.ServiceType, error) {
	if name == "" {
		return commonpb.ServiceType_SERVICE_TYPE_UNSPECIFIED, nil
	}
	known := []string{"source", "transform", "sink", "lookup"}
	i := slices.Index(known, strings.ToLower(name))
	if i < 0 {
		return 0, fmt.Errorf("--type %q is not one of %s", name, strings.Join(known, ", "))
	}
	return commonpb.ServiceType(i + 1), nil
}
