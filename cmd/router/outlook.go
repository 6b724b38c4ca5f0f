package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	shownChanges = 100 // unless --limit says otherwise
	mostChanges  = 10_000
)

// limitFlag bounds what a command lists.
type limitFlag struct {
	n    uint32
	most uint32
}

func (f *limitFlag) add(cmd *cobra.Command, n, most uint32, what string) {
	f.most = most
	cmd.Flags().Uint32Var(&f.n, "limit", n, fmt.Sprintf("list at most so many %s (up to %d)", what, most))
}

func (f *limitFlag) check(cmd *cobra.Command) error {
	if f.n == 0 || f.n > f.most {
		return usageError{cmd, fmt.Errorf("--limit %d must be between 1 and %d", f.n, f.most)}
	}
	return nil
}

func newPipelinePlanCommand(a *app) *cobra.Command {
	var from manifestFlags
	var limit limitFlag
	cmd := &cobra.Command{
		Use:   "plan FILE|FOLDER...",
		Short: "Show what applying pipelines would move, and change nothing",
		Long: `Show what would come of applying the pipelines of files, all of them together:
which sidecars would take and let go of which stages, which stages would wait and why,
and how even the load and how local the edges are before and after. Nothing is
changed. Files are read as pipeline apply reads them.

The node that is asked plans from the newest state, or with --stale from what it has
applied. Where several places are equally
good, the leader may take another one in the end.`,
		Example: "  router pipeline plan examples/\n  router pipeline plan orders.yaml -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			from.files = append(from.files, args...)
			set, err := from.load(cmd, a)
			if err != nil {
				return err
			}
			if len(set.Pipelines) == 0 {
				return codedError{exitUsage, errors.New("the files declare no pipeline; nothing was planned")}
			}
			if err := limit.check(cmd); err != nil {
				return err
			}
			req := &clusterpb.PlanPipelinesRequest{Limit: limit.n}
			for _, p := range set.Pipelines {
				req.Pipelines = append(req.Pipelines, p.Config)
			}
			if len(req.Pipelines) > rpc.MaxPlannedPipelines || proto.Size(req) > rpc.MaxRequestBytes {
				return usageError{cmd, fmt.Errorf("%d pipelines of %d bytes are too many to plan at once: at most %d of %d bytes; give fewer files",
					len(req.Pipelines), proto.Size(req), rpc.MaxPlannedPipelines, rpc.MaxRequestBytes)}
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.PlanPipelines(ctx, req)
				if err != nil {
					return err
				}
				if a.format != output.Table {
					err = output.Document(a.stdout, a.format, reply)
				} else if reply.GetOutlook() != nil {
					err = printPipelinePlan(a.stdout, reply, req.GetPipelines())
				}
				return errors.Join(err, notValid(reply))
			})
		},
	}
	from.add(cmd)
	limit.add(cmd, shownChanges, mostChanges, "changes and waiting stages")
	return cmd
}

// notValid is the error for pipelines that would be refused.
func notValid(reply *clusterpb.PlanPipelinesResponse) error {
	var errs []error
	for _, p := range reply.GetPipelines() {
		if v := p.GetViolations(); len(v) > 0 {
			errs = append(errs, fmt.Errorf("pipeline %s is not valid, nothing was planned: %s", p.GetPipelineId(), strings.Join(v, "; ")))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return codedError{exitUsage, errors.Join(errs...)}
}

func newWhatIfCommand(a *app) *cobra.Command {
	var sidecars, zones []string
	var limit limitFlag
	cmd := &cobra.Command{
		Use:   "what-if",
		Short: "Show what losing sidecars or a zone would move, and change nothing",
		Long: `Show what would come of losing sidecars: which stages would move against the fewest
that any plan could move, which would run nowhere and why, and how even the load would
be afterwards. Nothing is changed and nobody is told.`,
		Example: "  router cluster what-if --lose-sidecar default/pod-1 --lose-sidecar default/pod-2\n  router cluster what-if --lose-zone eu-west-1a",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(sidecars)+len(zones) == 0 {
				return usageError{cmd, errors.New("name what would be lost: --lose-sidecar ID or --lose-zone ZONE")}
			}
			if err := limit.check(cmd); err != nil {
				return err
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.WhatIf(ctx, &clusterpb.WhatIfRequest{LoseSidecars: sidecars, LoseZones: zones, Limit: limit.n})
				if err != nil {
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, reply)
				}
				fmt.Fprintf(a.stdout, "%s would be lost", count(reply.GetLost(), "sidecar", "sidecars"))
				if n := reply.GetOutlook().GetWaitingTotal(); n > 0 {
					fmt.Fprintf(a.stdout, ", and %s now would run nowhere", count(n, "stage that runs", "stages that run"))
				}
				fmt.Fprint(a.stdout, ".\n\n")
				return printOutlook(a.stdout, reply.GetOutlook(), nil, nil)
			})
		},
	}
	cmd.Flags().StringArrayVar(&sidecars, "lose-sidecar", nil, "id of a sidecar that would be lost; repeatable")
	cmd.Flags().StringArrayVar(&zones, "lose-zone", nil, "zone all of whose sidecars would be lost; repeatable")
	limit.add(cmd, shownChanges, mostChanges, "changes and waiting stages")
	return cmd
}

