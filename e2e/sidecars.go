package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// SidecarOptions shape a Sidecars.
type SidecarOptions struct {
	Seed      uint64
	Count     int
	Pipelines int // the fleet offers the services of so many
	// Beat is the pause between two heartbeats of a sidecar.
	Beat time.Duration
	// Connections are shared by all; each goes to a node of its own for as long as
	// that can be reached, then to another one, as behind a service address.
	Connections int
}

// Sidecars is a fleet of simulated sidecars on a Cluster. Half of them are as
// those in the field: they register once, send heartbeats without a deadline, one
// after the other, and do what an acknowledged answer says. The others watch, and
// say in their heartbeats what they have applied.
type Sidecars struct {
	t       testing.TB
	c       *Cluster
	o       SidecarOptions
	weather *weather
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu     sync.Mutex
	conns  []*grpc.ClientConn
	all    []*simSidecar
	byID   map[string]*simSidecar
	faults []string
	beats  int
}

// simSidecar is one of them. It outlives its pod: each life registers anew,
// at another address.
type simSidecar struct {
	id      string
	index   int
	watches bool

	// Guarded by Sidecars.mu.
	life     int
	endpoint string // of this life
	up       bool
	silent   bool // it is cut off: it sends nothing and goes on with what it holds
	held     holdings
	view     *assignmentView
	answered []answeredBeat // the newest, acknowledged
	end      context.CancelFunc
	restream context.CancelFunc // ends the stream that is open
}

type answeredBeat struct {
	sent, at time.Time
	node     uint64
}

// keepBeats is how many answered heartbeats of a sidecar are remembered: those of
// the longest lease any test has.
const keepBeats = 32

// StartSidecars starts a fleet; it ends with the test.
func StartSidecars(c *Cluster, w *weather, o SidecarOptions) *Sidecars {
	c.t.Helper()
	s := &Sidecars{t: c.t, c: c, o: o, weather: w, byID: map[string]*simSidecar{}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for j := range o.Connections {
		s.conns = append(s.conns, s.dial(j))
	}
	c.t.Cleanup(s.Close)
	rng := rand.New(rand.NewPCG(o.Seed, 77))
	for i := range o.Count {
		x := &simSidecar{id: fmt.Sprintf("e2e/pod-%03d", i), index: i, watches: rng.IntN(2) == 0}
		s.all, s.byID[x.id] = append(s.all, x), x
		s.Begin(x)
	}
	return s
}

// Close ends all sidecars.
func (s *Sidecars) Close() {
	s.stop()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

func (s *Sidecars) dial(j int) *grpc.ClientConn {
	nodes := manual.NewBuilderWithScheme("nodes")
	var state resolver.State
	for k := range s.c.Nodes {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: s.c.Nodes[(j+k)%len(s.c.Nodes)].Client})
	}
	nodes.InitialState(state)
	conn, err := grpc.NewClient("nodes:///cluster", grpc.WithResolvers(nodes),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(quickReconnect))
	if err != nil {
		s.t.Fatal(err)
	}
	return conn
}

func (s *Sidecars) stub(x *simSidecar) sidecarpb.SidecarCoordinatorClient {
	return sidecarpb.NewSidecarCoordinatorClient(s.conns[x.index%len(s.conns)])
}

func (s *Sidecars) fault(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults) < 20 {
		s.faults = append(s.faults, fmt.Sprintf(format, args...))
	}
}

// Begin starts the next life of a sidecar that is down.
func (s *Sidecars) Begin(x *simSidecar) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ctx, cancel := context.WithCancel(s.ctx)
	x.life++
	x.endpoint = fmt.Sprintf("10.%d.%d.%d:50053", x.life%250, x.index/250, x.index%250)
	x.up, x.silent, x.held, x.view, x.end = true, false, holdings{}, &assignmentView{}, cancel
	s.wg.Add(1)
	go func(req *sidecarpb.RegisterSidecarRequest) {
		defer s.wg.Done()
		s.live(ctx, x, req)
	}(s.registration(x))
}

// End ends the pod of a sidecar: it holds nothing any more.
func (s *Sidecars) End(x *simSidecar) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x.end()
	x.up, x.held = false, holdings{}
}

