package rpc

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// create creates a pipeline that has to be accepted.
func (a *api) create(cfg *adminpb.PipelineConfig) *adminpb.CreatePipelineResponse {
	a.t.Helper()
	resp, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: cfg})
	noError(a.t, err)
	if !resp.Success {
		a.t.Fatal(resp.Error)
	}
	return resp
}

// Goal: a call that was repeated and found nothing left to do has taken its
// place: when its first attempt arrives at last, it does not undo what came
// after.
func TestLateFirstAttempt(t *testing.T) {
	a := newAPI(t)
	one, two := chain("p", "kafka-events", "filter-active", "warehouse"), chain("p", "kafka-events", "filter-active", "warehouse")
	two.Name = "two"
	a.create(one)
	update := func(cfg *adminpb.PipelineConfig, id string) {
		t.Helper()
		resp, err := a.admin.UpdatePipeline(metadata.AppendToOutgoingContext(a.ctx(), MetadataRequestID, id),
			&adminpb.UpdatePipelineRequest{PipelineId: "p", Config: cfg})
		noError(t, err)
		if !resp.Success {
			t.Fatal(resp.Error)
		}
	}
	disable := func(enabled bool, id string) {
		t.Helper()
		ctx := metadata.AppendToOutgoingContext(a.ctx(), MetadataRequestID, id)
		var err error
		if enabled {
			_, err = a.admin.EnablePipeline(ctx, &adminpb.EnablePipelineRequest{PipelineId: "p"})
		} else {
			_, err = a.admin.DisablePipeline(ctx, &adminpb.DisablePipelineRequest{PipelineId: "p"})
		}
		noError(t, err)
	}
	now := func() *adminpb.PipelineConfig {
		t.Helper()
		got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
		noError(t, err)
		return got.Config
	}
	update(one, "r1") // the repeat, which finds what it wants
	update(two, "r2") // somebody else
	update(one, "r1") // the first attempt, held up until now
	if got := now(); got.GetName() != "two" {
		t.Errorf("an attempt whose call had returned came back and put %q in the place of \"two\"", got.GetName())
	}
	enabled := now().GetEnabled()
	disable(enabled, "r3")
	disable(!enabled, "r4")
	disable(enabled, "r3")
	if now().GetEnabled() == enabled {
		t.Error("an attempt whose call had returned came back and undid the switch")
	}
}

// Goal: the operator's calls, in the order and with the mistakes it makes, end
// in the state it wants, and its endless repetition costs no log entries.
func TestOperatorEmulation(t *testing.T) {
	a := newAPI(t)
	reconcile := func(cfg *adminpb.PipelineConfig, known bool) {
		t.Helper()
		if known {
			resp, err := a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{PipelineId: cfg.Id, Config: cfg})
			noError(t, err)
			if !resp.Success {
				t.Fatal(resp.Error)
			}
		} else {
			resp, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: cfg})
			noError(t, err)
			if !resp.Success || resp.PipelineId != cfg.Id {
				t.Fatal(resp)
			}
		}
		if cfg.Enabled {
			resp, err := a.admin.EnablePipeline(a.ctx(), &adminpb.EnablePipelineRequest{PipelineId: cfg.Id})
			noError(t, err)
			if !resp.Success {
				t.Fatal(resp.Error)
			}
		} else {
			resp, err := a.admin.DisablePipeline(a.ctx(), &adminpb.DisablePipelineRequest{PipelineId: cfg.Id, Drain: true})
			noError(t, err)
			if !resp.Success {
				t.Fatal(resp.Error)
			}
		}
	}
	status := func() *adminpb.PipelineStatus {
		t.Helper()
		got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "default/orders"})
		noError(t, err)
		if !got.Found {
			t.Fatal("not found")
		}
		return got.Status
	}
	cfg := chain("default/orders", "kafka-events", "filter-active", "warehouse")
	reconcile(cfg, false)
	if v := status().Version; v != 1 {
		t.Fatalf("version %d", v)
	}
	before := a.node.entryCount()
	for range 20 {
		reconcile(cfg, true)
		_, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{})
		noError(t, err)
	}
	reconcile(cfg, false) // its status lost the id: it creates what exists
	if n := a.node.entryCount(); n != before {
		t.Fatalf("%d log entries for calls that change nothing", n-before)
	}
	if v := status().Version; v != 1 {
		t.Fatalf("version %d after no change", v)
	}
	cfg = proto.Clone(cfg).(*adminpb.PipelineConfig)
	cfg.Enabled = false
	reconcile(cfg, true)
	if st := status(); st.Enabled || st.Version != 2 {
		t.Fatal(st)
	}
	// After a restore that lost it the operator updates what does not exist.
	lost := chain("default/lost", "a", "b")
	reconcile(lost, true)

	// Deletion: disable, then delete; and again, for what is gone.
	for range 2 {
		_, err := a.admin.DisablePipeline(a.ctx(), &adminpb.DisablePipelineRequest{PipelineId: "default/orders", Drain: true})
		noError(t, err)
		del, err := a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "default/orders"})
		noError(t, err)
		if !del.Success {
			t.Fatal(del.Error)
		}
	}
	got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "default/orders"})
	noError(t, err)
	if got.Found {
		t.Fatal("still there")
	}
}

