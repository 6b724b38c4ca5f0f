package router

import (
	"conveyor.etl/router/router/commandpb"
)

// How long and how many request ids are remembered. These are part of the
// deterministic state machine: another value on one replica would make it
// differ, so they are no options.
const (
	requestRetentionMS = 10 * 60 * 1000
	maxRequests        = 100_000
	// Each remembered request drops up to this many old ones, so that the
	// queue shrinks after a burst without any command paying for all of it.
	requestsPerPurge = 4
)

// remembered returns the first result of a request id, if it is still known.
// A repeat with a different kind of command is refused: it is another request
// and answering it with the first result would be a lie.
func (t *tx) remembered(id string, h handler) (*commandpb.Result, bool) {
	var rec commandpb.RequestRecord
	if !t.load(t.buf.single(prefixRequest, id), &rec) || t.now > rec.TimeMs+requestRetentionMS {
		return nil, false
	}
	if rec.Op != h.op {
		return &commandpb.Result{
			Revision: t.clock.Revision, TimeMs: t.now,
			Rejection: reject(commandpb.Code_CODE_PRECONDITION, "request "+id,
				"this request id was used for another kind of command within the last ten minutes; use a new id for %s", h.name),
		}, true
	}
	if rec.Result == nil {
		rec.Result = &commandpb.Result{}
	}
	rec.Result.RepeatedRequest = true
	return rec.Result, true
}

// remember stores the running command's result under a request id and forgets
// what is too old or too many. It does not count as a change of the state.
func (t *tx) remember(id string, h handler) {
	c := t.clock
	rec := &commandpb.RequestRecord{Sequence: c.RequestTail, TimeMs: t.now, Op: h.op, Result: t.res}
	ref := &commandpb.RequestRef{RequestId: id, TimeMs: t.now}
	t.store(t.buf.single(prefixRequest, id), rec)
	t.store(t.buf.sequence(prefixRequestQueue, c.RequestTail), ref)
	c.RequestTail++
	for range requestsPerPurge {
		if c.RequestHead == c.RequestTail {
			return
		}
		var oldest commandpb.RequestRef
		k := t.buf.sequence(prefixRequestQueue, c.RequestHead)
		if t.load(k, &oldest) {
			if t.now <= oldest.TimeMs+requestRetentionMS && c.RequestTail-c.RequestHead <= maxRequests {
				return
			}
			t.remove(k)
			// An expired id may have been used again: its record then belongs
			// to a later place in the queue.
			var old commandpb.RequestRecord
			if k := t.buf.single(prefixRequest, oldest.RequestId); t.load(k, &old) && old.Sequence == c.RequestHead {
				t.remove(k)
			}
		}
		c.RequestHead++
	}
}
