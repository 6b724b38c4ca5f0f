package rpc

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// Goal: a change after a calm is pushed at once; those that follow wait for quiet,
// but never longer than the ceiling.
func TestSettle(t *testing.T) {
	for _, c := range []struct {
		name  string
		since time.Duration // of the last push
		rings []time.Duration
		want  time.Duration
	}{
		{"after a calm", pushQuiet, nil, 0},
		{"right after a push", 0, nil, pushQuiet},
		{"a burst", 0, []time.Duration{10 * time.Millisecond, 25 * time.Millisecond}, 25*time.Millisecond + pushQuiet},
		{"without end", 0, []time.Duration{
			15 * time.Millisecond, 30 * time.Millisecond, 45 * time.Millisecond, 60 * time.Millisecond, 75 * time.Millisecond,
			90 * time.Millisecond, 105 * time.Millisecond, 120 * time.Millisecond, 135 * time.Millisecond, 150 * time.Millisecond,
			165 * time.Millisecond, 180 * time.Millisecond, 195 * time.Millisecond, 210 * time.Millisecond,
		}, pushCeiling},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				last := time.Now()
				<-time.After(c.since)
				began := time.Now()
				b := newBell()
				for _, d := range c.rings {
					time.AfterFunc(d, b.ring)
				}
				if err := settle(t.Context(), b, last); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took != c.want {
					t.Errorf("pushed after %v, want %v", took, c.want)
				}
				<-time.After(pushCeiling) // until the last ring is through
			})
		})
	}
}

// Goal: first states wait for each other and for nobody else: while all their
// workers are busy a change goes out. And whoever leaves while waiting is not
// served.
func TestFirstStatesHaveTheirOwnWorkers(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.create(chain("p", "x", "y"))
	stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
	noError(t, err)
	_, err = stream.Recv()
	noError(t, err)

	release := make(chan struct{})
	busy := make(chan error)
	const many = 64 // more than there are workers
	begun := make(chan struct{}, many)
	for range many {
		go func() { busy <- turn(a.ctx(), a.push.first, func() { begun <- struct{}{}; <-release }) }()
	}
	for range max(1, runtime.GOMAXPROCS(0)/2) { // until all of them are busy
		<-begun
	}
	left, leave := context.WithCancel(a.ctx())
	gone := make(chan error, 1)
	go func() {
		gone <- turn(left, a.push.first, func() { t.Error("somebody who left was served") })
	}()
	a.assign("ns/pod", "p")
	ev, err := stream.Recv()
	noError(t, err)
	if ev.GetEventType() != sidecarpb.EventType_EVENT_TYPE_ASSIGNED {
		t.Fatal(ev)
	}
	leave()
	if err := <-gone; err == nil {
		t.Error("the one who left was told nothing")
	}
	close(release)
	for range many {
		noError(t, <-busy)
	}
}

// Goal: a panic while a push is worked out ends that watch and nothing else.
func TestTurnPanics(t *testing.T) {
	a := newAPI(t)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is lost")
			}
		}()
		_ = turn(a.ctx(), a.push.deltas, func() { panic("at fault") })
	}()
	for range 100 {
		noError(t, turn(a.ctx(), a.push.deltas, func() {}))
	}
}

// Goal: a watcher that stops reading costs one push, which holds no view, and
// nobody else waits for it. When it reads again it comes to the newest state.
func TestWatcherThatStopsReading(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/stuck", "transform")
	a.registerSidecar("ns/other", "transform")
	services := []string{"x"}
	for i := range 400 { // so that a single event fills the stream's window
		services = append(services, fmt.Sprintf("stage-with-a-rather-long-name-%04d", i))
	}
	ctx, cancel := context.WithCancel(a.ctx())
	defer cancel()
	stuck, err := a.sidecar.WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/stuck"})
	noError(t, err)
	_, err = stuck.Recv()
	noError(t, err)
	other, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/other"})
	noError(t, err)
	_, err = other.Recv()
	noError(t, err)
	const rounds = 60
	for round := range rounds {
		services[0] = fmt.Sprintf("x%d", round)
		a.create(chain("p", services...))
		a.assign("ns/stuck", "p")
		a.assign("ns/other", "p")
		ev, err := other.Recv()
		noError(t, err)
		if got := ev.GetAssignment().GetStages()[0].GetStageId(); got != services[0]+"-stage" {
			t.Fatalf("round %d: the other watcher was sent %s", round, got)
		}
	}
	want := a.assignments("ns/stuck")["p"]
	events := 0
	for {
		ev, err := stuck.Recv()
		noError(t, err)
		if events++; ev.GetAssignment().GetGeneration() == want {
			break
		}
	}
	if events == rounds {
		t.Errorf("all %d changes waited for the watcher; they should melt into the newest", rounds)
	}
}

