package rpc

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/control"
	"conveyor.etl/router/placement"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// newStudiedAPI serves a node that can say why stages run where they do.
func newStudiedAPI(t *testing.T) *api {
	return newAPI(t, func(c *ServerConfig) {
		study := control.NewStudy(control.StudyConfig{State: c.State})
		t.Cleanup(study.Close)
		c.Placement, c.PipelineQuality = study, control.PipelineQuality
	})
}

// offer registers a sidecar with services "name:type".
func (a *api) offer(id string, services ...string) {
	a.t.Helper()
	s := &commandpb.Sidecar{SidecarId: id, PodName: id, Namespace: "ns", Endpoint: id[3:] + ":50053"}
	for i, text := range services {
		name, kind, _ := strings.Cut(text, ":")
		s.Services = append(s.Services, &commandpb.LocalService{
			Name: name, Endpoint: fmt.Sprintf("127.0.0.1:%d", 9000+i),
			Type: commandpb.ServiceType(commandpb.ServiceType_value["SERVICE_TYPE_"+strings.ToUpper(kind)]),
		})
	}
	// Not through the API, which would wait for the loop that places stages.
	a.node.must(a.t, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: s}}})
}

// place carries out what is planned, as the leader would.
func (a *api) place() {
	a.t.Helper()
	v := a.node.fsm.View()
	in, err := control.ReadInput(v)
	noError(a.t, err)
	noError(a.t, v.Close())
	a.node.must(a.t, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{
		ApplyAssignments: &commandpb.ApplyAssignments{Changes: control.Plan(in)},
	}})
}

// unchanged fails when fn changes the state, its revision, or the log.
func (a *api) unchanged(fn func()) {
	a.t.Helper()
	look := func() ([]byte, uint64, int) {
		v := a.node.fsm.View()
		defer v.Close()
		h, err := v.Hash()
		noError(a.t, err)
		return h, v.Revision(), a.node.entryCount()
	}
	hash, revision, entries := look()
	fn()
	if h, r, e := look(); !bytes.Equal(h, hash) || r != revision || e != entries {
		a.t.Errorf("the state was %x at %d after %d entries, and is %x at %d after %d", hash, revision, entries, h, r, e)
	}
}

// Goal: for every stage it is said where it runs, who else could run it and what
// rules the others out, why it waits, and where records go.
func TestExplainPipeline(t *testing.T) {
	a := newStudiedAPI(t)
	// With one transform alone it would stand in for any.
	a.offer("ns/one", "x:source", "y:transform", "v:transform")
	a.offer("ns/two", "y:transform", "v:transform", "z:sink")
	a.offer("ns/three", "z:sink")
	a.create(chain("p", "x", "y", "z"))
	a.create(chain("waits", "x", "nowhere", "z"))
	a.place()
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: "ns/three", State: commandpb.SidecarState_SIDECAR_STATE_SUSPECT}}})
	explain := func(req *clusterpb.ExplainPipelineRequest) *clusterpb.ExplainPipelineResponse {
		t.Helper()
		var r *clusterpb.ExplainPipelineResponse
		a.unchanged(func() {
			var err error
			r, err = a.cluster.ExplainPipeline(a.ctx(), req)
			noError(t, err)
		})
		if r.Revision != a.node.fsm.Revision() {
			t.Errorf("revision %d, the state is at %d", r.Revision, a.node.fsm.Revision())
		}
		return r
	}
	r := explain(&clusterpb.ExplainPipelineRequest{PipelineId: "p"})
	if len(r.Stages) != 3 {
		t.Fatal(r)
	}
	x, y, z := r.Stages[0], r.Stages[1], r.Stages[2]
	if x.SidecarIds[0] != "ns/one" || x.Strangers != 2 || x.NextHops[0].Reason != "it runs on the same sidecar" {
		t.Error(x)
	}
	if y.AsksFor != `transform service "y"` || len(y.Candidates) != 2 || !y.Candidates[0].Runs || y.Candidates[1].Verdict != "" {
		t.Error(y)
	}
	if h := y.NextHops[0]; h.FromSidecarId != "ns/one" || h.StageId != "z-stage" || h.ToSidecarId != z.SidecarIds[0] || h.Reason == "" || h.ToEndpoint == "" {
		t.Error(h)
	}
	for _, c := range z.Candidates {
		if c.SidecarId == "ns/three" && !c.Runs && c.Verdict != "it misses heartbeats: it keeps what it has and is given nothing" {
			t.Error(c)
		}
	}
	r = explain(&clusterpb.ExplainPipelineRequest{PipelineId: "waits", StageId: "nowhere-stage"})
	if len(r.Stages) != 1 || r.Stages[0].PendingReason != `no sidecar offers transform service "nowhere"` {
		t.Error(r)
	}
	r = explain(&clusterpb.ExplainPipelineRequest{PipelineId: "p", StageId: "z-stage", Limit: 1})
	if st := r.Stages[0]; len(st.Candidates) != 1 || !st.Candidates[0].Runs || st.Offering != 2 {
		t.Error(st)
	}
	for _, bad := range []struct {
		req  *clusterpb.ExplainPipelineRequest
		code codes.Code
	}{
		{&clusterpb.ExplainPipelineRequest{}, codes.InvalidArgument},
		{&clusterpb.ExplainPipelineRequest{PipelineId: strings.Repeat("a", 300)}, codes.InvalidArgument},
		{&clusterpb.ExplainPipelineRequest{PipelineId: "p", Limit: 1001}, codes.InvalidArgument},
		{&clusterpb.ExplainPipelineRequest{PipelineId: "none"}, codes.NotFound},
		{&clusterpb.ExplainPipelineRequest{PipelineId: "p", StageId: "none"}, codes.NotFound},
	} {
		_, err := a.cluster.ExplainPipeline(a.ctx(), bad.req)
		wantCode(t, err, bad.code)
	}

	// The same words stand where pipelines are shown.
	got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "waits"})
	noError(t, err)
	if p := got.Status.Placements[1].PendingReason; p != `no sidecar offers transform service "nowhere"` {
		t.Error(p)
	}
}

