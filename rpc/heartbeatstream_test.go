package rpc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// beatClient is the client's end of a heartbeat stream.
type beatClient struct {
	a      *api
	stream sidecarpb.SidecarCoordinator_StreamHeartbeatsClient
	queue  []*sidecarpb.StreamedHeartbeatResponse
}

func (a *api) streamBeats() *beatClient {
	a.t.Helper()
	stream, err := a.sidecar.StreamHeartbeats(a.ctx())
	noError(a.t, err)
	return &beatClient{a: a, stream: stream}
}

func (c *beatClient) send(req *sidecarpb.HeartbeatStreamRequest) {
	c.a.t.Helper()
	noError(c.a.t, c.stream.Send(req))
}

func full(number uint32, req *sidecarpb.SidecarHeartbeatRequest) *sidecarpb.HeartbeatStreamRequest {
	return &sidecarpb.HeartbeatStreamRequest{Full: []*sidecarpb.StreamedHeartbeat{{Number: number, Heartbeat: req}}}
}

// introduce sends the first heartbeat of a sidecar and returns the answer.
func (c *beatClient) introduce(number uint32, id string) *sidecarpb.HeartbeatResponse {
	c.a.t.Helper()
	c.send(full(number, &sidecarpb.SidecarHeartbeatRequest{SidecarId: id}))
	return c.answer(number)
}

func (c *beatClient) alive(numbers ...uint32) {
	c.a.t.Helper()
	c.send(&sidecarpb.HeartbeatStreamRequest{Alive: numbers})
}

// answer returns the next answer, which has to be for this number.
func (c *beatClient) answer(number uint32) *sidecarpb.HeartbeatResponse {
	c.a.t.Helper()
	next := c.next()
	if next.GetNumber() != number {
		c.a.t.Fatalf("an answer for number %d, want one for %d: %v", next.GetNumber(), number, next)
	}
	return next.GetResponse()
}

// next returns the next answer.
func (c *beatClient) next() *sidecarpb.StreamedHeartbeatResponse {
	c.a.t.Helper()
	for len(c.queue) == 0 {
		resp, err := c.stream.Recv()
		noError(c.a.t, err)
		c.queue = resp.GetAnswers()
	}
	next := c.queue[0]
	c.queue = c.queue[1:]
	return next
}

// ends returns the status the stream ends with.
func (c *beatClient) ends() error {
	for {
		if _, err := c.stream.Recv(); err != nil {
			return err
		}
	}
}

func told1(r *sidecarpb.HeartbeatResponse) string {
	var out []string
	for _, cmd := range r.GetCommands() {
		if as := cmd.GetAssign(); as != nil {
			out = append(out, "+"+as.GetPipelineId())
		} else {
			out = append(out, "-"+cmd.GetRevoke().GetPipelineId())
		}
	}
	return strings.Join(out, " ")
}

func (a *api) touched(id string, n int) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%d heartbeats of %s", n, id), func() bool { return a.beats.count(id, "") >= n })
}

// Goal: a sidecar is introduced once, told all it has to run, and from then on
// beats without an answer and without a log entry, until there is something to
// say: that is said at once, and once.
func TestStreamedHeartbeats(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.create(chain("p", "x", "y"))
	a.create(chain("q", "x", "y"))
	a.assign("ns/pod", "p")
	a.caughtUp()
	c := a.streamBeats()
	first := c.introduce(3, "ns/pod")
	if !first.GetAcknowledged() || told1(first) != "+p" || first.GetHeartbeatIntervalMs() == 0 || first.GetTtlMs() == 0 {
		t.Fatal(first)
	}
	before := a.beats.count("ns/pod", "")
	entries := a.node.entryCount()
	for range 5 {
		c.alive(3)
	}
	a.touched("ns/pod", before+5)
	if n := a.node.entryCount(); n != entries {
		t.Errorf("%d heartbeats became %d log entries", 5, n-entries)
	}
	a.assign("ns/pod", "q")
	if r := c.answer(3); told1(r) != "+q" || !r.GetAcknowledged() || r.GetHeartbeatIntervalMs() != 0 {
		t.Fatal(r)
	}
	a.revoke("ns/pod", "p")
	if r := c.answer(3); told1(r) != "-p" {
		t.Fatal(r)
	}
	// The client's end is the answer to whether anything was said twice.
	c.alive(3)
	noError(t, c.stream.CloseSend())
	if resp, err := c.stream.Recv(); err == nil {
		t.Fatal("said without need:", resp)
	}
	// Answers may be lost with their stream: whoever beats next is told everything.
	eventually(t, "the stream has been let go", func() bool { return a.streamed.Load() == 0 })
	r, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod"})
	noError(t, err)
	if got := told1(r); !strings.Contains(got, "+q") || !strings.Contains(got, "-p") {
		t.Error(got)
	}
}

