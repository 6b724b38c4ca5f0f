package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// forwarding is a follower (node 1) with its forwarder, and two nodes that may
// lead.
type forwarding struct {
	*station
	f    *Forwarder
	two  *station
	tree *station
}

func newForwarding(t testing.TB, configure func(*ForwarderConfig)) *forwarding {
	t.Helper()
	x := &forwarding{station: newStation(t, 1, nil), two: newStation(t, 2, nil), tree: newStation(t, 3, nil)}
	introduce(x.station, x.two, x.tree)
	c := ForwarderConfig{Node: x.node, Transport: x.transport, Logger: slog.New(x.log),
		MaxWait: patience, RetireGrace: 50 * time.Millisecond}
	if configure != nil {
		configure(&c)
	}
	f, err := NewForwarder(c)
	if err != nil {
		t.Fatal(err)
	}
	x.f = f
	t.Cleanup(func() { f.Close() })
	return x
}

// lead makes every node believe that s leads term.
func (x *forwarding) lead(s *station, term uint64) {
	for _, n := range []*station{x.two, x.tree, x.station} {
		n.node.follow(s.id.NodeID, term)
	}
}

// echo answers every command with its index and counts by request id.
type echo struct {
	mu    sync.Mutex
	event event
	index uint64
	seen  []string
}

func (e *echo) propose(cmd []byte, done func(raftnode.Result, error)) {
	c := &commandpb.Command{}
	if err := c.UnmarshalVT(cmd); err != nil {
		done(raftnode.Result{}, err)
		return
	}
	e.mu.Lock()
	e.index++
	index := e.index
	e.seen = append(e.seen, c.GetRenewLease().GetServiceId()+c.GetDeletePipeline().GetPipelineId())
	e.mu.Unlock()
	e.event.fire()
	done(raftnode.Result{Index: index, Value: &commandpb.Result{Revision: index, Offset: uint64(len(cmd))}}, nil)
}

func (e *echo) count(key string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := 0
	for _, s := range e.seen {
		if s == key {
			n++
		}
	}
	return n
}

// repeatableCommand may be sent twice, onceCommand may not.
func repeatableCommand(key string) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_RenewLease{RenewLease: &commandpb.RenewLease{ServiceId: key}}}
}

func onceCommand(key string) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: key}}}
}

// answer is what a done function got.
type answer struct {
	result *commandpb.Result
	index  uint64
	err    error
}

func (x *forwarding) submit(cmd *commandpb.Command) <-chan answer {
	ch := make(chan answer, 2) // two, so that a second call would be seen
	x.f.SubmitFunc(cmd, func(r *commandpb.Result, index uint64, err error) { ch <- answer{r, index, err} })
	return ch
}

func get(t testing.TB, ch <-chan answer) answer {
	t.Helper()
	select {
	case a := <-ch:
		return a
	case <-time.After(patience):
		t.Fatal("no answer")
		return answer{}
	}
}

func TestForwarderWhileLeading(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.node.propose = e.propose
	x.lead(x.station, 1)
	cmd := onceCommand("p")
	a := get(t, x.submit(cmd))
	if a.err != nil || a.index != 1 || a.result.GetOffset() != uint64(cmd.SizeVT()) {
		t.Fatalf("%+v", a)
	}
	r, err := x.f.Submit(t.Context(), cmd)
	if err != nil || r.GetRevision() != 2 {
		t.Fatalf("%v, %v", r, err)
	}
	if x.net.dials.Load() > 4 { // the sessions of the transport
		t.Error("a leader connected to itself")
	}
}

