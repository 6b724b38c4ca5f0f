package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// replica is a state machine of its own with a switch for leadership: what the
// loops see of a node. Commands take effect at once.
type replica struct {
	t   *testing.T
	fsm *router.FSM

	mu      sync.Mutex
	lead    raftnode.Leadership
	changed chan struct{}
	plans   int
	refuse  error  // next submissions fail with it
	before  func() // runs once before the next submission
	// first and last are in the entry of the next plan, before and after it.
	first, last []*commandpb.Command
	closed      chan struct{} // made outside of the bubble
	check       func()        // runs after each command
	most        map[[2]string]int
	placer      *Placer       // of inBubble
	budget      int           // its moves per minute; 0 = no bound
	balance     time.Duration // how often it evens the load; 0 = never
	jump        time.Duration // by how much its time of day is set
}

// newReplica opens an empty state. Pebble's own goroutines would never let the
// fake clock of a bubble advance, so it is opened outside of it; inBubble closes
// it.
func newReplica(t *testing.T, o router.Options) *replica {
	t.Helper()
	o.Bootstrap = router.Position{Index: 1, Term: 1}
	fsm, err := router.Open(vfs.NewMem(), "state", o)
	if err != nil {
		t.Fatal(err)
	}
	// What it does right after opening has to end outside as well: Close, inside,
	// would wait for it. One that has not run yet is known by who began it.
	for deadline := time.Now().Add(10 * time.Second); stacksHold("TableStats", "(*DB).flush", "(*DB).compact", "(*DB).maybeSchedule"); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the state does not come to rest")
		}
	}
	return &replica{t: t, fsm: fsm, closed: make(chan struct{})}
}

func stacksHold(functions ...string) bool {
	buf := make([]byte, 1<<20)
	stacks := buf[:runtime.Stack(buf, true)]
	return slices.ContainsFunc(functions, func(f string) bool { return bytes.Contains(stacks, []byte(f)) })
}

func (r *replica) enter() { r.changed = make(chan struct{}) }

func (r *replica) View() *router.View { return r.fsm.View() }
func (r *replica) Hub() *router.Hub   { return r.fsm.Hub() }

func (r *replica) Leadership() raftnode.Leadership {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lead
}

func (r *replica) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *replica) ReadIndex(context.Context) (uint64, error) { return r.fsm.Applied().Index, nil }

func (r *replica) setLeading(leading bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lead.Leading = leading
	r.lead.Term++
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *replica) apply(cmd *commandpb.Command) (*commandpb.Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	all, at := []*commandpb.Command{cmd}, 0
	if cmd.GetApplyAssignments() != nil {
		all, at = slices.Concat(r.first, all, r.last), len(r.first)
		r.first, r.last = nil, nil
	}
	e := router.Entry{Index: r.fsm.Applied().Index + 1, Term: max(r.lead.Term, 1), Local: true}
	for _, c := range all {
		raw, err := c.MarshalVT()
		if err != nil {
			return nil, err
		}
		e.Commands = append(e.Commands, raw)
	}
	res, err := r.fsm.Apply([]router.Entry{e})
	if err != nil {
		return nil, err
	}
	if r.check != nil {
		r.check()
	}
	return res[0][at], nil
}

func (r *replica) Submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	r.mu.Lock()
	before, refuse := r.before, r.refuse
	r.before = nil
	if cmd.GetApplyAssignments() != nil {
		r.plans++
	}
	r.mu.Unlock()
	if before != nil {
		before()
	}
	if refuse != nil {
		return nil, refuse
	}
	return r.apply(cmd)
}

func (r *replica) SubmitFunc(cmd *commandpb.Command, done func(*commandpb.Result, uint64, error)) {
	go func() {
		res, err := r.Submit(context.Background(), cmd)
		done(res, 0, err)
	}()
}

// do applies a command that must succeed.
func (r *replica) do(cmd *commandpb.Command) *commandpb.Result {
	r.t.Helper()
	res, err := r.apply(cmd)
	if err != nil || res.GetRejection() != nil {
		r.t.Fatalf("%v: %v %v", cmd, err, res.GetRejection())
	}
	return res
}

func (r *replica) register(id string, services ...string) {
	r.t.Helper()
	s := newModel().putSidecar(id, services...)
	r.do(&commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: s}}})
}

func (r *replica) putPipeline(id, text string) {
	r.t.Helper()
	r.do(&commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: parsePipeline(r.t, id, text)}}})
}

func (r *replica) state(id string) string {
	r.t.Helper()
	v := r.fsm.View()
	defer v.Close()
	s, err := v.Sidecar(id)
	if err != nil {
		r.t.Fatal(err)
	}
	return sidecarCondition(s).String()
}

