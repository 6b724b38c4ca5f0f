package rpc

import (
	"context"
	"errors"
	"testing"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// A caller that leaves while its command waits is told that it was not done,
// and it is never proposed.
func TestForwarderCallerLeaves(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.two.node.propose = e.propose
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := x.f.Submit(ctx, onceCommand("left"))
		done <- err
	}()
	until(t, &x.node.event, "the command to wait", func() bool {
		x.node.event.fire() // look again at once
		return x.f.waiting()
	})
	cancel()
	if err := <-done; !errors.Is(err, ErrNotProposed) || !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	x.lead(x.two, 1)
	if a := get(t, x.submit(onceCommand("stayed"))); a.err != nil {
		t.Fatal(a.err)
	}
	if e.count("left") != 0 {
		t.Error("a command was proposed after its caller was told that it was not")
	}
	if _, err := x.f.Submit(ctx, onceCommand("late")); !errors.Is(err, ErrNotProposed) {
		t.Errorf("a context that was done before: %v", err)
	}
}

// The same, when the caller leaves at the moment at which the forwarder has
// taken the command up for another attempt and finds, again, nobody to send it
// to.
func TestForwarderCallerLeavesDuringAttempt(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	e := &echo{}
	x.two.node.propose = e.propose
	cmd := onceCommand("left")
	op := &operation{cmd: cmd, size: cmd.SizeVT(), deadline: time.Now().Add(patience),
		done: func(*commandpb.Result, uint64, error) { t.Error("who gave up has its answer already") }}
	if !op.giveUp() {
		t.Fatal("a waiting command could not be given up")
	}
	x.f.dispatch(op)
	x.lead(x.two, 1)
	if a := get(t, x.submit(onceCommand("stayed"))); a.err != nil {
		t.Fatal(a.err)
	}
	if e.count("left") != 0 {
		t.Error("a command was proposed after its caller was told that it was not")
	}
}

// Between our deadline and the client's, what was sent may still be answered. A
// failure that comes then is the answer: the command is not tried again, and not
// called unknown.
func TestForwarderFailureAfterOurDeadline(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	x.lead(x.station, 1)
	attempts := make(chan func(raftnode.Result, error), 2)
	x.node.propose = func(_ []byte, done func(raftnode.Result, error)) { attempts <- done }
	client, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	call := &callContext{Context: client, deadline: time.Now().Add(10 * time.Millisecond)}
	defer call.end()
	answered := make(chan error, 1)
	go func() {
		_, err := x.f.Submit(call, onceCommand("p"))
		answered <- err
	}()
	fail := <-attempts
	// Well after our deadline. Were it before, the outcome would have to be the
	// same.
	<-time.After(60 * time.Millisecond)
	x.node.follow(0, 2)
	fail(raftnode.Result{}, raftnode.ErrOverwritten)
	if err := <-answered; OutcomeOf(Status(err)) != NotDone {
		t.Errorf("%v does not say that nothing was done", err)
	}
	x.lead(x.station, 3)
	// Where the caller woke only after the failure, the command was put aside for
	// another attempt before it was given up, and is still to be thrown away.
	until(t, &x.node.event, "the forwarder to look at what waits", func() bool {
		x.node.event.fire() // look again at once
		return !x.f.waiting()
	})
	x.f.Close() // what was taken up has been dealt with
	if len(attempts) > 0 {
		t.Error("the command goes on after its caller has been told")
	}
}

// A caller that leaves while its command is with the leader is told so.
func TestForwarderCallerLeavesLate(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	proposed := make(chan struct{})
	x.two.node.propose = func([]byte, func(raftnode.Result, error)) { close(proposed) }
	x.lead(x.two, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-proposed
		cancel()
	}()
	_, err := x.f.Submit(ctx, onceCommand("p"))
	if !errors.Is(err, context.Canceled) || errors.Is(err, ErrNotProposed) {
		t.Fatal(err)
	}
	if OutcomeOf(Status(err)) != Unknown {
		t.Error("the outcome is not reported as unknown")
	}
}
