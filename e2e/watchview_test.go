package e2e

import (
	"strings"
	"testing"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// TestAssignmentViewJudges: the validator accepts what a watch promises and
// nothing else. Method: a state, then one event, after a new stream or not.
func TestAssignmentViewJudges(t *testing.T) {
	const (
		assigned = sidecarpb.EventType_EVENT_TYPE_ASSIGNED
		updated  = sidecarpb.EventType_EVENT_TYPE_UPDATED
		revoked  = sidecarpb.EventType_EVENT_TYPE_REVOKED
		synced   = sidecarpb.EventType_EVENT_TYPE_SYNCED
		resync   = sidecarpb.EventType_EVENT_TYPE_RESYNC
	)
	event := func(kind sidecarpb.EventType, revision uint64, pipeline string, generation uint64) *sidecarpb.PipelineAssignmentEvent {
		ev := &sidecarpb.PipelineAssignmentEvent{EventType: kind, Revision: revision, Epoch: 1}
		if pipeline != "" {
			ev.Assignment = &sidecarpb.PipelineAssignment{PipelineId: pipeline, Generation: generation}
		}
		return ev
	}
	other := func(epoch uint64, reason string, ev *sidecarpb.PipelineAssignmentEvent) *sidecarpb.PipelineAssignmentEvent {
		ev.Epoch, ev.Reason = epoch, reason
		return ev
	}
	for _, c := range []struct {
		name   string
		stream bool // a new one before the event
		ev     *sidecarpb.PipelineAssignmentEvent
		fault  string
		holds  int
	}{
		{name: "a change", ev: event(updated, 11, "a", 4), holds: 1},
		{name: "another", ev: event(assigned, 11, "b", 4), holds: 2},
		{name: "a loss", ev: event(revoked, 11, "a", 0)},
		{name: "a mark", ev: event(synced, 12, "", 0), holds: 1},
		{name: "a duplicate", ev: event(assigned, 11, "a", 4), fault: "was held: true", holds: 1},
		{name: "a gap", ev: event(updated, 11, "b", 4), fault: "was held: false", holds: 2},
		{name: "the loss of nothing", ev: event(revoked, 11, "b", 0), fault: "not held", holds: 1},
		{name: "the same again", ev: event(updated, 11, "a", 3), fault: "generation 3 after 3", holds: 1},
		{name: "out of order", ev: event(updated, 9, "a", 4), fault: "back from revision 10 to 9", holds: 1},
		{name: "another epoch", ev: other(2, "", event(synced, 11, "", 0)), fault: "without RESYNC", holds: 1},
		{name: "start over", ev: other(2, "restored", event(resync, 0, "", 0))},
		{name: "start over without a reason", ev: event(resync, 0, "", 0), fault: "reason"},
		{name: "resumed, assigned anew", stream: true, ev: event(assigned, 11, "a", 4), holds: 1},
		{name: "resumed, lost unheard of", stream: true, ev: event(revoked, 11, "b", 0), holds: 1},
		{name: "resumed, the same again", stream: true, ev: event(assigned, 11, "a", 3), fault: "generation 3 after 3", holds: 1},
	} {
		v := &assignmentView{}
		v.begin()
		for _, ev := range []*sidecarpb.PipelineAssignmentEvent{event(assigned, 0, "a", 3), event(synced, 10, "", 0)} {
			if fault := v.take(ev); fault != "" {
				t.Fatal(fault)
			}
		}
		if c.stream {
			if r := v.begin(); r.FromRevision != 10 || r.FromEpoch != 1 {
				t.Errorf("%s: resumes from %v", c.name, r)
			}
		}
		if got := v.take(c.ev); !strings.Contains(got, c.fault) || (got == "") != (c.fault == "") || len(v.held) != c.holds {
			t.Errorf("%s: %q, holding %d; want %q and %d", c.name, got, len(v.held), c.fault, c.holds)
		}
	}
	v := &assignmentView{}
	v.begin()
	v.take(event(assigned, 0, "a", 3))
	if r := v.begin(); r.FromRevision != 0 || len(v.held) != 0 {
		t.Error("half a state is worth something")
	}
}
