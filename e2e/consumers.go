package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// ConsumerOptions shape Consumers.
type ConsumerOptions struct {
	Seed       uint64
	Groups     int
	Members    int // of each group
	Partitions uint32
	// Beat is how often a member says that it is there.
	Beat time.Duration
	// Expire is the silence after which a member counts as gone, of which the longest
	// that they keep is twice as long.
	Expire time.Duration
}

// Consumers are members of groups that join, are given partitions and commit how far
// they have read them, each with the generation it was given them in; they die, return
// under their name, and are held up for so long that they count as gone, to go on where
// they were held up with what they believe to own. Everything that the cluster tells
// them is kept, for Check.
type Consumers struct {
	c       *Cluster
	o       ConsumerOptions
	Offsets *History // of the partitions
	wg      sync.WaitGroup
	stop    context.CancelFunc

	mu      sync.Mutex
	faults  []string
	owners  map[ownedPartition]string // as anybody was told, or shown
	born    map[groupGeneration]uint64
	commits []groupCommit // accepted
	fenced  int
	held    int // times that a member was held up
}

type groupGeneration struct {
	group      string
	generation uint64
}

type ownedPartition struct {
	groupGeneration
	partition uint32
}

// groupCommit is a commit that was accepted.
type groupCommit struct {
	ownedPartition
	member           string
	offset, revision uint64
}

// StartConsumers starts members that talk to random nodes until Stop.
func StartConsumers(c *Cluster, o ConsumerOptions) *Consumers {
	ctx, stop := context.WithCancel(context.Background())
	k := &Consumers{c: c, o: o, Offsets: NewHistory(), stop: stop, owners: map[ownedPartition]string{}, born: map[groupGeneration]uint64{}}
	for g := range o.Groups {
		for m := range o.Members {
			rng := rand.New(rand.NewPCG(o.Seed, uint64(100+g*o.Members+m)))
			x := &consumer{k: k, rng: rng, client: g*o.Members + m, group: k.group(g), id: fmt.Sprintf("e2e-consumer-%d-%d", g, m)}
			k.wg.Go(func() { x.run(ctx) })
		}
		k.wg.Go(func() { k.look(ctx, k.group(g)) })
	}
	return k
}

// Stop ends the members after their current call.
func (k *Consumers) Stop() {
	k.stop()
	k.wg.Wait()
}

func (k *Consumers) group(g int) string { return fmt.Sprintf("e2e-group-%d", g) }

func (k *Consumers) source(group string) string { return "source-of-" + group }

func (k *Consumers) key(group string, partition uint32) string {
	return fmt.Sprintf("%s/%d", group, partition)
}

func (k *Consumers) faultLocked(format string, args ...any) {
	if len(k.faults) < 20 {
		k.faults = append(k.faults, fmt.Sprintf(format, args...))
	}
}

// told notes that a member was said to own partitions in a generation, by a state of a
// revision: that generation was begun no later.
func (k *Consumers) told(group string, generation, revision uint64, member string, partitions []uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	g := groupGeneration{group, generation}
	if at, known := k.born[g]; !known || revision < at {
		k.born[g] = revision
	}
	for _, p := range partitions {
		is := ownedPartition{g, p}
		if was, known := k.owners[is]; known && was != member {
			k.faultLocked("in generation %d of %s partition %d is owned by %s and by %s", generation, group, p, was, member)
		}
		k.owners[is] = member
	}
}

// look looks at a group as each node has it, again and again.
func (k *Consumers) look(ctx context.Context, group string) {
	for i := 0; rest(ctx, 50*time.Millisecond); i++ {
		call, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale"), time.Second)
		r, err := k.c.Nodes[i%len(k.c.Nodes)].Cluster().GetGroup(call, &clusterpb.GetGroupRequest{GroupId: group})
		cancel()
		if err != nil || !r.Found {
			continue
		}
		total := 0
		for _, m := range r.Group.Members {
			k.told(group, r.Group.Generation, r.Revision, m.ServiceId, m.Partitions)
			total += len(m.Partitions)
		}
		if total != int(r.Group.PartitionCount) {
			k.mu.Lock()
			k.faultLocked("at revision %d %d of %d partitions of %s have an owner: %v", r.Revision, total, r.Group.PartitionCount, group, r.Group.Members)
			k.mu.Unlock()
		}
	}
}

