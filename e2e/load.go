package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// Load is a mixed set of clients whose every call is recorded.
type Load struct {
	Pipelines, Offsets *History
	prefix             string
	stop               chan struct{}
	wg                 sync.WaitGroup
	mu                 sync.Mutex
	lastDone           time.Time
	gaps               []time.Duration // between two acknowledged mutations of anybody
}

// LoadOptions shape a Load.
type LoadOptions struct {
	Seed    uint64
	Clients int // default 8
	Keys    int // pipelines and offset partitions each, default 8
	// Prefix begins every id, so that loads one after the other on one cluster
	// each have a history that begins with nothing.
	Prefix string
	// Deadline of one call; default 1 s.
	Deadline time.Duration
}

// StartLoad starts clients that talk to random nodes until Stop.
func StartLoad(c *Cluster, o LoadOptions) *Load {
	if o.Clients == 0 {
		o.Clients = 8
	}
	if o.Keys == 0 {
		o.Keys = 8
	}
	if o.Deadline == 0 {
		o.Deadline = time.Second
	}
	l := &Load{prefix: o.Prefix, Pipelines: NewHistory(), Offsets: NewHistory(), stop: make(chan struct{}), lastDone: time.Now()}
	for i := range o.Clients {
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			rng := rand.New(rand.NewPCG(o.Seed, uint64(i)))
			versions := map[string]readVersion{}
			// A closed loop without pause would make the history of a minute
			// too long to be checked; 200 calls a second a client is plenty.
			pace := time.NewTicker(5 * time.Millisecond)
			defer pace.Stop()
			for n := 0; ; n++ {
				select {
				case <-l.stop:
					return
				case <-pace.C:
				}
				node := c.Nodes[rng.IntN(len(c.Nodes))]
				ctx, cancel := context.WithTimeout(context.Background(), o.Deadline)
				var known Known
				if i%2 == 0 {
					known = l.pipelineCall(ctx, node, rng, i, n, o.Keys, versions)
				} else {
					known = l.offsetCall(ctx, node, rng, i, o.Keys)
				}
				cancel()
				if known == Unknown || known == NotDone {
					// Each unknown outcome doubles what the checker has to
					// consider; a caller that hammers a dead node teaches nothing.
					for range 40 {
						<-pace.C
					}
				}
			}
		}()
	}
	return l
}

// Stop ends the clients after their current call.
func (l *Load) Stop() {
	close(l.stop)
	l.wg.Wait()
}

// LongestGap returns the longest time in which no mutation of any client was
// acknowledged.
func (l *Load) LongestGap() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var longest time.Duration
	for _, g := range l.gaps {
		longest = max(longest, g)
	}
	return longest
}

func (l *Load) acknowledged(k Known) Known {
	if k != Done && k != Refused {
		return k
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if g := now.Sub(l.lastDone); g > 50*time.Millisecond {
		l.gaps = append(l.gaps, g)
	}
	l.lastDone = now
	return k
}

func (l *Load) pipeline(k int) string { return fmt.Sprintf("%se2e/p%d", l.prefix, k) }

func (l *Load) source() string { return l.prefix + "source-1" }

func (l *Load) pipelineCall(ctx context.Context, node *Node, rng *rand.Rand, client, n, keys int, versions map[string]readVersion) Known {
	id := l.pipeline(rng.IntN(keys))
	switch r := rng.IntN(10); {
	case r < 4:
		return l.Pipelines.Record(client, PipelineOp{Pipeline: id}, func() (any, Known) { return readPipeline(ctx, node, id, versions) })
	case r < 5:
		op := PipelineOp{Pipeline: id, Delete: true}
		if v, ok := versions[id]; ok && v.version > 0 {
			op.Expected, op.Epoch = &v.version, v.epoch
		} else {
			return Refused
		}
		return l.acknowledged(l.Pipelines.Record(client, op, func() (any, Known) {
			res, err := node.Admin().DeletePipeline(ctx, &adminpb.DeletePipelineRequest{
				PipelineId: id, ExpectedVersion: op.Expected, ExpectedEpoch: op.epoch(),
			})
			k := outcome(err)
			if err == nil {
				return PipelineOut{OK: res.Success, Absent: res.Success && !res.Existed}, Done
			}
			if k == Refused {
				return PipelineOut{}, Done
			}
			return nil, k
		}))
	default:
		op := PipelineOp{Pipeline: id, Tag: fmt.Sprintf("c%d-%d", client, n)}
		if v, ok := versions[id]; ok && rng.IntN(3) > 0 {
			op.Expected, op.Epoch = &v.version, v.epoch
		}
		if rng.IntN(2) == 0 { // exactly-once by request id
			ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-request-id", l.prefix+op.Tag)
		}
		return l.acknowledged(l.Pipelines.Record(client, op, func() (any, Known) {
			res, err := node.Admin().UpdatePipeline(ctx, &adminpb.UpdatePipelineRequest{
				PipelineId: id, Config: testPipeline(id, op.Tag), ExpectedVersion: op.Expected, ExpectedEpoch: op.epoch(),
			})
			k := outcome(err)
			if err == nil {
				if res.Success {
					versions[id] = readVersion{res.Version, res.Epoch}
				}
				return PipelineOut{OK: res.Success, Version: res.Version, Epoch: res.Epoch}, Done
			}
			if k == Refused {
				return PipelineOut{}, Done
			}
			return nil, k
		}))
	}
}

// readVersion is what a client knows of a pipeline: 0 = that there is none.
type readVersion struct{ version, epoch uint64 }

// epoch is what a call names together with the version it expects.
func (op PipelineOp) epoch() *uint64 {
	if op.Expected == nil {
		return nil
	}
	return &op.Epoch
}

func readPipeline(ctx context.Context, node *Node, id string, versions map[string]readVersion) (any, Known) {
	res, err := node.Admin().GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: id})
	if err != nil {
		return nil, NotDone // a failed read changes nothing
	}
	out := PipelineOut{OK: true, Epoch: res.Epoch}
	if res.Found {
		out.Version, out.Tag = res.Status.Version, res.Config.Description
	}
	if versions != nil {
		versions[id] = readVersion{out.Version, out.Epoch}
	}
	return out, Done
}

