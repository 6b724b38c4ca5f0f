package raftnode

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// countMachine costs nothing, so that the node is what is measured.
type countMachine struct {
	mu  sync.Mutex
	pos Position
	n   int
}

func (m *countMachine) Applied() Position {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pos.clone()
}

func (m *countMachine) Apply(batches []Batch) ([][]any, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([][]any, len(batches))
	for i, b := range batches {
		m.n += len(b.Commands)
		if b.Local {
			out[i] = make([]any, len(b.Commands))
		}
		m.pos.Index, m.pos.Term = b.Index, b.Term
	}
	return out, nil
}

func (m *countMachine) ApplyMembership(pos Position) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pos = pos
	return nil
}

func (m *countMachine) Durable() uint64                { return m.Applied().Index }
func (m *countMachine) Flush() (uint64, error)         { return m.Durable(), nil }
func (m *countMachine) Image(string) (Position, error) { return Position{}, errors.ErrUnsupported }
func (m *countMachine) Install(string) (Position, error) {
	return Position{}, errors.ErrUnsupported
}

// BenchmarkPropose measures commands per second through a single node with a
// real log: packing and one fsync per batch.
func BenchmarkPropose(b *testing.B) {
	for _, callers := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			var batches, commands atomic.Int64
			boot := bootPosition(1)
			p := &process{t: b, id: 1, dir: b.TempDir(), nw: newNetwork(), boot: boot, sm: &countMachine{pos: boot},
				tune: func(c *Config) {
					c.Events.BatchProposed = func(n, _ int) { batches.Add(1); commands.Add(int64(n)) }
				}}
			b.Cleanup(p.stop)
			p.start()
			waitLeader(b, p)
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
