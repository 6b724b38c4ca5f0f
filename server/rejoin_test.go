package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc"
)

// running is a node that Run keeps.
type running struct {
	cancel context.CancelFunc
	ended  chan error
}

func (r running) stop(t *testing.T) {
	t.Helper()
	r.cancel()
	if err := <-r.ended; err != nil {
		t.Error(err)
	}
}

// awaitMember waits until member 3 is as want says.
func awaitMember(t *testing.T, s *Server, what string, want func(p raftnode.Position, m raftnode.Member) bool) {
	t.Helper()
	ctx := within(t)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		p := s.Node().Status().Position
		if m, ok := p.Member(3); ok && want(p, m) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: waited in vain; the members are %+v", what, p.Members)
		}
	}
}

func isVoter(p raftnode.Position, id uint64) bool {
	for _, v := range p.ConfState.GetVoters() {
		if v == id {
			return true
		}
	}
	return false
}

// takeOut removes node 3, as the leader does for an operator, or, with a note, for
// the member itself, whose directory was lost. It returns when all of nodes know.
func takeOut(t *testing.T, nodes []*Server, toComeBack bool) {
	t.Helper()
	if toComeBack {
		res, err := nodes[0].forwarder.Submit(within(t), &commandpb.Command{TimeMs: 1, Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
			Create: true, Operation: &commandpb.Operation{
				OperationId: "rejoin-3", Kind: "rejoin", NodeId: 3, State: commandpb.OperationState_OPERATION_STATE_RUNNING,
				Detail: []byte("0000000000000000"),
			},
		}}})
		if err != nil || res.GetRejection() != nil {
			t.Fatal(res, err)
		}
	}
	// Right after an election nobody has answered yet, and another may follow.
	ctx := within(t)
	for {
		lead := leader(t, nodes...)
		_, err := lead.Node().ChangeMembership(ctx, raftnode.Change{Kind: raftnode.Remove, ID: 3})
		if m, ok := lead.Node().Status().Position.Member(3); err == nil || ok && m.Removed {
			break
		}
		if !raftnode.NotDone(err) && !errors.Is(err, raftnode.ErrAmbiguous) || ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	// The leader's word is not yet the followers': one that is asked too early still
	// has the member as it was.
	for _, s := range nodes {
		awaitMember(t, s, "the member is taken out", func(_ raftnode.Position, m raftnode.Member) bool { return m.Removed })
	}
}

// Goal: a member whose directory was lost, and lost once more between its being
// taken out and its being added again, comes back by itself: all it hears from the
// others is that it was removed. It finds them though the one it heard it from is
// not the one that answers later.
func TestRejoinAfterItsDirectoryWasLostAgain(t *testing.T) {
	all, nodes := startCluster(t, 3, nil)
	commit(t, leader(t, nodes...), 1, 42)
	stop(t, nodes[2])
	if err := os.RemoveAll(all[2].DataDir); err != nil {
		t.Fatal(err)
	}
	takeOut(t, nodes[:2], true)

	ctx, cancel := context.WithCancel(context.Background())
	back := running{cancel, make(chan error, 1)}
	go func() { back.ended <- Run(ctx, &all[2], Options{Logger: logTo(t)}) }()
	awaitMember(t, nodes[0], "the member comes back", func(p raftnode.Position, m raftnode.Member) bool {
		return !m.Removed && isVoter(p, 3)
	})
	back.stop(t)
	if _, joining, err := datadir.ReadJoining(all[2].DataDir); joining || err != nil {
		t.Errorf("it is still joining: %v", err)
	}
	for _, s := range nodes[:2] {
		stop(t, s)
	}
}

// atEvent is a logger that calls do when an event of the name is logged.
type atEvent struct {
	slog.Handler
	name string
	do   func()
}

func (h atEvent) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

func (h atEvent) Handle(ctx context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "event" && a.Value.String() == h.name {
			h.do()
		}
		return true
	})
	return h.Handler.Handle(ctx, r)
}

// Goal: a node that is stopped just as it learns that it has to join again has not
// failed, and joins when it is started the next time.
func TestStoppedWhileLearningThatItHasToRejoin(t *testing.T) {
	all, nodes := startCluster(t, 3, nil)
	commit(t, leader(t, nodes...), 1, 42)
	stop(t, nodes[2])
	if err := os.RemoveAll(all[2].DataDir); err != nil {
		t.Fatal(err)
	}
	takeOut(t, nodes[:2], true)

	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	if err := Run(ctx, &all[2], Options{Logger: slog.New(atEvent{logTo(t).Handler(), "wiped", cancel})}); err != nil || ctx.Err() == nil {
		t.Errorf("it was stopped (%v), and said: %v", ctx.Err(), err)
	}
	if _, joining, err := datadir.ReadJoining(all[2].DataDir); !joining || err != nil {
		t.Fatalf("nothing says that it has to join: %v", err)
	}
	ctx, cancel = context.WithCancel(context.Background())
	back := running{cancel, make(chan error, 1)}
	go func() { back.ended <- Run(ctx, &all[2], Options{Logger: logTo(t)}) }()
	awaitMember(t, nodes[0], "the member comes back", func(p raftnode.Position, m raftnode.Member) bool {
		return !m.Removed && isVoter(p, 3)
	})
	back.stop(t)
	for _, s := range nodes[:2] {
		stop(t, s)
	}
}

// Goal: an empty node that several others refuse at once takes note of it once.
func TestRefusedBySeveralAtOnce(t *testing.T) {
	s := start(t, settings(t, t.TempDir(), 3)[0])
	var wg sync.WaitGroup
	for i := range uint64(32) {
		wg.Go(func() { s.refused(&rpc.RefusedError{Peer: 2 + i%2, Kind: rpc.Wiped, Told: true}) })
	}
	wg.Wait()
	if err := s.Err(); !errors.Is(err, errRejoin) {
		t.Errorf("it ends for: %v", err)
	}
	stop(t, s)
}

// Goal: a member that was removed for good is told so, on its directory, on an empty
// one, and each time it is started again.
func TestRemovedOnAnEmptyDirectory(t *testing.T) {
	all, nodes := startCluster(t, 3, nil)
	commit(t, leader(t, nodes...), 1, 42)
	stop(t, nodes[2])
	if err := os.RemoveAll(all[2].DataDir); err != nil {
		t.Fatal(err)
	}
	takeOut(t, nodes[:2], false)
	for range 2 {
		if err := Run(within(t), &all[2], Options{Logger: logTo(t)}); !errors.Is(err, ErrRemoved) {
			t.Fatalf("it was removed, and ran: %v", err)
		}
		if _, joining, err := datadir.ReadJoining(all[2].DataDir); joining || err != nil {
			t.Errorf("it still wants to join: %v", err)
		}
	}
	for _, s := range nodes[:2] {
		stop(t, s)
	}
}
