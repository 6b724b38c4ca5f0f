package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// catchUpWard is a group whose leaders and senders of images share one state, as
// nodes do.
type catchUpWard struct {
	*ward
	t     *testing.T
	state *replica
	loops sync.WaitGroup
	end   context.CancelFunc // of the leader
}

// newLeader makes another node the leader: what the last one remembered is gone.
func (c *catchUpWard) newLeader() {
	if c.end != nil {
		c.end()
		c.loops.Wait()
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.end = cancel
	p := NewPromoter(PromoterConfig{Node: c.ward, State: c.state, Submit: c.state, Promote: true})
	c.loops.Go(func() { p.Run(ctx) })
}

// sender is a node that sends images.
func (c *catchUpWard) sender(id uint64) *Transfers {
	return NewTransfers(TransfersConfig{
		Self: id, State: c.state, Submit: c.state, Position: func() raftnode.Position { return c.Status().Position },
	})
}

func (c *catchUpWard) all() []*commandpb.Operation {
	c.t.Helper()
	v := c.state.fsm.View()
	defer v.Close()
	var out []*commandpb.Operation
	if err := v.Operations(func(op *commandpb.Operation) bool {
		out = append(out, op)
		return true
	}); err != nil {
		c.t.Fatal(err)
	}
	return out
}

// only returns the one operation there is to be.
func (c *catchUpWard) only() *commandpb.Operation {
	c.t.Helper()
	synctest.Wait()
	all := c.all()
	if len(all) != 1 {
		c.t.Fatalf("%d operations: %v", len(all), all)
	}
	return all[0]
}

func (c *catchUpWard) cancelOp(id string) {
	c.t.Helper()
	c.state.do(&commandpb.Command{TimeMs: uint64(time.Now().UnixMilli()), Op: &commandpb.Command_CancelOperation{
		CancelOperation: &commandpb.CancelOperation{OperationId: id},
	}})
}

func catchingUp(t *testing.T, test func(t *testing.T, c *catchUpWard)) {
	t.Helper()
	r := newReplica(t, router.Options{})
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		r.enter()
		c := &catchUpWard{ward: w, t: t, state: r}
		defer func() { // see inBubble
			go func() { <-r.closed }()
			defer close(r.closed)
			if err := r.fsm.Close(); err != nil {
				t.Error(err)
			}
		}()
		c.newLeader()
		defer c.loops.Wait()
		defer func() { c.end() }()
		test(t, c)
	})
}

func line(op *commandpb.Operation) string {
	return fmt.Sprintf("%s %s %d/%d %s %d/s", strings.TrimPrefix(op.State.String(), "OPERATION_STATE_"), op.Phase, op.Done, op.Total, op.Unit, op.Rate)
}

var four = raftnode.Member{ID: 4, Disk: 7}

// Goal: while an image travels, the operation of the node shows its bytes, its rate
// and who sends it, whichever node that is, and the leader's own view of the node
// does not come between; one operation covers image and log, over a change of the
// leader and of the sender.
func TestCatchUpShowsTheImage(t *testing.T) {
	catchingUp(t, func(t *testing.T, c *catchUpWard) {
		c.learner(four, unheard)
		pass(1500 * time.Millisecond)
		if got := line(c.only()); got != "RUNNING log 10000/10000 entries 0/s" {
			t.Fatal(got)
		}
		ctx, held, end, err := c.sender(2).Begin(t.Context(), 4, 1_000_000)
		if err != nil {
			t.Fatal(err)
		}
		pass(100 * time.Millisecond) // not at the instant at which the sender looks
		for n := range int64(8) {
			held(50_000 * (n + 1))
			pass(time.Second)
			if n == 4 {
				c.newLeader()
			}
		}
		if op := c.only(); line(op) != "RUNNING image 400000/1000000 bytes 50000/s" || !strings.Contains(op.Message, "node 2") {
			t.Fatalf("%s: %s", line(op), op.Message)
		}
		// The sender dies: what it told does not stand for ever.
		end(errors.New("cut off"))
		if ctx.Err() == nil {
			t.Error("the context of an ended transfer is open")
		}
		pass(5 * time.Second)
		if got := line(c.only()); got != "RUNNING log 10000/10000 entries 0/s" {
			t.Fatal(got)
		}
		_, held, end, err = c.sender(3).Begin(t.Context(), 4, 1_000_000)
		if err != nil {
			t.Fatal(err)
		}
		held(700_000)
		end(nil)
		if got := line(c.only()); got != "RUNNING image 1000000/1000000 bytes 0/s" {
			t.Fatal(got)
		}
		c.learner(four, behind)
		pass(4 * time.Second)
		for m := uint64(3000); m < 9000; m += 1000 {
			c.learner(four, raftnode.PeerStatus{Answered: true, State: "replicate", Match: m})
			pass(time.Second)
		}
		if op := c.only(); op.Phase != "log" || op.Rate < 900 || op.Rate > 1100 {
			t.Fatal(line(op))
		}
		c.learner(four, following)
		pass(time.Second)
		if op := c.only(); line(op) != "DONE log 10000/10000 entries 0/s" || c.promotions() != "4" {
			t.Fatal(line(op), c.promotions())
		}
	})
}