// Many commands at once reach the leader once each, and every caller gets the
// result of its own.
func TestForwarderToLeader(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.two.node.propose = e.propose
	x.lead(x.two, 1)
	const n = 5000
	var answers [n]<-chan answer
	for i := range n {
		answers[i] = x.submit(onceCommand(fmt.Sprintf("%0*d", 1+i%300, i)))
	}
	for i, ch := range answers {
		a := get(t, ch)
		want := uint64(onceCommand(fmt.Sprintf("%0*d", 1+i%300, i)).SizeVT())
		if a.err != nil || a.result.GetOffset() != want || a.index == 0 {
			t.Fatalf("command %d: %+v, want offset %d", i, a, want)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.seen) != n {
		t.Errorf("the leader saw %d commands of %d", len(e.seen), n)
	}
	for i, key := range e.seen {
		if key != fmt.Sprintf("%0*d", 1+i%300, i) {
			t.Fatalf("command %d came as number %d", i, i)
		}
	}
}

// Without a leader, commands wait and then succeed; when none comes in time,
// they fail as certainly not done.
func TestForwarderWaitsForLeader(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.two.node.propose = e.propose
	ch := x.submit(onceCommand("p"))
	x.lead(x.two, 1)
	if a := get(t, ch); a.err != nil {
		t.Fatal(a.err)
	}

	y := newForwarding(t, func(c *ForwarderConfig) { c.MaxWait = time.Millisecond })
	a := get(t, y.submit(repeatableCommand("p")))
	if !errors.Is(a.err, raftnode.ErrNoLeader) || errors.Is(a.err, raftnode.ErrAmbiguous) || a.result != nil {
		t.Errorf("no leader in time: %+v", a)
	}
	if OutcomeOf(Status(a.err)) != NotDone {
		t.Errorf("the status of %v does not say that nothing was done", a.err)
	}
}

// Drain returns when the forwarded commands are answered and not before, also
// when the node that forwarded them is gone.
func TestDrain(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	if err := x.two.peers.Drain(t.Context()); err != nil {
		t.Fatalf("nothing was forwarded: %v", err)
	}
	held := make(chan func(raftnode.Result, error), 2)
	x.two.node.propose = func(_ []byte, done func(raftnode.Result, error)) { held <- done }
	x.lead(x.two, 1)
	ch := x.submit(onceCommand("p"))
	answer := <-held
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.two.peers.Drain(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("a command has no answer yet: %v", err)
	}
	drained := make(chan error, 1)
	go func() { drained <- x.two.peers.Drain(t.Context()) }()
	answer(raftnode.Result{Index: 1, Value: &commandpb.Result{Revision: 1}}, nil)
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	if a := get(t, ch); a.err != nil {
		t.Fatal(a.err)
	}

	x.submit(onceCommand("q"))
	<-held // never answered
	x.f.Close()
	if err := x.two.peers.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The leader dies while it has the command: whether it took effect is unknown.
// Only what is safe to repeat is repeated.
func TestForwarderLeaderDies(t *testing.T) {
	for name, kill := range map[string]func(*forwarding){
		"process":    func(x *forwarding) { x.two.stopServer() },
		"connection": func(x *forwarding) { x.net.cut(x.two.id.PeerAddr) },
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			x := newForwarding(t, nil)
			e := &echo{}
			x.tree.node.propose = e.propose
			var got atomic.Int64
			var ev event
			x.two.node.propose = func([]byte, func(raftnode.Result, error)) { got.Add(1); ev.fire() }
			x.lead(x.two, 1)
			once, again := x.submit(onceCommand("once")), x.submit(repeatableCommand("again"))
			withID := onceCommand("with-id")
			withID.RequestId = "r1"
			byID := x.submit(withID)
			until(t, &ev, "the commands", func() bool { return got.Load() == 3 })
			x.lead(x.tree, 2)
			kill(x)
			if a := get(t, once); !errors.Is(a.err, raftnode.ErrAmbiguous) {
				t.Errorf("a command that must not be repeated: %+v", a)
			}
			if a := get(t, again); a.err != nil {
				t.Errorf("a command that may be repeated: %v", a.err)
			}
			if a := get(t, byID); a.err != nil {
				t.Errorf("a command with a request id: %v", a.err)
			}
			if n := e.count("once"); n != 0 {
				t.Errorf("the command was proposed %d times more", n)
			}
		})
	}
}

// What was not handed to the network is certainly not done, and goes to the
// next leader by itself, whatever it is.
func TestForwarderNotSentIsRetried(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.tree.node.propose = e.propose
	x.net.setDown(x.two.id.PeerAddr, true)
	x.lead(x.two, 1)
	var answers []<-chan answer
	for i := range 100 {
		answers = append(answers, x.submit(onceCommand(fmt.Sprint(i))))
	}
	x.lead(x.tree, 2)
	for i, ch := range answers {
		if a := get(t, ch); a.err != nil {
			t.Fatalf("command %d: %v", i, a.err)
		}
		if n := e.count(fmt.Sprint(i)); n != 1 {
			t.Fatalf("command %d was proposed %d times", i, n)
		}
	}
}

