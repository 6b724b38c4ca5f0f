package rpc

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

func TestStateGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewStateGate()
		changed := g.Changed()
		is := func(what string, shut, final bool) {
			t.Helper()
			if err := g.Err(); (err != nil) != shut || shut && !errors.Is(err, ErrQuarantined) {
				t.Errorf("%s: %v", what, err)
			}
			if err := g.Final(); (err != nil) != final {
				t.Errorf("%s, final: %v", what, err)
			}
		}
		is("new", false, false)
		g.Hold("they differ", time.Second)
		is("held", true, false)
		<-changed
		<-time.After(900 * time.Millisecond)
		g.Hold("they differ", time.Second)
		<-time.After(900 * time.Millisecond)
		synctest.Wait()
		is("held again", true, false)
		changed = g.Changed()
		<-time.After(200 * time.Millisecond)
		<-changed
		is("expired", false, false)
		g.Hold("they differ", time.Second)
		g.Release()
		is("released", false, false)
		g.Hold("they differ", time.Second)
		g.Quarantine("it is wrong")
		g.Hold("they differ", time.Second)
		g.Release()
		<-time.After(2 * time.Second)
		synctest.Wait()
		is("quarantined", true, true)
		if !strings.Contains(g.Err().Error(), "it is wrong") {
			t.Errorf("the reason is lost: %v", g.Err())
		}
	})
	var none *StateGate
	if none.Err() != nil || none.Final() != nil || none.Changed() != nil {
		t.Error("no gate is not an open gate")
	}
}

