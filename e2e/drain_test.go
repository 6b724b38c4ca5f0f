package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// ledger is who reads which source right now, as the sidecars themselves know it.
// It sees what the records see: two readers at one time are two readers, whatever
// the cluster believes.
type ledger struct {
	mu     sync.Mutex
	owners map[string]map[string]uint64 // pipeline -> sidecar -> generation
	faults []string
}

// begin says that a sidecar reads the source of a pipeline from now on.
func (l *ledger) begin(pipeline, sidecar string, generation uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owners[pipeline] == nil {
		l.owners[pipeline] = make(map[string]uint64)
	}
	for other, g := range l.owners[pipeline] {
		if other != sidecar && other != late {
			l.faults = append(l.faults, fmt.Sprintf("%s reads %s by generation %d while %s does by %d", sidecar, pipeline, generation, other, g))
		}
		if other == late && g >= generation {
			l.faults = append(l.faults, fmt.Sprintf("%s has %s by generation %d, which does not fence %s by %d", sidecar, pipeline, generation, other, g))
		}
	}
	l.owners[pipeline][sidecar] = generation
}

func (l *ledger) end(pipeline, sidecar string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.owners[pipeline], sidecar)
}

func (l *ledger) of(pipeline string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for id := range l.owners[pipeline] {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// late is the sidecar that goes on reading what was taken from it.
const late = "drain/late"

// watcher is a sidecar of the newer kind: it watches its assignments, resumes after
// a broken stream, and says with its heartbeats what it has applied.
type watcher struct {
	t    *testing.T
	c    *Cluster
	l    *ledger
	id   string
	node func() *Node

	mu sync.Mutex
	// mute: it applies what it is told but does not say so. deaf: it does neither.
	mute, deaf      bool
	revision, epoch uint64 // applied
	said            uint64
	held            map[string]bool
}

func newWatcher(t *testing.T, c *Cluster, l *ledger, id string, services ...string) *watcher {
	w := &watcher{t: t, c: c, l: l, id: id, held: make(map[string]bool)}
	w.node = func() *Node {
		up := c.running()
		return up[len(id)%len(up)]
	}
	req := &sidecarpb.RegisterSidecarRequest{SidecarId: id, PodName: id, Namespace: "drain", SidecarEndpoint: "10.0.0.1:50053"}
	for i, s := range services {
		kind := sidecarpb.ServiceType_SERVICE_TYPE_SOURCE
		if s == "e2e-out" {
			kind = sidecarpb.ServiceType_SERVICE_TYPE_SINK
		}
		req.LocalServices = append(req.LocalServices, &sidecarpb.LocalService{ServiceName: s, ServiceType: kind, LocalEndpoint: fmt.Sprintf("127.0.0.1:%d", 9001+i)})
	}
	eventually(t, 20*time.Second, id+" is registered", func(ctx context.Context) error {
		r, err := w.node().Sidecars().RegisterSidecar(ctx, req)
		return ok(err, r.GetSuccess(), r.GetError())
	})
	ctx, cancel := context.WithCancel(context.Background())
	var loops sync.WaitGroup
	loops.Go(func() { w.watch(ctx) })
	loops.Go(func() { w.beat(ctx) })
	t.Cleanup(func() { cancel(); loops.Wait() })
	return w
}

func (w *watcher) watch(ctx context.Context) {
	for ctx.Err() == nil {
		w.mu.Lock()
		req := &sidecarpb.WatchAssignmentsRequest{SidecarId: w.id, FromRevision: w.revision, FromEpoch: w.epoch}
		w.mu.Unlock()
		stream, err := w.node().Sidecars().WatchPipelineAssignments(ctx, req)
		for err == nil {
			var ev *sidecarpb.PipelineAssignmentEvent
			if ev, err = stream.Recv(); err == nil {
				w.take(ev)
			}
		}
		w.rest(ctx, 50*time.Millisecond)
	}
}

func (w *watcher) rest(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// take applies an event. The streams of this test are never told to start over.
func (w *watcher) take(ev *sidecarpb.PipelineAssignmentEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deaf {
		return
	}
	a := ev.GetAssignment()
	reads := slices.ContainsFunc(a.GetStages(), func(s *sidecarpb.StageAssignment) bool { return s.GetStageId() == "in" && s.GetRemoteSidecar() == nil })
	switch ev.GetEventType() {
	case sidecarpb.EventType_EVENT_TYPE_RESYNC:
		w.t.Errorf("%s is told to start over: %s", w.id, ev.GetReason())
	case sidecarpb.EventType_EVENT_TYPE_REVOKED:
		w.l.end(a.PipelineId, w.id)
		delete(w.held, a.PipelineId)
	case sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_UPDATED:
		w.held[a.PipelineId] = true
		if reads {
			w.l.begin(a.PipelineId, w.id, a.Generation)
		} else {
			w.l.end(a.PipelineId, w.id)
		}
	}
	if ev.GetRevision() > 0 {
		w.revision, w.epoch = ev.GetRevision(), ev.GetEpoch()
	}
}

// beat sends a heartbeat as soon as there is something to say, and now and then.
func (w *watcher) beat(ctx context.Context) {
	lost := false
	for n := 0; ctx.Err() == nil; n++ {
		w.mu.Lock()
		req := &sidecarpb.SidecarHeartbeatRequest{SidecarId: w.id, AppliedRevision: w.said, AppliedEpoch: w.epoch}
		if !w.mute {
			req.AppliedRevision = w.revision
		}
		fresh := req.AppliedRevision != w.said || lost
		w.said = req.AppliedRevision
		w.mu.Unlock()
		if fresh || n%20 == 0 {
			call, cancel := context.WithTimeout(ctx, 2*time.Second)
			// What was lost is said again: to a node that has not heard of it, one that
			// says nothing is one of the field, whose heartbeats show what it applied.
			_, err := w.node().Sidecars().Heartbeat(call, req)
			lost = err != nil
			cancel()
		}
		w.rest(ctx, 20*time.Millisecond)
	}
}

func (w *watcher) set(mute, deaf bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mute, w.deaf = mute, deaf
}

func (w *watcher) holds() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.held)
}

const drainPipelines = 6

func drainPipeline(i int) string { return fmt.Sprintf("drain/p%d", i) }

func (l *ledger) all(want ...string) error {
	for i := range drainPipelines {
		if got := l.of(drainPipeline(i)); !slices.Equal(got, want) {
			return fmt.Errorf("%s is read by %v, want %v", drainPipeline(i), got, want)
		}
	}
	return nil
}

func setDrain(t *testing.T, c *Cluster, id string, on bool, deadline time.Duration) {
	t.Helper()
	eventually(t, 20*time.Second, "the drain of "+id, func(ctx context.Context) error {
		n := c.running()[0]
		if !on {
			_, err := n.Cluster().UndrainSidecar(ctx, &clusterpb.UndrainSidecarRequest{SidecarId: id})
			return err
		}
		r, err := n.Cluster().DrainSidecar(ctx, &clusterpb.DrainSidecarRequest{SidecarId: id, DeadlineMs: uint64(deadline.Milliseconds())})
		if err == nil && !r.GetSidecar().GetDraining() {
			err = errors.New("it does not drain")
		}
		return err
	})
}

// TestDrainNeverHasTwoOwners drains sidecars that read sources, with the leader
// killed while the stages are on their way, and asks the sidecars themselves: no
// source has two readers at any instant, and nobody is given one before the sidecar
// it was taken from has said that it let go. One that never says so is waited for
// until the deadline of its drain, and fenced by the generation after it.
func TestDrainNeverHasTwoOwners(t *testing.T) {
	c := NewCluster(t, Options{})
	l := &ledger{owners: make(map[string]map[string]uint64)}
	defer func() {
		for _, f := range l.faults {
			t.Error(f)
		}
	}()
	newWatcher(t, c, l, "drain/sink", "e2e-out")
	a := newWatcher(t, c, l, "drain/a", "e2e-in")
	for i := range drainPipelines {
		cfg := testPipeline(drainPipeline(i), "drain")
		cfg.Enabled = true
		eventually(t, 20*time.Second, "a pipeline", func(ctx context.Context) error {
			r, err := c.Nodes[0].Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: cfg})
			return ok(err, r.GetSuccess(), r.GetError())
		})
	}
	eventually(t, 20*time.Second, "a reads", func(context.Context) error { return l.all("drain/a") })
	b := newWatcher(t, c, l, "drain/bb", "e2e-in")

	// Who says so is let go of at once.
	setDrain(t, c, a.id, true, 0)
	eventually(t, 20*time.Second, "b reads all", func(context.Context) error { return l.all("drain/bb") })
	eventually(t, 20*time.Second, "a is done", func(ctx context.Context) error {
		r, err := c.Nodes[1].Cluster().GetSidecar(ctx, &clusterpb.GetSidecarRequest{SidecarId: a.id})
		if s := r.GetSidecar(); err == nil && (!s.GetDraining() || len(s.GetAssignments())+len(s.GetReleases()) > 0) {
			err = fmt.Errorf("it has %d assignments and %d releases left", len(s.GetAssignments()), len(s.GetReleases()))
		}
		return err
	})

	// In the middle of the next one the leader dies. Nobody is given anything before
	// b has spoken, whoever leads.
	setDrain(t, c, a.id, false, 0)
	b.set(true, false)
	setDrain(t, c, b.id, true, 0)
	eventually(t, 20*time.Second, "b has let go of all", func(context.Context) error {
		if n := b.holds(); n > 0 {
			return fmt.Errorf("it holds %d", n)
		}
		return nil
	})
	leader := c.Leader()
	leader.Kill()
	next := c.Leader(c.running()...)
	eventually(t, 20*time.Second, "the next leader waits too", func(ctx context.Context) error {
		for i := range drainPipelines {
			r, err := next.Admin().GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: drainPipeline(i)})
			if err != nil {
				return err
			}
			in := r.GetStatus().GetPlacements()[0]
			if len(in.GetSidecarIds()) > 0 || !slices.Equal(in.GetReleasing(), []string{b.id}) || in.GetPendingReason() == "" {
				return fmt.Errorf("%s: %v", drainPipeline(i), in)
			}
		}
		st, err := next.Admin().GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
		if err == nil && (st.GetPendingHandovers() != drainPipelines || st.GetDrainingSidecars() != 1) {
			err = fmt.Errorf("the status shows %d handovers and %d draining", st.GetPendingHandovers(), st.GetDrainingSidecars())
		}
		return err
	})
	if err := l.all(); err != nil {
		t.Fatal(err)
	}
	b.set(false, false)
	eventually(t, 20*time.Second, "a reads all", func(context.Context) error { return l.all("drain/a") })
	leader.Start()
	c.WaitServing(leader)

	// One that neither listens nor speaks keeps on reading what it read. It has its
	// time; then its assignment is the older one.
	setDrain(t, c, b.id, true, 0)
	slow := newWatcher(t, c, l, late, "e2e-in")
	setDrain(t, c, a.id, true, 0)
	eventually(t, 20*time.Second, "late reads all", func(context.Context) error { return l.all(late) })
	slow.set(true, true)
	setDrain(t, c, b.id, false, 0)
	begun := time.Now()
	setDrain(t, c, late, true, 3*time.Second)
	eventually(t, 20*time.Second, "b reads all beside it", func(context.Context) error { return l.all("drain/bb", late) })
	if took := time.Since(begun); took < 2*time.Second {
		t.Errorf("b was given them after %v, before the deadline of 3 s", took)
	}
	slow.set(false, false)
	// Its stream brought the revocation while it did not listen: as one that was
	// paused it reads its registration's answer, or its heartbeat's, first.
	eventually(t, 20*time.Second, "the late one is told to stop", func(ctx context.Context) error {
		r, err := c.Nodes[0].Sidecars().Heartbeat(ctx, &sidecarpb.SidecarHeartbeatRequest{SidecarId: late})
		if err != nil {
			return err
		}
		for _, cmd := range r.GetCommands() {
			if rv := cmd.GetRevoke(); rv != nil {
				l.end(rv.GetPipelineId(), late)
			}
		}
		return l.all("drain/bb")
	})
	c.WaitSameState()
}
