// Package client calls a Conveyor router cluster.
//
//	c, err := client.Dial([]string{"router-0:50051", "router-1:50051"}, client.Options{})
//	defer c.Close()
//	resp, err := c.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{...})
//
// Every node answers every call, so a client needs no idea of who leads: it
// stays with one node while that answers and goes on to the next when it does
// not. It keeps one connection per node used, however many goroutines call:
// few connections carry more than many.
//
// What a failed call leaves behind is never guessed. Each mutation is given a
// request id (unless the caller set one), under which the cluster applies it at
// most once and answers a repetition with the first result. So mutations are
// repeated as freely as reads: when a node was not reached, broke off in the
// middle, is busy, or does not know what became of the command. An error that
// remains says by OutcomeOf whether the command was done.
//
// A restore of a backup replaces the state, and begins another epoch: versions and
// offsets read before it are of another state. Compare with Expect, or fence calls
// with InEpoch; such a call then fails with OUT_OF_RANGE and the reason EPOCH, and
// nothing was done.
//
// A call without a deadline gets Options.Timeout, 5 s, for all its attempts
// together; it is never stuck longer. Streams get no deadline and are not
// repeated: after one has ended with UNAVAILABLE, open it again (with the
// revision reached, for a watch) and it goes to the next node.
package client