// Under commands without pause, connections and leaders change all the time.
// Every command gets exactly one answer; a success means that it was proposed
// at least once, "not done" that it never was, and a command that must not be
// repeated is proposed at most once.
func TestForwarderOutcomesAreTruthful(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.node.propose, x.two.node.propose, x.tree.node.propose = e.propose, e.propose, e.propose
	x.lead(x.two, 1)
	const n = 4000
	answers := make([]<-chan answer, n)
	for i := range n {
		answers[i] = x.submit(onceCommand(fmt.Sprint(i)))
		switch i % 200 {
		case 40:
			x.net.cut(x.two.id.PeerAddr)
		case 90:
			x.lead(x.tree, uint64(i))
		case 130:
			x.lead(x.station, uint64(i))
		case 180:
			x.lead(x.two, uint64(i))
		}
	}
	done, unknown, not := 0, 0, 0
	for i, ch := range answers {
		a := get(t, ch)
		proposed := e.count(fmt.Sprint(i))
		switch {
		case a.err == nil:
			done++
			if proposed != 1 {
				t.Fatalf("command %d succeeded and was proposed %d times", i, proposed)
			}
		case OutcomeOf(Status(a.err)) == NotDone:
			not++
			if proposed != 0 {
				t.Fatalf("command %d: %v, but it was proposed", i, a.err)
			}
		default:
			unknown++
			if proposed > 1 {
				t.Fatalf("command %d was proposed %d times", i, proposed)
			}
		}
	}
	t.Logf("%d done, %d unknown, %d not done", done, unknown, not)
	if done == 0 {
		t.Error("nothing succeeded: the test tests nothing")
	}
	for i, ch := range answers {
		select {
		case a := <-ch:
			t.Fatalf("command %d got a second answer: %+v", i, a)
		default:
		}
	}
}

// A repeat that is refused says nothing about the first attempt; one that fails
// for a definite reason neither.
func TestForwarderRepeatDoesNotLie(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	var calls atomic.Int64
	reply := func(second func(done func(raftnode.Result, error))) func([]byte, func(raftnode.Result, error)) {
		return func(_ []byte, done func(raftnode.Result, error)) {
			if calls.Add(1) == 1 {
				done(raftnode.Result{}, raftnode.ErrAmbiguous)
				return
			}
			second(done)
		}
	}
	refuse := func(done func(raftnode.Result, error)) {
		done(raftnode.Result{Index: 9, Value: &commandpb.Result{Rejection: &commandpb.Rejection{
			Code: commandpb.Code_CODE_REGRESSION, Reason: "it is further already"}}}, nil)
	}
	for _, leader := range []*station{x.station, x.two} { // here, and over the network
		leader.node.propose = reply(refuse)
		x.lead(leader, 1)
		calls.Store(0)
		if a := get(t, x.submit(repeatableCommand("p"))); !errors.Is(a.err, raftnode.ErrAmbiguous) {
			t.Errorf("unknown, then refused: %+v", a)
		}
		calls.Store(0)
		cmd := repeatableCommand("p")
		cmd.RequestId = "r"
		if a := get(t, x.submit(cmd)); a.err != nil || a.result.GetRejection() == nil {
			t.Errorf("with a request id the refusal is that of the first attempt: %+v", a)
		}
		calls.Store(0)
		leader.node.mu.Lock()
		leader.node.propose = reply(func(done func(raftnode.Result, error)) {
			done(raftnode.Result{}, raftnode.ErrBusy)
		})
		leader.node.mu.Unlock()
		if a := get(t, x.submit(repeatableCommand("p"))); !errors.Is(a.err, raftnode.ErrAmbiguous) {
			t.Errorf("unknown, then busy: %+v", a)
		}
		if a := get(t, x.submit(repeatableCommand("p"))); !errors.Is(a.err, raftnode.ErrBusy) {
			t.Errorf("busy at once: %+v", a)
		}
	}
}

