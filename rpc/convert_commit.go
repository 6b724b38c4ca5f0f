package rpc

import (
	"slices"
	"strconv"
	"strings"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// commandBuffer is the reusable memory of one command built from commit
// operations. A stream builds tens of thousands of commands a second; making
// each from fresh messages costs more than replicating it.
//
// The command it returns shares strings and bytes with the request and is valid
// until the next fill.
type commandBuffer struct {
	cmd   commandpb.Command
	batch commandpb.CommitBatch
	top   commandpb.Command_CommitBatch
	slots []opSlot
	ops   []*commandpb.CommitOp
}

// opSlot holds one operation in both shapes it can travel in: alone as a
// command, or as part of a batch.
type opSlot struct {
	op commandpb.CommitOp

	offset      commandpb.CommitSourceOffset
	watermark   commandpb.AdvanceWatermark
	groupOffset commandpb.CommitGroupOffset
	checkpoint  commandpb.SaveCheckpoint

	inBatchOffset      commandpb.CommitOp_SourceOffset
	inBatchWatermark   commandpb.CommitOp_Watermark
	inBatchGroupOffset commandpb.CommitOp_GroupOffset
	inBatchCheckpoint  commandpb.CommitOp_Checkpoint

	aloneOffset      commandpb.Command_CommitSourceOffset
	aloneWatermark   commandpb.Command_AdvanceWatermark
	aloneGroupOffset commandpb.Command_CommitGroupOffset
	aloneCheckpoint  commandpb.Command_SaveCheckpoint
}

// fill builds the command for ops, which checkCommitOps has passed. A batch of
// one travels as the plain command: smaller, and quicker to apply.
func (b *commandBuffer) fill(ops []*clusterpb.CommitOp, requestID string, nowMs uint64) *commandpb.Command {
	if len(ops) > len(b.slots) {
		// A new slice and not append: protobuf messages must not be copied.
		b.slots = make([]opSlot, max(len(ops), 2*len(b.slots)))
	}
	b.cmd.TimeMs, b.cmd.RequestId = nowMs, requestID
	if len(ops) == 1 {
		b.slots[0].alone(&b.cmd, ops[0])
		return &b.cmd
	}
	b.ops = b.ops[:0]
	for i, op := range ops {
		b.slots[i].inBatch(op)
		b.ops = append(b.ops, &b.slots[i].op)
	}
	b.batch.Ops = b.ops
	b.top.CommitBatch = &b.batch
	b.cmd.Op = &b.top
	return &b.cmd
}

func (s *opSlot) alone(cmd *commandpb.Command, op *clusterpb.CommitOp) {
	switch v := op.GetOp().(type) {
	case *clusterpb.CommitOp_Offset:
		s.setOffset(v.Offset)
		s.aloneOffset.CommitSourceOffset = &s.offset
		cmd.Op = &s.aloneOffset
	case *clusterpb.CommitOp_Watermark:
		s.setWatermark(v.Watermark)
		s.aloneWatermark.AdvanceWatermark = &s.watermark
		cmd.Op = &s.aloneWatermark
	case *clusterpb.CommitOp_GroupOffset:
		s.setGroupOffset(v.GroupOffset)
		s.aloneGroupOffset.CommitGroupOffset = &s.groupOffset
		cmd.Op = &s.aloneGroupOffset
	case *clusterpb.CommitOp_Checkpoint:
		s.setCheckpoint(v.Checkpoint)
		s.aloneCheckpoint.SaveCheckpoint = &s.checkpoint
		cmd.Op = &s.aloneCheckpoint
	}
}

func (s *opSlot) inBatch(op *clusterpb.CommitOp) {
	switch v := op.GetOp().(type) {
	case *clusterpb.CommitOp_Offset:
		s.setOffset(v.Offset)
		s.inBatchOffset.SourceOffset = &s.offset
		s.op.Op = &s.inBatchOffset
	case *clusterpb.CommitOp_Watermark:
		s.setWatermark(v.Watermark)
		s.inBatchWatermark.Watermark = &s.watermark
		s.op.Op = &s.inBatchWatermark
	case *clusterpb.CommitOp_GroupOffset:
		s.setGroupOffset(v.GroupOffset)
		s.inBatchGroupOffset.GroupOffset = &s.groupOffset
		s.op.Op = &s.inBatchGroupOffset
	case *clusterpb.CommitOp_Checkpoint:
		s.setCheckpoint(v.Checkpoint)
		s.inBatchCheckpoint.Checkpoint = &s.checkpoint
		s.op.Op = &s.inBatchCheckpoint
	}
}

func (s *opSlot) setOffset(o *clusterpb.OffsetCommit) {
	d := &s.offset
	d.SourceId, d.Partition, d.Offset, d.Force = o.GetSourceId(), o.GetPartition(), o.GetOffset(), o.GetForce()
	d.TimeS, d.TimeNs = splitTimestamp(o.GetTimestamp())
}

func (s *opSlot) setWatermark(o *clusterpb.WatermarkCommit) {
	w, d := o.GetWatermark(), &s.watermark
	d.SourceId, d.Partition, d.Position, d.Force = w.GetSourceId(), w.GetPartition(), w.GetPosition(), o.GetForce()
	d.TimeS, d.TimeNs = splitTimestamp(w.GetTimestamp())
}

func (s *opSlot) setGroupOffset(o *clusterpb.GroupOffsetCommit) {
	d := &s.groupOffset
	d.GroupId, d.SourceId, d.Partition, d.Offset = o.GetGroupId(), o.GetSourceId(), o.GetPartition(), o.GetOffset()
	d.ServiceId, d.Generation, d.Force = o.GetServiceId(), o.Generation, o.GetForce()
	d.TimeS, d.TimeNs = splitTimestamp(o.GetTimestamp())
}

func (s *opSlot) setCheckpoint(o *clusterpb.CheckpointCommit) {
	d := &s.checkpoint
	d.ServiceId, d.CheckpointId, d.Data = o.GetServiceId(), o.GetCheckpointId(), o.GetData()
}

// checkpointOffsetsFromAPI lists a checkpoint's offsets by source and partition,
// so that equal requests give equal commands.
func checkpointOffsetsFromAPI(m map[string]*checkpointpb.PartitionOffsets) []*commandpb.SourceOffset {
	var out []*commandpb.SourceOffset
	for source, ps := range m {
		for partition, offset := range ps.GetOffsets() {
			out = append(out, &commandpb.SourceOffset{SourceId: source, Partition: partition, Offset: offset})
		}
	}
	slices.SortFunc(out, func(a, b *commandpb.SourceOffset) int {
		if c := strings.Compare(a.SourceId, b.SourceId); c != 0 {
			return c
		}
		return int(int64(a.Partition) - int64(b.Partition))
	})
	return out
}

// checkpointOffsetsToAPI keeps every partition of every source.
func checkpointOffsetsToAPI(offsets []*commandpb.SourceOffset) map[string]*checkpointpb.PartitionOffsets {
	out := make(map[string]*checkpointpb.PartitionOffsets)
	for _, o := range offsets {
		addOffset(out, o.SourceId, o.Partition, o.Offset)
	}
	return out
}

// addOffset sets one offset in the nested map of the API.
func addOffset(m map[string]*checkpointpb.PartitionOffsets, source string, partition uint32, offset uint64) {
	ps := m[source]
	if ps == nil {
		ps = &checkpointpb.PartitionOffsets{Offsets: make(map[uint32]uint64)}
		m[source] = ps
	}
	ps.Offsets[partition] = offset
}

func formatUint(n uint64) string { return strconv.FormatUint(n, 10) }
