package control

import (
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// Goal: the operation of an image that is sent to a read replica which had caught
// up once ends when the replica has caught up again, or when a user cancels it.
func TestCatchUpOfAReadReplicaThatFellBehindAgain(t *testing.T) {
	replica := raftnode.Member{ID: 4, Disk: 7, ReadReplica: true}
	for name, cancelled := range map[string]bool{"caught up": false, "cancelled": true} {
		t.Run(name, func(t *testing.T) {
			catchingUp(t, func(t *testing.T, c *catchUpWard) {
				c.learner(replica, following)
				pass(5 * time.Second)
				if op := c.only(); op.State != commandpb.OperationState_OPERATION_STATE_DONE {
					t.Fatal(line(op))
				}
				c.learner(replica, receiving)
				_, held, end, err := c.sender(2).Begin(t.Context(), 4, 1_000_000)
				if err != nil {
					t.Fatal(err)
				}
				held(500_000)
				pass(2 * time.Second)
				end(nil)
				c.learner(replica, following)
				synctest.Wait()
				var running string
				for _, op := range c.all() {
					if op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
						running = op.OperationId
					}
				}
				if running == "" {
					t.Fatal("the image has no operation")
				}
				want := commandpb.OperationState_OPERATION_STATE_DONE
				if cancelled {
					c.cancelOp(running)
					want = commandpb.OperationState_OPERATION_STATE_CANCELLED
				}
				pass(time.Minute)
				all := c.all()
				if len(all) != 2 {
					t.Fatalf("%d operations: %v", len(all), all)
				}
				for _, op := range all {
					if op.OperationId == running && op.State != want {
						t.Errorf("a minute after the replica has caught up: %s", line(op))
					}
				}
			})
		})
	}
}
