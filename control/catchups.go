package control

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// KindCatchUp is the kind of the operations that show how far a member is that
// lacks much of the state.
const KindCatchUp = "catch-up"

// The phases of a catch-up, as its operation shows them.
const (
	phaseImage = "image"
	phaseLog   = "log"
)

const (
	// CatchUpHold is how long after its catch-up was cancelled a node gets no image
	// and is not made a voter by itself.
	CatchUpHold = 10 * time.Minute
	// imageFresh is how long what was told of an image on its way stands: whoever
	// sends it tells it every second.
	imageFresh = 3 * time.Second
)

// catchUps are the operations of members that catch up. Two write them, on any
// nodes and without asking each other: the leader, which sees what entries a member
// lacks, and whoever sends it an image, which need not be the leader and sees the
// bytes. What binds them, also across a change of the leader, is that the id of the
// next operation of a member follows from the state alone.
type catchUps struct {
	state  State // nil: nothing is known of earlier ones
	submit Submitter
	now    func() time.Time
}

// memberID is the part that the ids of all catch-ups of a member have in common.
// With another directory it is another member.
func memberID(m raftnode.Member) string { return fmt.Sprintf("%s-%d-%016x", KindCatchUp, m.ID, m.Disk) }

// ofMember says whether op is a catch-up of m.
func ofMember(op *commandpb.Operation, m raftnode.Member) bool {
	rest, ok := strings.CutPrefix(op.OperationId, memberID(m))
	return ok && op.Kind == KindCatchUp && (rest == "" || rest[0] == '-')
}

// newest returns the newest catch-up of m, nil when there is none, and the id of
// the next one.
func (c *catchUps) newest(m raftnode.Member) (*commandpb.Operation, string, error) {
	if c.state == nil {
		return nil, memberID(m), nil
	}
	v := c.state.View()
	defer v.Close()
	var found *commandpb.Operation
	err := v.Operations(func(op *commandpb.Operation) bool {
		if ofMember(op, m) {
			found = op
		}
		return found == nil
	})
	if found == nil {
		return nil, memberID(m), err
	}
	// Whoever looks after the end of this one calls the next one alike.
	return found, memberID(m) + "-" + strconv.FormatUint(found.ModRevision, 10), err
}

// running says whether op is under way.
func running(op *commandpb.Operation) bool {
	return op != nil && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING
}

// held says for how long a member is to be left alone because its newest catch-up
// was cancelled.
func (c *catchUps) held(op *commandpb.Operation) time.Duration {
	if op == nil || op.State != commandpb.OperationState_OPERATION_STATE_CANCELLED || !op.CancelRequested {
		return 0
	}
	return max(0, CatchUpHold-c.now().Sub(time.UnixMilli(int64(op.EndedAtMs))))
}

// fresh says whether somebody sends an image and has told so just now.
func (c *catchUps) fresh(op *commandpb.Operation) bool {
	return running(op) && op.Phase == phaseImage && op.Total > 0 && c.now().Sub(time.UnixMilli(int64(op.UpdatedAtMs))) < imageFresh
}

// operation returns a catch-up of m that goes on from now, the running one or the
// next.
func operation(m raftnode.Member, now *commandpb.Operation, next string) *commandpb.Operation {
	id := next
	if running(now) {
		id = now.OperationId
	}
	return &commandpb.Operation{
		OperationId: id, Kind: KindCatchUp, Subject: fmt.Sprintf("node %d", m.ID), NodeId: m.ID,
		State: commandpb.OperationState_OPERATION_STATE_RUNNING,
	}
}

// put records op, the first time with create. What fails is made up for by the
// next.
func (c *catchUps) put(ctx context.Context, op *commandpb.Operation, create bool) error {
	submit := func(create bool) error {
		_, err := c.submit.Submit(ctx, &commandpb.Command{
			TimeMs: uint64(c.now().UnixMilli()),
			Op:     &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{Operation: op, Create: create}},
		})
		return err
	}
	if create {
		// Refused when another has just created it; then this one goes on with it.
		if err := submit(true); err != nil {
			return err
		}
	}
	return submit(false)
}

// cancel ends op as a user asked. What it means for the member is said there,
// where users look.
func (c *catchUps) cancel(ctx context.Context, m raftnode.Member, op *commandpb.Operation) error {
	op.State = commandpb.OperationState_OPERATION_STATE_CANCELLED
	op.Message = fmt.Sprintf("cancelled: for %v no image is sent to node %d and it is not made a voter by itself, then that is tried again; "+
		"it stays a member and gets the entries of the log: 'router member remove %d' takes it out", CatchUpHold, m.ID, m.ID)
	return c.put(ctx, op, false)
}
