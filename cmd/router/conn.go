package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// clients are the services of the cluster as commands call them.
type clients struct {
	Admin      adminpb.RouterAdminClient
	Registry   registrypb.ServiceRegistryClient
	Checkpoint checkpointpb.CheckpointServiceClient
	Cluster    clusterpb.ClusterClient
}

// call runs one command's conversation with the cluster: it connects to the
// nodes of --server, bounds the whole by --timeout and closes the connections.
func (a *app) call(cmd *cobra.Command, talk func(ctx context.Context, c *clients) error) error {
	nodes := manual.NewBuilderWithScheme("nodes")
	state := resolver.State{}
	for _, s := range a.servers {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: s})
	}
	nodes.InitialState(state)
	conn, err := grpc.NewClient("nodes:///"+strings.Join(a.servers, ","), grpc.WithResolvers(nodes),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return usageError{cmd, err}
	}
	defer conn.Close()
	ctx := cmd.Context()
	if a.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}
	if a.stale {
		ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
	}
	err = talk(ctx, &clients{
		Admin:      adminpb.NewRouterAdminClient(conn),
		Registry:   registrypb.NewServiceRegistryClient(conn),
		Checkpoint: checkpointpb.NewCheckpointServiceClient(conn),
		Cluster:    clusterpb.NewClusterClient(conn),
	})
	if _, ok := status.FromError(err); ok && err != nil && readOnly(cmd) {
		return readError{err}
	}
	return err
}

// readOnly tells the commands that change nothing by their verbs.
func readOnly(cmd *cobra.Command) bool {
	switch cmd.Name() {
	case "get", "list", "status", "assignments":
		return true
	}
	return false
}