// consumer is one member. It outlives its pod.
type consumer struct {
	k         *Consumers
	rng       *rand.Rand
	client    int
	group, id string

	// What it believes.
	member     bool
	generation uint64
	partitions []uint32
	said       time.Time // that it is there
	read       map[uint32]uint64
}

func (x *consumer) node() *Node { return x.k.c.Nodes[x.rng.IntN(len(x.k.c.Nodes))] }

func (x *consumer) run(ctx context.Context) {
	x.begin()
	for rest(ctx, time.Duration(20+x.rng.IntN(60))*time.Millisecond) {
		if !x.member || time.Since(x.said) >= x.k.o.Beat {
			if !x.join(ctx) {
				rest(ctx, 200*time.Millisecond)
				continue
			}
		}
		switch x.rng.IntN(60) {
		case 0: // its pod dies, with all that it knew, and returns
			x.begin()
			rest(ctx, time.Duration(x.rng.Int64N(int64(2*x.k.o.Expire))))
		case 1: // it is held up, and goes on where it was
			x.k.mu.Lock()
			x.k.held++
			x.k.mu.Unlock()
			rest(ctx, time.Duration(x.rng.Int64N(int64(2*x.k.o.Expire))))
			for range 3 {
				x.commit(ctx)
			}
		case 2:
			x.leave(ctx)
		case 3, 4, 5:
			x.look(ctx)
		default:
			x.commit(ctx)
		}
	}
}

// begin forgets everything.
func (x *consumer) begin() {
	x.member, x.generation, x.partitions, x.read = false, 0, nil, map[uint32]uint64{}
}

// join says that the member is there, and takes over what it is given.
func (x *consumer) join(ctx context.Context) bool {
	call, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	n := x.node().Registry()
	if !x.member {
		r, err := n.Register(call, &registrypb.RegisterRequest{
			Identity:          &commonpb.ServiceIdentity{ServiceId: x.id, Name: "e2e-consumer", ServiceType: commonpb.ServiceType_SERVICE_TYPE_SINK},
			Endpoint:          &commonpb.Endpoint{Host: "10.0.0.1", Port: 8080},
			HeartbeatInterval: durationpb.New(x.k.o.Beat),
		})
		if err != nil || !r.Success {
			return false
		}
	}
	r, err := n.JoinGroup(call, &registrypb.JoinGroupRequest{ServiceId: x.id, GroupId: x.group, PartitionCount: x.k.o.Partitions})
	if err != nil || !r.Success {
		x.member = false
		return false
	}
	x.k.told(x.group, r.Generation, r.Revision, x.id, r.AssignedPartitions)
	x.member, x.generation, x.partitions, x.said = true, r.Generation, r.AssignedPartitions, time.Now()
	return true
}

func (x *consumer) leave(ctx context.Context) {
	call, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, _ = x.node().Registry().LeaveGroup(call, &registrypb.LeaveGroupRequest{ServiceId: x.id, GroupId: x.group}) // whether or not: it joins again
	x.said = time.Time{}
}

// look reads how far the group has read one of its partitions.
func (x *consumer) look(ctx context.Context) {
	p := uint32(x.rng.IntN(int(x.k.o.Partitions)))
	call, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	x.k.Offsets.Record(x.client, OffsetOp{Key: x.k.key(x.group, p)}, func() (any, Known) {
		at, err := x.k.offset(call, x.node(), x.group, p)
		if err != nil {
			return nil, NotDone
		}
		x.read[p] = max(x.read[p], at)
		return OffsetOut{OK: true, Current: at}, Done
	})
}

// offset reads how far a group has read a partition.
func (k *Consumers) offset(ctx context.Context, n *Node, group string, partition uint32) (uint64, error) {
	source := k.source(group)
	r, err := n.Checkpoints().GetGroupOffsets(ctx, &checkpointpb.GetGroupOffsetsRequest{GroupId: group, SourceId: &source})
	return r.GetSourceOffsets()[source].GetOffsets()[partition], err
}