// Goal: an agent speaks for several sidecars on one stream. One that is at fault
// or unknown is told so, and the others are none the worse.
func TestStreamOfAnAgent(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/a")
	a.registerSidecar("ns/b")
	c := a.streamBeats()
	for number, id := range []string{"ns/a", "ns/b"} {
		if r := c.introduce(uint32(number), id); !r.GetAcknowledged() {
			t.Fatal(r)
		}
	}
	if r := c.introduce(2, "no id!\n"); r.GetAcknowledged() || r.GetReason() == "" {
		t.Fatal(r)
	}
	if r := c.introduce(4, "ns/late"); r.GetAcknowledged() || r.GetReason() != unknownSidecar("ns/late") {
		t.Fatal(r)
	}
	c.alive(0, 1, 2)
	a.touched("ns/a", 2)
	a.touched("ns/b", 2)
	c.alive(4)
	if r := c.answer(4); r.GetAcknowledged() {
		t.Fatal(r)
	}
	if n := a.beats.count("ns/late", ""); n != 0 {
		t.Errorf("an unknown sidecar was heard of %d times", n)
	}
	a.registerSidecar("ns/late")
	c.alive(4)
	if r := c.answer(4); !r.GetAcknowledged() {
		t.Fatal(r)
	}
	a.touched("ns/late", 1)
	// A number may be given to another sidecar, and up.
	a.registerSidecar("ns/c")
	if r := c.introduce(0, "ns/c"); !r.GetAcknowledged() {
		t.Fatal(r)
	}
	c.send(&sidecarpb.HeartbeatStreamRequest{Leave: []uint32{1}})
	eventually(t, "two have left", func() bool { return a.streamed.Load() == 3 })
	c.alive(1)
	wantCode(t, c.ends(), codes.InvalidArgument)
	eventually(t, "all have left", func() bool { return a.streamed.Load() == 0 })
}

