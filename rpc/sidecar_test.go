package rpc

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

func sidecarRequest(id string, services ...string) *sidecarpb.RegisterSidecarRequest {
	req := &sidecarpb.RegisterSidecarRequest{
		SidecarId: id, PodName: "pod", Namespace: "ns", SidecarEndpoint: "10.0.0.7:50053",
	}
	for _, s := range services {
		req.LocalServices = append(req.LocalServices, &sidecarpb.LocalService{
			ServiceName: s, ServiceType: sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM, LocalEndpoint: "127.0.0.1:9000",
		})
	}
	return req
}

// registerSidecar registers without waiting for a placement.
func (a *api) registerSidecar(id string, services ...string) {
	a.t.Helper()
	rec := &commandpb.Sidecar{SidecarId: id, PodName: "pod", Namespace: "ns", Endpoint: "10.0.0.7:50053"}
	for _, s := range services {
		rec.Services = append(rec.Services, &commandpb.LocalService{
			Name: s, Type: commandpb.ServiceType_SERVICE_TYPE_TRANSFORM, Endpoint: "127.0.0.1:9000",
		})
	}
	a.node.must(a.t, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{
		RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: rec},
	}})
	// What a node remembers of a sidecar is forgotten when its registration is noted.
	// Were that later, the first heartbeats would be answered twice, or not counted.
	a.noted()
}

// oldSidecar behaves as the sidecar in the field: it registers once, then beats
// and executes the commands of an acknowledged answer in order.
type oldSidecar struct {
	a      *api
	id     string
	routes map[string]*sidecarpb.PipelineAssignment
}

func (a *api) startOldSidecar(id string, services ...string) *oldSidecar {
	a.t.Helper()
	resp, err := a.sidecar.RegisterSidecar(context.Background(), sidecarRequest(id, services...))
	noError(a.t, err)
	if !resp.Success {
		a.t.Fatalf("the sidecar exits: %s", resp.Error)
	}
	s := &oldSidecar{a: a, id: id, routes: make(map[string]*sidecarpb.PipelineAssignment)}
	for _, as := range resp.InitialAssignments {
		s.routes[as.PipelineId] = as
	}
	return s
}

// beat sends one heartbeat; lose drops the answer on its way.
func (s *oldSidecar) beat(lose bool) *sidecarpb.HeartbeatResponse {
	s.a.t.Helper()
	resp, err := s.a.sidecar.Heartbeat(context.Background(), &sidecarpb.SidecarHeartbeatRequest{
		SidecarId:     s.id,
		ServiceHealth: []*sidecarpb.LocalServiceHealth{{ServiceName: "transform", Healthy: true}},
	})
	noError(s.a.t, err)
	if lose || !resp.Acknowledged {
		return resp
	}
	for _, cmd := range resp.Commands {
		switch c := cmd.Command.(type) {
		case *sidecarpb.SidecarCommand_Assign:
			s.routes[c.Assign.PipelineId] = c.Assign
		case *sidecarpb.SidecarCommand_Revoke:
			delete(s.routes, c.Revoke.PipelineId)
		}
	}
	return resp
}

