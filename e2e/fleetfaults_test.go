package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// The lease times of the fleet under faults: short, so that faults which last
// longer fit a test, and long beside what a busy machine needs for an answer.
const (
	fleetBeat    = 600 * time.Millisecond
	fleetSuspect = 1800 * time.Millisecond
	fleetExpire  = 2700 * time.Millisecond
)

// fleetPipelines is how many pipelines there are, for groups of eight sidecars.
const (
	fleetPipelines = 30
	fleetSize      = 8 * fleetPipelines
)

// TestFleetUnderFaults: a few hundred sidecars, half of them as those in the field, and
// the members of a few groups, while leaders are killed, nodes cut off and paused for
// longer than a lease, pipelines change and sidecars and members die, fall silent and
// return.
//
// Goal: at no revision that any node shows has an exclusive stage two owners or do
// records go round; neither do they along the tables that sidecars of the field
// hold at the same moment; an expired sidecar soon has nothing any more; no
// heartbeat that a healthy node acknowledged is forgotten within a lease; the events
// of every watch are in order, without gap or duplicate, and resumable. Every partition of
// a group has one owner in each generation, no commit of an owner is accepted once a later
// generation has begun, and offsets never go back. In the end every
// sidecar holds exactly what the newest revision says, and every pipeline is what was
// acknowledged last.
func TestFleetUnderFaults(t *testing.T) {
	seed := newSeed(t)
	c := NewCluster(t, Options{Proxied: true, Args: []string{
		"--liveness-heartbeat-interval", fleetBeat.String(),
		"--liveness-suspect-after", fleetSuspect.String(), "--liveness-expire-after", fleetExpire.String(), "--placement-balance-interval", "1s",
		"--liveness-mass-expiry-percent", "50",
	}})
	w := newWeather()
	s := StartSidecars(c, w, SidecarOptions{Seed: seed, Count: fleetSize, Pipelines: fleetPipelines, Beat: fleetBeat, Connections: 12})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var loops sync.WaitGroup
	defer loops.Wait()
	defer cancel()

	pipelines := newFleetPipelines(c, seed)
	if err := pipelines.create(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, "the fleet is up", func(ctx context.Context) error { return s.settled(ctx, c.Nodes[0]) })

	var service serviceClock
	loops.Go(func() { service.run(ctx, c) })
	check := newFleetChecker(s, fleetLeases{expire: fleetExpire, release: 5 * time.Second}, service.served)
	looking := make(chan struct{})
	go func() {
		defer close(looking)
		for i := 0; rest(ctx, 40*time.Millisecond); i++ {
			check.look(ctx, c.Nodes[i%len(c.Nodes)])
		}
	}()
	churn, endChurn := context.WithCancel(ctx)
	var churning sync.WaitGroup
	for i := range 3 {
		churning.Go(func() { pipelines.change(churn, i, 3) })
	}
	churning.Go(func() { s.churn(churn, seed) })
	consumers := StartConsumers(c, ConsumerOptions{Seed: seed, Groups: 3, Members: 4, Partitions: 5, Beat: fleetBeat, Expire: fleetExpire})
	defer consumers.Stop()

	strikes := strikeFleet(t, c, w, seed)
	endChurn()
	churning.Wait()
	consumers.Stop()
	c.WaitServing(c.Nodes...)
	consumers.Check()
	s.revive()
	for _, n := range c.Nodes {
		eventually(t, 60*time.Second, "the fleet settles", func(ctx context.Context) error { return s.settled(ctx, n) })
	}
	pipelines.check(t, s)
	cancel()
	<-looking
	check.leasesKept()
	s.mu.Lock()
	resyncs := 0
	for _, x := range s.all {
		resyncs += x.view.resyncs
	}
	t.Logf("%v; %d heartbeats, %d changes of pipelines, %d looks, %d expiries, %d watches begun anew, %v of service",
		strikes, s.beats, pipelines.acked(), check.looks, len(check.expired), resyncs, service.served().Round(time.Second))
	faults := append(append([]string(nil), s.faults...), check.faults...)
	s.mu.Unlock()
	for _, f := range faults {
		t.Error(f)
	}
	if len(check.expired) == 0 {
		t.Error("nobody expired: the faults were too mild to show anything")
	}
	c.WaitSameState()
}

