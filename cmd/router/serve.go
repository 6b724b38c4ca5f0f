package main

import (
	"context"
	"errors"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"conveyor.etl/router/config"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/server"
)

func newServeCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run one node of the cluster",
		Long: `Run one node of the cluster in the foreground, logging to standard error.

Settings come from flags, then CONVEYOR_ROUTER_* and ETL_ROUTER__* variables, then
the YAML file, then defaults; 'router config explain' shows each with its origin.
In a StatefulSet without --node-id, id, peers and addresses follow from POD_NAME,
REPLICAS, HEADLESS_SERVICE and NAMESPACE.

A node on an empty directory with --join joins the cluster of the members whose
client addresses it is given: it becomes a learner, fetches the state, and votes
once it has caught up (unless --read-replica). A member that comes back on an empty
directory under its old id never votes: it joins again by itself. A node that was
removed ends with exit code 9, and does not start again on that directory.

SIGTERM or Ctrl-C stops the node in order: leadership moves to another node, calls
in progress are answered, the state is flushed. A second signal ends it at once;
nothing acknowledged is lost either way.`,
		Example: `  # One of the first three nodes of a new cluster:
  router serve --node-id 1 --data-dir /var/lib/router \
    --listen-addr 0.0.0.0:50051 --raft-addr 10.0.0.1:50052 \
    --peers 1:10.0.0.1:50052 --peers 2:10.0.0.2:50052 --peers 3:10.0.0.3:50052

  # One more node, on an empty directory; the cluster chooses its id:
  router serve --join 10.0.0.1:50051 --data-dir /var/lib/router \
    --listen-addr 0.0.0.0:50051 --raft-addr 10.0.0.4:50052`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			loaded, err := loadConfig(cmd, a)
			if err != nil {
				return codedError{exitUsage, err}
			}
			return serve(cmd.Context(), &loaded.Config, newLogger(a.stderr, &loaded.Config))
		},
	}
	config.AddFlags(cmd.Flags())
	return cmd
}

func newLogger(w io.Writer, c *config.Config) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.LogLevel, ReplaceAttr: func(_ []string, at slog.Attr) slog.Attr {
		if err, ok := at.Value.Any().(error); ok {
			return slog.String(at.Key, rpc.Plain(err.Error()))
		}
		return at
	}}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// serve runs a node until ctx is done or the node fails.
func serve(ctx context.Context, c *config.Config, log *slog.Logger) error {
	server.KeepHeapFloor()
	err := server.Run(ctx, c, server.Options{Logger: log})
	if errors.Is(err, server.ErrRemoved) {
		return codedError{exitRemoved, err}
	}
	if err != nil {
		// Whatever else ends a node is one code to those who supervise it.
		return codedError{exitError, err}
	}
	return nil
}