func (s *oldSidecar) runs() []string {
	var out []string
	for p := range s.routes {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

// caughtUp waits until the server's feed has seen everything applied so far, so
// that the next heartbeat knows of it.
func (a *api) caughtUp() {
	a.t.Helper()
	want := a.node.fsm.Hub().Revision()
	eventually(a.t, "the feed is up to date", func() bool {
		a.feed.mu.Lock()
		defer a.feed.mu.Unlock()
		return a.feed.reached >= want
	})
}

// Goal: a sidecar of the field registers, is told at once what the placement
// loop decides for it, learns of changes by heartbeats, and no heartbeat is a
// log entry.
func TestExistingSidecar(t *testing.T) {
	a := newAPI(t)
	a.create(chain("default/orders", "kafka", "transform", "warehouse"))
	a.caughtUp()
	registered := make(chan *oldSidecar)
	go func() { registered <- a.startOldSidecar("ns/pod-1", "Transform") }()
	eventually(t, "the registration is applied", func() bool {
		v := a.node.fsm.Latest()
		sc, err := v.Sidecar("ns/pod-1")
		noError(t, err)
		return sc != nil
	})
	a.assign("ns/pod-1", "default/orders")
	s := <-registered
	a.noted() // a registration that is noted later makes the node tell everything anew
	if !slices.Equal(s.runs(), []string{"default/orders"}) {
		t.Fatalf("initial assignments: %v", s.runs())
	}
	if st := s.routes["default/orders"].Stages; len(st) != 3 || st[0].GetLocalEndpoint() == "" {
		t.Fatal(st)
	}

	before := a.node.entryCount()
	for range 10 {
		if resp := s.beat(false); !resp.Acknowledged || resp.TtlMs == 0 || resp.HeartbeatIntervalMs == 0 {
			t.Fatal(resp)
		}
	}
	if n := a.node.entryCount(); n != before {
		t.Fatalf("%d heartbeats became entries", n-before)
	}
	if n := a.beats.count("ns/pod-1", ""); n != 11 { // the registration counts as one
		t.Fatalf("%d beats", n)
	}
	if resp := s.beat(false); len(resp.Commands) != 0 {
		t.Fatalf("nothing changed, yet: %v", resp.Commands)
	}

	a.create(chain("default/clicks", "a", "b"))
	a.assign("ns/pod-1", "default/clicks")
	a.caughtUp()
	s.beat(true) // the answer is lost
	if len(s.routes) != 1 {
		t.Fatal("a lost answer took effect")
	}
	s.beat(false) // and repeated
	if !slices.Equal(s.runs(), []string{"default/clicks", "default/orders"}) {
		t.Fatal(s.runs())
	}
	if resp := s.beat(false); len(resp.Commands) != 0 {
		t.Fatalf("told a third time: %v", resp.Commands)
	}

	a.revoke("ns/pod-1", "default/orders")
	a.caughtUp()
	resp := s.beat(true)
	if r := resp.Commands[0].GetRevoke(); r.GetPipelineId() != "default/orders" || !r.GetDrainFirst() {
		t.Fatal(resp)
	}
	s.beat(false)
	if !slices.Equal(s.runs(), []string{"default/clicks"}) {
		t.Fatal(s.runs())
	}
}

// Goal: a node that has not spoken to a sidecar yet tells it everything,
// revocations of the past included; and so does every node now and then.
func TestFullSet(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	for _, p := range []string{"one", "two"} {
		a.create(chain(p, "x", "y"))
		a.assign("ns/pod", p)
	}
	a.revoke("ns/pod", "one")
	a.caughtUp()
	s := &oldSidecar{a: a, id: "ns/pod", routes: map[string]*sidecarpb.PipelineAssignment{"one": nil}}
	readers := a.node.readCount()
	resp := s.beat(false)
	if len(resp.Commands) != 2 || !slices.Equal(s.runs(), []string{"two"}) {
		t.Fatal(resp)
	}
	if a.node.readCount() == readers {
		t.Fatal("a node that may be behind told a sidecar what to run")
	}
	s.beat(false) // the repetition
	if resp := s.beat(false); len(resp.Commands) != 0 {
		t.Fatal(resp)
	}
	// A sidecar that keeps beating is told everything again after a while.
	full := false
	for range 60 {
		a.clock.advance(10 * time.Second)
		full = full || len(s.beat(false).Commands) == 2
	}
	if !full {
		t.Fatal("never told everything again")
	}
	// One that was away has probably been told newer things elsewhere.
	s.beat(false)
	a.clock.advance(2 * time.Minute)
	if resp := s.beat(false); len(resp.Commands) != 2 {
		t.Fatal(resp)
	}
}

// Goal: an unknown sidecar is not acknowledged, and a node that cannot know says
// so instead.
func TestHeartbeatOfUnknownSidecar(t *testing.T) {
	a := newAPI(t)
	hasty := serveAPI(t, a.node, func(c *ServerConfig) { c.CallTimeout = 20 * time.Millisecond })
	beat := func(id string) (*sidecarpb.HeartbeatResponse, error) {
		return a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{SidecarId: id})
	}
	resp, err := beat("ns/nobody")
	noError(t, err)
	if resp.Acknowledged || a.beats.count("ns/nobody", "") != 0 {
		t.Fatal(resp)
	}
	a.node.setLeader(0, raftnode.ErrNoLeader)
	_, err = hasty.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/nobody"})
	wantCode(t, err, codes.Unavailable)
	a.node.setLeader(1, nil)
	a.registerSidecar("ns/pod")
	resp, err = beat("ns/pod")
	noError(t, err)
	if !resp.Acknowledged {
		t.Fatal(resp)
	}
	// Without a leader a known sidecar is still answered.
	a.node.setLeader(0, raftnode.ErrNoLeader)
	resp, err = beat("ns/pod")
	noError(t, err)
	if !resp.Acknowledged {
		t.Fatal(resp)
	}
	a.node.setLeader(1, nil)
	dereg, err := a.cluster.DeregisterSidecar(a.ctx(), &clusterpb.DeregisterSidecarRequest{SidecarId: "ns/pod"})
	noError(t, err)
	if !dereg.Existed {
		t.Fatal(dereg)
	}
	a.caughtUp()
	resp, err = beat("ns/pod")
	noError(t, err)
	if resp.Acknowledged {
		t.Fatal("a deregistered sidecar was acknowledged")
	}
}

// Goal: what a restarted sidecar registers again is answered at once with what
// it had, and a registration nobody could place does not wait at all.
func TestRegisterSidecarDoesNotWaitForNothing(t *testing.T) {
	a := newAPI(t) // a wait would last 10 s
	a.startOldSidecar("ns/idle", "nothing-wants-this")
	a.create(chain("p", "src", "transform", "sink"))
	a.caughtUp()
	a.registerSidecar("ns/pod", "transform")
	a.assign("ns/pod", "p")
	s := a.startOldSidecar("ns/pod", "transform")
	if !slices.Equal(s.runs(), []string{"p"}) {
		t.Fatal(s.runs())
	}
	unnamed := sidecarRequest("ns/unnamed", "")
	unnamed.LocalServices[0].ServiceType = sidecarpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	resp, err := a.sidecar.RegisterSidecar(a.ctx(), unnamed)
	noError(t, err)
	if !resp.Success {
		t.Fatal(resp)
	}
}

// Goal: a registration that the placement loop is too slow for is answered
// anyway, and completed by heartbeats.
func TestRegisterSidecarWaitIsBounded(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.PlacementWait = time.Millisecond })
	a.create(chain("p", "src", "transform", "sink"))
	a.caughtUp()
	s := a.startOldSidecar("ns/pod", "transform")
	if len(s.routes) != 0 {
		t.Fatal(s.runs())
	}
	a.assign("ns/pod", "p")
	a.caughtUp()
	s.beat(false)
	if !slices.Equal(s.runs(), []string{"p"}) {
		t.Fatal(s.runs())
	}
}

