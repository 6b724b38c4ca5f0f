package recovery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Submitter replicates commands, whichever node leads.
type Submitter interface {
	// Submit returns what every replica computed for cmd. A refusal is a result,
	// not an error.
	Submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error)
}

// RefusedError is a refusal by the state machine: nothing was changed.
type RefusedError struct{ Rejection *commandpb.Rejection }

// Error implements error.
func (e *RefusedError) Error() string {
	return e.Rejection.GetSubject() + ": " + e.Rejection.GetReason()
}

// code returns the code of a refusal, zero for any other error.
func code(err error) commandpb.Code {
	if r, ok := err.(*RefusedError); ok {
		return r.Rejection.GetCode()
	}
	return commandpb.Code_CODE_UNSPECIFIED
}

// submit replicates one command until it is known what became of it: all
// commands here may be repeated. It gives up when ctx is done, when the refusal
// is definite, or when trying again does not help. When an attempt may have taken
// effect the error matches raftnode.ErrAmbiguous, whatever the last one said.
func (r *Recovery) submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	unknown := false
	fail := func(err error) error {
		if unknown && !errors.Is(err, raftnode.ErrAmbiguous) {
			return fmt.Errorf("%w: %w", raftnode.ErrAmbiguous, err)
		}
		return err
	}
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		cmd.TimeMs = uint64(r.c.Now().UnixMilli())
		res, err := r.c.Submit.Submit(ctx, cmd)
		if err == nil {
			if res.GetRejection() != nil {
				return res, &RefusedError{res.GetRejection()}
			}
			return res, nil
		}
		notDone, final := r.c.Judge(err)
		unknown = unknown || !notDone
		if final {
			return nil, fail(err)
		}
		if !sleep(ctx, pause) {
			return nil, fail(fmt.Errorf("recovery: %w (last: %w)", ctx.Err(), err))
		}
		r.log.Debug("a command has to be repeated", "err", err)
	}
}

// sleep waits for d; it returns false when ctx is done first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// progressEvery is how often the progress of an operation becomes a command.
const progressEvery = time.Second

// operation is a running operation of this node.
type operation struct {
	r *Recovery

	mu   sync.Mutex
	op   *commandpb.Operation
	last time.Time
}

// begin creates an operation.
func (r *Recovery) begin(ctx context.Context, op *commandpb.Operation) (*operation, error) {
	op.NodeId, op.State = r.c.NodeID, commandpb.OperationState_OPERATION_STATE_RUNNING
	_, err := r.submit(ctx, putOperation(op, true))
	if err != nil && code(err) != commandpb.Code_CODE_EXISTS {
		return nil, err
	}
	// Whoever asks this node for the operation must find it.
	if err := r.catchUp(ctx); err != nil {
		return nil, fmt.Errorf("%w: the operation was recorded: %w", raftnode.ErrAmbiguous, err)
	}
	return &operation{r: r, op: op, last: r.c.Now()}, nil
}

func putOperation(op *commandpb.Operation, create bool) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_PutOperation{
		PutOperation: &commandpb.PutOperation{Operation: proto.CloneOf(op), Create: create},
	}}
}

// phase moves the operation to its next phase, with new units.
func (o *operation) phase(ctx context.Context, name, unit string, total uint64) error {
	o.mu.Lock()
	o.op.Phase, o.op.Unit, o.op.Done, o.op.Total = name, unit, 0, total
	o.op.Message = ""
	o.last = o.r.c.Now()
	cmd := putOperation(o.op, false)
	o.mu.Unlock()
	_, err := o.r.submit(ctx, cmd)
	return err
}

// progress notes that done units are done, and tells everybody now and then. A
// lost one is made up for by the next.
func (o *operation) progress(ctx context.Context, done uint64) {
	o.mu.Lock()
	o.op.Done = done
	now := o.r.c.Now()
	due := now.Sub(o.last) >= progressEvery
	var cmd *commandpb.Command
	if due {
		o.last = now
		cmd = putOperation(o.op, false)
	}
	o.mu.Unlock()
	if due {
		_, _ = o.r.submit(ctx, cmd)
	}
}

// say sets what the next progress tells in words.
func (o *operation) say(text string) {
	o.mu.Lock()
	o.op.Message = text
	o.mu.Unlock()
}

// beat changes the record of the operation until ctx is done, so that the leader
// sees that somebody works on it, also where there is no progress to tell.
func (o *operation) beat(ctx context.Context) {
	for n := uint64(1); sleep(ctx, o.r.c.StallAfter/4); n++ {
		o.mu.Lock()
		o.op.Detail = binary.AppendUvarint(nil, n)
		cmd := putOperation(o.op, false)
		o.mu.Unlock()
		_, _ = o.r.submit(ctx, cmd) // the next makes up for it
	}
}

// beating runs fn while the operation beats.
func (o *operation) beating(ctx context.Context, fn func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { o.beat(ctx) })
	err := fn()
	cancel()
	wg.Wait()
	return err
}

// end records how the operation ended.
func (o *operation) end(ctx context.Context, state commandpb.OperationState, message string) error {
	o.mu.Lock()
	o.op.State, o.op.Message = state, message
	if state == commandpb.OperationState_OPERATION_STATE_DONE {
		o.op.Done = o.op.Total
	}
	cmd := putOperation(o.op, false)
	o.mu.Unlock()
	_, err := o.r.submit(ctx, cmd)
	return err
}

// Wait returns operation id once it has ended, or as it is when ctx is done.
func Wait(ctx context.Context, state *router.FSM, id string) (*commandpb.Operation, error) {
	for {
		// Subscribed before looking, so that an end in between is not missed.
		sub, err := state.Hub().Subscribe(state.Revision(), router.TableOperations)
		if err != nil {
			return nil, err
		}
		op, err := readOperation(state, id)
		for err == nil && op != nil && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
			if _, _, nerr := sub.Next(ctx); nerr != nil {
				if ctx.Err() != nil {
					sub.Close()
					return op, nil
				}
				break // the state was replaced: subscribe again
			}
			op, err = readOperation(state, id)
		}
		sub.Close()
		if err != nil || op == nil || op.State != commandpb.OperationState_OPERATION_STATE_RUNNING {
			return op, err
		}
	}
}

func readOperation(state *router.FSM, id string) (*commandpb.Operation, error) {
	v := state.Latest()
	defer v.Close()
	return v.Operation(id)
}
