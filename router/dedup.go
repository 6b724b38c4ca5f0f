package router

import (
	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

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

// digestOf tells the operations under one request id apart. It covers what the
// caller asked for and nothing that whoever proposed it added: a repeat comes
// with another time, and may come through another node. Zero means that it
// cannot be told, as of an operation with texts that cannot be stored.
//
// It is taken before the operation is applied, which may change it in place.
func digestOf(c *commandpb.Command) uint64 {
	only := &commandpb.Command{Op: c.Op}
	var b []byte
	var err error
	switch op := c.Op.(type) {
	case *commandpb.Command_JoinGroup:
		// The number of partitions is looked up when the caller names none.
		if op.JoinGroup != nil {
			count := op.JoinGroup.PartitionCount
			op.JoinGroup.PartitionCount = 0
			b, err = only.MarshalVT()
			op.JoinGroup.PartitionCount = count
		}
	case *commandpb.Command_RegisterService, *commandpb.Command_UpdateServiceHealth, *commandpb.Command_PutPipeline:
		b, err = proto.MarshalOptions{Deterministic: true}.Marshal(only) // they hold maps
	default:
		b, err = only.MarshalVT()
	}
	if err != nil || len(b) == 0 {
		return 0
	}
	return xxhash.Sum64(b)
}

// remembered returns the first result of a request id, if it is still known.
// A repeat with a different command is refused: it is another request and
// answering it with the first result would be a lie.
func (t *tx) remembered(id string, h handler, digest uint64) (*commandpb.Result, bool) {
	var rec commandpb.RequestRecord
	if !t.load(t.buf.single(prefixRequest, id), &rec) || t.now > rec.TimeMs+requestRetentionMS {
		return nil, false
	}
	if rec.Op != h.op {
		return &commandpb.Result{
			Revision: t.clock.Revision, TimeMs: t.now, Epoch: t.clock.Epoch,
			Rejection: reject(commandpb.Code_CODE_PRECONDITION, "request "+id,
				"this request id was used for another kind of command within the last ten minutes; use a new id for %s", h.name),
		}, true
	}
	if rec.Digest != 0 && digest != 0 && rec.Digest != digest {
		return &commandpb.Result{
			Revision: t.clock.Revision, TimeMs: t.now, Epoch: t.clock.Epoch,
			Rejection: reject(commandpb.Code_CODE_PRECONDITION, "request "+id,
				"this request id was used for a %s with other content within the last ten minutes; this one was not done, use a new id for it", h.name),
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
func (t *tx) remember(id string, h handler, digest uint64) {
	c := t.clock
	rec := &commandpb.RequestRecord{Sequence: c.RequestTail, TimeMs: t.now, Op: h.op, Result: t.res, Digest: digest}
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