// Goal: what no client may send ends the stream with an answer that says why.
func TestStreamedHeartbeatsOutOfBounds(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.MaxTold = 1 })
	a.registerSidecar("ns/pod")
	many := make([]uint32, MaxStreamedSidecars+1)
	for name, req := range map[string]*sidecarpb.HeartbeatStreamRequest{
		"a number too large": full(MaxStreamedSidecars, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod"}),
		"no heartbeat":       full(0, nil),
		"nobody's number":    {Alive: []uint32{7}},
		"too many at once":   {Alive: many},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.streamBeats()
			c.send(req)
			wantCode(t, c.ends(), codes.InvalidArgument)
		})
	}
	c := a.streamBeats()
	c.introduce(0, "ns/pod")
	c.send(full(1, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod"}))
	wantCode(t, c.ends(), codes.ResourceExhausted)
}

// Goal: a sidecar beats on the stream on which it was introduced last. The other
// one is told, and its heartbeats count for nothing.
func TestStreamedSidecarMoves(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod")
	a.create(chain("p", "x", "y"))
	one, two := a.streamBeats(), a.streamBeats()
	one.introduce(0, "ns/pod")
	two.introduce(0, "ns/pod")
	if r := one.answer(0); r.GetAcknowledged() || r.GetReason() == "" {
		t.Fatal(r)
	}
	before := a.beats.count("ns/pod", "")
	one.alive(0)
	two.alive(0)
	two.alive(0)
	a.touched("ns/pod", before+2)
	a.assign("ns/pod", "p")
	if r := two.answer(0); told1(r) != "+p" {
		t.Fatal(r)
	}
	if r := one.introduce(0, "ns/pod"); told1(r) != "+p" || !r.GetAcknowledged() {
		t.Fatal(r)
	}
	if n := a.beats.count("ns/pod", ""); n != before+3 {
		t.Errorf("heard of %d times, want 3", n-before)
	}
	if r := two.answer(0); r.GetAcknowledged() {
		t.Fatal(r)
	}
}

// Goal: a sidecar hears at once that its lease has run out, that it was
// registered anew, and that it was deregistered.
func TestStreamedSidecarIsJudgedAnew(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod")
	c := a.streamBeats()
	resp, err := a.sidecar.RegisterSidecar(a.ctx(), sidecarRequest("ns/pod"))
	noError(t, err)
	a.noted() // were that later, it would be judged, and answered, once more
	c.send(full(0, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", RegistrationId: resp.GetRegistrationId()}))
	if r := c.answer(0); !r.GetAcknowledged() {
		t.Fatal(r)
	}
	v := a.node.fsm.View()
	sc, err := v.Sidecar("ns/pod")
	noError(t, err)
	noError(t, v.Close())
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: "ns/pod", State: commandpb.SidecarState_SIDECAR_STATE_EXPIRED, ExpectedGeneration: sc.Generation,
	}}})
	if r := c.answer(0); !r.GetAcknowledged() || !strings.Contains(r.GetReason(), "lease") {
		t.Fatal(r)
	}
	before := a.beats.count("ns/pod", "")
	c.alive(0) // brings it back
	a.touched("ns/pod", before+1)
	other := sidecarRequest("ns/pod")
	other.SidecarEndpoint = "10.0.0.8:50053"
	_, err = a.sidecar.RegisterSidecar(a.ctx(), other)
	noError(t, err)
	if r := c.answer(0); r.GetAcknowledged() || !strings.Contains(r.GetReason(), resp.GetRegistrationId()) {
		t.Fatal(r)
	}
	before = a.beats.count("ns/pod", "")
	c.alive(0)
	if r := c.answer(0); r.GetAcknowledged() {
		t.Fatal(r)
	}
	if n := a.beats.count("ns/pod", ""); n != before {
		t.Error("a heartbeat of an earlier registration counts")
	}
	if r := c.introduce(0, "ns/pod"); !r.GetAcknowledged() {
		t.Fatal(r)
	}
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_DeregisterSidecar{DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: "ns/pod"}}})
	if r := c.answer(0); r.GetAcknowledged() || r.GetReason() != unknownSidecar("ns/pod") {
		t.Fatal(r)
	}
}

// Goal: a sidecar that watches hears of what it has to run there alone, and says
// here what it has applied.
func TestStreamedHeartbeatsOfAWatcher(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.Planned = func() uint64 { return 1 << 60 } })
	a.registerSidecar("ns/pod")
	a.create(chain("p", "x", "y"))
	a.assign("ns/pod", "p")
	a.caughtUp()
	c := a.streamBeats()
	says := func(revision uint64) *sidecarpb.HeartbeatStreamRequest {
		req := full(0, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod", AppliedRevision: revision, AppliedEpoch: a.node.fsm.Epoch()})
		req.Full[0].Watches = true
		return req
	}
	c.send(says(1))
	if r := c.answer(0); !r.GetAcknowledged() || len(r.GetCommands()) != 0 {
		t.Fatal(r)
	}
	if len(a.convergence("p").GetLaggards()) != 1 {
		t.Error("it has applied nothing yet")
	}
	c.send(says(a.node.fsm.Revision()))
	eventually(t, "it is known to have applied it", func() bool { return len(a.convergence("p").GetLaggards()) == 0 })
	a.revoke("ns/pod", "p")
	a.caughtUp()
	noError(t, c.stream.CloseSend())
	if resp, err := c.stream.Recv(); err == nil {
		t.Fatal("told here as well:", resp)
	}
}

