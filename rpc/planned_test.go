package rpc

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// planning is how far the placement of a test is.
type planning struct {
	mu      sync.Mutex
	upTo    uint64
	changed chan struct{}
}

func newPlanning() *planning { return &planning{changed: make(chan struct{})} }

func (p *planning) set(revision uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upTo = revision
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *planning) planned() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.upTo
}

func (p *planning) next() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// serveTCP serves a also where other nodes reach it, and returns where that is.
func (a *api) serveTCP() string {
	a.t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	noError(a.t, err)
	served := make(chan error, 1)
	go func() { served <- a.Serve(lis) }()
	a.t.Cleanup(func() {
		a.Shutdown(context.Background())
		noError(a.t, <-served)
	})
	return lis.Addr().String()
}

// Goal: a registration is answered once the placement has looked at it, though the
// sidecar gets nothing to do, on the leader and on any other node; and it holds what it
// got. Method: nothing else would end the wait before the test does.
func TestRegistrationWaitsForThePlanner(t *testing.T) {
	for _, name := range []string{"leader", "follower"} {
		t.Run(name, func(t *testing.T) {
			p := newPlanning()
			patient := func(c *ServerConfig) {
				c.PlacementWait, c.CallTimeout = time.Hour, time.Hour
				c.Planned, c.PlannedChanged = p.planned, p.next
			}
			leader := newAPI(t, patient)
			a := leader
			if name == "follower" {
				// The states are two: only while the leader's holds nothing is its revision
				// one that the follower has reached.
				addr := leader.serveTCP()
				node := newOneNode(t)
				node.id, node.members = 2, []raftnode.Member{{ID: 1, Addr: "n1:1"}, {ID: 2, Addr: "n2:1"}}
				a = serveAPI(t, node, patient, func(c *ServerConfig) {
					c.NodeID, c.Planned, c.PlannedChanged = 2, func() uint64 { return 0 }, newPlanning().next
					c.ClientAddr = func(id uint64) string { return map[uint64]string{1: addr}[id] }
				})
			}
			a.create(chain("p", "src", "transform", "sink"))
			a.caughtUp()
			type answer struct {
				resp *sidecarpb.RegisterSidecarResponse
				err  error
			}
			register := func(id string) (uint64, chan answer) {
				answered := make(chan answer, 1)
				go func() {
					resp, err := a.sidecar.RegisterSidecar(a.ctx(), sidecarRequest(id, "transform"))
					answered <- answer{resp, err}
				}()
				eventually(t, "it is registered", func() bool { sc, err := a.sidecarAPI().localSidecar(id); return err == nil && sc != nil })
				return a.node.fsm.Revision(), answered
			}
			revision, idle := register("ns/idle")
			p.set(revision - 1)
			select {
			case got := <-idle:
				t.Fatal("answered before the placement has looked at it:", got)
			default:
			}
			p.set(revision)
			if got := <-idle; got.err != nil || !got.resp.Success || len(got.resp.InitialAssignments) != 0 {
				t.Fatal(got)
			}
			revision, busy := register("ns/busy")
			a.assign("ns/busy", "p")
			p.set(revision)
			if got := <-busy; got.err != nil || len(got.resp.InitialAssignments) != 1 {
				t.Fatal(got)
			}
			// Without a leader nobody knows.
			leader.node.setLeader(0, raftnode.ErrNoLeader)
			_, err := leader.cluster.AwaitPlanned(leader.ctx(), &clusterpb.AwaitPlannedRequest{Revision: 1 << 40})
			wantCode(t, err, codes.Unavailable)
		})
	}
}