// commit reads on in a partition that it believes to own, mostly, and says so.
func (x *consumer) commit(ctx context.Context) {
	if len(x.partitions) == 0 {
		return
	}
	p := x.partitions[x.rng.IntN(len(x.partitions))]
	offset, generation := x.read[p]+1+uint64(x.rng.IntN(10)), x.generation
	call, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	known := x.k.Offsets.Record(x.client, OffsetOp{Key: x.k.key(x.group, p), Commit: true, Offset: offset}, func() (any, Known) {
		r, err := x.node().Checkpoints().CommitGroupOffset(call, &checkpointpb.CommitGroupOffsetRequest{
			GroupId: x.group, SourceId: x.k.source(x.group), Partition: p, Offset: offset, ServiceId: x.id, Generation: &generation,
		})
		if err != nil {
			if outcome(err) != Refused {
				return nil, outcome(err)
			}
			x.said = time.Time{} // it finds out what it owns now
			x.k.mu.Lock()
			x.k.fenced++
			x.k.mu.Unlock()
			return nil, NotDone // fenced: nothing was compared with the offset
		}
		x.read[p] = max(x.read[p], r.CurrentOffset)
		if r.Success {
			x.k.mu.Lock()
			x.k.commits = append(x.k.commits, groupCommit{
				ownedPartition: ownedPartition{groupGeneration{x.group, generation}, p}, member: x.id, offset: offset, revision: r.Revision,
			})
			x.k.mu.Unlock()
		}
		return OffsetOut{OK: r.Success, Current: r.CurrentOffset}, Done
	})
	if known == Unknown {
		rest(ctx, 200*time.Millisecond) // see StartLoad
	}
}

// Check fails the test unless every partition has had one owner in each generation, no
// commit of an owner was accepted after a later generation had begun, and some order
// explains all offsets that were committed and read. It reads all of them once more,
// from every node.
func (k *Consumers) Check() {
	k.c.t.Helper()
	for i, n := range k.c.Nodes {
		for g := range k.o.Groups {
			for p := range k.o.Partitions {
				eventually(k.c.t, 30*time.Second, "final read of an offset of a group", func(ctx context.Context) error {
					var failed error
					k.Offsets.Record(1000+i, OffsetOp{Key: k.key(k.group(g), p)}, func() (any, Known) {
						var at uint64
						if at, failed = k.offset(ctx, n, k.group(g), p); failed != nil {
							return nil, NotDone
						}
						return OffsetOut{OK: true, Current: at}, Done
					})
					return failed
				})
			}
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fencedOff()
	for _, f := range k.faults {
		k.c.t.Error(f)
	}
	k.c.t.Logf("groups: %d generations, %d commits accepted and %d fenced, members held up %d times; offsets: %v",
		len(k.born), len(k.commits), k.fenced, k.held, k.Offsets)
	if k.fenced == 0 || len(k.commits) == 0 || len(k.born) < 2*k.o.Groups {
		k.c.t.Error("the members met too little to show anything")
	}
	k.Offsets.Check(k.c.t, "group-offsets", OffsetModel())
}

// fencedOff finds commits that were accepted after a later generation had begun, and those
// of who was not the owner. Of one revision, which many commands may share, it is not
// known what came first. k.mu is held.
func (k *Consumers) fencedOff() {
	slices.SortStableFunc(k.commits, func(a, b groupCommit) int { return int(a.revision) - int(b.revision) })
	type newest struct{ generation, revision uint64 }
	begun := map[string][]newest{} // by group, by revision
	for g, revision := range k.born {
		begun[g.group] = append(begun[g.group], newest{g.generation, revision})
	}
	for _, all := range begun {
		slices.SortFunc(all, func(a, b newest) int { return int(a.revision) - int(b.revision) })
	}
	for _, c := range k.commits {
		if owner, known := k.owners[c.ownedPartition]; !known || owner != c.member {
			k.faultLocked("%s committed partition %d of %s in generation %d, in which it is owned by %q", c.member, c.partition, c.group, c.generation, owner)
		}
		for _, x := range begun[c.group] {
			if x.revision >= c.revision {
				break
			}
			if x.generation > c.generation {
				k.faultLocked("at revision %d %s committed partition %d of %s in generation %d, though generation %d had begun by revision %d",
					c.revision, c.member, c.partition, c.group, c.generation, x.generation, x.revision)
				break
			}
		}
	}
}
