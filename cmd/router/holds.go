package main

import (
	"context"
	"fmt"
	"strings"

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
func heldLines(r *clusterpb.GetPlacementHoldsResponse, silent bool) (lines []string) {
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
	if n := r.GetExpiriesHeld(); n > 0 && silent {
		lines = append(lines, fmt.Sprintf("%s not given up before %s, since too many fell silent at once", count(n, "silent sidecar is", "silent sidecars are"), when(r.GetExpiriesHeldUntil())))
	}
	return lines
}