// Goal: health that is said once is taken over once, and stays until it is said
// anew.
func TestStreamedHealth(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_RegisterService{RegisterService: &commandpb.RegisterService{Service: &commandpb.Service{
		ServiceId: "svc", Name: "transform", SidecarId: "ns/pod", Type: commandpb.ServiceType_SERVICE_TYPE_TRANSFORM,
		Endpoint: &commandpb.Endpoint{Host: "10.0.0.7", Port: 9000},
	}}}})
	health := func() commandpb.HealthStatus {
		v := a.node.fsm.Latest()
		defer v.Close()
		s, err := v.Service("svc")
		noError(t, err)
		return s.GetHealth().GetStatus()
	}
	c := a.streamBeats()
	say := func(healthy bool) {
		c.send(full(0, &sidecarpb.SidecarHeartbeatRequest{
			SidecarId: "ns/pod", ServiceHealth: []*sidecarpb.LocalServiceHealth{{ServiceName: "transform", Healthy: healthy}},
		}))
	}
	say(false)
	eventually(t, "unhealthy", func() bool { return health() == commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY })
	entries := a.node.entryCount()
	before := a.beats.count("ns/pod", "")
	say(false)
	c.alive(0)
	a.touched("ns/pod", before+2)
	if n := a.node.entryCount(); n != entries {
		t.Errorf("%d log entries for what was known", n-entries)
	}
	say(true)
	eventually(t, "healthy", func() bool { return health() == commandpb.HealthStatus_HEALTH_STATUS_HEALTHY })
}