// table renders the assignments in force.
func (r *replica) table() string {
	r.t.Helper()
	v := r.fsm.View()
	defer v.Close()
	in, err := ReadInput(v)
	if err != nil {
		r.t.Fatal(err)
	}
	m := newModel()
	for _, a := range in.Assignments {
		m.assignments[assignmentKey{a.SidecarId, a.PipelineId}] = a
	}
	return m.table()
}

func (r *replica) liveness() *Liveness {
	r.t.Helper()
	l, err := NewLiveness(LivenessConfig{Node: r, State: r, Submit: r, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

// inBubble runs the loops and then test, on a fake clock.
func (r *replica) inBubble(test func(t *testing.T, l *Liveness)) {
	synctest.Test(r.t, func(t *testing.T) {
		r.enter()
		ctx, cancel := context.WithCancel(context.Background())
		l := r.liveness()
		p := NewPlacer(PlacerConfig{Node: r, State: r, Submit: r, MovesPerMinute: r.budget, BalanceInterval: r.balance, FlapGrace: time.Minute,
			Now: func() time.Time { return setWall(time.Now(), r.jump) }})
		r.placer = p
		var loops sync.WaitGroup
		loops.Go(func() { l.Run(ctx) })
		loops.Go(func() { p.Run(ctx) })
		// Channels made in a bubble, Pebble's among them, must not be used
		// outside of it. But Close waits for Pebble's goroutines, which are
		// outside, and a bubble in which all wait for one another is taken for a
		// deadlock; one that waits for a channel from outside is not.
		defer func() {
			go func() { <-r.closed }()
			defer close(r.closed)
			if err := r.fsm.Close(); err != nil {
				t.Error(err)
			}
		}()
		defer loops.Wait() // also when test fails
		defer cancel()
		test(t, l)
	})
}

// pass lets d go by on the clock of the bubble: no real time passes, and
// everything that was due has happened up to the last instant.
func pass(d time.Duration) { sleep(context.Background(), d) }

// beat lets sidecars send heartbeats every 10 s for d.
func beat(l *Liveness, d time.Duration, ids ...string) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		for _, id := range ids {
			l.Touch(id, "")
		}
		pass(min(10*time.Second, time.Until(end)))
	}
	synctest.Wait()
}

const threeStages = "orders:source -> clean:transform -> lake:sink"

// TestFirstChangeAfterACalm: a change that comes alone is planned at once, those
// that follow it together.
func TestFirstChangeAfterACalm(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("b", "clean:transform")
	r.register("c", "lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 5*time.Second, "a", "b", "c")
		r.putPipeline("p", threeStages)
		synctest.Wait()
		if got := r.table(); !contains(got, "p b: clean") {
			t.Fatalf("the first change after a calm waits:\n%s", got)
		}
		r.putPipeline("q", threeStages)
		pass(10 * time.Millisecond)
		r.putPipeline("r", threeStages)
		pass(15 * time.Millisecond)
		synctest.Wait()
		if got := r.table(); contains(got, "q b: clean") || contains(got, "r b: clean") {
			t.Fatalf("a change right after another is planned alone:\n%s", got)
		}
		pass(10 * time.Millisecond)
		synctest.Wait()
		if got := r.table(); !contains(got, "q b: clean") || !contains(got, "r b: clean") {
			t.Fatalf("they are not planned once things are calm:\n%s", got)
		}
	})
}

// TestLossAndReturn: a sidecar that falls silent keeps its stages while it is
// suspect and loses them when it expires; when it is heard of again it is alive
// at once and takes nothing back.
func TestLossAndReturn(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("b", "clean:transform")
	r.register("c", "lake:sink")
	r.register("d", "clean:transform")
	r.putPipeline("p", threeStages)
	r.inBubble(func(t *testing.T, l *Liveness) {
		pass(time.Second)
		synctest.Wait()
		if got := r.table(); got != "nothing is assigned\n" {
			t.Fatalf("a node that does not lead planned:\n%s", got)
		}
		r.setLeading(true)
		beat(l, 5*time.Second, "a", "b", "c", "d")
		first := r.table()
		stage, other := "b", "d"
		if !contains(first, "p b: clean") {
			stage, other = "d", "b"
		}
		if !contains(first, "p a: orders=127.0.0.1:9001 clean@"+stage) || !contains(first, "p c: lake") {
			t.Fatalf("unexpected tables:\n%s", first)
		}
		beat(l, 24*time.Second, "a", "c", other)
		if got := r.state(stage); got != "alive" {
			t.Fatalf("%s is %s before its lease ran out", stage, got)
		}
		beat(l, 10*time.Second, "a", "c", other)
		if got := r.state(stage); got != "suspect" || r.table() != first {
			t.Fatalf("%s is %s; tables:\n%s", stage, got, r.table())
		}
		beat(l, 10*time.Second, "a", "c", other)
		if got := r.state(stage); got != "expired" {
			t.Fatalf("%s is %s", stage, got)
		}
		second := r.table()
		if !contains(second, "p a: orders=127.0.0.1:9001 clean@"+other) || contains(second, "p "+stage) {
			t.Fatalf("tables after the loss:\n%s", second)
		}
		l.Touch(stage, "")
		pass(time.Second)
		synctest.Wait()
		if got := r.state(stage); got != "alive" || r.table() != second {
			t.Fatalf("%s is %s; tables:\n%s", stage, got, r.table())
		}
	})
}

