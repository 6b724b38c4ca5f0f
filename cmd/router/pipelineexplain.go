package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newPipelineExplainCommand(a *app) *cobra.Command {
	var stage string
	var limit limitFlag
	cmd := &cobra.Command{
		Use:   "explain ID",
		Short: "Show why the stages of a pipeline run where they do, or why they wait",
		Long: `Show for each stage of a pipeline where it runs, which sidecars offer what it asks for
and what rules out those that may not run it, why it waits if nobody does, and to which
sidecar each instance hands records on, with the reason.`,
		Example: "  router pipeline explain default/orders\n  router pipeline explain default/orders --stage orders-sink --limit 1000",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := limit.check(cmd); err != nil {
				return err
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.ExplainPipeline(ctx, &clusterpb.ExplainPipelineRequest{PipelineId: args[0], StageId: stage, Limit: limit.n})
				if err != nil {
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, reply)
				}
				for i, st := range reply.GetStages() {
					if i > 0 {
						fmt.Fprintln(a.stdout)
					}
					if err := printExplained(a.stdout, st); err != nil {
						return err
					}
				}
				if reply.GetCut() {
					fmt.Fprintln(a.stdout, "\nThe lists of some stages were left out, for all would be too much at once: ask for one with --stage")
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&stage, "stage", "", "id of the stage to explain; all when not given")
	limit.add(cmd, 20, 1000, "candidates and edges of each stage")
	return cmd
}

func printExplained(w io.Writer, st *clusterpb.ExplainedStage) error {
	fmt.Fprintf(w, "%s: asks for %s; %d of %d instances run\n", output.Clean(st.GetStageId()), output.Clean(st.GetAsksFor()),
		st.GetInstances(), st.GetInstancesAsked())
	if st.GetPendingReason() != "" {
		fmt.Fprintf(w, "  waits: %s\n", output.Clean(st.GetPendingReason()))
	}
	if st.GetSilentReason() != "" {
		fmt.Fprintf(w, "  silent: %s\n", output.Clean(st.GetSilentReason()))
	}
	if st.GetDrainingReason() != "" {
		fmt.Fprintf(w, "  draining: %s\n", output.Clean(st.GetDrainingReason()))
	}
	fmt.Fprintf(w, "  offered by %s, not by %d\n", count(st.GetOffering(), "sidecar", "sidecars"), st.GetStrangers())
	if st.GetUnexamined() {
		fmt.Fprintln(w, "  so many sidecars offer what the stages ask for that those of this one were not looked at: ask with --stage")
	}
	var tally []string
	for _, v := range st.GetVerdicts() {
		tally = append(tally, fmt.Sprintf("%d %s", v.GetCount(), candidateVerdict(false, v.GetVerdict())))
	}
	if int(st.GetOffering()) > len(st.GetCandidates()) && len(tally) > 0 {
		fmt.Fprintf(w, "  of those that do not run it: %s\n", output.Clean(strings.Join(tally, "; ")))
	}
	g := &output.Grid{Header: []string{"  CANDIDATE", "SERVICE", "LOAD", "VERDICT"}}
	for _, c := range st.GetCandidates() {
		g.Add("  "+c.GetSidecarId(), c.GetLocalEndpoint(), fmt.Sprintf("%.2f", c.GetLoad()), candidateVerdict(c.GetRuns(), c.GetVerdict())+standsIn(c))
	}
	if err := listed(w, g, int(st.GetOffering()), "candidate", "candidates"); err != nil {
		return err
	}
	g = &output.Grid{Header: []string{"  FROM", "NEXT STAGE", "TO", "WHY"}}
	for _, h := range st.GetNextHops() {
		to := h.GetToSidecarId()
		if h.GetToEndpoint() != "" {
			to += " (" + h.GetToEndpoint() + ")"
		}
		g.Add("  "+h.GetFromSidecarId(), h.GetStageId(), to, h.GetReason())
	}
	return listed(w, g, int(st.GetNextHopsTotal()), "edge", "edges")
}

// listed prints a list and says how much of it is not shown.
func listed(w io.Writer, g *output.Grid, total int, one, several string) error {
	if len(g.Rows) > 0 {
		if err := g.Write(w); err != nil {
			return err
		}
	}
	if more := total - len(g.Rows); more > 0 {
		fmt.Fprintf(w, "  %s not shown; give a higher --limit\n", count(uint32(more), "more "+one+" is", "more "+several+" are"))
	}
	return nil
}

// standsIn says that a service is not what the stage asks for by name.
func standsIn(c *clusterpb.StageCandidate) string {
	if c.GetStandsIn() == "" {
		return ""
	}
	return fmt.Sprintf("; nobody offers the name: %q, its only service of that type, stands in", c.GetStandsIn())
}

func candidateVerdict(runs bool, verdict string) string {
	switch {
	case runs:
		return "runs it"
	case verdict == "":
		return "could run it"
	}
	return verdict
}