// Goal: a failure of the cluster is told as such; a sidecar must not take it for
// a registration.
func TestRegisterSidecarFailure(t *testing.T) {
	a := newAPI(t)
	a.node.setLeader(1, raftnode.ErrNoLeader)
	_, err := a.sidecar.RegisterSidecar(a.ctx(), sidecarRequest("ns/pod"))
	wantCode(t, err, codes.Unavailable)
}

// Goal: memory for what sidecars were told is bounded, and forgetting one only
// means telling it everything.
func TestToldIsBounded(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.MaxTold = 10 })
	a.create(chain("p", "x", "y"))
	for i := range 50 {
		id := "ns/pod-" + formatUint(uint64(i))
		a.registerSidecar(id)
		a.assign(id, "p")
	}
	a.caughtUp()
	for range 3 {
		for i := range 50 {
			s := &oldSidecar{a: a, id: "ns/pod-" + formatUint(uint64(i)), routes: map[string]*sidecarpb.PipelineAssignment{}}
			s.beat(false)
		}
	}
	if n := a.told.len(); n > 10 {
		t.Fatalf("%d remembered", n)
	}
}

// Goal: what a sidecar says of its services' health reaches the registry once.
func TestSidecarHealthReachesRegistry(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	req := registration("svc", "Transform")
	req.SidecarId = "ns/pod"
	_, err := a.registry.Register(a.ctx(), req)
	noError(t, err)
	say := func(healthy bool) {
		t.Helper()
		_, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{
			SidecarId: "ns/pod", ServiceHealth: []*sidecarpb.LocalServiceHealth{{ServiceName: "transform", Healthy: healthy}},
		})
		noError(t, err)
	}
	health := func() commonpb.HealthStatus {
		t.Helper()
		list, err := a.registry.ListServices(a.ctx(), &registrypb.ListServicesRequest{IncludeUnhealthy: true})
		noError(t, err)
		return list.Services[0].Health.Status
	}
	before := a.node.entryCount()
	say(true)
	if a.node.entryCount() != before {
		t.Fatal("no news became an entry")
	}
	say(false)
	say(false)
	if h := health(); h != commonpb.HealthStatus_HEALTH_STATUS_UNHEALTHY || a.node.entryCount() != before+1 {
		t.Fatal(h, a.node.entryCount()-before)
	}
	say(true)
	if h := health(); h != commonpb.HealthStatus_HEALTH_STATUS_HEALTHY {
		t.Fatal(h)
	}
}