// Goal: a sidecar whose stream opens while no node leads is heard of, for the
// next leader has to know. Without a leader for long the stream ends: nobody hears
// what comes over it.
func TestStreamedHeartbeatsWithoutLeader(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.LeaderGrace = time.Millisecond })
	a.registerSidecar("ns/pod")
	a.registerSidecar("ns/known")
	c := a.streamBeats()
	c.introduce(0, "ns/known")
	a.node.setLeader(0, raftnode.ErrNoLeader)
	eventually(t, "the node is known to have no leader", func() bool { return a.health.leaderless.Load() })
	c.alive(0)
	err := c.ends()
	wantCode(t, err, codes.Unavailable)
	if len(status.Convert(err).Details()) == 0 {
		t.Error("it is not said when to come back")
	}
	a.node.setLeader(1, nil)
	eventually(t, "there is a leader", func() bool { return !a.health.leaderless.Load() })

	b := newAPI(t, func(c *ServerConfig) { c.LeaderGrace = time.Hour })
	b.registerSidecar("ns/pod")
	b.node.setLeader(0, raftnode.ErrNoLeader)
	c = b.streamBeats()
	c.send(full(0, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod"}))
	b.touched("ns/pod", 1)
	wantCode(t, c.ends(), codes.Unavailable)
	b.node.setLeader(1, nil)
}

// Goal: a client that does not read what it is told, for longer than a lease, does
// not keep its sidecars alive, and holds up nobody. What waits for it is bounded by
// their number. When it reads again all is well.
func TestStreamIsNotRead(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod")
	a.registerSidecar("ns/other")
	a.registerSidecar("ns/new")
	services := []string{"x"}
	for i := range 400 { // so that a few answers fill the stream's window
		services = append(services, fmt.Sprintf("stage-with-a-rather-long-name-%04d", i))
	}
	c, other := a.streamBeats(), a.streamBeats()
	c.introduce(0, "ns/pod")
	other.introduce(0, "ns/other")
	rounds := 0
	for ; rounds < 60; rounds++ {
		services[0] = fmt.Sprintf("x%d", rounds)
		a.create(chain("p", services...))
		a.assign("ns/pod", "p")
		a.assign("ns/other", "p")
		if r := other.answer(0); told1(r) != "+p" {
			t.Fatal(r)
		}
	}
	entry := func() *told {
		a.told.mu.Lock()
		defer a.told.mu.Unlock()
		return a.told.by["ns/pod"]
	}
	s := entry().member.stream
	eventually(t, "a send waits for the client", func() bool { return s.sending.Load() != 0 })
	before := a.beats.count("ns/pod", "")
	c.alive(0)
	a.touched("ns/pod", before+1)
	a.clock.advance(a.cfg.SidecarTTL)
	c.alive(0)
	c.send(full(0, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/pod"}))
	c.send(full(1, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/new"}))
	eventually(t, "all of it was received", func() bool { return a.streamed.Load() == 3 })
	if n := a.beats.count("ns/new", ""); n != 0 {
		t.Error("a sidecar is heard of on a stream that is not read")
	}
	want := a.assignments("ns/pod")["p"]
	answers := 0
	for fresh := false; ; {
		next := c.next()
		r := next.GetResponse()
		if next.GetNumber() == 1 {
			fresh = r.GetAcknowledged()
			continue
		}
		answers++
		if cmds := r.GetCommands(); len(cmds) > 0 && cmds[len(cmds)-1].GetAssign().GetGeneration() == want {
			if !fresh && !c.answer(1).GetAcknowledged() {
				t.Error("the new sidecar is refused")
			}
			break
		}
	}
	if answers >= rounds {
		t.Errorf("all %d changes waited for the client", rounds)
	}
	if n := a.beats.count("ns/pod", ""); n != before+1 {
		t.Errorf("a client that does not read was heard of %d times", n-before-1)
	}
	eventually(t, "the send is over", func() bool { return s.sending.Load() == 0 })
	c.alive(0)
	a.touched("ns/pod", before+2)
}

// Goal: answers that are too large together go out in several messages, and one
// that is too large alone goes out all the same.
func TestCutAnswers(t *testing.T) {
	var all []*sidecarpb.StreamedHeartbeatResponse
	for i, size := range []int{400, 400, 400, 2000, 10, 10} {
		all = append(all, &sidecarpb.StreamedHeartbeatResponse{
			Number: uint32(i), Response: &sidecarpb.HeartbeatResponse{Reason: strings.Repeat("x", size)},
		})
	}
	var got []int
	for rest := all; len(rest) > 0; {
		var head []*sidecarpb.StreamedHeartbeatResponse
		head, rest = cutAnswers(rest, 1000)
		got = append(got, len(head))
		if resp := (&sidecarpb.HeartbeatStreamResponse{Answers: head}); len(head) > 1 && resp.SizeVT() > 1000 {
			t.Errorf("a message of %d answers has %d bytes", len(head), resp.SizeVT())
		}
	}
	if want := []int{2, 1, 1, 2}; !slices.Equal(got, want) {
		t.Errorf("cut into %v, want %v", got, want)
	}
}

// Goal: an earlier pod with the same id, known by its address, is told to stop on
// a stream too, and its heartbeats keep nothing alive.
func TestRivalOnAStream(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/one")
	a.create(chain("p", "x", "y"))
	a.assign("ns/one", "p")
	a.rivals.replaced(
		&commandpb.Sidecar{SidecarId: "ns/one", PodName: "first", Endpoint: "10.0.0.1:1"},
		&commandpb.Sidecar{SidecarId: "ns/one", PodName: "second", Endpoint: "10.0.0.2:1"})
	s := &sidecarStream{api: a.sidecarAPI(), bell: newBell(), stream: beatsFrom{ctx: a.from("10.0.0.1")}}
	noError(t, s.take(full(0, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/one"})))
	defer s.close()
	for range 2 {
		resp, err := s.work(s.stream.Context(), s.next(make([]dueMember, 0, 1)))
		noError(t, err)
		if r := resp.GetAnswers()[0].GetResponse(); !r.GetAcknowledged() || told1(r) != "-p" || !strings.Contains(r.GetReason(), "second") {
			t.Fatal(r)
		}
		noError(t, s.take(&sidecarpb.HeartbeatStreamRequest{Alive: []uint32{0}}))
	}
	if n := a.beats.count("ns/one", ""); n != 0 {
		t.Errorf("it was heard of %d times", n)
	}
	if len(a.rivals.alarms(a.clock.Now())) != 1 {
		t.Error("no alarm")
	}
}

// beatsFrom is a stream that comes from somewhere.
type beatsFrom struct {
	sidecarpb.SidecarCoordinator_StreamHeartbeatsServer
	ctx context.Context
}

func (b beatsFrom) Context() context.Context { return b.ctx }
