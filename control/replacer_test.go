package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// replacerWorld records what a Replacer does to it.
type replacerWorld struct {
	status    raftnode.Status
	changed   []raftnode.Change
	changeErr error
	transfers int
	put       []*commandpb.Operation
}

func (w *replacerWorld) Leadership() raftnode.Leadership { return raftnode.Leadership{} }
func (w *replacerWorld) Changed() <-chan struct{}        { return nil }
func (w *replacerWorld) ReadIndex(context.Context) (uint64, error) {
	return 0, nil
}
func (w *replacerWorld) Status() raftnode.Status { return w.status }

func (w *replacerWorld) ChangeMembership(_ context.Context, c raftnode.Change) (raftnode.Position, error) {
	w.changed = append(w.changed, c)
	return raftnode.Position{ConfState: &raftpb.ConfState{Voters: []uint64{1, 3, 4}}}, w.changeErr
}

func (w *replacerWorld) TransferLeader(context.Context, uint64) error {
	w.transfers++
	return nil
}

func (w *replacerWorld) Submit(_ context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	w.put = append(w.put, cmd.GetPutOperation().GetOperation())
	return &commandpb.Result{}, nil
}

func (w *replacerWorld) SubmitFunc(*commandpb.Command, func(*commandpb.Result, uint64, error)) {}

// Each step of replacing node 2 by node 4 follows from what is there, whoever led
// before: so a new leader goes on where the last one stopped.
func TestReplacerSteps(t *testing.T) {
	const done, failed, cancelled = commandpb.OperationState_OPERATION_STATE_DONE,
		commandpb.OperationState_OPERATION_STATE_FAILED, commandpb.OperationState_OPERATION_STATE_CANCELLED
	ready := raftnode.PeerStatus{ID: 4, Answered: true, State: "replicate", Match: 1000}
	behind := raftnode.PeerStatus{ID: 4, Answered: true, State: "replicate", Match: 10}
	for _, c := range []struct {
		name      string
		leader    uint64
		voters    []uint64
		learners  []uint64
		outgoing  []uint64
		removed   []uint64
		peer      raftnode.PeerStatus
		cancel    bool
		err       error
		change    raftnode.Change
		transfers int
		state     commandpb.OperationState
		text      string
	}{
		{name: "it is caught up", voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: ready,
			change: raftnode.Change{Kind: raftnode.Promote, ID: 4, Replaces: 2}, state: done, text: "in the place of node 2"},
		{name: "it lacks entries", voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: behind},
		{name: "it gets an image", voters: []uint64{1, 2, 3}, learners: []uint64{4},
			peer: raftnode.PeerStatus{ID: 4, Answered: true, State: "snapshot", Match: 1000}},
		{name: "it was promoted meanwhile", voters: []uint64{1, 2, 3, 4}, peer: ready,
			change: raftnode.Change{Kind: raftnode.Remove, ID: 2}, state: done},
		{name: "the old one leads", leader: 2, voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: ready, transfers: 1},
		{name: "the joint configuration is being left", voters: []uint64{1, 3, 4}, outgoing: []uint64{1, 2, 3}, peer: ready},
		{name: "an earlier leader did it", voters: []uint64{1, 3, 4}, removed: []uint64{2}, peer: ready, state: done},
		{name: "cancelled in time", voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: ready, cancel: true, state: cancelled, text: "nothing was changed"},
		{name: "cancelled too late", voters: []uint64{1, 3, 4}, removed: []uint64{2}, peer: ready, cancel: true, state: done},
		{name: "the new one was removed", voters: []uint64{1, 2, 3}, removed: []uint64{4}, state: failed, text: "the voters are as they were"},
		{name: "the old one was removed", voters: []uint64{1, 3}, learners: []uint64{4}, removed: []uint64{2}, peer: ready, state: failed, text: "no voter any more"},
		{name: "it does not answer for long", voters: []uint64{1, 2, 3}, learners: []uint64{4},
			peer: raftnode.PeerStatus{ID: 4, Silence: 2 * time.Minute}, state: failed, text: "has not answered"},
		{name: "refused", voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: ready, err: raftnode.ErrMembershipRefused,
			change: raftnode.Change{Kind: raftnode.Promote, ID: 4, Replaces: 2}, state: failed},
		{name: "not decided", voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: ready, err: raftnode.ErrAmbiguous,
			change: raftnode.Change{Kind: raftnode.Promote, ID: 4, Replaces: 2}},
		{name: "another change is pending", voters: []uint64{1, 2, 3}, learners: []uint64{4}, peer: ready, err: raftnode.ErrMembershipPending,
			change: raftnode.Change{Kind: raftnode.Promote, ID: 4, Replaces: 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &replacerWorld{changeErr: c.err}
			w.status = raftnode.Status{ID: max(c.leader, 1), Commit: 1000, Peers: []raftnode.PeerStatus{c.peer}}
			w.status.Position.ConfState = &raftpb.ConfState{Voters: c.voters, Learners: c.learners, VotersOutgoing: c.outgoing}
			for _, ids := range [][]uint64{c.voters, c.learners} {
				for _, id := range ids {
					w.status.Position.Members = append(w.status.Position.Members, raftnode.Member{ID: id})
				}
			}
			for _, id := range c.removed {
				w.status.Position.Members = append(w.status.Position.Members, raftnode.Member{ID: id, Removed: true})
			}
			r := NewReplacer(ReplacerConfig{Node: w, Submit: w})
			r.told = map[string]time.Time{}
			op := &commandpb.Operation{OperationId: "r", Kind: router.OperationReplace,
				State: commandpb.OperationState_OPERATION_STATE_RUNNING, CancelRequested: c.cancel}
			r.step(t.Context(), op, router.Replacement{Old: 2, New: 4}, w.status)

			var want []raftnode.Change
			if c.change.Kind != 0 {
				want = append(want, c.change)
			}
			if fmt.Sprint(w.changed) != fmt.Sprint(want) || w.transfers != c.transfers {
				t.Errorf("changes %v, %d transfers; want %v, %d", w.changed, w.transfers, want, c.transfers)
			}
			state := commandpb.OperationState_OPERATION_STATE_RUNNING
			var text string
			if n := len(w.put); n > 0 {
				state, text = w.put[n-1].State, w.put[n-1].Message
			}
			if c.state == 0 {
				c.state = commandpb.OperationState_OPERATION_STATE_RUNNING
			}
			if state != c.state || !strings.Contains(text, c.text) {
				t.Errorf("the operation is %v (%q), want %v (%q)", state, text, c.state, c.text)
			}
		})
	}
}

// While it waits, others keep their hands off the node that is to take over, and
// forget it when leadership has ended.
func TestReplacerHolds(t *testing.T) {
	r := NewReplacer(ReplacerConfig{})
	if r.Holds(4) {
		t.Error("held before anything was begun")
	}
	r.hold(map[uint64]bool{4: true})
	if !r.Holds(4) || r.Holds(5) {
		t.Error("node 4, and no other, must be held")
	}
	r.hold(nil)
	if r.Holds(4) {
		t.Error("held after the end")
	}
	if _, err := router.DecodeReplacement([]byte("{")); err == nil || errors.Is(err, context.Canceled) {
		t.Error("a damaged detail was read")
	}
}