// Goal: a broken graph is refused in the reply with every fault of it at once,
// and nothing reaches the log.
func TestInvalidPipeline(t *testing.T) {
	a := newAPI(t)
	cfg := chain("p", "src", "mid", "sink")
	cfg.Edges = append(cfg.Edges,
		&adminpb.Edge{FromStage: "sink-stage", ToStage: "src-stage"},
		&adminpb.Edge{FromStage: "mid-stage", ToStage: "nowhere"})
	before := a.node.entryCount()
	created, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: cfg})
	noError(t, err)
	if created.Success || len(created.Violations) < 2 {
		t.Fatal(created)
	}
	for _, v := range created.Violations {
		if !strings.Contains(created.Error, v) {
			t.Errorf("the error does not say %q: %s", v, created.Error)
		}
	}
	updated, err := a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{PipelineId: "p", Config: cfg})
	noError(t, err)
	if updated.Success || !slices.Equal(updated.Violations, created.Violations) {
		t.Fatal(updated)
	}
	if a.node.entryCount() != before {
		t.Fatal("it reached the log")
	}
}

// Goal: compare-and-set refuses with ABORTED or its kin and the current version,
// on every call that has it; a match goes through once.
func TestCompareAndSet(t *testing.T) {
	a := newAPI(t)
	cfg := chain("p", "src", "sink")
	create := func(expected uint64) error {
		_, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: cfg, ExpectedVersion: &expected})
		return err
	}
	wantCode(t, create(3), codes.NotFound)
	noError(t, create(0))
	wantCode(t, create(0), codes.AlreadyExists)
	next := chain("p", "src", "mid", "sink")
	update := func(expected uint64) (*adminpb.UpdatePipelineResponse, error) {
		return a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{PipelineId: "p", Config: next, ExpectedVersion: &expected})
	}
	_, err := update(7)
	wantCode(t, err, codes.Aborted)
	resp, err := update(1)
	noError(t, err)
	if !resp.Success || resp.Version != 2 {
		t.Fatal(resp)
	}
	_, err = update(1)
	wantCode(t, err, codes.Aborted)
	_, err = a.admin.DisablePipeline(a.ctx(), &adminpb.DisablePipelineRequest{PipelineId: "p", ExpectedVersion: proto.Uint64(1)})
	wantCode(t, err, codes.Aborted)
	dis, err := a.admin.DisablePipeline(a.ctx(), &adminpb.DisablePipelineRequest{PipelineId: "p", ExpectedVersion: proto.Uint64(2)})
	noError(t, err)
	if dis.Version != 3 {
		t.Fatal(dis)
	}
	_, err = a.admin.EnablePipeline(a.ctx(), &adminpb.EnablePipelineRequest{PipelineId: "p", ExpectedVersion: proto.Uint64(2)})
	wantCode(t, err, codes.Aborted)
	_, err = a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p", ExpectedVersion: proto.Uint64(2)})
	wantCode(t, err, codes.Aborted)
	del, err := a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p", ExpectedVersion: proto.Uint64(3)})
	noError(t, err)
	if !del.Existed {
		t.Fatal(del)
	}
}

// Goal: validate_only checks everything and changes nothing.
func TestValidateOnly(t *testing.T) {
	a := newAPI(t)
	before := a.node.entryCount()
	ok, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: chain("p", "a", "b"), ValidateOnly: true})
	noError(t, err)
	if !ok.Success {
		t.Fatal(ok)
	}
	bad, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: &adminpb.PipelineConfig{Id: "p"}, ValidateOnly: true})
	noError(t, err)
	if bad.Success || len(bad.Violations) == 0 {
		t.Fatal(bad)
	}
	_, err = a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{
		PipelineId: "p", Config: chain("p", "a", "b"), ValidateOnly: true, ExpectedVersion: proto.Uint64(4),
	})
	wantCode(t, err, codes.Aborted)
	if a.node.entryCount() != before {
		t.Fatal("something was changed")
	}
}