func (l *Load) offsetCall(ctx context.Context, node *Node, rng *rand.Rand, client, keys int) Known {
	part := uint32(rng.IntN(keys))
	key := fmt.Sprintf("%s/%d", l.source(), part)
	if rng.IntN(3) == 0 {
		return l.Offsets.Record(client, OffsetOp{Key: key}, func() (any, Known) { return readOffset(ctx, node, l.source(), part) })
	}
	// Mostly rising with the clock, sometimes far behind.
	v := uint64(time.Now().UnixMicro())
	if rng.IntN(8) == 0 {
		v -= uint64(rng.IntN(1_000_000))
	}
	return l.acknowledged(l.Offsets.Record(client, OffsetOp{Key: key, Commit: true, Offset: v}, func() (any, Known) {
		res, err := node.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: l.source(), Partition: part, Offset: v})
		if err != nil {
			return nil, outcome(err)
		}
		return OffsetOut{OK: res.Success, Current: res.CurrentOffset}, Done
	}))
}

func readOffset(ctx context.Context, node *Node, source string, part uint32) (any, Known) {
	res, err := node.Checkpoints().GetSourceOffset(ctx, &checkpointpb.GetOffsetRequest{SourceId: source, Partition: &part})
	if err != nil {
		return nil, NotDone
	}
	return OffsetOut{OK: true, Current: res.Offsets[part]}, Done
}

// FinalReads records a linearizable read of every key on every node, so that a
// lost write has no place left to hide in.
func (l *Load) FinalReads(c *Cluster, keys int) {
	for i, n := range c.Nodes {
		for k := range keys {
			id := l.pipeline(k)
			eventually(c.t, 30*time.Second, "final read of "+id, func(ctx context.Context) error {
				var failed error
				l.Pipelines.Record(1000+i, PipelineOp{Pipeline: id}, func() (any, Known) {
					out, known := readPipeline(ctx, n, id, nil)
					if known != Done {
						failed = fmt.Errorf("node %d did not answer", n.ID)
					}
					return out, known
				})
				return failed
			})
			part := uint32(k)
			eventually(c.t, 30*time.Second, "final read of an offset", func(ctx context.Context) error {
				var failed error
				l.Offsets.Record(1000+i, OffsetOp{Key: fmt.Sprintf("%s/%d", l.source(), part)}, func() (any, Known) {
					out, known := readOffset(ctx, n, l.source(), part)
					if known != Done {
						failed = fmt.Errorf("node %d did not answer", n.ID)
					}
					return out, known
				})
				return failed
			})
		}
	}
}

// Check verifies both histories.
func (l *Load) Check(c *Cluster) {
	c.t.Helper()
	c.t.Logf("pipelines: %v", l.Pipelines)
	c.t.Logf("offsets: %v", l.Offsets)
	l.Pipelines.Check(c.t, "pipelines", PipelineModel())
	l.Offsets.Check(c.t, "offsets", OffsetModel())
}

// testPipeline is a small valid pipeline whose description is tag.
func testPipeline(id, tag string) *adminpb.PipelineConfig {
	return &adminpb.PipelineConfig{
		Id: id, Name: id, Description: tag,
		Stages: []*adminpb.Stage{
			{Id: "in", Name: "in", StageType: adminpb.StageType_STAGE_TYPE_SOURCE, Parallelism: 1,
				ServiceSelector: &adminpb.ServiceSelector{ServiceName: "e2e-in"}},
			{Id: "out", Name: "out", StageType: adminpb.StageType_STAGE_TYPE_SINK, Parallelism: 1,
				ServiceSelector: &adminpb.ServiceSelector{ServiceName: "e2e-out"}},
		},
		Edges: []*adminpb.Edge{{FromStage: "in", ToStage: "out"}},
	}
}

// ok folds the two ways an answer says no into one error.
func ok(err error, success bool, text string) error {
	if err != nil {
		return err
	}
	if !success {
		return fmt.Errorf("refused: %s", text)
	}
	return nil
}