func contains(s, sub string) bool {
	return slices.ContainsFunc(splitLines(s), func(l string) bool { return len(l) >= len(sub) && l[:len(sub)] == sub })
}

func splitLines(s string) []string {
	var out []string
	for len(s) > 0 {
		i := 0
		for i < len(s) && s[i] != '\n' {
			i++
		}
		out = append(out, s[:i])
		s = s[min(len(s), i+1):]
	}
	return out
}

// TestNewLeaderIsPatient: who was nearly given up by the last leader has a full
// lease with the next one, which may have heard from nobody yet.
func TestNewLeaderIsPatient(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		pass(29 * time.Second)
		r.setLeading(false)
		l.Touch("a", "") // lands on a node that does not lead: no harm
		pass(5 * time.Second)
		r.setLeading(true)
		pass(29 * time.Second)
		synctest.Wait()
		if got := r.state("a"); got != "alive" {
			t.Fatalf("a is %s", got)
		}
		pass(2 * time.Second)
		synctest.Wait()
		if got := r.state("a"); got != "suspect" {
			t.Fatalf("a is %s although it has been silent for a full lease", got)
		}
	})
}

// TestServiceExpires: a service of the registry is judged by its own
// heartbeats, and one that deregisters is forgotten.
func TestServiceExpires(t *testing.T) {
	r := newReplica(t, router.Options{})
	for _, id := range []string{"one", "two"} {
		r.do(&commandpb.Command{Op: &commandpb.Command_RegisterService{RegisterService: &commandpb.RegisterService{Service: &commandpb.Service{
			ServiceId: id, Name: id, Type: commandpb.ServiceType_SERVICE_TYPE_SINK, RegistrationId: id,
			Endpoint: &commandpb.Endpoint{Host: "h", Port: 1},
		}}}})
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		for range 6 {
			pass(10 * time.Second)
			l.Touch("", "one")
		}
		synctest.Wait()
		v := r.fsm.View()
		defer v.Close()
		one, err1 := v.Service("one")
		two, err2 := v.Service("two")
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if serviceCondition(one) != alive || serviceCondition(two) != expired {
			t.Fatalf("one is %v, two is %v", one.State, two.State)
		}
	})
}

// TestServiceBackBeforeItsExpiry: a service that registers again while its expiry
// is on its way to the log stays, and stays in its groups.
func TestServiceBackBeforeItsExpiry(t *testing.T) {
	r := newReplica(t, router.Options{})
	register := func(registration string) {
		r.do(&commandpb.Command{Op: &commandpb.Command_RegisterService{RegisterService: &commandpb.RegisterService{Service: &commandpb.Service{
			ServiceId: "one", Name: "one", Type: commandpb.ServiceType_SERVICE_TYPE_SINK, RegistrationId: registration,
			Endpoint: &commandpb.Endpoint{Host: "h", Port: 1},
		}}}})
	}
	register("first")
	r.do(&commandpb.Command{Op: &commandpb.Command_JoinGroup{JoinGroup: &commandpb.JoinGroup{ServiceId: "one", GroupId: "g", PartitionCount: 4}}})
	r.before = func() { register("second") }
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		pass(50 * time.Second)
		synctest.Wait()
		v := r.fsm.View()
		defer v.Close()
		one, err1 := v.Service("one")
		g, err2 := v.Group("g")
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		if one.RegistrationId != "second" {
			t.Fatal("no expiry was on its way")
		}
		if serviceCondition(one) != alive || len(g.GetMembers()) != 1 {
			t.Fatalf("it is %v and the group has %d members", one.State, len(g.GetMembers()))
		}
	})
}

