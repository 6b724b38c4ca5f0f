package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// pipelineHolds returns what the leader holds back of a pipeline, nil when that is not
// to be had.
func pipelineHolds(ctx context.Context, c *clients, id string) *clusterpb.GetPlacementHoldsResponse {
	ctx, cancel := context.WithTimeout(ctx, qualityWait)
	defer cancel()
	reply, err := c.Cluster.GetPlacementHolds(ctx, &clusterpb.GetPlacementHoldsRequest{PipelineId: id})
	if err != nil {
		return nil // an older node, or nobody leads
	}
	return reply
}

// heldLines says what is held back of a pipeline, a line each. silent says that a stage
// runs on sidecars alone that are not heard of.
func heldLines(r *clusterpb.GetPlacementHoldsResponse, silent bool, now time.Time) (lines []string) {
	for _, h := range r.GetPipelines() {
		if h.GetPutOff() > 0 {
			line := count(h.GetPutOff(), "sidecar is", "sidecars are") + " told later"
			if n := h.GetWaitsForTotal(); n > 0 && h.GetHeardBy() != nil {
				who := strings.Join(h.GetWaitsFor(), ", ")
				if more := int(n) - len(h.GetWaitsFor()); more > 0 {
					who += fmt.Sprintf(" and %d more", more)
				}
				line += fmt.Sprintf(", once %s confirmed what was told before, or must have heard of it, which is by %s", who, when(h.GetHeardBy()))
			}
			lines = append(lines, line)
		}
		if h.GetHeldMoves() > 0 {
			lines = append(lines, fmt.Sprintf("%s for the movement budget, not before %s", count(h.GetHeldMoves(), "move waits", "moves wait"), when(h.GetHeldUntil())))
		}
	}
	if r.GetExpiriesHeld() > 0 && silent {
		lines = append(lines, heldExpiries(r, now))
	}
	return lines
}

// heldExpiries says when the sidecars are given up that are not since too many fell
// silent at once.
func heldExpiries(r *clusterpb.GetPlacementHoldsResponse, now time.Time) string {
	n, until, last := r.GetExpiriesHeld(), r.GetExpiriesHeldUntil(), ""
	if t := r.GetExpiriesHeldLast(); t != nil && n > 1 { // older nodes do not tell
		last = ", the last by " + when(t)
	}
	if until != nil && !now.Before(until.AsTime()) {
		return fmt.Sprintf("%s given up one after another since %s%s: too many fell silent at once",
			count(n, "silent sidecar is", "silent sidecars are"), when(until), last)
	}
	if last != "" {
		last = ", then one after another" + last
	}
	return fmt.Sprintf("%s not given up before %s%s, since too many fell silent at once; sooner if most come back",
		count(n, "silent sidecar is", "silent sidecars are"), when(until), last)
}