// Goal: a config comes back as it was sent, conditions and all.
func TestPipelineRoundTrip(t *testing.T) {
	a := newAPI(t)
	cfg := chain("p", "src", "mid", "sink")
	cfg.Description, cfg.Metadata = "what it does", map[string]string{"team": "x"}
	cfg.Stages[1].ServiceSelector.Labels = map[string]string{"zone": "b"}
	cfg.Stages[1].ServiceSelector.GroupId = "g"
	cond := &adminpb.Condition{Condition: &adminpb.Condition_And{And: &adminpb.AndCondition{Conditions: []*adminpb.Condition{
		{Condition: &adminpb.Condition_RecordType{RecordType: "order"}},
		{Condition: &adminpb.Condition_Or{Or: &adminpb.OrCondition{Conditions: []*adminpb.Condition{
			{Condition: &adminpb.Condition_Always{Always: "true"}},
			{Condition: &adminpb.Condition_MetadataMatch{MetadataMatch: &adminpb.MetadataMatch{Key: "k", Pattern: "^v"}}},
		}}}},
		{Condition: &adminpb.Condition_Not{Not: &adminpb.NotCondition{Condition: &adminpb.Condition{
			Condition: &adminpb.Condition_Expression{Expression: "x > 1"},
		}}}},
	}}}}
	cfg.Edges[0].Condition = cond
	cfg.Stages[0].RoutingRules = []*adminpb.RoutingRule{{Name: "r", Condition: cond, TargetStages: []string{"mid-stage"}, Priority: 3}}
	a.create(cfg)
	got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
	noError(t, err)
	if !proto.Equal(got.Config, cfg) {
		t.Fatalf("%v\nwant %v", got.Config, cfg)
	}
	if got.Status.CreatedAt == nil || got.Status.ModRevision == 0 || got.Revision < got.Status.ModRevision {
		t.Fatal(got.Status)
	}
}

func TestListPipelines(t *testing.T) {
	a := newAPI(t)
	for _, id := range []string{"a", "b", "c", "d"} {
		cfg := chain(id, "src", "sink")
		cfg.Enabled = id != "b"
		a.create(cfg)
	}
	ids := func(req *adminpb.ListPipelinesRequest) ([]string, string) {
		t.Helper()
		resp, err := a.admin.ListPipelines(a.ctx(), req)
		noError(t, err)
		var out []string
		for i, p := range resp.Pipelines {
			out = append(out, p.Id)
			if resp.Statuses[i].Enabled != p.Enabled {
				t.Fatal("statuses are not parallel")
			}
		}
		return out, resp.NextPageToken
	}
	if got, _ := ids(&adminpb.ListPipelinesRequest{}); !slices.Equal(got, []string{"a", "c", "d"}) {
		t.Fatal(got)
	}
	if got, _ := ids(&adminpb.ListPipelinesRequest{IncludeDisabled: true}); len(got) != 4 {
		t.Fatal(got)
	}
	var all []string
	token := ""
	for {
		page, next := ids(&adminpb.ListPipelinesRequest{PageSize: 2, PageToken: token})
		all = append(all, page...)
		if token = next; token == "" {
			break
		}
	}
	if !slices.Equal(all, []string{"a", "c", "d"}) {
		t.Fatal(all)
	}
}

// Goal: the status says where each stage runs, and in words why one does not.
func TestPlacementsAndPendingReasons(t *testing.T) {
	a := newAPI(t)
	a.create(chain("p", "kafka-events", "filter-active", "warehouse"))
	placements := func() []*adminpb.StagePlacement {
		t.Helper()
		got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
		noError(t, err)
		return got.Status.Placements
	}
	want := func(i int, text string) {
		t.Helper()
		if p := placements()[i]; !strings.Contains(p.PendingReason, text) || len(p.SidecarIds) > 0 {
			t.Fatalf("stage %d: %v, want %q", i, p, text)
		}
	}
	want(0, "no sidecar is registered")
	a.registerSidecar("ns/other", "unrelated")
	want(0, `no sidecar offers service "kafka-events"`)
	a.registerSidecar("ns/pod", "KafkaEvents")
	want(0, "not been placed yet")
	a.assign("ns/pod", "p")
	for i, p := range placements() {
		if !slices.Equal(p.SidecarIds, []string{"ns/pod"}) || p.PendingReason != "" {
			t.Fatalf("stage %d: %v", i, p)
		}
	}
	a.revoke("ns/pod", "p")
	_, err := a.admin.DisablePipeline(a.ctx(), &adminpb.DisablePipelineRequest{PipelineId: "p"})
	noError(t, err)
	want(1, "disabled")
}

