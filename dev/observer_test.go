package dev

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"

	"conveyor.etl/router/internal/freeport"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// lively is a node that answers unless it is frozen.
type lively struct {
	adminpb.UnimplementedRouterAdminServer
	frozen atomic.Bool
}

func (l *lively) GetClusterStatus(ctx context.Context, _ *adminpb.GetClusterStatusRequest) (*adminpb.GetClusterStatusResponse, error) {
	if l.frozen.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &adminpb.GetClusterStatusResponse{NodeId: 1, LeaderId: 1, Term: 1, Revision: 1}, nil
}

func (l *lively) ListPipelines(context.Context, *adminpb.ListPipelinesRequest) (*adminpb.ListPipelinesResponse, error) {
	return &adminpb.ListPipelinesResponse{Pipelines: []*adminpb.PipelineConfig{{Id: "p"}}}, nil
}

// TestLookPastAFrozenNode: a node that does not answer keeps nobody from seeing what the
// others say; it is told once that it does not answer, and once that it does again, and
// nothing of one that has ended or has yet to begin.
func TestLookPastAFrozenNode(t *testing.T) {
	base := freeport.Any()
	for !freeport.Claim(base+1, base+2) {
		base = freeport.Any()
	}
	o := &Options{Nodes: 2, BasePort: base}
	nodes := []*lively{{}, {}}
	for i, n := range nodes {
		lis, err := net.Listen("tcp", o.clientAddr(i+1))
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer()
		adminpb.RegisterRouterAdminServer(srv, n)
		go func() { _ = srv.Serve(lis) }() // ends with Stop
		t.Cleanup(srv.Stop)
	}
	var said []string
	ob, err := newObserver(o, newEvents(func(e event) {
		if strings.Contains(e.text, "answer") {
			said = append(said, e.text)
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ob.close)
	pids := map[int]int{1: 1 << 30, 2: 1<<30 + 1} // no processes of this machine
	ob.pid = func(node int) int { return pids[node] }
	look := func(times int) {
		for range times {
			ob.look(t.Context())
		}
	}
	want := func(what string, lines ...string) {
		t.Helper()
		if strings.Join(said, "|") != strings.Join(lines, "|") {
			t.Fatalf("%s: told %q, want %q", what, said, lines)
		}
		said = nil
	}
	nodes[1].frozen.Store(true)
	look(missedLooks + 1)
	want("it has not answered yet")
	if s := ob.scene(); len(s.pipelines) != 1 || s.frozen[2] {
		t.Fatalf("beside a node that does not answer: %+v", s)
	}
	nodes[1].frozen.Store(false)
	for ob.scene().nodes[2] == nil { // a busy machine may need more than one
		look(1)
	}
	want("it answers for the first time")
	nodes[1].frozen.Store(true)
	look(missedLooks - 1)
	want("a moment without an answer")
	look(2)
	want("frozen", "node 2 does not answer, though its process runs, pid 1073741825")
	if s := ob.scene(); !s.frozen[2] || s.frozen[1] {
		t.Fatalf("%+v", s)
	}
	nodes[1].frozen.Store(false)
	for ob.scene().nodes[2] == nil {
		look(1)
	}
	want("it goes on", "node 2 answers again")
	nodes[1].frozen.Store(true)
	pids[2] = 0
	look(missedLooks + 1)
	want("it is down")
	pids[2] = 1<<30 + 2
	look(missedLooks + 1)
	want("it starts again")
}
