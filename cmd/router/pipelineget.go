package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newPipelineGetCommand(a *app) *cobra.Command {
	var limit limitFlag
	cmd := &cobra.Command{
		Use:   "get ID",
		Short: "Show one pipeline, where its stages run and why one does not",
		Long: `Show one pipeline, and how good it is where it runs: how many edges stay
within a pod, how the load of its most loaded sidecar compares with the mean of its
sidecars, and what the leader's last plan moved of it against the fewest moves any
plan could have done with. Why it runs there says 'router pipeline explain'.

With -o yaml or -o json the output is the pipeline itself, in the form pipeline apply
reads. Its status, which apply ignores, has the figures, where each stage runs, with
all of the sidecars, why one waits, and what is held back.`,
		Example: "  router pipeline get default/orders\n  router pipeline get default/orders --limit 1000\n  router pipeline get default/orders -o yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := limit.check(cmd); err != nil {
				return err
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Admin.GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: args[0]})
				if err != nil {
					return err
				}
				if !reply.GetFound() {
					return notFound("there is no pipeline %q; see 'router pipeline list'", args[0])
				}
				quality := pipelineQuality(ctx, c, args[0])
				held := heldLines(pipelineHolds(ctx, c, args[0]), onlySilent(reply.GetStatus()), time.Now())
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, shownPipeline{reply.GetConfig(), statusOf(reply.GetStatus(), quality, held)})
				}
				return printPipeline(a, reply.GetConfig(), reply.GetStatus(), quality, held, int(limit.n))
			})
		},
	}
	limit.add(cmd, 5, 100_000, "sidecars of each stage")
	return cmd
}

// onlySilent is true when a stage runs on sidecars alone that are not heard of.
func onlySilent(st *adminpb.PipelineStatus) bool {
	return slices.ContainsFunc(st.GetPlacements(), func(pl *adminpb.StagePlacement) bool { return pl.GetSilentReason() != "" })
}

// printPipeline shows a pipeline, and of each list of sidecars as many as limit.
func printPipeline(a *app, p *adminpb.PipelineConfig, st *adminpb.PipelineStatus, quality *clusterpb.GetPlacementQualityResponse, held []string, limit int) error {
	head := &output.Grid{}
	head.Add("ID", p.GetId())
	if p.GetDescription() != "" {
		head.Add("DESCRIPTION", p.GetDescription())
	}
	head.Add("ENABLED", yesNo(p.GetEnabled()))
	head.Add("VERSION", shownVersion(st.GetVersion(), st.GetEpoch()))
	head.Add("UPDATED", when(st.GetUpdatedAt()))
	if quality != nil {
		head.Add("PLACEMENT", qualityLine(quality))
	}
	for _, line := range held {
		head.Add("HELD BACK", line)
	}
	if err := head.Write(a.stdout); err != nil {
		return err
	}
	fmt.Fprintln(a.stdout)
	placed := map[string]*adminpb.StagePlacement{}
	for _, pl := range st.GetPlacements() {
		placed[pl.GetStageId()] = pl
	}
	next := map[string][]string{}
	for _, e := range p.GetEdges() {
		next[e.GetFromStage()] = append(next[e.GetFromStage()], e.GetToStage())
	}
	stages := &output.Grid{Header: []string{"STAGE", "TYPE", "SERVICE", "NEXT", "RUNS ON"}}
	cut := false
	for _, s := range p.GetStages() {
		pl := placed[s.GetId()]
		cut = cut || max(len(pl.GetSidecarIds()), len(pl.GetDraining()), len(pl.GetReleasing())) > limit
		stages.Add(s.GetId(), short(s.GetStageType().String(), "STAGE_TYPE_"),
			s.GetServiceSelector().GetServiceName(), strings.Join(next[s.GetId()], ","), runsOn(pl, limit))
	}
	if err := stages.Write(a.stdout); err != nil || !cut {
		return err
	}
	_, err := fmt.Fprintln(a.stdout, "\nNot all sidecars are named; give a higher --limit, or -o json for all of them")
	return err
}

// runsOn says where a stage runs and what is to be known of that, or why it does not.
func runsOn(pl *adminpb.StagePlacement, limit int) string {
	if reason := pl.GetPendingReason(); reason != "" {
		return "pending: " + reason
	}
	where := firstOf(pl.GetSidecarIds(), limit)
	if d := pl.GetDraining(); len(d) > 0 {
		where += " (draining: " + firstOf(d, limit) + ")"
	}
	if why := pl.GetDrainingReason(); why != "" {
		where += " (draining: " + why + ")"
	}
	if r := pl.GetReleasing(); len(r) > 0 {
		where += " (waits for " + firstOf(r, limit) + ")"
	}
	if why := pl.GetSilentReason(); why != "" {
		where += " (silent: " + why + ")"
	}
	return where
}

// firstOf names the first of ids, and says how many more they are.
func firstOf(ids []string, limit int) string {
	if more := len(ids) - limit; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:limit], ","), more)
	}
	return strings.Join(ids, ",")
}