// strikeFleet lets the faults happen, each kind at least once, and returns how many
// of each.
func strikeFleet(t *testing.T, c *Cluster, w *weather, seed uint64) map[string]int {
	rng := rand.New(rand.NewPCG(seed, 3))
	// Longer than a lease, so that those who talk to the node lose theirs, or
	// shorter than a heartbeat.
	long := func() time.Duration { return fleetExpire + time.Duration(rng.IntN(1000))*time.Millisecond }
	brief := func() time.Duration { return time.Duration(100+rng.IntN(500)) * time.Millisecond }
	victim := func(leads bool) *Node {
		for _, n := range c.Nodes {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			st, err := n.Admin().GetClusterStatus(metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale"), &adminpb.GetClusterStatusRequest{})
			cancel()
			if err == nil && (st.LeaderId == n.ID) == leads {
				return n
			}
		}
		return c.Nodes[rng.IntN(len(c.Nodes))]
	}
	kill := func(nodes ...*Node) {
		w.strike(nodes...)
		for _, n := range nodes {
			n.Kill()
		}
		pause(t, brief())
		for _, n := range nodes {
			n.Start()
		}
		c.WaitServing(nodes...)
		w.clear(nodes...)
	}
	stop := func(n *Node, d time.Duration) {
		w.strike(n)
		n.Pause()
		pause(t, d)
		n.Resume()
		w.clear(n)
	}
	cut := func(n *Node, d time.Duration, how func()) {
		w.strike(n)
		how()
		pause(t, d)
		c.Heal()
		w.clear(n)
	}
	deaf := func(n *Node) {
		for _, p := range c.Nodes {
			if p != n {
				c.Link(p, n).Silence()
			}
		}
	}
	kinds := []struct {
		name string
		do   func()
	}{
		{"leader killed", func() { kill(victim(true)) }},
		{"leader paused for longer than a lease", func() { stop(victim(true), long()) }},
		{"follower cut off for longer than a lease", func() { n := victim(false); cut(n, long(), func() { c.Isolate(n) }) }},
		{"leader cut off", func() { n := victim(true); cut(n, brief(), func() { c.Isolate(n) }) }},
		{"follower killed", func() { kill(victim(false)) }},
		{"leader paused", func() { stop(victim(true), brief()) }},
		{"leader deaf", func() { n := victim(true); cut(n, brief(), func() { deaf(n) }) }},
		{"follower paused for longer than a lease", func() { stop(victim(false), long()) }},
		{"majority killed", func() { kill(c.Nodes[0], c.Nodes[1]) }},
		{"leader cut off for longer than a lease", func() { n := victim(true); cut(n, long(), func() { c.Isolate(n) }) }},
	}
	counts := map[string]int{}
	for end := time.Now().Add(*durationFlag); time.Now().Before(end); {
		for _, k := range rng.Perm(len(kinds)) {
			if len(counts) == len(kinds) && !time.Now().Before(end) {
				break
			}
			kinds[k].do()
			counts[kinds[k].name]++
			pause(t, 2*brief())
		}
	}
	return counts
}

// churn lets sidecars die and return, fall silent and be heard again, and watches
// break, until ctx is done.
func (s *Sidecars) churn(ctx context.Context, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 4))
	type due struct {
		at time.Time
		do func()
	}
	var back []due
	busy := map[*simSidecar]bool{}
	for rest(ctx, 50*time.Millisecond) {
		for len(back) > 0 && time.Now().After(back[0].at) {
			back[0].do()
			back = back[1:]
		}
		x := s.all[rng.IntN(len(s.all))]
		if busy[x] || len(busy) > len(s.all)/8 {
			continue
		}
		away := time.Duration(rng.IntN(int(2 * fleetExpire)))
		switch rng.IntN(3) {
		case 0:
			busy[x] = true
			s.End(x)
			back = append(back, due{time.Now().Add(away), func() { s.Begin(x); delete(busy, x) }})
		case 1:
			busy[x] = true
			s.Silence(x, true)
			back = append(back, due{time.Now().Add(away), func() { s.Silence(x, false); delete(busy, x) }})
		case 2:
			s.Restream(x)
		}
	}
}