// Goal: a dry run tells what would come of pipelines, and it comes so; it changes
// nothing.
func TestPlanPipelines(t *testing.T) {
	a := newStudiedAPI(t)
	a.offer("ns/one", "x:source", "y:transform", "v:transform")
	a.offer("ns/two", "z:sink")
	a.create(chain("p", "x", "y", "z"))
	a.place()
	plan := func(limit uint32, cfgs ...*adminpb.PipelineConfig) *clusterpb.PlanPipelinesResponse {
		t.Helper()
		var r *clusterpb.PlanPipelinesResponse
		a.unchanged(func() {
			var err error
			r, err = a.cluster.PlanPipelines(a.ctx(), &clusterpb.PlanPipelinesRequest{Pipelines: cfgs, Limit: limit})
			noError(t, err)
		})
		return r
	}
	changed := chain("p", "x", "z")
	waits := chain("r", "x", "nowhere", "z")
	r := plan(0, changed, chain("q", "x", "y", "z"), waits)
	var results []string
	for _, p := range r.Pipelines {
		results = append(results, fmt.Sprint(p.PipelineId, " ", p.Result, " ", p.Version))
	}
	if got := strings.Join(results, ", "); got != "p changed 1, q created 0, r created 0" {
		t.Error(got)
	}
	var lines []string
	for _, c := range r.Outlook.Changes {
		lines = append(lines, fmt.Sprintf("%s %s +%v -%v", c.PipelineId, c.StageId, c.Takes, c.Releases))
	}
	want := "p y-stage +[] -[ns/one]\nq x-stage +[ns/one] -[]\nq y-stage +[ns/one] -[]\nq z-stage +[ns/two] -[]\nr z-stage +[ns/two] -[]"
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	o := r.Outlook
	if o.Moves != 4 || o.LeastMoves != 4 || o.ChangesTotal != 5 || o.WaitingTotal != 2 || o.After.StagesPending != 2 ||
		o.Before.InstancesPlaced != 3 || o.After.InstancesPlaced != 6 || o.Before.MaxOverMean == 0 {
		t.Error(o)
	}
	if w := o.Waiting[1]; w.PipelineId != "r" || w.StageId != "nowhere-stage" || w.Reason != `no sidecar offers transform service "nowhere"` {
		t.Error(w)
	}
	if r := plan(1, changed, chain("q", "x", "y", "z"), waits); len(r.Outlook.Changes) != 1 || len(r.Outlook.Waiting) != 1 ||
		r.Outlook.ChangesTotal != 5 || r.Outlook.WaitingTotal != 2 {
		t.Error("cut:", r)
	}
	if r := plan(0, chain("p", "x", "y", "z")); r.Pipelines[0].Result != "unchanged" || len(r.Outlook.Changes) != 0 {
		t.Error(r)
	}
	loop := chain("loop", "x", "y")
	loop.Edges = append(loop.Edges, &adminpb.Edge{FromStage: "y-stage", ToStage: "x-stage"})
	if r := plan(0, loop, changed); r.Outlook != nil || r.Pipelines[0].Result != "invalid" || len(r.Pipelines[0].Violations) == 0 {
		t.Error(r)
	}

	// It comes as foretold.
	a.create(changed)
	a.create(chain("q", "x", "y", "z"))
	a.place()
	v := a.node.fsm.View()
	defer v.Close()
	runs := map[string]string{}
	for _, id := range []string{"p", "q"} {
		noError(t, v.PipelineAssignments(id, func(as *commandpb.Assignment) bool {
			for _, st := range as.Stages {
				if st.RemoteSidecarId == "" && !as.Revoked {
					runs[id+" "+st.StageId] = as.SidecarId
				}
			}
			return true
		}))
	}
	if got := fmt.Sprint(runs); got != "map[p x-stage:ns/one p z-stage:ns/two q x-stage:ns/one q y-stage:ns/one q z-stage:ns/two]" {
		t.Error(got)
	}

	for _, bad := range []*clusterpb.PlanPipelinesRequest{
		{},
		{Pipelines: []*adminpb.PipelineConfig{changed, changed}},
		{Pipelines: []*adminpb.PipelineConfig{{}}},
		{Pipelines: []*adminpb.PipelineConfig{changed}, Limit: 10_001},
		{Pipelines: make([]*adminpb.PipelineConfig, 1001)},
	} {
		for i, p := range bad.Pipelines {
			if p == nil {
				bad.Pipelines[i] = proto.Clone(changed).(*adminpb.PipelineConfig)
			}
		}
		_, err := a.cluster.PlanPipelines(a.ctx(), bad)
		wantCode(t, err, codes.InvalidArgument)
	}
}

