package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// smallLog makes the log so short that it is truncated all the time, in files
// so small that some of them go each time.
func smallLog() []string {
	return []string{"--raft-tail-bytes", "1MiB", "--raft-segment-bytes", "1MiB", "--store-memtable-bytes", "1MiB"}
}

// lagBytes of commands leave a stopped follower behind the log of a cluster
// that runs with smallLog, also within the seconds after an image, in which the
// log may grow to eight times its usual length to spare the next one.
const lagBytes = 10 << 20

// Filler saves checkpoints that make the log long quickly, one caller per
// service, and remembers what was acknowledged.
type Filler struct {
	t     testing.TB
	name  string
	bytes int
	mu    sync.Mutex
	acked map[string]uint64 // service -> highest acknowledged number
	next  map[string]uint64
	epoch map[int]int
	stop  chan struct{}
	wg    sync.WaitGroup
}

// NewFiller returns a filler of checkpoints of the given size whose services
// begin with name.
func NewFiller(t testing.TB, name string, bytes int) *Filler {
	return &Filler{t: t, name: name, bytes: bytes, acked: map[string]uint64{}, next: map[string]uint64{},
		epoch: map[int]int{}, stop: make(chan struct{})}
}

// save writes the next checkpoint of service i through n. The data cannot be
// compressed: sizes on disk are then what they seem. After an unknown outcome
// the service is written no more: a late effect would look like a lost write.
func (f *Filler) save(ctx context.Context, n *Node, i int) error {
	f.mu.Lock()
	service := fmt.Sprintf("%s%d-%d", f.name, i, f.epoch[i])
	f.next[service]++
	number := f.next[service]
	f.mu.Unlock()
	data := make([]byte, f.bytes)
	src := rand.NewChaCha8([32]byte{byte(i), byte(number), byte(number >> 8)})
	_, _ = src.Read(data) // never fails
	r, err := n.Checkpoints().SaveCheckpoint(ctx, &checkpointpb.SaveCheckpointRequest{
		ServiceId: service, CheckpointId: strconv.FormatUint(number, 10), Data: data,
	})
	err = ok(err, r.GetSuccess(), "checkpoint")
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.epoch[i]++
		return err
	}
	f.acked[service] = number
	return nil
}

// Fill writes at least total bytes over the given number of services.
func (f *Filler) Fill(total, services int, nodes ...*Node) {
	f.t.Helper()
	for written, i := 0, 0; written < total; written, i = written+f.bytes, i+1 {
		eventually(f.t, 30*time.Second, "a checkpoint is saved", func(ctx context.Context) error {
			return f.save(ctx, nodes[i%len(nodes)], i%services)
		})
	}
}

// Run writes through all nodes of c in turn, about 2 MB a second, until Stop.
func (f *Filler) Run(c *Cluster) {
	const writers = 2
	for w := range writers {
		f.wg.Go(func() {
			pace := time.NewTicker(time.Duration(f.bytes) * writers * time.Second / (2 << 20))
			defer pace.Stop()
			for i := w; ; i += writers {
				select {
				case <-f.stop:
					return
				case <-pace.C:
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				_ = f.save(ctx, c.Nodes[i/writers%len(c.Nodes)], i%8) // unless acknowledged, it does not count
				cancel()
			}
		})
	}
}

// Stop ends Run.
func (f *Filler) Stop() {
	close(f.stop)
	f.wg.Wait()
}

// Check reads every service on every node: what is there must be at least what
// was acknowledged last.
func (f *Filler) Check(nodes ...*Node) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range nodes {
		for service, want := range f.acked {
			eventually(f.t, 30*time.Second, "checkpoint of "+service, func(ctx context.Context) error {
				r, err := n.Checkpoints().GetCheckpoint(ctx, &checkpointpb.GetCheckpointRequest{ServiceId: service})
				if err != nil {
					return err
				}
				got, err := strconv.ParseUint(r.GetCheckpointId(), 10, 64)
				if err != nil || got < want || got > f.next[service] || len(r.Data) != f.bytes {
					f.t.Fatalf("node %d has checkpoint %q of %s (%d bytes), number %d was acknowledged",
						n.ID, r.GetCheckpointId(), service, len(r.Data), want)
				}
				return nil
			})
		}
	}
}