// watchState is a client of WatchPipelineAssignments that checks what every
// event promises and keeps the state they lead to.
type watchState struct {
	t        *testing.T
	holds    map[string]uint64 // generation by pipeline
	revision uint64            // where to resume
	synced   bool
}

func (w *watchState) take(ev *sidecarpb.PipelineAssignmentEvent) {
	w.t.Helper()
	if ev.Revision < w.revision && ev.EventType != sidecarpb.EventType_EVENT_TYPE_RESYNC && w.synced {
		w.t.Fatalf("revision went back from %d to %d: %v", w.revision, ev.Revision, ev)
	}
	p := ev.GetAssignment().GetPipelineId()
	generation, known := w.holds[p]
	switch ev.EventType {
	case sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_UPDATED:
		if known && ev.Assignment.Generation <= generation {
			w.t.Fatalf("a duplicate: %v", ev)
		}
		if known != (ev.EventType == sidecarpb.EventType_EVENT_TYPE_UPDATED) && w.synced {
			w.t.Fatalf("the wrong kind, known %v: %v", known, ev)
		}
		w.holds[p] = ev.Assignment.Generation
	case sidecarpb.EventType_EVENT_TYPE_REVOKED:
		delete(w.holds, p)
	case sidecarpb.EventType_EVENT_TYPE_SYNCED:
		w.synced = true
	case sidecarpb.EventType_EVENT_TYPE_RESYNC:
		w.holds, w.synced, w.revision = map[string]uint64{}, false, 0
		return
	default:
		w.t.Fatalf("unknown kind: %v", ev)
	}
	w.revision = ev.Revision
}

