package raftnode_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// counter is a state machine that counts commands. It keeps nothing on disk:
// after a restart the log is replayed from the beginning, which is why Durable
// stays at the start.
type counter struct {
	mu  sync.Mutex
	pos raftnode.Position
	n   int
}

func (c *counter) Applied() raftnode.Position {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pos
}

func (c *counter) Apply(batches []raftnode.Batch) ([][]any, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	results := make([][]any, len(batches))
	for i, b := range batches {
		for range b.Commands {
			c.n++
			if b.Local {
				results[i] = append(results[i], c.n)
			}
		}
		c.pos.Index, c.pos.Term = b.Index, b.Term
	}
	return results, nil
}

func (c *counter) ApplyMembership(pos raftnode.Position) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pos = pos
	return nil
}

func (c *counter) Durable() uint64        { return 1 }
func (c *counter) Flush() (uint64, error) { return 1, nil }

func (c *counter) Image(dir string) (raftnode.Position, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return raftnode.Position{}, err
	}
	return c.pos, os.WriteFile(filepath.Join(dir, "count"), fmt.Append(nil, c.n), 0o644)
}

func (c *counter) Install(string) (raftnode.Position, error) {
	return raftnode.Position{}, fmt.Errorf("a single node receives no images")
}

// alone is the transport of a node without peers.
type alone struct{}

func (alone) Send([]*raftpb.Message) {}
func (alone) SendImage(context.Context, *raftpb.Message, *snap.Reader) error {
	return fmt.Errorf("no peers")
}
func (alone) SetMembers([]raftnode.Member) {}

func Example() {
	dir, err := os.MkdirTemp("", "raftnode")
	check(err)
	defer os.RemoveAll(dir)

	// Every member of a new group starts from the same position.
	start := raftnode.Position{
		Index: 1, Term: 1,
		ConfState: &raftpb.ConfState{Voters: []uint64{1}},
		Members:   []raftnode.Member{{ID: 1, Addr: "localhost:7100"}},
	}
	log, recovered, err := wal.Open(filepath.Join(dir, "wal"), wal.Identity{ClusterID: 42, NodeID: 1},
		wal.Start{Index: start.Index, Term: start.Term, ConfState: start.ConfState}, wal.Options{})
	check(err)
	images, err := snap.OpenStore(vfs.Default, filepath.Join(dir, "images"), snap.Options{})
	check(err)
	machine := &counter{pos: start}
	node, err := raftnode.New(raftnode.Config{ID: 1}, machine, log, recovered, images, alone{})
	check(err)

	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- node.Run(ctx) }()

	// The node knows who leads before it takes commands.
	for changed := node.Changed(); !node.Leadership().Leading; changed = node.Changed() {
		<-changed
	}
	for range 3 {
		result, err := node.Propose(ctx, []byte("count"))
		check(err)
		fmt.Println("counted:", result.Value)
	}
	// After ReadIndex the state of this node includes everything acknowledged
	// anywhere before the call.
	_, err = node.ReadIndex(ctx)
	check(err)
	fmt.Println("read:", machine.n)

	cancel()
	check(<-stopped)
	check(log.Close())
	// Output:
	// counted: 1
	// counted: 2
	// counted: 3
	// read: 3
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