// Goal: while the gate is shut no call is answered from the state, whatever it
// asks for, watches that were open end, and what an operator needs still works.
func TestShutGateRefusesClients(t *testing.T) {
	gate := NewStateGate()
	a := newAPI(t, func(c *ServerConfig) { c.Gate = gate })
	refused := func(what string, err error) {
		t.Helper()
		s := Status(err)
		if s.Code() != codes.Unavailable || OutcomeOf(s) != NotDone || !strings.Contains(s.Message(), "because") {
			t.Errorf("%s: %v", what, err)
		}
	}
	health := func() healthgrpc.HealthCheckResponse_ServingStatus {
		r, err := healthgrpc.NewHealthClient(a.conn).Check(a.ctx(), &healthgrpc.HealthCheckRequest{})
		noError(t, err)
		return r.GetStatus()
	}
	eventually(t, "the node serves", func() bool { return health() == healthgrpc.HealthCheckResponse_SERVING })
	watch, err := a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{})
	noError(t, err)
	_, err = watch.Recv()
	noError(t, err)

	gate.Hold("because", time.Hour)
	for err = nil; err == nil; {
		_, err = watch.Recv()
	}
	refused("an open watch", err)
	watch, err = a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	refused("a new watch", err)
	_, err = a.admin.ListPipelines(a.ctx(), &adminpb.ListPipelinesRequest{})
	refused("a read", err)
	_, err = a.admin.ListPipelines(a.with(MetadataConsistency, "stale"), &adminpb.ListPipelinesRequest{})
	refused("a stale read", err)
	_, err = a.checkpoint.CommitOffset(a.ctx(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
	refused("a write", err)
	_, err = a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p"})
	refused("a write that the state would answer", err)
	eventually(t, "the node does not serve", func() bool { return health() == healthgrpc.HealthCheckResponse_NOT_SERVING })
	st, err := a.admin.GetClusterStatus(a.ctx(), &adminpb.GetClusterStatusRequest{})
	if err != nil || st.GetHealth() != adminpb.ClusterHealth_CLUSTER_HEALTH_UNHEALTHY {
		t.Errorf("the status of a cluster that answers nobody: %v %v", st.GetHealth(), err)
	}
	_, err = a.cluster.GetStateHash(a.ctx(), &clusterpb.GetStateHashRequest{})
	noError(t, err)

	gate.Release()
	_, err = a.admin.ListPipelines(a.ctx(), &adminpb.ListPipelinesRequest{})
	noError(t, err)
	eventually(t, "the node serves again", func() bool { return health() == healthgrpc.HealthCheckResponse_SERVING })
	watch, err = a.registry.WatchServices(a.ctx(), &registrypb.WatchServicesRequest{})
	noError(t, err)
	_, err = watch.Recv()
	noError(t, err)
}

// Goal: a leader that knows its state to be wrong takes no command, from nobody,
// and says so; one on its way is not answered by what that state made of it.
func TestShutGateRefusesCommands(t *testing.T) {
	checkLeaks(t)
	gate := NewStateGate()
	x := newForwarding(t, func(c *ForwarderConfig) { c.Gate = gate; c.MaxWait = 200 * time.Millisecond })
	x.lead(x.station, 1)
	pending := make(chan func(raftnode.Result, error), 1)
	x.node.propose = func(_ []byte, done func(raftnode.Result, error)) { pending <- done }
	ch := x.submit(onceCommand("p"))
	done := <-pending
	gate.Quarantine("because")
	done(raftnode.Result{Index: 1, Value: &commandpb.Result{Revision: 1}}, nil)
	if a := get(t, ch); !errors.Is(a.err, raftnode.ErrAmbiguous) {
		t.Errorf("a command on its way: %+v", a)
	}
	if a := get(t, x.submit(onceCommand("p"))); !errors.Is(a.err, ErrQuarantined) || OutcomeOf(Status(a.err)) != NotDone {
		t.Errorf("a new command: %+v", a)
	}
	select {
	case <-pending:
		t.Error("it was proposed all the same")
	default:
	}
}

// A follower hears why the leader refuses, and waits for another one.
func TestShutGateRefusesForwarded(t *testing.T) {
	checkLeaks(t)
	gate := NewStateGate()
	x := newForwarding(t, nil)
	x.two.config = func(c *PeerServerConfig) { c.Gate = gate }
	x.two.stopServer()
	x.two.restartServer()
	var e echo
	x.two.node.propose, x.tree.node.propose = e.propose, e.propose
	x.lead(x.two, 1)
	if a := get(t, x.submit(onceCommand("first"))); a.err != nil {
		t.Fatalf("with an open gate: %v", a.err)
	}
	gate.Quarantine("because")
	// One that gives up soon. Before it has heard from the leader it cannot tell why.
	f, err := NewForwarder(ForwarderConfig{Node: x.node, Transport: x.transport, MaxWait: 300 * time.Millisecond})
	noError(t, err)
	defer f.Close()
	eventually(t, "it is said why", func() bool {
		ch := make(chan answer, 1)
		f.SubmitFunc(onceCommand("second"), func(r *commandpb.Result, index uint64, err error) { ch <- answer{r, index, err} })
		s := Status(get(t, ch).err)
		if s.Code() != codes.Unavailable || OutcomeOf(s) != NotDone {
			t.Fatalf("with a shut gate: %v", s)
		}
		return strings.Contains(s.Message(), "because")
	})
	ch := x.submit(onceCommand("third"))
	x.lead(x.tree, 2)
	if a := get(t, ch); a.err != nil {
		t.Errorf("with another leader: %v", a.err)
	}
	if e.count("second") != 0 || e.count("third") != 1 {
		t.Errorf("proposed: %v", e.seen)
	}
}

func TestCheckStateGoesToTheLeader(t *testing.T) {
	full := false
	leader := newAPI(t, func(c *ServerConfig) {
		c.CheckState = func(_ context.Context, f bool) (*clusterpb.CheckStateResponse, error) {
			full = f
			return &clusterpb.CheckStateResponse{Equal: true, Index: 7}, nil
		}
	})
	r, err := leader.cluster.CheckState(leader.ctx(), &clusterpb.CheckStateRequest{Full: true})
	if err != nil || !r.GetEqual() || r.GetIndex() != 7 || !full {
		t.Errorf("on the leader: %v %v", r, err)
	}
	// Another node that cannot pass it on says who leads.
	follower := newAPI(t, func(c *ServerConfig) {
		c.CheckState = func(context.Context, bool) (*clusterpb.CheckStateResponse, error) {
			return nil, &raftnode.NotLeaderError{Leader: 2, Term: 1}
		}
	})
	follower.node.setLeader(2, nil)
	if _, err = follower.cluster.CheckState(follower.ctx(), &clusterpb.CheckStateRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("on a node that does not reach the leader: %v", err)
	}
}
