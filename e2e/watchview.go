package e2e

import (
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// holdings is what a sidecar was told to run, by pipeline.
type holdings map[string]*sidecarpb.PipelineAssignment

// differs says how h differs from what the cluster says, "" when it does not.
func (h holdings) differs(want []*sidecarpb.PipelineAssignment) string {
	said := make(map[string]bool)
	for _, a := range want {
		said[a.PipelineId] = true
		switch got := h[a.PipelineId]; {
		case got == nil:
			return "lacks " + a.PipelineId
		case !proto.Equal(got, a):
			return fmt.Sprintf("holds %v, the cluster says %v", got, a)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(h)) {
		if !said[id] {
			return fmt.Sprintf("holds %s, which the cluster has taken from it", id)
		}
	}
	return ""
}

// assignmentView is what the events of a watch of assignments, over all its
// streams, add up to. It judges each event by what a watch promises: in order,
// without gap or duplicate, and resumable after any event.
type assignmentView struct {
	held            holdings
	revision, epoch uint64 // resume from here; 0 = from the beginning
	synced          bool   // on this stream
	// resumed: until it is synced the stream may mention what changed meanwhile in
	// other words, a pipeline that is held as ASSIGNED, one that is not as REVOKED.
	resumed bool
	resyncs int
}

// begin says that a stream is opened and returns what it resumes from.
func (v *assignmentView) begin() *sidecarpb.WatchAssignmentsRequest {
	v.synced, v.resumed = false, v.revision > 0
	if !v.resumed {
		v.held = holdings{}
	}
	return &sidecarpb.WatchAssignmentsRequest{FromRevision: v.revision, FromEpoch: v.epoch}
}

// take adds an event and returns what is wrong with it, "" when nothing is.
func (v *assignmentView) take(ev *sidecarpb.PipelineAssignmentEvent) string {
	kind, a := ev.EventType, ev.Assignment
	if kind == sidecarpb.EventType_EVENT_TYPE_RESYNC {
		v.held, v.synced, v.resumed = holdings{}, false, false
		v.revision, v.epoch = 0, ev.Epoch
		v.resyncs++
		if ev.Reason == "" {
			return "RESYNC without a reason"
		}
		return ""
	}
	if v.revision > 0 && ev.Epoch != v.epoch {
		return fmt.Sprintf("%v of epoch %d on a watch of epoch %d, without RESYNC", kind, ev.Epoch, v.epoch)
	}
	if ev.Revision < v.revision {
		return fmt.Sprintf("%v goes back from revision %d to %d", kind, v.revision, ev.Revision)
	}
	complete := v.synced
	v.revision, v.epoch = ev.Revision, ev.Epoch
	if kind == sidecarpb.EventType_EVENT_TYPE_SYNCED {
		v.synced = true
		if ev.Revision == 0 {
			return "SYNCED without a revision to resume from"
		}
		return ""
	}
	if complete && ev.Revision == 0 {
		return fmt.Sprintf("%v after SYNCED without a revision", kind)
	}
	was := v.held[a.GetPipelineId()]
	catchingUp := v.resumed && !complete
	switch kind {
	case sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_UPDATED:
		v.held[a.GetPipelineId()] = a
		if (kind == sidecarpb.EventType_EVENT_TYPE_ASSIGNED) == (was != nil) && !catchingUp {
			return fmt.Sprintf("%v of %s, which was held: %t", kind, a.GetPipelineId(), was != nil)
		}
		if was != nil && a.Generation <= was.Generation {
			return fmt.Sprintf("%v of %s brings generation %d after %d", kind, a.PipelineId, a.Generation, was.Generation)
		}
	case sidecarpb.EventType_EVENT_TYPE_REVOKED:
		delete(v.held, a.GetPipelineId())
		if was == nil && !catchingUp {
			return fmt.Sprintf("REVOKED %s, which is not held", a.GetPipelineId())
		}
	default:
		return fmt.Sprintf("event of the unknown type %d", kind)
	}
	return ""
}