// Every failure of the leader arrives as what it was.
func TestForwarderFailuresTravel(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	var fail atomic.Pointer[error]
	x.two.node.propose = func(_ []byte, done func(raftnode.Result, error)) { done(raftnode.Result{}, *fail.Load()) }
	x.lead(x.two, 1)
	for _, want := range []error{raftnode.ErrBusy, raftnode.ErrTooLarge, ErrNoSpace, raftnode.ErrAmbiguous} {
		wrapped := fmt.Errorf("deep inside: %w", want)
		fail.Store(&wrapped)
		if a := get(t, x.submit(onceCommand("p"))); !errors.Is(a.err, want) {
			t.Errorf("%v arrived as %v", want, a.err)
		}
	}
	odd := errors.New("something nobody thought of")
	fail.Store(&odd)
	if a := get(t, x.submit(onceCommand("p"))); !errors.Is(a.err, raftnode.ErrAmbiguous) {
		t.Errorf("an unforeseen error arrived as %v", a.err)
	}
}

// A node that was taken for the leader says that it is not: nothing is lost, and
// the command goes to the real one once this node knows it.
func TestForwarderFollowsTheLeader(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.tree.node.propose = e.propose
	x.node.follow(2, 1) // but node 2 follows 3
	x.two.node.follow(3, 2)
	x.tree.node.follow(3, 2)
	ch := x.submit(onceCommand("p"))
	x.node.follow(3, 2)
	if a := get(t, ch); a.err != nil {
		t.Fatal(a.err)
	}
	if e.count("p") != 1 {
		t.Error("not proposed exactly once")
	}
}

// A former leader may still answer what it was sent, and what it never answers
// does not wait for ever.
func TestForwarderFormerLeaderAnswers(t *testing.T) {
	checkLeaks(t)
	// moved is a forwarder whose leader holds a command and leads no more.
	moved := func(grace time.Duration) (<-chan answer, func(raftnode.Result, error)) {
		x := newForwarding(t, func(c *ForwarderConfig) { c.RetireGrace = grace })
		e := &echo{}
		x.tree.node.propose = e.propose
		held := make(chan func(raftnode.Result, error), 1)
		x.two.node.propose = func(_ []byte, done func(raftnode.Result, error)) { held <- done }
		x.lead(x.two, 1)
		ch := x.submit(onceCommand("1"))
		done := <-held
		x.lead(x.tree, 2)
		if a := get(t, x.submit(onceCommand("2"))); a.err != nil {
			t.Fatal(a.err)
		}
		return ch, done
	}
	first, done := moved(patience)
	done(raftnode.Result{Index: 7, Value: &commandpb.Result{Revision: 7}}, nil)
	if a := get(t, first); a.err != nil || a.index != 7 {
		t.Errorf("the former leader's answer: %+v", a)
	}
	never, _ := moved(50 * time.Millisecond)
	if a := get(t, never); !errors.Is(a.err, raftnode.ErrAmbiguous) {
		t.Errorf("no answer: %+v", a)
	}
}

func TestForwarderLimits(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, func(c *ForwarderConfig) { c.MaxWaiting = 10 })
	answers := make(chan answer, 40)
	for range 20 {
		x.f.SubmitFunc(onceCommand("p"), func(r *commandpb.Result, index uint64, err error) { answers <- answer{r, index, err} })
	}
	// Not always the last ten: a command that is just being tried again waits nowhere,
	// and one that comes then takes its place.
	for range 10 {
		if a := get(t, answers); !errors.Is(a.err, raftnode.ErrBusy) {
			t.Fatalf("beyond the limit: %+v", a)
		}
	}
	x.f.Close()
	for range 10 {
		if a := get(t, answers); !errors.Is(a.err, raftnode.ErrStopping) {
			t.Fatalf("closed while waiting: %+v", a)
		}
	}
	if len(answers) > 0 {
		t.Fatalf("a second answer: %+v", <-answers)
	}
	if a := get(t, x.submit(onceCommand("p"))); !errors.Is(a.err, raftnode.ErrStopping) {
		t.Fatalf("after Close: %+v", a)
	}
}