// Goal: of a stage in a handover it is said which sidecar has yet to let go of it, in
// the words that the pipeline's status has.
func TestExplainDuringHandover(t *testing.T) {
	a := newStudiedAPI(t)
	a.offer("ns/one", "x:source")
	a.offer("ns/two", "x:source")
	a.offer("ns/sink", "y:sink")
	a.create(chain("p", "x", "y"))
	a.place()
	ask := func() (explained, shown string) {
		t.Helper()
		e, err := a.cluster.ExplainPipeline(a.ctx(), &clusterpb.ExplainPipelineRequest{PipelineId: "p", StageId: "x-stage"})
		noError(t, err)
		r, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
		noError(t, err)
		return e.Stages[0].PendingReason, r.GetStatus().GetPlacements()[0].GetPendingReason()
	}
	if e, s := ask(); e != "" || s != "" {
		t.Fatalf("it runs, and waits because %q, %q", e, s)
	}
	e, err := a.cluster.ExplainPipeline(a.ctx(), &clusterpb.ExplainPipelineRequest{PipelineId: "p"})
	noError(t, err)
	on := e.Stages[0].SidecarIds[0]
	a.node.must(t, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{
		Handovers: true, Changes: []*commandpb.AssignmentChange{{
			SidecarId: on, PipelineId: "p", SidecarGeneration: 1, Revoke: true, Releases: []string{"x-stage"}, ReleaseTimeoutMs: 60_000,
		}},
	}}})
	if e, s := ask(); e != s || !strings.Contains(e, on+" was told to let go of it and has not confirmed that") {
		t.Fatalf("explained as %q, shown as %q", e, s)
	}
}

// Goal: what a loss would come to is told, of sidecars that are there, and nothing
// is lost for it.
func TestWhatIf(t *testing.T) {
	a := newStudiedAPI(t)
	a.offer("ns/one", "x:source", "y:transform")
	a.offer("ns/two", "x:source", "y:transform")
	a.offer("ns/sink", "z:sink")
	a.create(chain("p", "x", "y", "z"))
	a.place()
	ask := func(ids ...string) *clusterpb.WhatIfResponse {
		t.Helper()
		var r *clusterpb.WhatIfResponse
		a.unchanged(func() {
			var err error
			r, err = a.cluster.WhatIf(a.ctx(), &clusterpb.WhatIfRequest{LoseSidecars: ids})
			noError(t, err)
		})
		return r
	}
	e, err := a.cluster.ExplainPipeline(a.ctx(), &clusterpb.ExplainPipelineRequest{PipelineId: "p"})
	noError(t, err)
	on := e.Stages[0].SidecarIds[0]
	if r := ask(on); r.Lost != 1 || r.Outlook.Moves != 2 || r.Outlook.LeastMoves != 2 || r.Outlook.WaitingTotal != 0 {
		t.Error(r)
	}
	r := ask("ns/sink", on)
	if r.Lost != 2 || r.Outlook.WaitingTotal != 3 || r.Outlook.After.StagesPending != 3 {
		t.Error(r)
	}
	for _, w := range r.Outlook.Waiting {
		if w.StageId == "z-stage" && w.Reason != `every sidecar that offers sink service "z" has expired: ns/sink` {
			t.Error(w)
		}
	}
	for _, bad := range []struct {
		req  *clusterpb.WhatIfRequest
		code codes.Code
		text string
	}{
		{&clusterpb.WhatIfRequest{}, codes.InvalidArgument, "neither a sidecar nor a zone"},
		{&clusterpb.WhatIfRequest{LoseSidecars: []string{on, "ns/none", "ns/nobody"}}, codes.NotFound, `there is no sidecar "ns/nobody", "ns/none"`},
		{&clusterpb.WhatIfRequest{LoseZones: []string{"west"}}, codes.NotFound, `no sidecar is in zone "west"`},
		{&clusterpb.WhatIfRequest{LoseZones: []string{""}}, codes.NotFound, `no sidecar is in zone ""`},
		{&clusterpb.WhatIfRequest{LoseSidecars: make([]string, 10_001)}, codes.InvalidArgument, "the limit is 10000"},
	} {
		_, err := a.cluster.WhatIf(a.ctx(), bad.req)
		wantCode(t, err, bad.code)
		if !strings.Contains(err.Error(), bad.text) {
			t.Errorf("%v, want %s", err, bad.text)
		}
	}
}

