package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/bench"
	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

func newBenchCommand(a *app) *cobra.Command {
	c := bench.Config{}
	var mix, to string
	var fill bool
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Put load on a running cluster and measure it",
		Long: `Put load on a running cluster and measure throughput and latency.

Clients call in a closed loop: each sends when its last call was answered. With
--rate calls are due at fixed times and latencies count from then on, so that a
stall of the cluster is not hidden by clients that wait with it. With --streams
commits go over long-lived streams instead, many in flight.

The commits are real: ids svc-000000000000 and so on, and sources bench-*, are
written to the cluster. Use a cluster made for the purpose.

After a failed call a client pauses, up to 200 ms; a stream that broke is made anew.
Exit code 8 when calls failed, had no answer for a second when the run ended, or were
never sent at their --rate: the report is printed, with how many and the last one's
reason. What --to leader found in the beginning is called until the end. Ctrl-C ends
the measurement: what was measured until then is printed, and the exit code is 130.`,
		Example: `  router bench --clients 64 --conns 8 --duration 10s
  router bench --mix checkpoint=20,read=80 --to all
  router bench --streams 8 --in-flight 64 --batch 16
  router bench --rate 5000 --duration 1m -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkPositive(cmd, "clients", "conns", "in-flight", "batch", "keys", "value-size", "duration"); err != nil {
				return err
			}
			if err := checkPids(cmd, c.Pids); err != nil {
				return err
			}
			var err error
			if c.Mix, err = bench.ParseMix(mix); err != nil {
				return usageError{cmd, err}
			}
			ctx := cmd.Context()
			if c.Endpoints, err = a.benchEndpoints(cmd, to); err != nil {
				return err
			}
			c.EnsureDefaults()
			if err := c.Validate(); err != nil {
				return usageError{cmd, err}
			}
			if fill {
				if err := bench.Fill(ctx, c.Endpoints[0], c.Keys, c.ValueBytes); err != nil {
					return interrupted(ctx, err, false)
				}
			}
			report, err := bench.Run(ctx, c)
			if report == nil {
				return interrupted(ctx, err, false)
			}
			if err := a.printReport(report); err != nil {
				return err
			}
			if err == nil && report.Errors+report.Unsent > 0 {
				return silentError{exitCheckFailed}
			}
			return interrupted(ctx, err, true)
		},
	}
	f := cmd.Flags()
	f.IntVar(&c.Clients, "clients", 64, "callers, one call at a time each")
	f.IntVar(&c.Conns, "conns", 8, "connections the clients or streams share")
	f.IntVar(&c.Streams, "streams", 0, "commit over this many streams instead of single calls")
	f.IntVar(&c.InFlight, "in-flight", 64, "commits in flight on each stream")
	f.IntVar(&c.Batch, "batch", 1, "commits in one message of a stream, applied together or not at all")
	f.StringVar(&mix, "mix", "checkpoint", "operations and their weights: checkpoint, offset, read, stale")
	f.Float64Var(&c.Rate, "rate", 0, "calls due per second, in all; 0 = as fast as they are answered")
	f.DurationVar(&c.Duration, "duration", 10*time.Second, "how long to measure")
	f.DurationVar(&c.Warmup, "warmup", 2*time.Second, "load before the measurement")
	f.IntVar(&c.Keys, "keys", 100_000, "distinct checkpoint ids")
	f.IntVar(&c.ValueBytes, "value-size", 256, "bytes of checkpoint data")
	f.DurationVar(&c.Deadline, "deadline", 0, "deadline of each call; 0 = none")
	f.Uint64Var(&c.Seed, "seed", 1, "seed of ids and values")
	f.StringVar(&to, "to", "given", "which nodes to call: given (those of --server), leader, all")
	f.IntSliceVar(&c.Pids, "pids", nil, "server processes on this machine whose CPU time is shown")
	f.BoolVar(&fill, "fill", false, "commit every id once before the measurement")
	cmd.AddCommand(newBenchFleetCommand(a))
	_ = cmd.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]string{"given", "leader", "all"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// printReport prints what was measured.
func (a *app) printReport(r interface{ Text(w io.Writer) error }) error {
	if a.format == output.Table {
		return r.Text(a.stdout)
	}
	return output.Document(a.stdout, a.format, r)
}

// interrupted says of a run that ended with err whether anything was measured, when
// the user ended it.
func interrupted(ctx context.Context, err error, measured bool) error {
	if err == nil || !errors.Is(context.Cause(ctx), context.Canceled) {
		return err
	}
	text := "interrupted before anything was measured"
	if measured {
		text = "interrupted: the figures are of what was measured until then"
	}
	return codedError{exitInterrupted, errors.New(text)}
}

// checkPositive refuses flags that are not positive. Below, zero stands for the
// default, which whoever writes 0 does not mean.
func checkPositive(cmd *cobra.Command, names ...string) error {
	var errs []error
	for _, name := range names {
		value := cmd.Flags().Lookup(name).Value
		if value.Type() == "duration" {
			if d, err := cmd.Flags().GetDuration(name); err != nil || d <= 0 {
				errs = append(errs, err, fmt.Errorf("--%s %s must be longer than 0", name, value))
			}
		} else if n, err := cmd.Flags().GetInt(name); err != nil || n <= 0 {
			errs = append(errs, err, fmt.Errorf("--%s %s must be 1 at least", name, value))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return usageError{cmd, err}
	}
	return nil
}

// checkPids refuses pids that are none, before a run that would have to do without.
func checkPids(cmd *cobra.Command, pids []int) error {
	if err := bench.CheckPids(pids); err != nil {
		return usageError{cmd, fmt.Errorf("--pids: %w; nothing was measured", err)}
	}
	return nil
}

// benchEndpoints finds the client addresses the load goes to.
func (a *app) benchEndpoints(cmd *cobra.Command, to string) ([]string, error) {
	if to == "given" {
		nodes, err := nodeAddresses(a.servers)
		if err != nil {
			return nil, usageError{cmd, err}
		}
		ctx, cancel := a.quick(cmd.Context())
		defer cancel()
		// Some may be down, on purpose; when all are there is nothing to measure.
		_, err = a.reach(ctx, nodes)
		return nodes, err
	}
	if to != "leader" && to != "all" {
		return nil, usageError{cmd, fmt.Errorf("--to %q is unknown; it is one of given, leader, all", to)}
	}
	var out []string
	err := a.call(cmd, func(ctx context.Context, c *clients) error {
		ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
		st, err := c.Admin.GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
		if err != nil {
			return err
		}
		if to == "leader" && st.GetLeaderId() == 0 {
			return status.Error(codes.Unavailable, "no node leads at the moment; nothing was measured")
		}
		for _, n := range st.GetNodes() {
			if n.GetClientAddress() != "" && (to == "all" || n.GetNodeId() == st.GetLeaderId()) {
				out = append(out, n.GetClientAddress())
			}
		}
		return nil
	})
	if err == nil && len(out) == 0 {
		err = fmt.Errorf("the cluster names no client address for --to %s; give the nodes with --server", to)
	}
	return out, err
}