// revive brings all sidecars back.
func (s *Sidecars) revive() {
	for _, x := range s.all {
		s.Silence(x, false)
		s.mu.Lock()
		down := !x.up
		s.mu.Unlock()
		if down {
			s.Begin(x)
		}
	}
}

// serviceClock measures for how long the cluster has served writes.
type serviceClock struct {
	mu  sync.Mutex
	sum time.Duration
}

func (k *serviceClock) served() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sum
}

func (k *serviceClock) run(ctx context.Context, c *Cluster) {
	last := time.Now()
	for i := uint64(1); rest(ctx, 100*time.Millisecond); i++ {
		n := c.Nodes[i%uint64(len(c.Nodes))]
		call, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		_, err := n.Checkpoints().CommitOffset(call, &checkpointpb.CommitOffsetRequest{SourceId: "service-clock", Offset: i})
		cancel()
		if err != nil {
			continue
		}
		k.mu.Lock()
		k.sum += min(time.Since(last), 250*time.Millisecond)
		k.mu.Unlock()
		last = time.Now()
	}
}

// fleetPipelinesUnderChange are the pipelines of the fleet. Each is changed by one
// goroutine, which repeats a change until it is acknowledged.
type fleetPipelinesUnderChange struct {
	c    *Cluster
	seed uint64
	mu   sync.Mutex
	is   []*adminpb.PipelineConfig // as acknowledged last, or as asked for
	sure []bool                    // whether that was acknowledged
	n    int
}

func newFleetPipelines(c *Cluster, seed uint64) *fleetPipelinesUnderChange {
	return &fleetPipelinesUnderChange{c: c, seed: seed, is: make([]*adminpb.PipelineConfig, fleetPipelines), sure: make([]bool, fleetPipelines)}
}

func fleetPipelineID(p int) string { return fmt.Sprintf("e2e/pipeline-%02d", p) }

// fleetPipeline is pipeline p in one of its forms. Another form has other stage ids,
// so that all who run it have to be told; some also lack the transform.
func fleetPipeline(p, form int, enabled bool) *adminpb.PipelineConfig {
	cfg := &adminpb.PipelineConfig{Id: fleetPipelineID(p), Name: fleetPipelineID(p), Enabled: enabled, Description: fmt.Sprint("form ", form)}
	for _, kind := range []sidecarpb.ServiceType{
		sidecarpb.ServiceType_SERVICE_TYPE_SOURCE, sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM, sidecarpb.ServiceType_SERVICE_TYPE_SINK,
	} {
		if kind == sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM && form%4 == 3 {
			continue
		}
		role := strings.ToLower(strings.TrimPrefix(kind.String(), "SERVICE_TYPE_"))
		st := &adminpb.Stage{
			Id: fmt.Sprintf("%s.%d", role, form), Name: role, StageType: adminpb.StageType(kind),
			Parallelism:     uint32(instancesOf(cfg.Id + "/" + role)),
			ServiceSelector: &adminpb.ServiceSelector{ServiceName: serviceOf(p, kind)},
		}
		if n := len(cfg.Stages); n > 0 {
			cfg.Edges = append(cfg.Edges, &adminpb.Edge{FromStage: cfg.Stages[n-1].Id, ToStage: st.Id})
		}
		cfg.Stages = append(cfg.Stages, st)
	}
	return cfg
}

