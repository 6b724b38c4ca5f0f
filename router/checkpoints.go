package router

import (
	"cmp"
	"slices"

	"conveyor.etl/router/router/commandpb"
)

// saveCheckpoint stores a service's checkpoint in place of the one before. The
// old one is not read: with a million of them that would cost more than the
// write.
//
// Rejections: INVALID (ids, an offset named twice), LIMIT (data, offsets).
func (t *tx) saveCheckpoint(c *commandpb.SaveCheckpoint) *commandpb.Rejection {
	if r := first(checkID("service id", c.ServiceId), checkID("checkpoint id", c.CheckpointId)); r != nil {
		return r
	}
	subject := "checkpoint of " + c.ServiceId
	if len(c.Data) > maxCheckpointBytes {
		return limit(subject, "the data are %d bytes long, at most %d are allowed", len(c.Data), maxCheckpointBytes)
	}
	if len(c.SourceOffsets) > maxSourceOffsets {
		return limit(subject, "it names %d source offsets, at most %d are allowed", len(c.SourceOffsets), maxSourceOffsets)
	}
	for _, o := range c.SourceOffsets {
		if r := checkID("source id", o.GetSourceId()); r != nil {
			return r
		}
	}
	order := func(a, b *commandpb.SourceOffset) int {
		return cmp.Or(cmp.Compare(a.SourceId, b.SourceId), cmp.Compare(a.Partition, b.Partition))
	}
	if !slices.IsSortedFunc(c.SourceOffsets, order) {
		slices.SortStableFunc(c.SourceOffsets, order)
	}
	for i := 1; i < len(c.SourceOffsets); i++ {
		if a, b := c.SourceOffsets[i-1], c.SourceOffsets[i]; order(a, b) == 0 {
			return invalid(subject, "it names source %q partition %d twice", b.SourceId, b.Partition)
		}
	}
	rec := commandpb.Checkpoint{
		ServiceId: c.ServiceId, CheckpointId: c.CheckpointId, Data: c.Data,
		SourceOffsets: c.SourceOffsets, CreatedAtMs: t.now, ModRevision: t.revision,
	}
	v, err := rec.MarshalVT()
	if err != nil {
		t.fail(err)
		return nil
	}
	t.buf = t.buf.single(prefixCheckpoint, c.ServiceId)
	t.put(t.blind(t.buf), v, nil)
	t.chainCheckpoint(t.buf, v)
	t.clock.CheckpointRevision = t.revision
	t.changed = true
	return nil
}

// deleteCheckpoint removes a service's checkpoint, if there is one.
//
// Rejections: INVALID (id).
func (t *tx) deleteCheckpoint(c *commandpb.DeleteCheckpoint) *commandpb.Rejection {
	if r := checkID("service id", c.ServiceId); r != nil {
		return r
	}
	t.buf = t.buf.single(prefixCheckpoint, c.ServiceId)
	cl := t.cell(t.buf)
	if cl.val == nil {
		return nil
	}
	t.drop(cl)
	t.chainCheckpoint(t.buf, nil)
	t.clock.CheckpointRevision = t.revision
	t.res.Existed, t.changed = true, true
	return nil
}
