package rpc

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// BenchmarkMessages measures log messages from one node to another over
// loopback, as fast as the receiver takes them.
func BenchmarkMessages(b *testing.B) {
	for _, size := range []int{0, 1 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			from, to := newStation(b, 1, nil), newStation(b, 2, nil)
			introduce(from, to)
			m := message(raftpb.MsgApp, 1, 2, 1, make([]byte, size)...)
			got := make(chan int, 1<<16)
			to.node.discard = true
			to.node.step = func(_ context.Context, msgs []*raftpb.Message) error {
				got <- len(msgs)
				return nil
			}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			// A window, as raft has: what is in flight never fills the queue.
			window := max(1, min(4096, (16<<20)/max(size, 1)))
			inFlight := 0
			for i := 0; i < b.N; {
				if inFlight < window {
					from.transport.Send([]*raftpb.Message{m})
					inFlight++
					i++
					continue
				}
				inFlight -= <-got
			}
			for inFlight > 0 {
				inFlight -= <-got
			}
		})
	}
}

// BenchmarkForward measures commands of a follower to a leader that answers at
// once: what forwarding adds to a commit.
func BenchmarkForward(b *testing.B) {
	for _, window := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("window%d", window), func(b *testing.B) {
			x := newForwarding(b, nil)
			var index atomic.Uint64
			result := &commandpb.Result{Revision: 1, Offset: 2}
			x.two.node.propose = func(_ []byte, done func(raftnode.Result, error)) {
				done(raftnode.Result{Index: index.Add(1), Value: result}, nil)
			}
			x.lead(x.two, 1)
			cmd := &commandpb.Command{TimeMs: 1, Op: &commandpb.Command_CommitSourceOffset{
				CommitSourceOffset: &commandpb.CommitSourceOffset{SourceId: "orders", Partition: 3, Offset: 1 << 30}}}
			free := make(chan struct{}, window)
			for range window {
				free <- struct{}{}
			}
			done := func(_ *commandpb.Result, _ uint64, err error) {
				if err != nil {
					b.Error(err)
				}
				free <- struct{}{}
			}
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				<-free
				x.f.SubmitFunc(cmd, done)
			}
			for range window {
				<-free
			}
		})
	}
}
