package router

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// How many operations are kept and may run. Part of the state machine, so no
// options.
const (
	maxEndedOperations   = 1000
	maxRunningOperations = 256
	maxOperationDetail   = 64 << 10
	operationsPerPurge   = 4
)

// operation loads an operation; nil when absent. Each call returns a fresh
// message.
func (t *tx) operation(id string) *commandpb.Operation {
	o := &commandpb.Operation{}
	if !t.load(t.buf.single(prefixOperation, id), o) {
		return nil
	}
	return o
}

// saveOperation stores next in place of prev (nil = new) and, once it has
// ended, puts it into the queue of those that are forgotten some day.
func (t *tx) saveOperation(prev, next *commandpb.Operation) *commandpb.Rejection {
	next.ModRevision, next.UpdatedAtMs = t.revision, t.now
	ended := next.State != commandpb.OperationState_OPERATION_STATE_RUNNING
	if ended {
		next.EndedAtMs = t.now
	}
	v, err := encode(next)
	if err != nil {
		return invalid("operation "+next.OperationId, "it cannot be stored: a text in it is not valid UTF-8")
	}
	var before proto.Message
	if prev != nil {
		before = prev
	} else {
		t.count(countOperations, 1)
	}
	t.put(t.cell(t.buf.single(prefixOperation, next.OperationId)), v, nil)
	t.emit(TableOperations, next.OperationId, before, next)
	if ended {
		t.put(t.cell(t.buf.sequence(prefixOperationEnd, t.clock.OperationTail)), []byte(next.OperationId), nil)
		t.clock.OperationTail++
		t.purgeOperations()
	}
	return nil
}

// purgeOperations forgets the oldest of the ended operations that are too many.
func (t *tx) purgeOperations() {
	c := t.clock
	for range operationsPerPurge {
		if c.OperationTail-c.OperationHead <= maxEndedOperations {
			return
		}
		cl := t.cell(t.buf.sequence(prefixOperationEnd, c.OperationHead))
		id := string(cl.val)
		t.drop(cl)
		c.OperationHead++
		if old := t.operation(id); old != nil {
			t.remove(t.buf.single(prefixOperation, id))
			t.count(countOperations, -1)
			t.emit(TableOperations, id, old, nil)
		}
	}
}

// putOperation creates an operation or moves a running one on. Its times and
// revisions, and whether its end was asked for, are not the caller's.
//
// Rejections: INVALID (ids, texts, state, another kind), LIMIT (detail, running
// operations), EXISTS (create), NOT_FOUND and PRECONDITION (no longer running).
func (t *tx) putOperation(c *commandpb.PutOperation) *commandpb.Rejection {
	next := c.GetOperation()
	if next == nil {
		return invalid("operation", "the command holds no operation")
	}
	if r := first(
		checkID("operation id", next.OperationId), checkID("operation kind", next.Kind), checkText("subject", next.Subject),
		checkText("phase", next.Phase), checkText("unit", next.Unit), checkText("message", next.Message),
	); r != nil {
		return r
	}
	subject := "operation " + next.OperationId
	if _, ok := commandpb.OperationState_name[int32(next.State)]; !ok || next.State == commandpb.OperationState_OPERATION_STATE_UNSPECIFIED {
		return invalid(subject, "%d is no state an operation can be in", next.State)
	}
	if len(next.Detail) > maxOperationDetail {
		return limit(subject, "its detail is %d bytes long, at most %d are allowed", len(next.Detail), maxOperationDetail)
	}
	prev := t.operation(next.OperationId)
	next.EndedAtMs = 0
	if c.Create {
		if prev != nil {
			r := reject(commandpb.Code_CODE_EXISTS, subject, "it exists already, as a %s since revision %d", prev.Kind, prev.CreateRevision)
			r.Current = prev.ModRevision
			return r
		}
		if running := t.clock.Counts[countOperations] - (t.clock.OperationTail - t.clock.OperationHead); running >= maxRunningOperations {
			return limit(subject, "%d operations are running, at most %d are allowed; wait for one of them or cancel it", running, maxRunningOperations)
		}
		next.CancelRequested = false
		next.StartedAtMs, next.CreateRevision = t.now, t.revision
		return t.saveOperation(nil, next)
	}
	if prev == nil {
		return notFound("operation", next.OperationId)
	}
	t.res.Existed = true
	if prev.State != commandpb.OperationState_OPERATION_STATE_RUNNING {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "it has ended already, as %s", operationStateName(prev.State))
	}
	if failed := next.State == commandpb.OperationState_OPERATION_STATE_FAILED || next.State == commandpb.OperationState_OPERATION_STATE_CANCELLED; failed && t.swappedIn(next.OperationId) {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "it has put its state in force, so it cannot have failed")
	}
	if prev.Kind != next.Kind {
		return invalid(subject, "it is a %s, not a %s", prev.Kind, next.Kind)
	}
	next.CancelRequested = prev.CancelRequested
	next.StartedAtMs, next.CreateRevision = prev.StartedAtMs, prev.CreateRevision
	next.UpdatedAtMs, next.ModRevision = prev.UpdatedAtMs, prev.ModRevision
	if next.Message == "" && next.State == prev.State && next.Phase == prev.Phase {
		// What another node had to say of it stays until the next phase.
		next.Message = prev.Message
	}
	if proto.Equal(prev, next) {
		return nil
	}
	return t.saveOperation(prev, next)
}

