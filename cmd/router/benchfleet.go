package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"conveyor.etl/router/bench/fleet"
	"conveyor.etl/router/dev"
)

func newBenchFleetCommand(a *app) *cobra.Command {
	c := fleet.Config{}
	var pids []int
	var own dev.Options
	cmd := &cobra.Command{
		Use:   "fleet",
		Short: "Simulate a fleet of sidecars and measure how the cluster bears it",
		Long: `Simulate sidecars that register, send heartbeats and watch their assignments over
the same calls as real ones, run scenarios with them, and print what was measured:

  steady   heartbeats, and nothing else happens
  one      changes of one pipeline that one watcher runs
  wide     changes of one pipeline that every watcher runs
  mass     every pipeline changes at once
  rolling  all sidecars restart, some at a time
  zone     all sidecars of one zone fall silent, and come back
  expiry   a tenth of all sidecars, those that run the most, fall silent together
  storm    all watchers reconnect at once; with --nodes after the leader's death
  leader   the leading node is killed; needs --nodes

Each watcher checks what it is sent: in order, no gap, no duplicate, resumable. After
each scenario every sidecar must have been told exactly what the cluster holds for
it. The exit code is 8 when one was not, or when a lease or a heartbeat was lost. After
Ctrl-C the figures of the scenarios that are through are printed, and those of the
steady one up to then; the exit code is 130.

The records are real: sidecars and pipelines of the namespace "fleet" are written
to the cluster. Use a cluster made for the purpose, or let --nodes start one.`,
		Example: `  router bench fleet --nodes 3 --sidecars 10000 --pipelines 1000 --watchers 1000
  router bench fleet -s 10.0.0.1:9090,10.0.0.2:9090 --sidecars 100000 --scenarios steady --duration 5m -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkFleetFlags(cmd); err != nil {
				return err
			}
			if err := checkPids(cmd, pids); err != nil {
				return err
			}
			return a.benchFleet(cmd, c, pids, own)
		},
	}
	f := cmd.Flags()
	f.IntVar(&c.Sidecars, "sidecars", 1000, "sidecars to simulate")
	f.IntVar(&c.Pipelines, "pipelines", 0, "pipelines of three stages; 0 = one for ten sidecars")
	f.IntVar(&c.Watchers, "watchers", 0, "how many of the sidecars watch their assignments; the others learn them by heartbeats")
	f.StringVar(&c.Beats, "beats", fleet.BeatsUnary, "how heartbeats travel: "+strings.Join(fleet.BeatKinds, ", "))
	f.IntVar(&c.PerStream, "per-stream", 1, "sidecars that share a heartbeat stream, as those of one machine do behind an agent")
	f.IntVar(&c.Connections, "connections", 0, "connections they share; 0 = as many as needed")
	f.IntVar(&c.Zones, "zones", 3, "zones they are spread over")
	f.StringSliceVar(&c.Scenarios, "scenarios", []string{fleet.Steady}, "what to do with them, in this order: "+strings.Join(fleet.Scenarios, ", "))
	f.DurationVar(&c.Duration, "duration", 30*time.Second, "how long to measure the steady scenario")
	f.DurationVar(&c.Heartbeat, "heartbeat", 0, "pause between the heartbeats of one sidecar; 0 = as the cluster asks for")
	f.IntVar(&c.Rounds, "rounds", 20, "how often to repeat single changes")
	f.DurationVar(&c.Settle, "settle", 2*time.Minute, "how long anything may take that must happen in the end")
	f.IntVar(&c.InFlight, "in-flight", 256, "registrations and changes under way at a time")
	f.IntVar(&c.Workers, "workers", 128, "heartbeats under way at a time")
	f.Uint64Var(&c.Seed, "seed", 1, "picks the pipelines that are changed")
	f.IntSliceVar(&pids, "pids", nil, "server processes on this machine whose CPU time and memory are shown")
	f.IntVar(&own.Nodes, "nodes", 0, "start a cluster of this many nodes on this machine for the run")
	f.StringVar(&own.DataDir, "data-dir", "data/bench-fleet", "with --nodes: directory of the nodes' data, emptied first")
	f.IntVar(&own.BasePort, "base-port", 7300, "with --nodes: node i serves clients on this port + i, other nodes on + 100 + i")
	f.DurationVar(&own.Leases.HeartbeatEvery, "heartbeat-interval", 10*time.Second, "with --nodes: how often the cluster asks for heartbeats")
	f.DurationVar(&own.Leases.SuspectAfter, "suspect-after", 20*time.Second, "with --nodes: silence after which a sidecar is suspect")
	f.DurationVar(&own.Leases.ExpireAfter, "expire-after", 30*time.Second, "with --nodes: silence after which its stages move")
	_ = cmd.RegisterFlagCompletionFunc("beats", cobra.FixedCompletions(fleet.BeatKinds, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("scenarios", cobra.FixedCompletions(fleet.Scenarios, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// checkFleetFlags refuses numbers that mean nothing.
func checkFleetFlags(cmd *cobra.Command) error {
	if err := checkPositive(cmd, "sidecars", "zones", "per-stream", "rounds", "in-flight", "workers", "duration", "settle",
		"base-port", "heartbeat-interval", "suspect-after", "expire-after"); err != nil {
		return err
	}
	for _, name := range []string{"pipelines", "watchers", "connections", "nodes"} {
		if n, err := cmd.Flags().GetInt(name); err != nil || n < 0 {
			return usageError{cmd, errors.Join(err, fmt.Errorf("--%s %d must be 0 at least", name, n))}
		}
	}
	return nil
}

// respawnAfter is how long a killed node of a cluster of ours stays down.
const respawnAfter = 5 * time.Second

func (a *app) benchFleet(cmd *cobra.Command, c fleet.Config, pids []int, own dev.Options) error {
	ctx, cancel := context.WithCancelCause(cmd.Context())
	defer cancel(nil)
	c.Endpoints, c.Pids = a.servers, func() []int { return pids }
	c.Progress = func(line string) { fmt.Fprintf(a.stderr, "%s %s\n", time.Now().Format("15:04:05"), line) }
	if own.Nodes != 0 {
		nodes, err := startOwn(&own)
		if err != nil {
			return err
		}
		defer nodes.Stop()
		go func() {
			select {
			case err := <-nodes.Failed():
				cancel(err)
			case <-ctx.Done():
			}
		}()
		c.Endpoints = nodes.Endpoints()
		c.Kill = func(node uint64) error { return nodes.Kill(int(node)) }
		c.Pids = func() []int {
			var up []int
			for _, pid := range nodes.Pids() {
				if pid != 0 {
					up = append(up, pid)
				}
			}
			return up
		}
	}
	c.EnsureDefaults()
	if err := c.Validate(); err != nil {
		return usageError{cmd, err}
	}
	report, err := fleet.Run(ctx, c)
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	if report == nil {
		return interrupted(ctx, err, false)
	}
	if err := a.printReport(report); err != nil {
		return err
	}
	if err == nil && report.Failed() {
		return silentError{exitCheckFailed} // the report says why
	}
	return interrupted(ctx, err, true)
}

// startOwn starts a cluster for one run.
func startOwn(o *dev.Options) (*dev.Nodes, error) {
	var err error
	if o.Binary, err = os.Executable(); err != nil {
		return nil, err
	}
	o.Fresh, o.Respawn = true, respawnAfter
	return dev.Start(*o)
}