// Goal: the cluster's status is what the operator shows, degraded when a voter
// is silent, and answers without a leader.
func TestClusterStatus(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) {
		c.ClientAddr = func(id uint64) string {
			if id == 1 {
				return "n1:50051"
			}
			return ""
		}
	})
	a.node.mu.Lock()
	a.node.members = append(a.node.members, raftnode.Member{ID: 2, Addr: "n2:50052"}, raftnode.Member{ID: 3, Addr: "n3:50052"})
	a.node.peers = []raftnode.PeerStatus{
		{ID: 1, Match: 9, Answered: true}, {ID: 2, Match: 8, Answered: true, Silence: 50 * time.Millisecond}, {ID: 3, Match: 4, Answered: true},
	}
	a.node.mu.Unlock()
	get := func() *adminpb.GetClusterStatusResponse {
		t.Helper()
		resp, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{})
		noError(t, err)
		return resp
	}
	st := get()
	if st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_HEALTHY || st.LeaderId != 1 || st.NodeId != 1 || len(st.Nodes) != 3 ||
		st.ClusterId != "0000000000c0ffee" || st.ClusterName != "test" || st.Version != "1.2.3" || len(st.Alarms) != 0 {
		t.Fatal(st)
	}
	if n := st.Nodes[0]; n.Role != adminpb.NodeRole_NODE_ROLE_LEADER || n.ClientAddress != "n1:50051" || n.Address != "n1:50052" {
		t.Fatal(n)
	}
	if n := st.Nodes[1]; n.Role != adminpb.NodeRole_NODE_ROLE_FOLLOWER || n.MatchIndex != 8 || !n.Healthy ||
		!n.LastContact.AsTime().Equal(a.clock.Now().Add(-50*time.Millisecond)) {
		t.Fatal(n)
	}
	// A leader that has only just taken over calls nobody healthy of whom it has not heard.
	a.node.mu.Lock()
	a.node.peers[2].Answered = false
	a.node.mu.Unlock()
	st = get()
	if n := st.Nodes[2]; st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_DEGRADED || n.Healthy || !n.HealthUnknown || n.LastContact != nil ||
		len(st.Alarms) != 1 || !strings.Contains(st.Alarms[0], "node 3 (n3:50052) has not answered the new leader yet") {
		t.Fatal(st)
	}
	silent := func(p raftnode.PeerStatus, alarm string) {
		t.Helper()
		a.node.mu.Lock()
		p.ID, p.Silent = 3, true
		a.node.peers[2] = p
		a.node.mu.Unlock()
		st = get()
		if st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_DEGRADED || st.Nodes[2].Healthy || len(st.Alarms) != 1 || !strings.Contains(st.Alarms[0], alarm) {
			t.Fatal(st)
		}
	}
	silent(raftnode.PeerStatus{Answered: true, Silence: 3 * time.Second}, "node 3 (n3:50052) has not answered the leader for 3s")
	silent(raftnode.PeerStatus{Silence: 3 * time.Second}, "node 3 (n3:50052) has not answered the leader since it began to lead")
	a.node.setLeader(0, raftnode.ErrNoLeader)
	st = get()
	if st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_UNHEALTHY || st.LeaderId != 0 ||
		!strings.Contains(st.Alarms[0], "there is no leader") || !strings.Contains(st.Alarms[0], "node 1 cannot reach node 3 (n3:50052)") {
		t.Fatal(st)
	}
}

// Goal: a cluster of two says in its status and its members that no voter may fail.
func TestTwoVotersAreFragile(t *testing.T) {
	a := newAPI(t)
	a.node.mu.Lock()
	a.node.members = append(a.node.members, raftnode.Member{ID: 2, Addr: "n2:50052"})
	a.node.voters = []uint64{1, 2}
	a.node.peers = []raftnode.PeerStatus{{ID: 2, Answered: true}}
	a.node.mu.Unlock()
	st, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{})
	noError(t, err)
	if len(st.Alarms) != 1 || !strings.Contains(st.Alarms[0], "losing either one stops the cluster") || st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_HEALTHY {
		t.Fatal(st)
	}
	members, err := a.cluster.ListMembers(a.ctx(), &clusterpb.ListMembersRequest{})
	noError(t, err)
	if !slices.Equal(members.Alarms, st.Alarms) {
		t.Fatal(members)
	}
}

func TestMetrics(t *testing.T) {
	a := newAPI(t, func(c *ServerConfig) {
		c.Metrics = func() map[string]float64 { return map[string]float64{"extra": 5} }
	})
	a.create(chain("p", "a", "b"))
	all, err := a.admin.GetMetrics(a.ctx(), &adminpb.GetMetricsRequest{})
	noError(t, err)
	for name, want := range map[string]float64{"raft_is_leader": 1, "raft_term": 1, "pipelines": 1, "extra": 5} {
		if got, ok := all.Metrics["conveyor_etl_router_"+name]; !ok || got != want {
			t.Errorf("%s is %v (%v), want %v", name, got, ok, want)
		}
	}
	some, err := a.admin.GetMetrics(a.ctx(), &adminpb.GetMetricsRequest{MetricNames: []string{"pipelines", "conveyor_etl_router_raft_term", "nonsense"}})
	noError(t, err)
	if len(some.Metrics) != 2 || some.Metrics["pipelines"] != 1 || some.Metrics["conveyor_etl_router_raft_term"] != 1 {
		t.Fatal(some)
	}
}
