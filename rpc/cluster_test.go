package rpc

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

func TestSidecarLists(t *testing.T) {
	a := newAPI(t)
	a.create(chain("p", "x", "y"))
	for _, id := range []string{"a/1", "a/2", "b/1", "b/2", "b/3"} {
		a.node.must(t, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{
			Sidecar: &commandpb.Sidecar{SidecarId: id, Namespace: id[:1], Endpoint: "h:1"},
		}}})
	}
	a.assign("b/2", "p")
	var all []string
	token := ""
	for {
		resp, err := a.cluster.ListSidecars(a.ctx(), &clusterpb.ListSidecarsRequest{Namespace: "b", PageSize: 2, PageToken: token})
		noError(t, err)
		for _, s := range resp.Sidecars {
			all = append(all, s.SidecarId)
			if (len(s.Assignments) == 1) != (s.SidecarId == "b/2") || s.State != clusterpb.SidecarState_SIDECAR_STATE_ALIVE {
				t.Fatal(s)
			}
		}
		if token = resp.NextPageToken; token == "" {
			break
		}
	}
	if !slices.Equal(all, []string{"b/1", "b/2", "b/3"}) {
		t.Fatal(all)
	}
	one, err := a.cluster.GetSidecar(a.ctx(), &clusterpb.GetSidecarRequest{SidecarId: "b/2"})
	noError(t, err)
	if !one.Found || one.Sidecar.Assignments[0].PipelineId != "p" {
		t.Fatal(one)
	}
	none, err := a.cluster.GetSidecar(a.ctx(), &clusterpb.GetSidecarRequest{SidecarId: "b/9"})
	noError(t, err)
	if none.Found || none.Revision == 0 {
		t.Fatal(none)
	}
	for i := range 2 {
		gone, err := a.cluster.DeregisterSidecar(a.ctx(), &clusterpb.DeregisterSidecarRequest{SidecarId: "b/2"})
		noError(t, err)
		if gone.Existed != (i == 0) {
			t.Fatal(gone)
		}
	}
}

func TestGroupLists(t *testing.T) {
	a := newAPI(t)
	a.register(registration("svc", "x"))
	for _, g := range []string{"g1", "g2", "g3"} {
		_, err := a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "svc", GroupId: g, PartitionCount: 2})
		noError(t, err)
	}
	resp, err := a.cluster.ListGroups(a.ctx(), &clusterpb.ListGroupsRequest{PageSize: 2})
	noError(t, err)
	if len(resp.Groups) != 2 || resp.NextPageToken != "g2" {
		t.Fatal(resp)
	}
	resp, err = a.cluster.ListGroups(a.ctx(), &clusterpb.ListGroupsRequest{PageSize: 2, PageToken: "g2"})
	noError(t, err)
	if len(resp.Groups) != 1 || resp.NextPageToken != "" {
		t.Fatal(resp)
	}
	one, err := a.cluster.GetGroup(a.ctx(), &clusterpb.GetGroupRequest{GroupId: "g1"})
	noError(t, err)
	if !one.Found || one.Group.PartitionCount != 2 || len(one.Group.Members[0].Partitions) != 2 {
		t.Fatal(one)
	}
	none, err := a.cluster.GetGroup(a.ctx(), &clusterpb.GetGroupRequest{GroupId: "g9"})
	noError(t, err)
	if none.Found {
		t.Fatal(none)
	}
}

func TestStateHash(t *testing.T) {
	a := newAPI(t)
	hash := func() *clusterpb.GetStateHashResponse {
		t.Helper()
		resp, err := a.cluster.GetStateHash(a.ctx(), &clusterpb.GetStateHashRequest{})
		noError(t, err)
		return resp
	}
	one := hash()
	_, err := a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
	noError(t, err)
	two := hash()
	if len(one.Hash) == 0 || bytes.Equal(one.Hash, two.Hash) || two.AppliedIndex != one.AppliedIndex+1 || two.NodeId != 1 {
		t.Fatal(one, two)
	}
}