// put repeats a change until it is acknowledged. The request id makes the repeats,
// and a first attempt that arrives late, harmless.
func (u *fleetPipelinesUnderChange) put(ctx context.Context, p, form int, cfg *adminpb.PipelineConfig, rng *rand.Rand) error {
	u.mu.Lock()
	u.is[p], u.sure[p] = cfg, false
	u.mu.Unlock()
	for {
		call, cancel := context.WithTimeout(ctx, time.Second)
		call = metadata.AppendToOutgoingContext(call, "conveyor-request-id", fmt.Sprintf("fleet-%d-%d", p, form))
		r, err := u.c.Nodes[rng.IntN(len(u.c.Nodes))].Admin().UpdatePipeline(call, &adminpb.UpdatePipelineRequest{PipelineId: cfg.Id, Config: cfg})
		cancel()
		if err == nil && !r.Success {
			return fmt.Errorf("pipeline %s was refused: %s %v", cfg.Id, r.Error, r.Violations)
		}
		if err == nil {
			u.mu.Lock()
			u.sure[p] = true
			u.n++
			u.mu.Unlock()
			return nil
		}
		if !rest(ctx, 20*time.Millisecond) {
			return ctx.Err()
		}
	}
}

func (u *fleetPipelinesUnderChange) create(ctx context.Context) error {
	rng := rand.New(rand.NewPCG(u.seed, 5))
	for p := range fleetPipelines {
		if err := u.put(ctx, p, 0, fleetPipeline(p, 0, true), rng); err != nil {
			return err
		}
	}
	return nil
}

// change changes the pipelines of one of so many writers until ctx is done.
func (u *fleetPipelinesUnderChange) change(ctx context.Context, writer, writers int) {
	rng := rand.New(rand.NewPCG(u.seed, 6+uint64(writer)))
	for form := 1; rest(ctx, time.Duration(rng.IntN(250))*time.Millisecond); form++ {
		p := writer + writers*rng.IntN(fleetPipelines/writers)
		// Without the fault's ctx: a change that was begun is carried through, so that it is
		// known what the pipeline is.
		if err := u.put(context.WithoutCancel(ctx), p, form, fleetPipeline(p, form, rng.IntN(6) > 0), rng); err != nil {
			u.c.t.Error(err)
			return
		}
	}
}

func (u *fleetPipelinesUnderChange) acked() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.n
}

// check fails unless every pipeline is on every node what was acknowledged last, and
// all its stages run as often as asked.
func (u *fleetPipelinesUnderChange) check(t *testing.T, s *Sidecars) {
	t.Helper()
	for _, n := range u.c.Nodes {
		eventually(t, 60*time.Second, "the pipelines run", func(ctx context.Context) error {
			r, err := n.Cluster().ListSidecars(ctx, &clusterpb.ListSidecarsRequest{PageSize: 10_000})
			if err != nil {
				return err
			}
			for p, want := range u.is {
				got, err := n.Admin().GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: want.Id})
				if err != nil {
					return err
				}
				if !got.Found || got.Config.Description != want.Description || got.Config.Enabled != want.Enabled || !u.sure[p] {
					t.Fatalf("node %d: pipeline %s is %q (enabled %t), acknowledged was %q (%t)",
						n.ID, want.Id, got.GetConfig().GetDescription(), got.GetConfig().GetEnabled(), want.Description, want.Enabled)
				}
				on := runs(r.Sidecars, want.Id)
				for _, st := range want.Stages {
					if have := len(on[st.Id]); want.Enabled && have != int(st.Parallelism) || !want.Enabled && have != 0 {
						return fmt.Errorf("stage %s of %s (enabled %t) runs %d times, asked for are %d", st.Id, want.Id, want.Enabled, have, st.Parallelism)
					}
				}
			}
			return nil
		})
	}
	for _, n := range u.c.Nodes {
		eventually(t, 60*time.Second, "the fleet stays settled", func(ctx context.Context) error { return s.settled(ctx, n) })
	}
}
