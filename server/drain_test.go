package server

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// A leader that is stopped answers what other nodes have forwarded to it: no
// call through them ends with an unknown outcome, although none of the commands
// may be sent twice.
func TestStoppingTheLeaderAnswersTheOthers(t *testing.T) {
	_, nodes := startCluster(t, 3, steady)
	first := leader(t, nodes...)
	ctx, cancel := context.WithCancel(within(t))
	var callers sync.WaitGroup
	var done atomic.Int64
	begun := make(chan struct{}, 1)
	var rest []*Server
	for n, s := range nodes {
		if s == first {
			continue
		}
		rest = append(rest, s)
		client := checkpointpb.NewCheckpointServiceClient(dial(t, s.Addr()))
		for w := range 16 {
			callers.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					_, err := client.SaveCheckpoint(context.Background(), &checkpointpb.SaveCheckpointRequest{
						ServiceId: fmt.Sprintf("s-%d-%d", n, w), CheckpointId: fmt.Sprint(i), Data: []byte("x"),
					})
					if err != nil {
						t.Errorf("outcome %s: %v", rpc.OutcomeOf(status.Convert(err)), err)
						return
					}
					if done.Add(1) == 2000 {
						begun <- struct{}{}
					}
				}
			})
		}
	}
	select {
	case <-begun:
	case <-ctx.Done():
		t.Fatal("no load")
	}
	stop(t, first)
	cancel()
	callers.Wait()
	for _, s := range rest {
		stop(t, s)
	}
}
