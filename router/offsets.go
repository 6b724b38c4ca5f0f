package router

import (
	"encoding/binary"

	"conveyor.etl/router/router/commandpb"
)

// offsetOf returns the cell's offset without decoding it into an object twice.
func (t *tx) offsetOf(c *cell, o *commandpb.Offset) bool {
	if c.val == nil {
		return false
	}
	if err := o.UnmarshalVT(c.val); err != nil {
		t.fail(err)
		return false
	}
	return true
}

// encodeOffset encodes an Offset as its generated code does, into a buffer of
// the exact size.
func encodeOffset(offset uint64, s int64, ns int32) []byte {
	b := make([]byte, 0, 3+3*binary.MaxVarintLen64)
	if offset != 0 {
		b = binary.AppendUvarint(append(b, 1<<3), offset)
	}
	if s != 0 {
		b = binary.AppendUvarint(append(b, 2<<3), uint64(s))
	}
	if ns != 0 {
		b = binary.AppendUvarint(append(b, 3<<3), uint64(ns))
	}
	return b
}

// advance moves the offset in c forward to offset, or anywhere with force.
func (t *tx) advance(c *cell, kind countKind, subject func() string, offset uint64, s int64, ns int32, force bool) *commandpb.Rejection {
	var cur commandpb.Offset
	known := t.offsetOf(c, &cur)
	t.res.Offset = offset
	switch {
	case !known:
		t.count(kind, 1)
	case offset == cur.Offset:
		t.res.Existed = true
		return nil
	case offset < cur.Offset && !force:
		t.res.Offset = cur.Offset
		r := reject(commandpb.Code_CODE_REGRESSION, subject(), "offset %d is behind the committed %d; commit a later one, or force it to go back", offset, cur.Offset)
		r.Current = cur.Offset
		return r
	}
	t.res.Existed = known
	t.put(c, encodeOffset(offset, s, ns), nil)
	t.changed = true
	return nil
}

// commitSourceOffset records how far a source has been read.
//
// Rejections: INVALID (id), REGRESSION.
func (t *tx) commitSourceOffset(c *commandpb.CommitSourceOffset) *commandpb.Rejection {
	if r := checkID("source id", c.SourceId); r != nil {
		return r
	}
	t.buf = t.buf.partition(prefixSourceOffset, c.SourceId, c.Partition)
	return t.advance(t.cell(t.buf), countSourceOffsets, func() string {
		return partitionSubject("source", c.SourceId, c.Partition)
	}, c.Offset, c.TimeS, c.TimeNs, c.Force)
}

// commitGroupOffset records how far a group has read a partition. With a
// service id or a generation it is fenced: only the partition's owner in the
// current generation may commit.
//
// Rejections: INVALID (id), FENCED, REGRESSION.
func (t *tx) commitGroupOffset(c *commandpb.CommitGroupOffset) *commandpb.Rejection {
	if r := first(checkID("group id", c.GroupId), checkID("source id", c.SourceId)); r != nil {
		return r
	}
	if c.ServiceId != "" || c.Generation != nil {
		if r := t.fence(c); r != nil {
			return r
		}
	}
	t.buf = t.buf.groupOffset(c.GroupId, c.SourceId, c.Partition)
	return t.advance(t.cell(t.buf), countGroupOffsets, func() string {
		return partitionSubject("group "+c.GroupId+" source", c.SourceId, c.Partition)
	}, c.Offset, c.TimeS, c.TimeNs, c.Force)
}

// fence refuses a commit by a member that lost the partition.
func (t *tx) fence(c *commandpb.CommitGroupOffset) *commandpb.Rejection {
	subject := "group " + c.GroupId
	g := t.group(c.GroupId)
	if g == nil {
		return reject(commandpb.Code_CODE_FENCED, subject, "the group has no members; join it first")
	}
	fenced := func(format string, args ...any) *commandpb.Rejection {
		r := reject(commandpb.Code_CODE_FENCED, subject, format, args...)
		t.res.Generation = t.fenced(g.Generation)
		r.Current = t.res.Generation
		return r
	}
	if c.Generation != nil {
		if r := t.otherEpoch(subject, *c.Generation, g.Generation); r != nil {
			return r
		}
		if now := t.fenced(g.Generation); *c.Generation != now {
			return fenced("the commit is of generation %d, the group is at %d; take over the new assignment and commit what is still owned", *c.Generation, now)
		}
	}
	if c.ServiceId == "" {
		return nil
	}
	i, ok := findMember(g, c.ServiceId)
	if !ok {
		return fenced("service %q is no member of the group; join it again", c.ServiceId)
	}
	if !owns(g.Members[i], c.Partition) {
		return fenced("service %q does not own partition %d in generation %d", c.ServiceId, c.Partition, t.fenced(g.Generation))
	}
	return nil
}

// commitBatch applies all its operations or none.
//
// Rejections: INVALID (no operation), LIMIT (count), and those of its
// operations, with failed_op set.
func (t *tx) commitBatch(c *commandpb.CommitBatch) *commandpb.Rejection {
	if len(c.Ops) == 0 {
		return invalid("batch", "the batch holds no operation")
	}
	if len(c.Ops) > maxBatchOps {
		return limit("batch", "the batch holds %d operations, at most %d are allowed", len(c.Ops), maxBatchOps)
	}
	// The values of a single operation say nothing about the whole, and those
	// of a refused batch nothing about what is stored.
	defer func() {
		t.res.Offset, t.res.Existed, t.res.Watermark = 0, false, nil
	}()
	for i, op := range c.Ops {
		var r *commandpb.Rejection
		switch o := op.GetOp().(type) {
		case *commandpb.CommitOp_SourceOffset:
			r = t.commitSourceOffset(o.SourceOffset)
		case *commandpb.CommitOp_Watermark:
			r = t.advanceWatermark(o.Watermark)
		case *commandpb.CommitOp_GroupOffset:
			r = t.commitGroupOffset(o.GroupOffset)
		case *commandpb.CommitOp_Checkpoint:
			r = t.saveCheckpoint(o.Checkpoint)
		default:
			if len(op.ProtoReflect().GetUnknown()) > 0 {
				t.fail(ErrUnknownCommand)
				return nil
			}
			r = invalid("batch", "operation %d is empty", i)
		}
		if t.err != nil {
			return nil
		}
		if r != nil {
			t.res.FailedOp = uint32(i)
			return r
		}
	}
	return nil
}