// TestPlacerGathers: a rollout of many sidecars within a moment is one plan or
// a few, not one each.
func TestPlacerGathers(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source*100 -> lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		pass(time.Second)
		synctest.Wait()
		before := r.planned()
		for i := range 100 {
			r.register(fmt.Sprintf("s%02d", i), "orders:source")
			pass(time.Millisecond)
		}
		pass(time.Second)
		synctest.Wait()
		if n := r.planned() - before; n < 1 || n > 3 {
			t.Fatalf("%d plans for one rollout", n)
		}
		if got := len(splitLines(r.table())); got != 101 {
			t.Fatalf("%d tables, want 101", got)
		}
	})
}

func (r *replica) planned() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.plans
}

// TestPlacerPlansAgain: when the state moved on under a plan, or it could not be
// replicated, another one follows.
func TestPlacerPlansAgain(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source -> lake:sink")
	r.before = func() {
		s := newModel().putSidecar("k", "lake:sink")
		s.Endpoint = "elsewhere:1"
		r.do(&commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: s}}})
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		pass(time.Second)
		synctest.Wait()
		if got := r.table(); !contains(got, "p a: orders=127.0.0.1:9001 lake@k(elsewhere:1)") {
			t.Fatalf("the plan was made from an address that is no longer true:\n%s", got)
		}
		r.mu.Lock()
		r.refuse = raftnode.ErrBusy
		r.mu.Unlock()
		r.do(&commandpb.Command{Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: "p"}}})
		r.putPipeline("q", "orders:source -> lake:sink")
		pass(time.Second)
		r.mu.Lock()
		r.refuse = nil
		r.mu.Unlock()
		pass(time.Second)
		synctest.Wait()
		if got := r.table(); !contains(got, "q a:") || contains(got, "p ") {
			t.Fatalf("after the trouble was over:\n%s", got)
		}
	})
}

// TestLoopsResync: loops that were overtaken by the change feed read the state
// again and go on.
func TestLoopsResync(t *testing.T) {
	r := newReplica(t, router.Options{HistoryBytes: 64 << 10})
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		pass(time.Second)
		// One entry with more changes than the history holds.
		e := router.Entry{Index: r.fsm.Applied().Index + 1, Term: 1}
		m := newModel()
		for i := range 2000 {
			s := m.putSidecar(fmt.Sprintf("s%04d", i), "orders:source")
			raw, err := (&commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: s}}}).MarshalVT()
			if err != nil {
				t.Fatal(err)
			}
			e.Commands = append(e.Commands, raw)
		}
		if _, err := r.fsm.Apply([]router.Entry{e}); err != nil {
			t.Fatal(err)
		}
		r.register("k", "lake:sink")
		r.putPipeline("p", "orders:source -> lake:sink")
		pass(2 * time.Second)
		synctest.Wait()
		if got := splitLines(r.table()); len(got) != 2 {
			t.Fatalf("tables: %v", got)
		}
		l.Touch("s0000", "")
		pass(31 * time.Second)
		synctest.Wait()
		if got := r.state("s1999"); got != "suspect" {
			t.Fatalf("s1999 is %s: the leases missed it", got)
		}
	})
}

// TestChunks: a plan is cut between pipelines, and within one only when it does
// not fit otherwise.
func TestChunks(t *testing.T) {
	p := NewPlacer(PlacerConfig{ChunkChanges: 5})
	var changes []*commandpb.AssignmentChange
	for _, n := range []struct {
		id string
		n  int
	}{{"a", 2}, {"b", 2}, {"c", 3}, {"d", 12}, {"e", 1}} {
		for i := range n.n {
			changes = append(changes, &commandpb.AssignmentChange{PipelineId: n.id, SidecarId: fmt.Sprint(i)})
		}
	}
	var got []string
	total := 0
	for _, c := range p.chunks(changes) {
		text := ""
		for _, ch := range c {
			text += ch.PipelineId
		}
		total += len(c)
		got = append(got, text)
	}
	if want := []string{"aabb", "ccc", "ddddd", "ddddd", "dde"}; !slices.Equal(got, want) || total != len(changes) {
		t.Fatalf("chunks %v, want %v", got, want)
	}
}

// TestPlannedEndsWithTheReign: who asks how far the placement is hears that nobody
// knows once the node leads no more.
func TestPlannedEndsWithTheReign(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.inBubble(func(t *testing.T, l *Liveness) {
		planned := uint64(0)
		r.placer.c.Planned = func(p PlanInfo) { planned = p.Revision }
		r.placer.c.Stopped = func() { planned = 0 }
		r.setLeading(true)
		beat(l, time.Second, "a")
		if planned != r.fsm.Revision() {
			t.Fatalf("planned up to %d, the state is at %d", planned, r.fsm.Revision())
		}
		r.setLeading(false)
		synctest.Wait()
		if planned != 0 {
			t.Fatalf("planned up to %d though it does not lead", planned)
		}
	})
}