func (w *watchState) pipelines() []string {
	var out []string
	for p := range w.holds {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

// Goal: the watch sends the state as ASSIGNED, SYNCED, then every change with
// its kind, in order.
func TestWatchAssignments(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.create(chain("one", "x", "y"))
	a.create(chain("two", "x", "y"))
	a.assign("ns/pod", "one")
	stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
	noError(t, err)
	w := &watchState{t: t, holds: map[string]uint64{}}
	next := func(want sidecarpb.EventType, pipeline string) *sidecarpb.PipelineAssignmentEvent {
		t.Helper()
		ev, err := stream.Recv()
		noError(t, err)
		if ev.EventType != want || ev.GetAssignment().GetPipelineId() != pipeline {
			t.Fatalf("%v, want %v of %s", ev, want, pipeline)
		}
		w.take(ev)
		return ev
	}
	if ev := next(sidecarpb.EventType_EVENT_TYPE_ASSIGNED, "one"); ev.Revision != 0 {
		t.Fatalf("a part of the state can be resumed from: %v", ev)
	}
	next(sidecarpb.EventType_EVENT_TYPE_SYNCED, "")
	res := a.assign("ns/pod", "two")
	if ev := next(sidecarpb.EventType_EVENT_TYPE_ASSIGNED, "two"); ev.Revision != res.Revision {
		t.Fatal(ev)
	}
	a.create(chain("two", "x", "mid", "y"))
	a.assign("ns/pod", "two")
	if ev := next(sidecarpb.EventType_EVENT_TYPE_UPDATED, "two"); len(ev.Assignment.Stages) != 3 {
		t.Fatal(ev)
	}
	a.revoke("ns/pod", "one")
	next(sidecarpb.EventType_EVENT_TYPE_REVOKED, "one")

	_, err = a.watchOnce(&sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/nobody"})
	wantCode(t, err, codes.NotFound)
}

// watchOnce opens a watch, takes one event and closes it.
func (a *api) watchOnce(req *sidecarpb.WatchAssignmentsRequest) (*sidecarpb.PipelineAssignmentEvent, error) {
	a.t.Helper()
	ctx, cancel := context.WithCancel(a.ctx())
	defer cancel()
	stream, err := a.sidecar.WatchPipelineAssignments(ctx, req)
	noError(a.t, err)
	return stream.Recv()
}

// Goal: whatever happens between and during watches that are cut after each
// event, resuming leads to the true state: no gap.
func TestWatchAssignmentsResume(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	ids := []string{"p0", "p1", "p2", "p3"}
	for _, id := range ids {
		a.create(chain(id, "x", "y"))
	}
	w := &watchState{t: t, holds: map[string]uint64{}}
	run := func(events int) {
		t.Helper()
		ctx, cancel := context.WithCancel(a.ctx())
		defer cancel()
		stream, err := a.sidecar.WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{
			SidecarId: "ns/pod", FromRevision: w.revision,
		})
		noError(t, err)
		w.synced = false
		if w.revision == 0 {
			w.holds = map[string]uint64{}
		}
		for range events {
			ev, err := stream.Recv()
			noError(t, err)
			if ev.EventType == sidecarpb.EventType_EVENT_TYPE_RESYNC {
				t.Fatalf("resuming from %d: %v", w.revision, ev)
			}
			// A resumed watch may repeat what shares a revision.
			if ev.Assignment != nil {
				delete(w.holds, ev.Assignment.PipelineId)
			}
			w.take(ev)
			if w.synced {
				break
			}
		}
	}
	run(10)
	for round := range 12 {
		for i, id := range ids {
			if (round+i)%3 == 0 {
				a.revoke("ns/pod", id)
			} else {
				cfg := chain(id, "x", "v"+formatUint(uint64(round)), "y")
				a.create(cfg)
				a.assign("ns/pod", id)
			}
		}
		run(1) // cut after the first event
		run(2)
		run(10)
		var want []string
		v := a.node.fsm.View()
		noError(t, v.Assignments("ns/pod", func(as *commandpb.Assignment) bool {
			if !as.Revoked {
				want = append(want, as.PipelineId)
				if w.holds[as.PipelineId] != as.Generation {
					t.Errorf("round %d: %s has generation %d, the watch %d", round, as.PipelineId, as.Generation, w.holds[as.PipelineId])
				}
			}
			return true
		}))
		v.Close()
		if !slices.Equal(w.pipelines(), want) {
			t.Fatalf("round %d: the watch holds %v, the state %v", round, w.pipelines(), want)
		}
	}
}

// Goal: several changes of one sidecar in one command share a revision; each
// event but the last can be resumed from without losing the others.
func TestWatchAssignmentsSharedRevision(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	cmd := &commandpb.ApplyAssignments{}
	for _, id := range []string{"a", "b", "c"} {
		a.create(chain(id, "x", "y"))
		cmd.Changes = append(cmd.Changes, a.assignment("ns/pod", id, false).GetApplyAssignments().Changes...)
	}
	start := a.node.fsm.Revision()
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: cmd}})
	var got []string
	from := start
	for range 10 {
		ev, err := a.watchOnce(&sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod", FromRevision: from})
		noError(t, err)
		if ev.EventType == sidecarpb.EventType_EVENT_TYPE_SYNCED {
			break
		}
		got = append(got, ev.Assignment.PipelineId)
		from = ev.Revision
		if len(got) == 1 && from != start {
			t.Fatalf("resuming after the first of three from %d loses the others", from)
		}
		if from == start {
			// Only the whole of the revision moves the place to resume from.
			stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod", FromRevision: from})
			noError(t, err)
			for i := range 3 {
				ev, err := stream.Recv()
				noError(t, err)
				if (i == 2) != (ev.Revision > start) {
					t.Fatalf("event %d: %v", i, ev)
				}
				from = ev.Revision
			}
		}
	}
	ev, err := a.watchOnce(&sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod", FromRevision: from})
	noError(t, err)
	if ev.EventType != sidecarpb.EventType_EVENT_TYPE_SYNCED {
		t.Fatalf("%v after everything was received", ev)
	}
}

// Goal: a watch that cannot be resumed says so, and starts over.
func TestWatchAssignmentsResync(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.create(chain("p", "x", "y"))
	a.assign("ns/pod", "p")
	a.feed.mu.Lock()
	a.feed.floor = a.node.fsm.Revision()
	a.feed.mu.Unlock()
	for _, from := range []uint64{1, a.node.fsm.Revision() + 1000} {
		stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod", FromRevision: from})
		noError(t, err)
		for i, want := range []sidecarpb.EventType{
			sidecarpb.EventType_EVENT_TYPE_RESYNC, sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_SYNCED,
		} {
			ev, err := stream.Recv()
			noError(t, err)
			if ev.EventType != want || (i == 0) != (ev.Reason != "") {
				t.Fatalf("from %d, event %d: %v", from, i, ev)
			}
		}
	}
}

// Goal: a watch is not resumed past a revocation that the state has forgotten
// already, even when the feed has not come to that yet. Method: a feed that never
// gets any further than where it began.
func TestResumeFloorBehindTheState(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.create(chain("p", "x", "y"))
	a.assign("ns/pod", "p")
	behind := newFeed(a.node.fsm, a.cfg.Logger)
	_, err := behind.load()
	noError(t, err)
	held := a.node.fsm.Revision() // what a client goes away with
	if floor, err := behind.resumeFloor(a.ctx(), held); err != nil || floor > held {
		t.Fatalf("floor %d, %v, although nothing has happened since %d", floor, err, held)
	}
	a.revoke("ns/pod", "p")
	revoked := a.node.fsm.Revision()
	if floor, err := behind.resumeFloor(a.ctx(), revoked); err != nil || floor > held {
		t.Fatalf("floor %d, %v, although the revocation is still there", floor, err)
	}
	for i := 0; ; i++ { // until the oldest revocation of the sidecar has to go
		known := false
		noError(t, a.node.fsm.Latest().Assignments("ns/pod", func(as *commandpb.Assignment) bool {
			known = known || as.PipelineId == "p"
			return true
		}))
		if !known {
			break
		}
		id := fmt.Sprintf("p%d", i)
		a.create(chain(id, "x", "y"))
		a.assign("ns/pod", id)
		a.revoke("ns/pod", id)
	}
	if floor, err := behind.resumeFloor(a.ctx(), a.node.fsm.Revision()); err != nil || floor < revoked {
		t.Fatalf("floor %d, %v: the revocation at %d is forgotten, a watch resumed before would never hear of it", floor, err, revoked)
	}
}

// Goal: a quiet watch is given newer revisions to resume from.
func TestWatchAssignmentsProgress(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.SyncEvery = time.Millisecond })
	a.registerSidecar("ns/pod", "transform")
	stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
	noError(t, err)
	first, err := stream.Recv()
	noError(t, err)
	a.create(chain("p", "x", "y"))
	second, err := stream.Recv()
	noError(t, err)
	if second.EventType != sidecarpb.EventType_EVENT_TYPE_SYNCED || second.Revision <= first.Revision {
		t.Fatal(first, second)
	}
}

// Goal: the number of watches is bounded, and a closed one makes room.
func TestWatchLimit(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.MaxWatches = 1 })
	a.registerSidecar("ns/pod")
	ctx, cancel := context.WithCancel(a.ctx())
	stream, err := a.sidecar.WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
	noError(t, err)
	_, err = stream.Recv()
	noError(t, err)
	_, err = a.watchOnce(&sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
	wantCode(t, err, codes.ResourceExhausted)
	cancel()
	eventually(t, "there is room", func() bool {
		_, err := a.watchOnce(&sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
		return err == nil
	})
}