// The server bounds what one stream has in flight.
func TestForwardServerLimits(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	x.two.stopServer()
	x.two.config = func(c *PeerServerConfig) { c.MaxInFlight = 3 }
	x.two.restartServer()
	var mu sync.Mutex
	var held []func(raftnode.Result, error)
	x.two.node.propose = func(_ []byte, done func(raftnode.Result, error)) {
		mu.Lock()
		defer mu.Unlock()
		held = append(held, done)
	}
	x.lead(x.two, 1)
	var answers []<-chan answer
	for range 6 {
		answers = append(answers, x.submit(onceCommand("p")))
	}
	for _, ch := range answers[3:] {
		if a := get(t, ch); !errors.Is(a.err, raftnode.ErrBusy) {
			t.Fatalf("beyond the limit: %+v", a)
		}
	}
	mu.Lock()
	for _, done := range held {
		done(raftnode.Result{Index: 1, Value: &commandpb.Result{}}, nil)
	}
	mu.Unlock()
	for _, ch := range answers[:3] {
		if a := get(t, ch); a.err != nil {
			t.Fatal(a.err)
		}
	}
}

// Closing while commands are with the leader leaves nobody waiting.
func TestForwarderCloseResolvesAll(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	var got atomic.Int64
	var ev event
	x.two.node.propose = func([]byte, func(raftnode.Result, error)) { got.Add(1); ev.fire() }
	x.lead(x.two, 1)
	once, again := x.submit(onceCommand("p")), x.submit(repeatableCommand("p"))
	until(t, &ev, "the commands", func() bool { return got.Load() == 2 })
	x.f.Close()
	for _, ch := range []<-chan answer{once, again} {
		if a := get(t, ch); !errors.Is(a.err, raftnode.ErrAmbiguous) {
			t.Errorf("closed while with the leader: %+v", a)
		}
	}
}

func TestRepeatable(t *testing.T) {
	source := func(force bool) *commandpb.CommitSourceOffset {
		return &commandpb.CommitSourceOffset{SourceId: "s", Force: force}
	}
	cases := []struct {
		name string
		cmd  *commandpb.Command
		want bool
	}{
		{"offset", &commandpb.Command{Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: source(false)}}, true},
		{"forced offset", &commandpb.Command{Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: source(true)}}, false},
		{"forced offset with id", &commandpb.Command{RequestId: "r", Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: source(true)}}, true},
		{"checkpoint", &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{}}, false},
		{"pipeline", &commandpb.Command{Op: &commandpb.Command_PutPipeline{}}, false},
		{"batch of offsets", &commandpb.Command{Op: &commandpb.Command_CommitBatch{CommitBatch: &commandpb.CommitBatch{Ops: []*commandpb.CommitOp{
			{Op: &commandpb.CommitOp_SourceOffset{SourceOffset: source(false)}},
			{Op: &commandpb.CommitOp_Watermark{Watermark: &commandpb.AdvanceWatermark{}}}}}}}, true},
		{"batch with a checkpoint", &commandpb.Command{Op: &commandpb.Command_CommitBatch{CommitBatch: &commandpb.CommitBatch{Ops: []*commandpb.CommitOp{
			{Op: &commandpb.CommitOp_Checkpoint{Checkpoint: &commandpb.SaveCheckpoint{}}}}}}}, false},
		{"nothing", &commandpb.Command{}, false},
	}
	for _, c := range cases {
		if got := repeatable(c.cmd); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// Heartbeats of a follower reach the leader, once each per batch, and survive a
// time without one.
func TestBeatsReachTheLeader(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	b := NewBeats(BeatsConfig{Node: x.node, Forwarder: x.f, Sink: x.node.beat, Interval: time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); b.Run(ctx) }()
	defer func() { cancel(); <-done }()

	for range 100 {
		b.Sidecar("a")
		b.Service("b")
	}
	x.lead(x.two, 1)
	n := x.two.node
	until(t, &n.event, "two heartbeats", func() bool { n.mu.Lock(); defer n.mu.Unlock(); return len(n.beats) >= 2 })
	n.mu.Lock()
	if len(n.beats) != 2 {
		t.Errorf("%d heartbeats came of 2 that waited", len(n.beats))
	}
	n.mu.Unlock()
	x.lead(x.station, 2)
	b.Sidecar("c")
	x.node.mu.Lock()
	defer x.node.mu.Unlock()
	// The others may be there as well by now: a new leader is told them again.
	if got := slices.DeleteFunc(slices.Clone(x.node.beats), func(k beatKey) bool { return k != beatKey{"c", ""} }); len(got) != 1 {
		t.Errorf("on the leader: %v", x.node.beats)
	}
}
