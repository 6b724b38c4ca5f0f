package raftnode

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
)

// BenchmarkPropose measures commands per second through a single node with a
// real log: packing and one fsync per batch.
func BenchmarkPropose(b *testing.B) {
	for _, callers := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			var batches, commands atomic.Int64
			_, ps := startCluster(b, func(c *Config) {
				c.Events.BatchProposed = func(n, _ int) { batches.Add(1); commands.Add(int64(n)) }
			}, 1)
			p := waitLeader(b, ps...)
			ctx := context.Background()
			cmd := make([]byte, 256)
			var next atomic.Int64
			b.ReportAllocs()
			b.ResetTimer()
			done := make(chan error, callers)
			for range callers {
				go func() {
					for next.Add(1) <= int64(b.N) {
						if _, err := p.n.Propose(ctx, cmd); err != nil {
							done <- err
							return
						}
					}
					done <- nil
				}()
			}
			for range callers {
				if err := <-done; err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			b.ReportMetric(float64(commands.Load())/float64(max(1, batches.Load())), "cmds/batch")
			p.stop()
		})
	}
}