// Silence lets a sidecar send nothing, or go on.
func (s *Sidecars) Silence(x *simSidecar, silent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x.silent = silent
	if silent && x.restream != nil {
		x.restream()
	}
}

// Restream ends the watch of a sidecar, which opens another one.
func (s *Sidecars) Restream(x *simSidecar) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.restream != nil {
		x.restream()
	}
}

// registration is what the present life of x registers. No sidecar offers all that
// its pipeline needs, and the services are spread so that hand-overs between any two
// of a group can go either way. The caller holds s.mu.
func (s *Sidecars) registration(x *simSidecar) *sidecarpb.RegisterSidecarRequest {
	group := x.index % s.o.Pipelines
	r := &sidecarpb.RegisterSidecarRequest{
		SidecarId: x.id, PodName: fmt.Sprintf("pod-%03d-%d", x.index, x.life), Namespace: "e2e", SidecarEndpoint: x.endpoint,
	}
	kinds := [][]sidecarpb.ServiceType{
		{sidecarpb.ServiceType_SERVICE_TYPE_SOURCE, sidecarpb.ServiceType_SERVICE_TYPE_SINK},
		{sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM, sidecarpb.ServiceType_SERVICE_TYPE_SINK},
		{sidecarpb.ServiceType_SERVICE_TYPE_SOURCE, sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM},
	}[x.index/s.o.Pipelines%3]
	for k, kind := range kinds {
		r.LocalServices = append(r.LocalServices, &sidecarpb.LocalService{
			ServiceName: serviceOf(group, kind), ServiceType: kind, LocalEndpoint: fmt.Sprintf("127.0.0.1:%d", 50100+k),
		})
	}
	return r
}

func serviceOf(group int, kind sidecarpb.ServiceType) string {
	return fmt.Sprintf("%s-%d", strings.ToLower(strings.TrimPrefix(kind.String(), "SERVICE_TYPE_")), group)
}

// live is one life of a sidecar.
func (s *Sidecars) live(ctx context.Context, x *simSidecar, req *sidecarpb.RegisterSidecarRequest) {
	for {
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		sent := time.Now()
		var from peer.Peer
		r, err := s.stub(x).RegisterSidecar(call, req, grpc.WaitForReady(true), grpc.Peer(&from))
		cancel()
		if err == nil && !r.Success {
			s.fault("the registration of %s was refused: %s", x.id, r.Error)
		}
		if err == nil {
			s.mu.Lock()
			if ctx.Err() == nil {
				s.acknowledged(x, sent, &from)
				if !x.watches {
					for _, a := range r.InitialAssignments {
						x.held[a.PipelineId] = a
					}
					s.inspect(x)
				}
			}
			s.mu.Unlock()
			break
		}
		if !rest(ctx, 100*time.Millisecond) { // the pod is started again
			return
		}
	}
	if x.watches {
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			s.watch(ctx, x)
		}()
	}
	// Not in step with all the others.
	for rest(ctx, rand.N(s.o.Beat)); ctx.Err() == nil; rest(ctx, s.o.Beat) {
		s.beat(ctx, x)
	}
}

func rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// acknowledged remembers an answered sign of life. The caller holds s.mu.
func (s *Sidecars) acknowledged(x *simSidecar, sent time.Time, from *peer.Peer) {
	b := answeredBeat{sent: sent, at: time.Now()}
	for _, n := range s.c.Nodes {
		if from.Addr != nil && from.Addr.String() == n.Client {
			b.node = n.ID
		}
	}
	if len(x.answered) == keepBeats {
		x.answered = slices.Delete(x.answered, 0, 1)
	}
	x.answered = append(x.answered, b)
	s.beats++
}

