package router

import (
	"strconv"

	"conveyor.etl/router/router/commandpb"
)

func partitionSubject(kind, id string, partition uint32) string {
	return kind + " " + id + " partition " + strconv.FormatUint(uint64(partition), 10)
}

// advanceWatermark records up to where a partition of a source is complete.
// The same position with a later event time is progress of an idle source; the
// same or an earlier one changes nothing.
//
// Rejections: INVALID (id), REGRESSION.
func (t *tx) advanceWatermark(c *commandpb.AdvanceWatermark) *commandpb.Rejection {
	if r := checkID("source id", c.SourceId); r != nil {
		return r
	}
	t.buf = t.buf.partition(prefixWatermark, c.SourceId, c.Partition)
	cl := t.cell(t.buf)
	var cur commandpb.Watermark
	known := cl.val != nil
	if known {
		if err := cur.UnmarshalVT(cl.val); err != nil {
			t.fail(err)
			return nil
		}
	}
	t.res.Offset, t.res.Existed = c.Position, known
	write := true
	switch {
	case !known:
		t.count(countWatermarks, 1)
	case c.Position == cur.Position:
		write = c.TimeS > cur.TimeS || c.TimeS == cur.TimeS && c.TimeNs > cur.TimeNs
	case c.Position < cur.Position && !c.Force:
		t.res.Offset = cur.Position
		r := reject(commandpb.Code_CODE_REGRESSION, partitionSubject("source", c.SourceId, c.Partition), "watermark %d is behind the known %d; report a later one, or force it to go back", c.Position, cur.Position)
		r.Current = cur.Position
		return r
	}
	if write {
		// Source and partition are in the key already.
		t.put(cl, encodeWatermark(c), nil)
		t.changed = true
		t.s.marks.update(c.SourceId, mark{partition: c.Partition, position: c.Position, s: c.TimeS, ns: c.TimeNs})
		t.marked = append(t.marked, c.SourceId)
	}
	if t.wanted {
		t.res.Watermark = t.globalWatermark(c.SourceId)
	}
	return nil
}

func encodeWatermark(c *commandpb.AdvanceWatermark) []byte {
	w := commandpb.Watermark{Position: c.Position, TimeS: c.TimeS, TimeNs: c.TimeNs}
	b, _ := w.MarshalVT() // numbers only: cannot fail
	if b == nil {
		b = []byte{}
	}
	return b
}
