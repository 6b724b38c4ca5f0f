package rpc

import (
	"cmp"
	"fmt"
	"slices"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// assignmentWatch is one stream of assignments: what was sent on it, and how the
// next state differs from that. What has to be sent is gathered encoded, for
// whoever works it out does not wait for the client.
//
// Each event carries a revision that the watch can be resumed from after this
// event and no other was received. Until the first SYNCED of a full state that
// is 0: a state that arrived in part is worth nothing. Afterwards events go out
// by the revision of their change, and those of one revision but the last carry
// the revision before.
type assignmentWatch struct {
	sidecar string
	marks   *markCache
	out     []encoded         // to be sent
	sent    map[string]uint64 // generation by pipeline, of those in force
	resumed uint64            // > 0: the client has the state of this revision
	full    bool              // the first state is out
	epoch   uint64            // restore epoch of what was sent
	reached uint64            // newest revision sent
}

// take hands over what has to be sent.
func (w *assignmentWatch) take() []encoded {
	out := w.out
	w.out = nil
	return out
}

func (w *assignmentWatch) add(ev *sidecarpb.PipelineAssignmentEvent) error {
	frame, err := encodeEvent(ev)
	if err == nil {
		w.out = append(w.out, frame)
	}
	return err
}

// resync tells the client to start over.
func (w *assignmentWatch) resync(reason string) error {
	return w.add(&sidecarpb.PipelineAssignmentEvent{
		EventType: sidecarpb.EventType_EVENT_TYPE_RESYNC, Reason: reason, Epoch: w.epoch,
	})
}

// restoredReason says why what a client knows counts no more.
func restoredReason(known, current uint64) string {
	return fmt.Sprintf("the state was restored from a backup: what you know is of epoch %d, this is epoch %d", known, current)
}

// startOver begins again in another epoch: generations and revisions of the two
// say nothing about each other.
func (w *assignmentWatch) startOver(epoch uint64) error {
	reason := restoredReason(w.epoch, epoch)
	clear(w.sent)
	w.epoch, w.resumed, w.full, w.reached = epoch, 0, false, 0
	return w.resync(reason)
}

// synced tells the client that it has everything up to revision.
func (w *assignmentWatch) synced(revision uint64) error {
	w.full, w.reached, w.resumed = true, revision, 0
	frame, err := w.marks.get(revision, w.epoch)
	if err == nil {
		w.out = append(w.out, frame)
	}
	return err
}

type assignmentEvent struct {
	kind     sidecarpb.EventType
	at       uint64
	pipeline string
	a        *commandpb.Assignment // nil for a revocation the state has forgotten
}

// push adds what differs between v and what was sent.
func (w *assignmentWatch) push(v *router.View) error {
	var events []assignmentEvent
	present := make(map[string]struct{}, len(w.sent))
	err := v.Assignments(w.sidecar, func(a *commandpb.Assignment) bool {
		if !a.Revoked {
			present[a.PipelineId] = struct{}{}
		}
		if ev, ok := w.compare(a); ok {
			events = append(events, ev)
		}
		return true
	})
	if err != nil {
		return err
	}
	for pipeline := range w.sent {
		if _, ok := present[pipeline]; ok {
			continue
		}
		if !slices.ContainsFunc(events, func(e assignmentEvent) bool { return e.pipeline == pipeline }) {
			events = append(events, assignmentEvent{sidecarpb.EventType_EVENT_TYPE_REVOKED, v.Revision(), pipeline, nil})
		}
	}
	slices.SortFunc(events, func(x, y assignmentEvent) int {
		return cmp.Or(cmp.Compare(x.at, y.at), cmp.Compare(x.pipeline, y.pipeline))
	})
	for i, ev := range events {
		out := &sidecarpb.PipelineAssignmentEvent{EventType: ev.kind, Epoch: w.epoch}
		if ev.a != nil {
			out.Assignment, out.ChangedAtMs = assignmentToAPI(ev.a, w.epoch), ev.a.ChangedAtMs
		} else {
			out.Assignment = &sidecarpb.PipelineAssignment{PipelineId: ev.pipeline}
		}
		if w.full || w.resumed > 0 {
			out.Revision = ev.at
			if i+1 < len(events) && events[i+1].at == ev.at {
				out.Revision--
			}
		}
		if err := w.add(out); err != nil {
			return err
		}
		w.reached = max(w.reached, out.Revision)
		if ev.kind == sidecarpb.EventType_EVENT_TYPE_REVOKED {
			delete(w.sent, ev.pipeline)
		} else {
			w.sent[ev.pipeline] = ev.a.Generation
		}
	}
	return nil
}

// compare says what has to be sent about one assignment, if anything.
func (w *assignmentWatch) compare(a *commandpb.Assignment) (assignmentEvent, bool) {
	generation, known := w.sent[a.PipelineId]
	held := w.resumed > 0 && a.ModRevision <= w.resumed // the client resumed with it
	ev := assignmentEvent{at: a.ModRevision, pipeline: a.PipelineId, a: a}
	switch {
	case a.Revoked:
		ev.kind = sidecarpb.EventType_EVENT_TYPE_REVOKED
		return ev, known || (w.resumed > 0 && !held)
	case held && !known:
		w.sent[a.PipelineId] = a.Generation
		return ev, false
	case known && generation == a.Generation:
		return ev, false
	case known:
		ev.kind = sidecarpb.EventType_EVENT_TYPE_UPDATED
	default:
		ev.kind = sidecarpb.EventType_EVENT_TYPE_ASSIGNED
	}
	return ev, true
}
