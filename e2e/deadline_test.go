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
		// The node gives up 50 ms before its client does. On a machine too busy to
		// bring the answer in that time it is asked again.
		eventually(t, 20*time.Second, "a "+name+" with half a second and no leader is answered", func(context.Context) error {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			err := call(ctx)
			st := status.Convert(err)
			switch {
			case st.Code() == codes.Unavailable && len(st.Details()) > 0:
				return nil
			case st.Code() == codes.DeadlineExceeded:
				return err
			}
			t.Fatalf("a %s with half a second and no leader: %v, want UNAVAILABLE with details", name, err)
			return nil
		})
	}
}