// Goal: cancelling stops the image, says what becomes of the node, and holds, also
// for another sender and another leader: no image, no promotion, no new operation.
// Ten minutes later it is tried again, as another operation.
func TestCancelCatchUp(t *testing.T) {
	catchingUp(t, func(t *testing.T, c *catchUpWard) {
		c.learner(four, receiving)
		ctx, held, end, err := c.sender(2).Begin(t.Context(), 4, 1_000_000)
		if err != nil {
			t.Fatal(err)
		}
		held(10)
		pass(3 * time.Second)
		id := c.only().OperationId
		c.cancelOp(id)
		pass(time.Second)
		if !errors.Is(context.Cause(ctx), raftnode.ErrImageHeld) {
			t.Fatalf("the image goes on: %v", context.Cause(ctx))
		}
		end(context.Cause(ctx))
		op := c.only()
		if op.State != commandpb.OperationState_OPERATION_STATE_CANCELLED || !strings.Contains(op.Message, "member remove 4") {
			t.Fatalf("%s: %s", line(op), op.Message)
		}
		if _, _, _, err := c.sender(3).Begin(t.Context(), 4, 1_000_000); !errors.Is(err, raftnode.ErrImageHeld) {
			t.Fatalf("another node sends it: %v", err)
		}
		c.newLeader()
		c.learner(four, following) // by the log
		pass(9 * time.Minute)
		if c.only().OperationId != id || c.promotions() != "" {
			t.Fatalf("%s, promoted %q", line(c.only()), c.promotions())
		}
		c.learner(four, receiving)
		pass(2 * time.Minute)
		all := c.all()
		if len(all) != 2 || all[0].OperationId == id || line(all[0]) != "RUNNING image 0/0 bytes 0/s" {
			t.Fatalf("after ten minutes: %v", all)
		}
		_, _, end, err = c.sender(3).Begin(t.Context(), 4, 1_000_000)
		if err != nil {
			t.Fatal(err)
		}
		end(nil)
		c.learner(four, following)
		pass(4 * time.Second)
		if c.promotions() != "4" || line(c.all()[0]) != "DONE log 10000/10000 entries 0/s" {
			t.Fatal(c.promotions(), line(c.all()[0]))
		}
	})
}

// Goal: without an image under way a cancelled catch-up ends as well; by the leader
// that is there.
func TestCancelCatchUpByLog(t *testing.T) {
	catchingUp(t, func(t *testing.T, c *catchUpWard) {
		c.learner(four, behind)
		pass(2 * time.Second)
		c.cancelOp(c.only().OperationId)
		c.newLeader()
		pass(3 * time.Second)
		if op := c.only(); op.State != commandpb.OperationState_OPERATION_STATE_CANCELLED {
			t.Fatal(line(op))
		}
	})
}