// beat sends one heartbeat and does what the answer says.
func (s *Sidecars) beat(ctx context.Context, x *simSidecar) {
	req := &sidecarpb.SidecarHeartbeatRequest{SidecarId: x.id}
	s.mu.Lock()
	silent := x.silent
	if x.watches && x.view.synced {
		req.AppliedRevision, req.AppliedEpoch = x.view.revision, x.view.epoch
	}
	s.mu.Unlock()
	if silent {
		return
	}
	sent := time.Now()
	var from peer.Peer
	r, err := s.stub(x).Heartbeat(ctx, req, grpc.WaitForReady(true), grpc.Peer(&from))
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil || ctx.Err() != nil {
		return
	}
	if !r.Acknowledged {
		if len(s.faults) < 20 {
			s.faults = append(s.faults, fmt.Sprintf("node %s does not know %s, which is registered: %s", from.Addr, x.id, r.Reason))
		}
		return
	}
	s.acknowledged(x, sent, &from)
	if x.watches {
		return
	}
	for _, cmd := range r.Commands {
		switch c := cmd.Command.(type) {
		case *sidecarpb.SidecarCommand_Assign:
			x.held[c.Assign.PipelineId] = c.Assign
		case *sidecarpb.SidecarCommand_Revoke:
			delete(x.held, c.Revoke.PipelineId)
		}
	}
	if len(r.Commands) > 0 {
		s.inspect(x)
	}
}

// watch follows the assignments of x over as many streams as it takes.
func (s *Sidecars) watch(ctx context.Context, x *simSidecar) {
	for rest(ctx, rand.N(50*time.Millisecond)) {
		s.mu.Lock()
		silent := x.silent
		s.mu.Unlock()
		if silent {
			continue
		}
		if err := s.stream(ctx, x); ctx.Err() == nil && status.Code(err) == codes.NotFound {
			s.fault("the watch of %s, which is registered, was refused: %v", x.id, err)
		}
	}
}

func (s *Sidecars) stream(ctx context.Context, x *simSidecar) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	x.restream = cancel
	req := x.view.begin()
	s.mu.Unlock()
	req.SidecarId = x.id
	stream, err := s.stub(x).WatchPipelineAssignments(ctx, req, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for {
		ev, err := stream.Recv()
		if err != nil {
			return err
		}
		s.mu.Lock()
		if ctx.Err() != nil {
			s.mu.Unlock()
			return ctx.Err()
		}
		fault := x.view.take(ev)
		x.held = x.view.held
		s.mu.Unlock()
		if fault != "" {
			s.fault("the watch of %s: %s", x.id, fault)
		}
	}
}

// inspect looks for a circle of hand-overs among the tables that the sidecars of
// the field hold this moment, after that of x has changed. The caller holds s.mu.
func (s *Sidecars) inspect(x *simSidecar) {
	for pipeline := range x.held {
		next := func(id string) (out []string) {
			from := s.byID[id]
			if from == nil || from.watches || !from.up {
				return nil
			}
			for _, st := range from.held[pipeline].GetStages() {
				// Behind the address of an earlier life there is nobody.
				if r := st.GetRemoteSidecar(); r != nil && s.byID[r.SidecarId] != nil && s.byID[r.SidecarId].endpoint == r.Endpoint {
					out = append(out, r.SidecarId)
				}
			}
			return out
		}
		if way := circleFrom(x.id, next); way != nil && len(s.faults) < 20 {
			text := fmt.Sprintf("records of %s go round: %v;", pipeline, way)
			for _, id := range way[:len(way)-1] {
				text += fmt.Sprintf(" %s holds %v;", id, s.byID[id].held[pipeline])
			}
			s.faults = append(s.faults, text)
		}
	}
}

// circleFrom returns a way from start that comes back to it, nil when there is none.
func circleFrom(start string, next func(id string) []string) []string {
	seen := map[string]bool{}
	var visit func(id string, way []string) []string
	visit = func(id string, way []string) []string {
		for _, n := range next(id) {
			if n == start {
				return append(slices.Clone(way), n)
			}
			if !seen[n] {
				seen[n] = true
				if found := visit(n, append(way, n)); found != nil {
					return found
				}
			}
		}
		return nil
	}
	return visit(start, []string{start})
}

// agrees returns how what sidecar id holds differs from what the cluster says, ""
// when it does not.
func (s *Sidecars) agrees(id string, want []*sidecarpb.PipelineAssignment) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.byID[id]
	switch {
	case x == nil:
		return "is not of this fleet"
	case !x.up || x.silent:
		return "is down"
	case x.watches && !x.view.synced:
		return "is not synced"
	}
	return x.held.differs(want)
}
