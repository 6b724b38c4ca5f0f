package router

import (
	"fmt"

	"google.golang.org/protobuf/proto"
)

// Table names a kind of record whose changes are published.
type Table uint8

// The tables with a change feed. Offsets, watermarks and checkpoints have
// none: they change with every commit and nobody has to be told.
const (
	TablePipelines Table = iota + 1
	TableSidecars
	TableServices
	TableGroups
	TableAssignments
	TableOperations
	TableHandovers
	tableCount
)

// String returns the table's name.
func (t Table) String() string {
	switch t {
	case TablePipelines:
		return "pipelines"
	case TableSidecars:
		return "sidecars"
	case TableServices:
		return "services"
	case TableGroups:
		return "groups"
	case TableAssignments:
		return "assignments"
	case TableOperations:
		return "operations"
	case TableHandovers:
		return "handovers"
	}
	return fmt.Sprintf("table(%d)", uint8(t))
}

// Change is one record before and after a revision. The messages are shared by
// all subscribers and must not be modified.
type Change struct {
	Revision uint64
	Table    Table
	// Key is the record's id; for an assignment AssignmentKey(sidecar, pipeline),
	// for a handover HandoverKey(pipeline, sidecar).
	Key string
	// Prev and Next are *commandpb.Pipeline, *commandpb.Sidecar and so on; a
	// nil interface when the record did not or does not exist.
	Prev, Next proto.Message
}

// AssignmentKey returns the Key of an assignment's changes.
func AssignmentKey(sidecar, pipeline string) string { return sidecar + "\x00" + pipeline }

// HandoverKey returns the Key of a handover's changes.
func HandoverKey(pipeline, sidecar string) string { return pipeline + "\x00" + sidecar }

// changeSet is everything one revision changed. It is handed out whole or not
// at all.
type changeSet struct {
	revision uint64
	changes  []Change
	tables   uint32 // bit per Table
	bytes    int64
}

func (s *changeSet) add(c Change) {
	s.changes = append(s.changes, c)
	s.tables |= 1 << c.Table
	s.bytes += 128 + int64(len(c.Key)) + messageBytes(c.Prev) + messageBytes(c.Next)
}

// messageBytes estimates the memory a message holds: its encoding, doubled for
// headers and pointers.
func messageBytes(m proto.Message) int64 {
	if m == nil {
		return 0
	}
	if s, ok := m.(interface{ SizeVT() int }); ok {
		return 128 + 2*int64(s.SizeVT())
	}
	return 128 + 2*int64(proto.Size(m))
}