// Goal: a voter that lacks much, or gets an image, is an operation too, ends done
// when it has caught up, though another node leads by then, and gets another
// operation the next time; one that is merely busy or down is none.
func TestVoterCatchesUp(t *testing.T) {
	catchingUp(t, func(t *testing.T, c *catchUpWard) {
		voter := raftnode.Member{ID: 2, Disk: 9}
		c.voter(voter, raftnode.PeerStatus{Answered: true, State: "replicate", Match: wardCommit - 1000})
		pass(5 * time.Second)
		c.voter(voter, raftnode.PeerStatus{Answered: true, Silent: true, State: "probe", Match: 10})
		pass(time.Minute)
		if all := c.all(); len(all) != 0 {
			t.Fatal(all)
		}
		c.voter(voter, behind)
		pass(3 * time.Second)
		if op := c.only(); line(op) != "RUNNING log 2000/10000 entries 0/s" || op.Subject != "node 2" {
			t.Fatal(line(op), op.Subject)
		}
		c.newLeader()
		c.voter(voter, following)
		pass(3 * time.Second)
		first := c.only()
		if first.State != commandpb.OperationState_OPERATION_STATE_DONE {
			t.Fatal(line(first))
		}
		c.voter(voter, receiving)
		pass(3 * time.Second)
		_, held, end, err := c.sender(1).Begin(t.Context(), 2, 500)
		if err != nil {
			t.Fatal(err)
		}
		held(100)
		pass(2 * time.Second)
		all := c.all()
		if len(all) != 2 || all[0].OperationId == first.OperationId || !strings.HasPrefix(line(all[0]), "RUNNING image 100/500 bytes") {
			t.Fatal(all)
		}
		end(nil)
		c.voter(voter, following)
		pass(3 * time.Second)
		if op := c.all()[0]; op.State != commandpb.OperationState_OPERATION_STATE_DONE {
			t.Fatal(line(op))
		}
	})
}

// Goal: what is left of a node that is no member any more is ended, and an image
// for a node that is not known yet is sent all the same.
func TestCatchUpOfStrangers(t *testing.T) {
	catchingUp(t, func(t *testing.T, c *catchUpWard) {
		_, held, end, err := c.sender(2).Begin(t.Context(), 4, 500)
		if err != nil {
			t.Fatal(err)
		}
		held(100)
		pass(2 * time.Second)
		if all := c.all(); len(all) != 0 {
			t.Fatal(all)
		}
		c.learner(four, receiving)
		pass(2 * time.Second)
		if op := c.only(); op.Done != 100 {
			t.Fatal(line(op))
		}
		end(errors.New("taken out"))
		c.remove(4)
		pass(5 * time.Second)
		if op := c.only(); op.State != commandpb.OperationState_OPERATION_STATE_CANCELLED || op.CancelRequested {
			t.Fatal(line(op))
		}
	})
}

// Goal: that a member has come back is recorded also when the leader that took it in
// died right afterwards; not before it is back.
func TestRejoinEndsWithoutItsLeader(t *testing.T) {
	catchingUp(t, func(t *testing.T, c *catchUpWard) {
		c.state.do(&commandpb.Command{TimeMs: 1, Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
			Create: true, Operation: &commandpb.Operation{
				OperationId: "back", Kind: router.OperationRejoin, NodeId: four.ID, State: commandpb.OperationState_OPERATION_STATE_RUNNING,
				Detail: router.RejoinDetail(6),
			},
		}}})
		is := func(want commandpb.OperationState) {
			t.Helper()
			pass(5 * time.Second)
			for _, op := range c.all() {
				if op.OperationId == "back" && op.State != want {
					t.Fatalf("%v, want %v", op.State, want)
				}
			}
		}
		is(commandpb.OperationState_OPERATION_STATE_RUNNING)
		c.voter(raftnode.Member{ID: four.ID, Disk: 6}, following)
		is(commandpb.OperationState_OPERATION_STATE_RUNNING)
		c.remove(four.ID)
		is(commandpb.OperationState_OPERATION_STATE_RUNNING)
		c.learner(four, receiving)
		is(commandpb.OperationState_OPERATION_STATE_DONE)
	})
}
