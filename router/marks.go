package router

import (
	"container/heap"

	"conveyor.etl/router/router/commandpb"
)

// markIndex answers "which partition of this source is furthest behind"
// without a scan per commit. It is derived from the watermark table, loaded
// source by source on first use, and dropped whole when it grows too large.
type markIndex struct {
	sources map[string]*sourceMarks
	size    int
}

// maxMarks bounds the partitions held: about 48 bytes each.
const maxMarks = 1 << 18

func newMarkIndex() *markIndex { return &markIndex{sources: map[string]*sourceMarks{}} }

// sourceMarks is a heap of one source's partitions, furthest behind first.
type sourceMarks struct {
	items []mark
	at    map[uint32]int
}

type mark struct {
	partition uint32
	ns        int32
	position  uint64
	s         int64
}

func (m *sourceMarks) Len() int { return len(m.items) }
func (m *sourceMarks) Less(i, j int) bool {
	a, b := m.items[i], m.items[j]
	if a.position != b.position {
		return a.position < b.position
	}
	return a.partition < b.partition
}

func (m *sourceMarks) Swap(i, j int) {
	m.items[i], m.items[j] = m.items[j], m.items[i]
	m.at[m.items[i].partition], m.at[m.items[j].partition] = i, j
}

func (m *sourceMarks) Push(x any) {
	v := x.(mark)
	m.at[v.partition] = len(m.items)
	m.items = append(m.items, v)
}

func (m *sourceMarks) Pop() any {
	v := m.items[len(m.items)-1]
	m.items = m.items[:len(m.items)-1]
	delete(m.at, v.partition)
	return v
}

func (x *markIndex) forget(source string) {
	if m := x.sources[source]; m != nil {
		x.size -= len(m.items)
		delete(x.sources, source)
	}
}

// update records a partition's watermark if its source is loaded.
func (x *markIndex) update(source string, v mark) {
	m := x.sources[source]
	if m == nil {
		return
	}
	if i, ok := m.at[v.partition]; ok {
		m.items[i] = v
		heap.Fix(m, i)
		return
	}
	heap.Push(m, v)
	x.size++
}

// globalWatermark returns the watermark of the partition furthest behind.
func (t *tx) globalWatermark(source string) *commandpb.Watermark {
	x := t.s.marks
	m := x.sources[source]
	if m == nil {
		if x.size > maxMarks {
			x.sources, x.size = map[string]*sourceMarks{}, 0
		}
		m = &sourceMarks{at: map[uint32]int{}}
		t.scan(t.buf.group(prefixWatermark, source), func(k, v []byte) {
			_, partition, err := decodePartition(k)
			var w commandpb.Watermark
			if err == nil {
				err = w.UnmarshalVT(v)
			}
			t.fail(err)
			m.Push(mark{partition: partition, position: w.Position, s: w.TimeS, ns: w.TimeNs})
		})
		heap.Init(m)
		x.sources[source] = m
		x.size += len(m.items)
		t.marked = append(t.marked, source)
	}
	if len(m.items) == 0 {
		return nil
	}
	low := m.items[0]
	return &commandpb.Watermark{
		SourceId: source, Partition: low.partition, Position: low.position, TimeS: low.s, TimeNs: low.ns,
	}
}
