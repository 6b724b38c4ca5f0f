package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// ward is a leader with learners, and what is asked of it.
type ward struct {
	mu      sync.Mutex
	lead    raftnode.Leadership
	changed chan struct{}
	members []raftnode.Member
	peers   map[uint64]raftnode.PeerStatus
	voters  map[uint64]bool // besides the leader
	asked   []uint64        // learners that were to be promoted
	refuse  error
	ops     map[string]*commandpb.Operation
	written int
}

const wardCommit = 10_000

func newWard() *ward {
	return &ward{
		changed: make(chan struct{}), lead: raftnode.Leadership{Leader: 1, Term: 1, Leading: true},
		members: []raftnode.Member{{ID: 1}}, peers: map[uint64]raftnode.PeerStatus{}, voters: map[uint64]bool{}, ops: map[string]*commandpb.Operation{},
	}
}

func (w *ward) Leadership() raftnode.Leadership {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lead
}

func (w *ward) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *ward) ReadIndex(context.Context) (uint64, error) { return wardCommit, nil }

func (w *ward) Status() raftnode.Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := raftnode.Status{ID: 1, Leader: 1, Commit: wardCommit}
	st.Position = raftnode.Position{ConfState: &raftpb.ConfState{Voters: []uint64{1}}, Members: slices.Clone(w.members)}
	for _, m := range w.members {
		if m.ID == 1 || m.Removed {
			continue
		}
		if w.voters[m.ID] {
			st.Position.ConfState.Voters = append(st.Position.ConfState.Voters, m.ID)
		} else {
			st.Position.ConfState.Learners = append(st.Position.ConfState.Learners, m.ID)
		}
		st.Peers = append(st.Peers, w.peers[m.ID])
	}
	return st
}

func (w *ward) ChangeMembership(_ context.Context, c raftnode.Change) (raftnode.Position, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.Kind != raftnode.Promote || c.Replaces != 0 {
		return raftnode.Position{}, fmt.Errorf("unexpected change %v", c)
	}
	w.asked = append(w.asked, c.ID)
	if w.refuse != nil {
		return raftnode.Position{}, w.refuse
	}
	w.members = slices.DeleteFunc(w.members, func(m raftnode.Member) bool { return m.ID == c.ID })
	return raftnode.Position{}, nil
}

func (w *ward) Submit(_ context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.written++
	put := cmd.GetPutOperation()
	op := put.GetOperation()
	if put.GetCreate() && w.ops[op.GetOperationId()] != nil {
		return &commandpb.Result{Rejection: &commandpb.Rejection{Code: commandpb.Code_CODE_EXISTS}}, nil
	}
	w.ops[op.GetOperationId()] = op
	return &commandpb.Result{}, nil
}

func (w *ward) SubmitFunc(cmd *commandpb.Command, done func(*commandpb.Result, uint64, error)) {
	res, err := w.Submit(context.Background(), cmd)
	done(res, 0, err)
}

// learner adds one, or says how far it is.
func (w *ward) learner(m raftnode.Member, p raftnode.PeerStatus) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.ID = m.ID
	w.peers[m.ID] = p
	w.members = slices.DeleteFunc(w.members, func(o raftnode.Member) bool { return o.ID == m.ID && o.Removed })
	if !slices.ContainsFunc(w.members, func(o raftnode.Member) bool { return o.ID == m.ID }) {
		w.members = append(w.members, m)
	}
}

// voter is learner for one that votes.
func (w *ward) voter(m raftnode.Member, p raftnode.PeerStatus) {
	w.mu.Lock()
	w.voters[m.ID] = true
	w.mu.Unlock()
	w.learner(m, p)
}

// remove leaves a tombstone.
func (w *ward) remove(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.members {
		if w.members[i].ID == id {
			w.members[i].Removed = true
		}
	}
}

func (w *ward) promotions() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Trim(fmt.Sprint(w.asked), "[]")
}

func (w *ward) operation(id string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	op := w.ops[id]
	if op == nil {
		return "none"
	}
	return fmt.Sprintf("%s %s %d/%d", strings.TrimPrefix(op.State.String(), "OPERATION_STATE_"), op.Phase, op.Done, op.Total)
}

