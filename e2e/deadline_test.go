package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// TestShortDeadlineWithoutLeader: a client that waits for less than the server
// would still learns that nothing was done. DEADLINE_EXCEEDED, which gRPC makes
// up at the client's deadline, would leave that open.
func TestShortDeadlineWithoutLeader(t *testing.T) {
	c := NewCluster(t, Options{})
	alone := c.Nodes[0]
	c.Leader()
	c.Nodes[1].Kill()
	c.Nodes[2].Kill()
	eventually(t, 10*time.Second, "a node alone follows nobody", func(ctx context.Context) error {
		ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
		st, err := alone.Admin().GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
		if err == nil && st.GetLeaderId() != 0 {
			err = errors.New("it still knows a leader")
		}
		return err
	})
	calls := map[string]func(ctx context.Context) error{
		"write": func(ctx context.Context) error {
			_, err := alone.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
			return err
		},
		"linearizable read": func(ctx context.Context) error {
			_, err := alone.Checkpoints().GetSourceOffset(ctx, &checkpointpb.GetOffsetRequest{SourceId: "s"})
			return err
		},
	}
	for name, call := range calls {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		err := call(ctx)
		cancel()
		if status.Code(err) != codes.Unavailable || len(status.Convert(err).Details()) == 0 {
			t.Errorf("a %s with half a second and no leader: %v, want UNAVAILABLE with details", name, err)
		}
	}
}
