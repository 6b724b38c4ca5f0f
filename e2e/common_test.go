package e2e

import (
	"context"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// writeOffset commits an offset of partition 0 with a deadline of one second.
func writeOffset(t *testing.T, n *Node, source string, offset uint64) (*checkpointpb.CommitOffsetResponse, Known) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	res, err := n.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: source, Offset: offset})
	return res, outcome(err)
}

func statusOf(t testing.TB, n *Node) *adminpb.GetClusterStatusResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	st, err := n.Admin().GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
	if err != nil {
		t.Fatalf("status of node %d: %v", n.ID, err)
	}
	return st
}