// printPipelinePlan shows what applying the pipelines of configs would come to.
func printPipelinePlan(w io.Writer, reply *clusterpb.PlanPipelinesResponse, configs []*adminpb.PipelineConfig) error {
	titles := make(map[string]string)
	var order []string
	for i, p := range reply.GetPipelines() {
		title := "would be " + p.GetResult()
		if p.GetResult() == "unchanged" {
			title = "is as declared already"
		}
		if p.GetVersion() > 0 {
			title += fmt.Sprintf(", version %d now", p.GetVersion())
		}
		if i < len(configs) && !configs[i].GetEnabled() {
			title += ", disabled"
		}
		titles[p.GetPipelineId()] = title
		order = append(order, p.GetPipelineId())
	}
	return printOutlook(w, reply.GetOutlook(), order, titles)
}

// printOutlook shows changes and waiting stages by pipeline, those of order first and
// each of them, then the figures before and after.
func printOutlook(w io.Writer, o *clusterpb.PlacementOutlook, order []string, titles map[string]string) error {
	type listing struct {
		stages []string
		lines  map[string][]string // by stage
	}
	of := make(map[string]*listing)
	put := func(pipeline, stage, line string) {
		l := of[pipeline]
		if l == nil {
			if titles[pipeline] == "" {
				order = append(order, pipeline)
			}
			l = &listing{lines: make(map[string][]string)}
			of[pipeline] = l
		}
		if l.lines[stage] == nil {
			l.stages = append(l.stages, stage)
		}
		l.lines[stage] = append(l.lines[stage], line)
	}
	shown := 0
	for _, c := range o.GetChanges() {
		for _, id := range c.GetTakes() {
			put(c.GetPipelineId(), c.GetStageId(), "+ "+id)
		}
		for _, id := range c.GetReleases() {
			put(c.GetPipelineId(), c.GetStageId(), "- "+id)
		}
		shown += len(c.GetTakes()) + len(c.GetReleases())
	}
	for _, s := range o.GetWaiting() {
		reason := s.GetReason()
		if reason == "" {
			reason = "the list is too long to say why of all; try fewer at once"
		}
		put(s.GetPipelineId(), s.GetStageId(), "waits: "+reason)
	}
	for _, id := range order {
		fmt.Fprintln(w, strings.TrimSpace(output.Clean(id)+" "+titles[id]))
		if of[id] == nil {
			continue
		}
		for _, stage := range of[id].stages {
			fmt.Fprintf(w, "  %s\n", output.Clean(stage))
			for _, line := range of[id].lines[stage] {
				fmt.Fprintf(w, "    %s\n", output.Clean(line))
			}
		}
	}
	if more := int(o.GetChangesTotal()) - shown; more > 0 {
		fmt.Fprintf(w, "%d more changes are not shown; give a higher --limit\n", more)
	}
	if more := int(o.GetWaitingTotal()) - len(o.GetWaiting()); more > 0 {
		fmt.Fprintf(w, "%d more stages that would wait are not shown; give a higher --limit\n", more)
	}
	if len(order) > 0 {
		fmt.Fprintln(w)
	}
	b, f := o.GetBefore(), o.GetAfter()
	g := &output.Grid{Header: []string{"PLACEMENT", "BEFORE", "AFTER"}}
	g.Add("instances that run", fmt.Sprintf("%d of %d", b.GetInstancesPlaced(), b.GetInstancesAsked()), fmt.Sprintf("%d of %d", f.GetInstancesPlaced(), f.GetInstancesAsked()))
	g.Add("stages that wait", b.GetStagesPending(), f.GetStagesPending())
	g.Add("load, max/mean", maxOverMean(b), maxOverMean(f))
	g.Add("edges that stay local", localShare(b), localShare(f))
	if err := g.Write(w); err != nil {
		return err
	}
	fmt.Fprintf(w, "\n%s, the fewest possible: %d", count(o.GetMoves(), "move", "moves"), o.GetLeastMoves())
	if n := o.GetRerouted(); n > 0 {
		fmt.Fprintf(w, "; %s told where to send records", count(n, "sidecar is", "sidecars are"))
	}
	if n := o.GetUnderWay(); n > 0 {
		fmt.Fprintf(w, "; %s changing anyway, which is not listed", count(n, "pipeline is", "pipelines are"))
	}
	_, err := fmt.Fprintln(w, ". Nothing was changed.")
	return err
}