// swappedIn reports whether the state of a restore is in force, or will be at the
// end of this entry.
func (t *tx) swappedIn(id string) bool {
	if t.swap != nil && t.swap.OperationId == id {
		return true
	}
	last := &commandpb.RestoreStage{}
	return t.load(t.buf.meta(metaRestored), last) && last.OperationId == id
}

// operationStateName is spelled out because the generated names may change.
func operationStateName(s commandpb.OperationState) string {
	switch s {
	case commandpb.OperationState_OPERATION_STATE_RUNNING:
		return "running"
	case commandpb.OperationState_OPERATION_STATE_DONE:
		return "done"
	case commandpb.OperationState_OPERATION_STATE_FAILED:
		return "failed"
	case commandpb.OperationState_OPERATION_STATE_CANCELLED:
		return "cancelled"
	}
	return "unknown"
}

// cancelOperation asks for the end of a running operation; who carries it out
// ends it. One that has ended, or was asked before, is left as it is.
//
// Rejections: INVALID (id), NOT_FOUND.
func (t *tx) cancelOperation(c *commandpb.CancelOperation) *commandpb.Rejection {
	if r := checkID("operation id", c.OperationId); r != nil {
		return r
	}
	prev := t.operation(c.OperationId)
	if prev == nil {
		return notFound("operation", c.OperationId)
	}
	t.res.Existed = true
	if prev.CancelRequested || prev.State != commandpb.OperationState_OPERATION_STATE_RUNNING {
		return nil
	}
	next := proto.Clone(prev).(*commandpb.Operation)
	next.CancelRequested = true
	return t.saveOperation(prev, next)
}

// Operation returns an operation, nil when there is none or it is no longer
// kept.
func (v *View) Operation(id string) (*commandpb.Operation, error) {
	return getRecord[commandpb.Operation](v, key(nil).single(prefixOperation, id))
}

// Operations lists all operations that run or are kept, the newest first. They
// are read before fn is called; there are at most 1,256.
func (v *View) Operations(fn func(*commandpb.Operation) bool) error {
	var all []*commandpb.Operation
	err := listTable(v, prefixOperation, "", 0, func(o *commandpb.Operation) bool {
		all = append(all, o)
		return true
	})
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b *commandpb.Operation) int {
		return cmp.Or(cmp.Compare(b.CreateRevision, a.CreateRevision), cmp.Compare(a.OperationId, b.OperationId))
	})
	for _, o := range all {
		if !fn(o) {
			return nil
		}
	}
	return nil
}