// assignments returns the generations of a sidecar's assignments by pipeline.
func (a *api) assignments(sidecar string) map[string]uint64 {
	a.t.Helper()
	info, err := a.sidecarAPI().currentGenerations(sidecar)
	noError(a.t, err)
	return info
}

func (a *api) sidecarAPI() *sidecarAPI { return &sidecarAPI{Server: a.Server} }

func (a *sidecarAPI) currentGenerations(id string) (map[string]uint64, error) {
	as, _, err := a.currentAssignments(id)
	out := make(map[string]uint64)
	for _, x := range as {
		out[x.PipelineId] = x.Generation
	}
	return out, err
}

// Goal: a node that stops tells its watches when to come back, not all the same.
func TestReconnectIsDirected(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{SidecarId: "ns/pod"})
	noError(t, err)
	_, err = stream.Recv()
	noError(t, err)
	go a.Shutdown(a.ctx())
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
	if ReasonOf(status.Convert(err)) != "STOPPING" {
		t.Errorf("reason %s", ReasonOf(status.Convert(err)))
	}
	n := 0
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			n++
			if d := r.GetRetryDelay().AsDuration(); d <= 0 || d > reconnectMin {
				t.Errorf("asked to come back after %v", d)
			}
		}
	}
	if n != 1 {
		t.Errorf("%d pauses are asked for", n)
	}
	seen := make(map[time.Duration]bool)
	for range 100 {
		d := reconnectAfter(5000)
		if d <= 0 || d > 5*time.Second {
			t.Fatalf("%v for one of 5000 watches", d)
		}
		seen[d] = true
	}
	if len(seen) < 50 {
		t.Errorf("%d different pauses for 100 watches", len(seen))
	}
}

// Goal: watches that are idle at one revision are sent the same bytes.
func TestMarksAreShared(t *testing.T) {
	var c markCache
	one, err := c.get(7, 1)
	noError(t, err)
	two, err := c.get(7, 1)
	noError(t, err)
	if &one[0] != &two[0] {
		t.Error("the mark was encoded twice")
	}
	three, err := c.get(8, 1)
	noError(t, err)
	var ev sidecarpb.PipelineAssignmentEvent
	noError(t, ev.UnmarshalVT(three))
	if ev.GetRevision() != 8 || ev.GetEpoch() != 1 || ev.GetEventType() != sidecarpb.EventType_EVENT_TYPE_SYNCED {
		t.Errorf("%v", &ev)
	}
}

// Goal: a watch that comes with a revision of another epoch than the state is of, as
// after a restore, is told so and starts over, whatever the revision.
func TestWatchOfAnotherEpoch(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/pod", "transform")
	a.create(chain("p", "x", "y"))
	a.assign("ns/pod", "p")
	for _, from := range []uint64{1, a.node.fsm.Revision(), a.node.fsm.Revision() + 1000} {
		stream, err := a.sidecar.WatchPipelineAssignments(a.ctx(), &sidecarpb.WatchAssignmentsRequest{
			SidecarId: "ns/pod", FromRevision: from, FromEpoch: a.node.fsm.Epoch() + 1,
		})
		noError(t, err)
		for i, want := range []sidecarpb.EventType{
			sidecarpb.EventType_EVENT_TYPE_RESYNC, sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_SYNCED,
		} {
			ev, err := stream.Recv()
			noError(t, err)
			if ev.EventType != want || (i == 0) != strings.Contains(ev.Reason, "restored from a backup") {
				t.Fatalf("from %d, event %d: %v", from, i, ev)
			}
		}
	}
}