// Goal: the live picture shows each change in words, from now or from a
// revision, and refuses what it cannot tell without a gap.
func TestWatchChanges(t *testing.T) {
	a := newAPI(t)
	a.create(chain("seed", "x", "y")) // revision 0 would mean "from now"
	stream, err := a.cluster.WatchChanges(a.ctx(), &clusterpb.WatchChangesRequest{})
	noError(t, err)
	_, err = stream.Header() // it watches from here on
	noError(t, err)
	start := a.node.fsm.Revision()
	a.create(chain("p", "x", "y"))
	a.registerSidecar("ns/pod", "transform")
	a.assign("ns/pod", "p")
	a.register(registration("svc", "x"))
	_, err = a.registry.JoinGroup(a.ctx(), &registrypb.JoinGroupRequest{ServiceId: "svc", GroupId: "g", PartitionCount: 1})
	noError(t, err)
	a.revoke("ns/pod", "p")
	_, err = a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p"})
	noError(t, err)
	want := []struct{ table, text string }{
		{"pipelines", "created with 2 stages, enabled"},
		{"sidecars", "registered at 10.0.0.7:50053"},
		{"assignments", "runs x-stage, y-stage of p"},
		{"services", "registered as x"},
		{"groups", "created with 1 partitions"},
		{"assignments", "taken from sidecar ns/pod"},
		{"pipelines", "deleted"},
	}
	check := func(stream clusterpb.Cluster_WatchChangesClient) {
		t.Helper()
		last := start
		for _, w := range want {
			ev, err := stream.Recv()
			noError(t, err)
			if ev.Table != w.table || !strings.Contains(ev.Summary, w.text) || ev.Revision <= last {
				t.Fatalf("%v after %d, want %v", ev, last, w)
			}
			if ev.Deleted != (w.text == "deleted") || strings.ContainsRune(ev.Key, 0) {
				t.Fatal(ev)
			}
			last = ev.Revision
		}
	}
	check(stream)
	again, err := a.cluster.WatchChanges(a.ctx(), &clusterpb.WatchChangesRequest{FromRevision: start})
	noError(t, err)
	check(again)
	some, err := a.cluster.WatchChanges(a.ctx(), &clusterpb.WatchChangesRequest{FromRevision: start, Tables: []string{"services"}})
	noError(t, err)
	ev, err := some.Recv()
	noError(t, err)
	if ev.Table != "services" {
		t.Fatal(ev)
	}
	future, err := a.cluster.WatchChanges(a.ctx(), &clusterpb.WatchChangesRequest{FromRevision: 1_000_000})
	noError(t, err)
	_, err = future.Recv()
	wantCode(t, err, codes.OutOfRange)
}

// Goal: a watch that broke between two changes of one revision is resumed
// without losing the second.
func TestWatchChangesSharedRevision(t *testing.T) {
	a := newAPI(t)
	a.create(chain("p", "x", "y"))
	a.registerSidecar("ns/pod", "transform")
	a.assign("ns/pod", "p")
	start := a.node.fsm.Revision()
	_, err := a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p"}) // and its assignment
	noError(t, err)
	seen := map[string]bool{}
	for from := start; len(seen) < 2; {
		ctx, cancel := context.WithCancel(a.ctx())
		stream, err := a.cluster.WatchChanges(ctx, &clusterpb.WatchChangesRequest{FromRevision: from})
		noError(t, err)
		for n := 0; n <= len(seen); n++ { // one further each time, then it breaks
			ev, err := stream.Recv()
			noError(t, err)
			if from = ev.Revision; !seen[ev.Table] {
				seen[ev.Table] = true
				break
			}
		}
		cancel()
		if from >= a.node.fsm.Revision() && len(seen) < 2 {
			t.Fatalf("resuming after %d leaves out what else changed in that revision; seen: %v", from, seen)
		}
	}
	if !seen["pipelines"] || !seen["assignments"] {
		t.Fatal(seen)
	}
}

// Goal: a transfer works from every node: a follower passes it on to the leader,
// once.
func TestTransferLeader(t *testing.T) {
	leader := newAPI(t)
	leader.node.mu.Lock()
	leader.node.members = []raftnode.Member{{ID: 1}, {ID: 2}, {ID: 3}}
	leader.node.voters = []uint64{1, 3}
	leader.node.mu.Unlock()
	// Who cannot lead is not tried.
	_, err := leader.cluster.TransferLeader(leader.ctx(), &clusterpb.TransferLeaderRequest{NodeId: 4})
	wantCode(t, err, codes.NotFound)
	_, err = leader.cluster.TransferLeader(leader.ctx(), &clusterpb.TransferLeaderRequest{NodeId: 2})
	wantCode(t, err, codes.FailedPrecondition)
	resp, err := leader.cluster.TransferLeader(leader.ctx(), &clusterpb.TransferLeaderRequest{NodeId: 3})
	noError(t, err)
	if resp.LeaderId != 3 || !slices.Equal(leader.node.moved, []uint64{3}) {
		t.Fatal(resp)
	}
	// It follows now and knows no address to pass the call on to.
	_, err = leader.cluster.TransferLeader(leader.ctx(), &clusterpb.TransferLeaderRequest{})
	wantCode(t, err, codes.Unavailable)
	// A call that was passed on is not passed on again.
	_, err = leader.cluster.TransferLeader(leader.with(metadataRelayed, "2"), &clusterpb.TransferLeaderRequest{})
	wantCode(t, err, codes.Unavailable)
	leader.node.setLeader(0, raftnode.ErrNoLeader)
	_, err = leader.cluster.TransferLeader(leader.ctx(), &clusterpb.TransferLeaderRequest{})
	wantCode(t, err, codes.Unavailable)
}

