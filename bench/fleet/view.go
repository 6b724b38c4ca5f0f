package fleet

import (
	"fmt"
	"hash/fnv"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// holding is what is known of one assignment that is in force.
type holding struct {
	generation uint64
	content    uint64 // hash
}

func holdingOf(a *sidecarpb.PipelineAssignment) (holding, error) {
	raw, err := a.MarshalVT() // no maps in it: equal content, equal bytes
	if err != nil {
		return holding{}, err
	}
	h := fnv.New64a()
	_, _ = h.Write(raw) // never fails
	return holding{a.GetGeneration(), h.Sum64()}, nil
}

// view is what the events of a watch, over all its streams, add up to. It judges
// each event: what a watch promises is that they are in order, without gap and
// duplicate, and can be resumed after any of them.
type view struct {
	held     map[string]holding
	revision uint64 // resume from here; 0 = from the beginning
	epoch    uint64
	synced   bool // on this stream
	// resumed: this stream began after a revision. Until it is synced it may
	// mention what changed meanwhile in other words: a pipeline that is held may
	// be ASSIGNED, one that is not may be REVOKED.
	resumed bool
}

// begin says that a new stream was opened. It returns what to resume from.
func (v *view) begin() (revision, epoch uint64) {
	v.synced, v.resumed = false, v.revision > 0
	if !v.resumed {
		v.held = make(map[string]holding)
	}
	return v.revision, v.epoch
}

// take adds an event and returns what is wrong with it, if anything.
func (v *view) take(ev *sidecarpb.PipelineAssignmentEvent) error {
	kind, a := ev.GetEventType(), ev.GetAssignment()
	if kind == sidecarpb.EventType_EVENT_TYPE_RESYNC {
		v.held = make(map[string]holding)
		v.revision, v.epoch, v.resumed, v.synced = 0, ev.GetEpoch(), false, false
		return nil
	}
	if v.revision > 0 && ev.GetEpoch() != v.epoch {
		return fmt.Errorf("%v of epoch %d without RESYNC; the watch is of epoch %d", kind, ev.GetEpoch(), v.epoch)
	}
	v.epoch = ev.GetEpoch()
	if r := ev.GetRevision(); r < v.revision {
		return fmt.Errorf("%v goes back from revision %d to %d", kind, v.revision, r)
	} else {
		v.revision = r
	}
	if kind == sidecarpb.EventType_EVENT_TYPE_SYNCED {
		if v.revision == 0 {
			return fmt.Errorf("SYNCED without a revision to resume from")
		}
		v.synced = true
		return nil
	}
	if v.synced && v.revision == 0 {
		return fmt.Errorf("%v after SYNCED has no revision", kind)
	}
	id := a.GetPipelineId()
	was, known := v.held[id]
	catchingUp := v.resumed && !v.synced
	switch kind {
	case sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_UPDATED:
		if assigned := kind == sidecarpb.EventType_EVENT_TYPE_ASSIGNED; assigned == known && !catchingUp {
			return fmt.Errorf("%v of %s, held: %v", kind, id, known)
		}
		if known && a.GetGeneration() <= was.generation {
			return fmt.Errorf("%v of %s brings generation %d after %d", kind, id, a.GetGeneration(), was.generation)
		}
		h, err := holdingOf(a)
		if err != nil {
			return err
		}
		v.held[id] = h
	case sidecarpb.EventType_EVENT_TYPE_REVOKED:
		if !known && !catchingUp {
			return fmt.Errorf("REVOKED %s, which is not held", id)
		}
		delete(v.held, id)
	default:
		return fmt.Errorf("event of the unknown type %d", kind)
	}
	return nil
}

// differs says how what is held differs from what the cluster says, "" when it
// does not.
func differs(held map[string]holding, want []*sidecarpb.PipelineAssignment) (string, error) {
	for _, a := range want {
		h, err := holdingOf(a)
		if err != nil {
			return "", err
		}
		switch got, ok := held[a.GetPipelineId()]; {
		case !ok:
			return "lacks " + a.GetPipelineId(), nil
		case got.generation != h.generation:
			return fmt.Sprintf("has generation %d of %s, the cluster has %d", got.generation, a.GetPipelineId(), h.generation), nil
		case got.content != h.content:
			return "has other stages of " + a.GetPipelineId() + " than the cluster", nil
		}
	}
	if len(held) > len(want) {
		return fmt.Sprintf("holds %d pipelines, the cluster says %d", len(held), len(want)), nil
	}
	return "", nil
}
