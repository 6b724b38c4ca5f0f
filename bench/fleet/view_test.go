package fleet

import (
	"strings"
	"testing"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

const (
	assigned = sidecarpb.EventType_EVENT_TYPE_ASSIGNED
	updated  = sidecarpb.EventType_EVENT_TYPE_UPDATED
	revoked  = sidecarpb.EventType_EVENT_TYPE_REVOKED
	synced   = sidecarpb.EventType_EVENT_TYPE_SYNCED
	resync   = sidecarpb.EventType_EVENT_TYPE_RESYNC
)

func event(kind sidecarpb.EventType, revision uint64, pipeline string, generation uint64) *sidecarpb.PipelineAssignmentEvent {
	ev := &sidecarpb.PipelineAssignmentEvent{EventType: kind, Revision: revision, Epoch: 1}
	if pipeline != "" {
		ev.Assignment = &sidecarpb.PipelineAssignment{PipelineId: pipeline, Generation: generation}
	}
	return ev
}

// Goal: the validator accepts what a watch promises and nothing else. Method: a
// stream of events, the last of which is at fault or not.
func TestViewJudges(t *testing.T) {
	first := []*sidecarpb.PipelineAssignmentEvent{event(assigned, 0, "a", 3), event(synced, 10, "", 0)}
	for _, c := range []struct {
		name  string
		begin bool // a new stream before the last event
		ev    *sidecarpb.PipelineAssignmentEvent
		want  string
	}{
		{name: "a change", ev: event(updated, 11, "a", 4)},
		{name: "another pipeline", ev: event(assigned, 11, "b", 4)},
		{name: "a loss", ev: event(revoked, 11, "a", 0)},
		{name: "the same mark again", ev: event(synced, 10, "", 0)},
		{name: "a duplicate", ev: event(assigned, 11, "a", 4), want: "held: true"},
		{name: "a change of what is not held", ev: event(updated, 11, "b", 4), want: "held: false"},
		{name: "a loss of what is not held", ev: event(revoked, 11, "b", 0), want: "is not held"},
		{name: "an old generation", ev: event(updated, 11, "a", 3), want: "brings generation 3 after 3"},
		{name: "back in time", ev: event(updated, 9, "a", 4), want: "goes back from revision 10 to 9"},
		{name: "another epoch", ev: &sidecarpb.PipelineAssignmentEvent{EventType: synced, Revision: 11, Epoch: 2}, want: "without RESYNC"},
		{name: "another epoch, announced", ev: &sidecarpb.PipelineAssignmentEvent{EventType: resync, Epoch: 2}},
		{name: "resumed, in other words", begin: true, ev: event(assigned, 11, "a", 4)},
		{name: "resumed, a loss that was never heard of", begin: true, ev: event(revoked, 11, "b", 0)},
		{name: "resumed, but the same again", begin: true, ev: event(assigned, 11, "a", 3), want: "brings generation 3 after 3"},
		{name: "unknown", ev: event(99, 11, "a", 4), want: "unknown type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := &view{}
			v.begin()
			for _, ev := range first {
				if err := v.take(ev); err != nil {
					t.Fatal(err)
				}
			}
			if c.begin {
				if from, epoch := v.begin(); from != 10 || epoch != 1 {
					t.Fatalf("resumes from %d of epoch %d", from, epoch)
				}
			}
			switch err := v.take(c.ev); {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("%v, want %q", err, c.want)
			}
		})
	}
}

// Goal: a state that broke off before its mark is read again from the beginning.
func TestViewBrokenOff(t *testing.T) {
	v := &view{}
	v.begin()
	if err := v.take(event(assigned, 0, "a", 3)); err != nil {
		t.Fatal(err)
	}
	if from, _ := v.begin(); from != 0 || len(v.held) != 0 {
		t.Fatalf("resumes from %d with %d pipelines", from, len(v.held))
	}
}

func TestDiffers(t *testing.T) {
	a := &sidecarpb.PipelineAssignment{PipelineId: "a", Generation: 3}
	h, err := holdingOf(a)
	if err != nil {
		t.Fatal(err)
	}
	other := &sidecarpb.PipelineAssignment{PipelineId: "a", Generation: 3, IsLocalComplete: true}
	newer := &sidecarpb.PipelineAssignment{PipelineId: "a", Generation: 4}
	for _, c := range []struct {
		held map[string]holding
		want []*sidecarpb.PipelineAssignment
		diff string
	}{
		{map[string]holding{"a": h}, []*sidecarpb.PipelineAssignment{a}, ""},
		{nil, nil, ""},
		{nil, []*sidecarpb.PipelineAssignment{a}, "lacks a"},
		{map[string]holding{"a": h}, []*sidecarpb.PipelineAssignment{other}, "has other stages of a"},
		{map[string]holding{"a": h}, []*sidecarpb.PipelineAssignment{newer}, "has generation 3 of a, the cluster has 4"},
		{map[string]holding{"a": h}, nil, "holds 1 pipelines"},
	} {
		got, err := differs(c.held, c.want)
		if err != nil || !strings.Contains(got, c.diff) || (got == "") != (c.diff == "") {
			t.Errorf("%q (%v), want %q", got, err, c.diff)
		}
	}
}
