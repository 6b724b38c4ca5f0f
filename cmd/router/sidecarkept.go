package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	// keptAsked bounds the stages that are asked about, and keptTime the asking: it
	// only says more about a drain.
	keptAsked = 20
	keptTime  = 2 * time.Second
	// keptRuns is how many of those that run a stage are looked at for the sidecar.
	keptRuns = 100
	// keptShown is how many of them are named one by one.
	keptShown = 5
)

// kept says of the stages a draining sidecar runs why they stay with it, a sentence
// each: nobody else offers what they ask for, or nobody who does can take them. A
// stage that somebody can take is on its way and not listed. What the cluster does
// not answer is left out.
func kept(ctx context.Context, c *clients, s *clusterpb.SidecarInfo) []string {
	ctx, cancel := context.WithTimeout(ctx, keptTime)
	defer cancel()
	var out []string
	asked, more := 0, 0
	for _, as := range s.GetAssignments() {
		for _, st := range as.GetStages() {
			if st.GetRemoteSidecar() != nil {
				continue
			}
			if asked++; asked > keptAsked {
				continue
			}
			reply, err := c.Cluster.ExplainPipeline(ctx, &clusterpb.ExplainPipelineRequest{
				PipelineId: as.GetPipelineId(), StageId: st.GetStageId(), Limit: keptRuns,
			})
			if err != nil || len(reply.GetStages()) == 0 {
				continue
			}
			why := keptBecause(s.GetSidecarId(), reply.GetStages()[0])
			switch {
			case why == "":
			case len(out) == keptShown:
				more++
			default:
				out = append(out, fmt.Sprintf("pipeline %s, stage %s stays: %s", as.GetPipelineId(), st.GetStageId(), why))
			}
		}
	}
	if more > 0 {
		out = append(out, fmt.Sprintf("%s for reasons as these", count(uint32(more), "more stage stays", "more stages stay")))
	}
	return out
}

// keptBecause says why nobody else can be given a stage that sidecar ran when its
// table was read; "" when somebody can, or has been, or it is not known.
func keptBecause(sidecar string, st *clusterpb.ExplainedStage) string {
	if runs := st.GetSidecarIds(); len(runs) < keptRuns && !slices.Contains(runs, sidecar) {
		return ""
	}
	if st.GetUnexamined() || st.GetOffering() == 0 {
		return ""
	}
	if st.GetOffering() == 1 {
		return "nobody else offers " + st.GetAsksFor()
	}
	var tally []string
	for _, v := range st.GetVerdicts() {
		if v.GetVerdict() == "" {
			return ""
		}
		tally = append(tally, fmt.Sprintf("%d because %s", v.GetCount(), v.GetVerdict()))
	}
	if len(tally) == 0 {
		return "the others that offer " + st.GetAsksFor() + " run it already"
	}
	return fmt.Sprintf("none of the others that offer %s can take it: %s", st.GetAsksFor(), strings.Join(tally, ", "))
}

// keptAtLast asks what is kept when the time for the wait is over.
func (a *app) keptAtLast(cmd *cobra.Command, talk context.Context, c *clients, s *clusterpb.SidecarInfo) []string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(talk), keptTime)
	defer cancel()
	defer context.AfterFunc(cmd.Context(), cancel)()
	if !a.stale { // without a leader the answer would only come late
		ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
	}
	return kept(ctx, c, s)
}

// indented puts lines behind a sentence.
func indented(lines []string) string {
	var out strings.Builder
	for _, line := range lines {
		out.WriteString("\n  " + line)
	}
	return out.String()
}