// Goal: how good the place of a pipeline is, and what the leader's last plan moved.
func TestPlacementQuality(t *testing.T) {
	moved := func(string) (placement.Quality, uint64, bool) { return placement.Quality{}, 0, false }
	a := newAPI(t, func(c *ServerConfig) {
		c.PipelineQuality = control.PipelineQuality
		c.Moved = func(id string) (placement.Quality, uint64, bool) { return moved(id) }
	})
	a.offer("ns/one", "x:source", "y:transform")
	a.offer("ns/two", "z:sink")
	a.create(chain("p", "x", "y", "z"))
	a.place()
	get := func(id string) (*clusterpb.GetPlacementQualityResponse, error) {
		return a.cluster.GetPlacementQuality(a.ctx(), &clusterpb.GetPlacementQualityRequest{PipelineId: id})
	}
	r, err := get("p")
	noError(t, err)
	q := r.Quality
	if q.InstancesPlaced != 3 || q.Edges != 2 || q.EdgesInPod != 1 || q.LocalEdgeShare != 0.5 || q.HighestLoad != 2 || q.MaxOverMean != 1 || r.LastPlan != nil {
		t.Error(r)
	}
	_, err = get("none")
	wantCode(t, err, codes.NotFound)
	_, err = get("")
	wantCode(t, err, codes.Unavailable) // it has not planned yet
	moved = func(id string) (placement.Quality, uint64, bool) {
		if id == "p" {
			return placement.Quality{Moves: 3, Least: 2}, 7, true
		}
		return placement.Quality{Moves: 5, Least: 4, Asked: 9, Edges: 4, InPod: 3}, 8, true
	}
	r, err = get("p")
	noError(t, err)
	if !proto.Equal(r.LastPlan, &clusterpb.PlanMoves{Revision: 7, Moves: 3, LeastMoves: 2}) {
		t.Error(r)
	}
	r, err = get("")
	noError(t, err)
	if r.LastPlan.GetMoves() != 5 || r.Quality.InstancesAsked != 9 || r.Quality.LocalEdgeShare != 0.75 {
		t.Error(r)
	}
	a.node.setLeader(0, nil)
	r, err = get("p") // without what the leader knows
	noError(t, err)
	if r.Quality.GetInstancesPlaced() != 3 || r.LastPlan != nil {
		t.Error(r)
	}
	_, err = get("")
	wantCode(t, err, codes.Unavailable)
}

// busyStudy has no time for anybody.
type busyStudy struct{ PlacementStudy }

func (busyStudy) Explain(context.Context, string, placement.Query) ([]placement.StageStatus, router.Point, error) {
	return nil, router.Point{}, fmt.Errorf("%w: others ask", raftnode.ErrBusy)
}

// Goal: a node that has no time to explain says so to who asks for that, and still
// shows its pipelines.
func TestBusyStudy(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) { c.Placement = busyStudy{} })
	a.create(chain("p", "x", "y"))
	_, err := a.cluster.ExplainPipeline(a.ctx(), &clusterpb.ExplainPipelineRequest{PipelineId: "p"})
	wantCode(t, err, codes.ResourceExhausted)
	got, err := a.admin.ListPipelines(a.ctx(), &adminpb.ListPipelinesRequest{})
	noError(t, err)
	if r := got.Statuses[0].Placements[0].PendingReason; !strings.Contains(r, "too busy to find out why") {
		t.Error(r)
	}
}