func (w *ward) run(t *testing.T, promote bool, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w.changed = make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		p := NewPromoter(PromoterConfig{Node: w, Submit: w, Promote: promote})
		var loop sync.WaitGroup
		loop.Go(func() { p.Run(ctx) })
		defer loop.Wait()
		defer cancel()
		test(t)
	})
}

var (
	following = raftnode.PeerStatus{Answered: true, State: "replicate", Match: wardCommit - 10}
	behind    = raftnode.PeerStatus{Answered: true, State: "replicate", Match: 2_000}
	receiving = raftnode.PeerStatus{Answered: true, State: "snapshot"}
	silent    = raftnode.PeerStatus{Answered: true, Silent: true, State: "replicate", Match: wardCommit}
	unheard   = raftnode.PeerStatus{State: "replicate", Match: wardCommit}
)

// Goal: a learner is promoted once it has been caught up, and answering, for
// several looks; an operation says how far it is until then.
func TestLearnerIsPromotedWhenItHasCaughtUp(t *testing.T) {
	w := newWard()
	w.run(t, true, func(t *testing.T) {
		const op = "catch-up-4-0000000000000007"
		for _, p := range []raftnode.PeerStatus{unheard, receiving, behind, silent} {
			w.learner(four, p)
			pass(5 * time.Second)
			if got := w.promotions(); got != "" {
				t.Fatalf("%+v was promoted", p)
			}
		}
		w.learner(four, receiving)
		pass(2 * time.Second)
		if got := w.operation(op); got != "RUNNING image 0/0" {
			t.Fatal(got)
		}
		w.learner(four, behind)
		pass(2 * time.Second)
		if got := w.operation(op); got != "RUNNING log 2000/10000" {
			t.Fatal(got)
		}
		// Once in a while is not enough.
		for range 10 {
			w.learner(four, following)
			pass(150 * time.Millisecond)
			w.learner(four, behind)
			pass(150 * time.Millisecond)
		}
		if got := w.promotions(); got != "" {
			t.Fatal("a learner that comes and goes was promoted")
		}
		w.learner(four, following)
		pass(time.Second)
		synctest.Wait()
		if got := w.promotions(); got != "4" {
			t.Fatalf("promoted: %q", got)
		}
		if got := w.operation(op); got != "DONE log 10000/10000" {
			t.Fatal(got)
		}
	})
}

// Goal: a refusal that passes is outlasted.
func TestPromotionIsTriedAgain(t *testing.T) {
	w := newWard()
	w.refuse = raftnode.ErrMembershipPending
	w.run(t, true, func(t *testing.T) {
		w.learner(raftnode.Member{ID: 4, Disk: 7}, following)
		pass(2 * time.Second)
		w.mu.Lock()
		tries := len(w.asked)
		w.refuse = nil
		w.mu.Unlock()
		if tries < 2 || tries > 10 {
			t.Fatalf("%d attempts in two seconds", tries)
		}
		pass(2 * time.Second)
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.members) != 1 || len(w.asked) != tries+1 {
			t.Fatalf("members %v after %d attempts", w.members, len(w.asked))
		}
	})
}

// Goal: read replicas, and all learners where that was asked for, stay what they
// are, and a leader does not go on writing that they have caught up.
func TestLearnersThatStay(t *testing.T) {
	for _, promote := range []bool{true, false} {
		w := newWard()
		w.run(t, promote, func(t *testing.T) {
			w.learner(raftnode.Member{ID: 4, Disk: 7, ReadReplica: promote}, following)
			pass(time.Minute)
			w.mu.Lock()
			written := w.written
			w.mu.Unlock()
			pass(time.Hour)
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			if len(w.asked) != 0 || len(w.members) != 2 {
				t.Fatalf("promoted: %v", w.asked)
			}
			if w.written != written || written > 3 {
				t.Fatalf("%d commands in the first minute, %d in the hour after", written, w.written-written)
			}
		})
	}
}

// Goal: a node that does not lead leaves the members alone.
func TestFollowerPromotesNobody(t *testing.T) {
	w := newWard()
	w.lead.Leading = false
	w.run(t, true, func(t *testing.T) {
		w.learner(raftnode.Member{ID: 4, Disk: 7}, following)
		pass(time.Minute)
		if got := w.promotions(); got != "" || w.written != 0 {
			t.Fatal(got, w.written)
		}
	})
}