// Goal: a follower shows the cluster as its leader sees it, with its own
// position, and passes a transfer on; when the leader does not answer it shows
// what it knows itself.
func TestFollowerAsksLeader(t *testing.T) {
	leader := newAPI(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	noError(t, err)
	served := make(chan error, 1)
	go func() { served <- leader.Serve(lis) }()
	t.Cleanup(func() {
		leader.Shutdown(context.Background())
		noError(t, <-served)
	})
	members := []raftnode.Member{{ID: 1, Addr: "n1:50052"}, {ID: 2, Addr: "n2:50052"}, {ID: 3, Addr: "n3:50052"}}
	leader.node.mu.Lock()
	leader.node.members, leader.node.voters = members, []uint64{1, 2, 3}
	leader.node.peers = []raftnode.PeerStatus{{ID: 1, Match: 9, Answered: true}, {ID: 2, Match: 8, Answered: true}, {ID: 3, Match: 3, Silent: true}}
	leader.node.mu.Unlock()

	node := newOneNode(t)
	node.members, node.id = members, 2
	var mu sync.Mutex
	addr := lis.Addr().String()
	follower := serveAPI(t, node, func(c *ServerConfig) {
		c.NodeID = 2
		c.Reachable = func(id uint64) bool { return id == 3 }
		c.ClientAddr = func(id uint64) string {
			mu.Lock()
			defer mu.Unlock()
			if id == 1 {
				return addr
			}
			return ""
		}
	})
	st, err := follower.admin.GetClusterStatus(follower.ctx(), &adminpb.GetClusterStatusRequest{})
	noError(t, err)
	if st.NodeId != 2 || st.LeaderId != 1 || st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_DEGRADED || len(st.Alarms) != 1 {
		t.Fatal(st)
	}
	if st.Nodes[1].MatchIndex != 8 || st.Nodes[1].AppliedIndex != node.index || st.Nodes[1].Version != "1.2.3" || st.Nodes[2].Healthy {
		t.Fatal(st.Nodes)
	}
	_, err = follower.cluster.TransferLeader(follower.ctx(), &clusterpb.TransferLeaderRequest{NodeId: 1})
	noError(t, err)
	if !slices.Equal(leader.node.moved, []uint64{1}) {
		t.Fatal(leader.node.moved)
	}
	mu.Lock()
	addr = ""
	mu.Unlock()
	st, err = follower.admin.GetClusterStatus(follower.ctx(), &adminpb.GetClusterStatusRequest{})
	noError(t, err)
	// Nobody confirms what it knows, so it does not call the cluster healthy.
	if st.Health != adminpb.ClusterHealth_CLUSTER_HEALTH_DEGRADED || !st.Nodes[2].Healthy || st.Nodes[1].MatchIndex == 0 ||
		len(st.Alarms) != 1 || !strings.Contains(st.Alarms[0], "the leader, node 1, cannot be reached from node 2") {
		t.Fatal(st)
	}
}

// Goal: whichever node is asked shows of every node what it has applied and which
// release it is, as that node says itself, and nothing of one that cannot be reached.
func TestStatusAsksEveryNode(t *testing.T) {
	members := []raftnode.Member{{ID: 1, Addr: "n1:1"}, {ID: 2, Addr: "n2:1"}, {ID: 3, Addr: "n3:1"}, {ID: 4, Addr: "n4:1"}}
	var mu sync.Mutex
	addrs := map[uint64]string{4: "127.0.0.1:1"} // nobody listens there
	addr := func(id uint64) string {
		mu.Lock()
		defer mu.Unlock()
		return addrs[id]
	}
	nodes := make(map[uint64]*api)
	for id := uint64(1); id <= 3; id++ {
		serve := newAPI
		if id > 1 { // the first one looks for what all of them leave behind
			serve = func(t *testing.T, change ...func(*ServerConfig)) *api { return serveAPI(t, newOneNode(t), change...) }
		}
		a := serve(t, func(c *ServerConfig) {
			c.NodeID, c.ClientAddr, c.Version = id, addr, fmt.Sprint("1.0.", id)
		})
		a.node.mu.Lock()
		a.node.id, a.node.members, a.node.voters, a.node.index = id, members, []uint64{1, 2, 3, 4}, 100+id
		a.node.mu.Unlock()
		at := a.serveTCP()
		mu.Lock()
		addrs[id] = at
		mu.Unlock()
		nodes[id] = a
	}
	for _, a := range nodes {
		eventually(t, "it knows what all say of themselves", func() bool {
			st, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{})
			noError(t, err)
			as := 0
			for _, n := range st.Nodes {
				index, version := 100+n.NodeId, fmt.Sprint("1.0.", n.NodeId)
				if n.NodeId == 4 {
					index, version = 0, ""
				}
				if n.AppliedIndex == index && n.Version == version {
					as++
				} else if n.AppliedIndex != 0 || n.Version != "" { // it may be slow, but not wrong
					t.Fatalf("asked %d: node %d has applied %d and is %q", st.NodeId, n.NodeId, n.AppliedIndex, n.Version)
				}
			}
			return as == 4
		})
	}
}
