package e2e

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// fleetChecker looks at the state of the fleet again and again, as each node has
// it, and finds what must not be at any revision. One goroutine uses it.
type fleetChecker struct {
	s       *Sidecars
	leases  fleetLeases
	faults  []string
	looks   int
	moved   map[string]bool // sidecars that were seen expired
	expired map[expiry]*expiredHolder
	// served is for how long the cluster could have acted so far.
	served func() time.Duration
}

// passedOn is how long a heartbeat may be on its way to the leader: a decision about the
// silence before it may overtake it.
const passedOn = time.Second

// fleetLeases are the times the nodes were told.
type fleetLeases struct {
	expire time.Duration // silence after which a sidecar is expired
	// release is how long a cluster that serves may take to take everything from
	// a sidecar that is.
	release time.Duration
}

// expiry is one expiry of one sidecar.
type expiry struct {
	id string
	at int64 // Unix time in milliseconds, of the deciding leader
}

type expiredHolder struct {
	since    time.Duration // by served, when it was first seen to hold something
	done     bool          // reported
	answered []answeredBeat
}

func newFleetChecker(s *Sidecars, l fleetLeases, served func() time.Duration) *fleetChecker {
	return &fleetChecker{s: s, leases: l, served: served, moved: map[string]bool{}, expired: map[expiry]*expiredHolder{}}
}

func (k *fleetChecker) fault(format string, args ...any) {
	if len(k.faults) < 20 {
		k.faults = append(k.faults, fmt.Sprintf(format, args...))
	}
}

// look checks the state as n has it, which may be an old one; it does nothing when n
// does not answer.
func (k *fleetChecker) look(ctx context.Context, n *Node) {
	call, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale"), time.Second)
	defer cancel()
	r, err := n.Cluster().ListSidecars(call, &clusterpb.ListSidecarsRequest{PageSize: 10_000})
	if err != nil || r.NextPageToken != "" {
		return
	}
	k.looks++
	k.owners(r)
	k.circles(r)
	k.expiries(r)
}

// owners finds stages that run on more sidecars than they may. All versions of a
// pipeline count together: the records of its source are the same.
func (k *fleetChecker) owners(r *clusterpb.ListSidecarsResponse) {
	owners := map[string][]string{}
	for _, sc := range r.Sidecars {
		for _, a := range sc.Assignments {
			for _, st := range a.Stages {
				if st.GetRemoteSidecar() == nil {
					role, _, _ := strings.Cut(st.StageId, ".")
					owners[a.PipelineId+"/"+role] = append(owners[a.PipelineId+"/"+role], fmt.Sprintf("%s (version %d)", sc.SidecarId, a.PipelineVersion))
				}
			}
		}
	}
	for stage, by := range owners {
		if limit := instancesOf(stage); len(by) > limit {
			k.fault("at revision %d stage %s, of which there is to be %d, runs on %v", r.Revision, stage, limit, by)
		}
	}
}

// instancesOf returns how often a stage may run: those of one pipeline in five
// twice, but for its source.
func instancesOf(stage string) int {
	var p int
	var role string
	if _, err := fmt.Sscanf(strings.Replace(stage, "/", " ", 2), "e2e pipeline-%02d/%s", &p, &role); err == nil && p%5 == 0 && role != "source" {
		return 2
	}
	return 1
}

// circles finds ways on which a batch comes back to a sidecar it has passed.
func (k *fleetChecker) circles(r *clusterpb.ListSidecarsResponse) {
	next := map[string]map[string][]string{} // by pipeline
	for _, sc := range r.Sidecars {
		for _, a := range sc.Assignments {
			for _, st := range a.Stages {
				if to := st.GetRemoteSidecar(); to != nil {
					if next[a.PipelineId] == nil {
						next[a.PipelineId] = map[string][]string{}
					}
					next[a.PipelineId][sc.SidecarId] = append(next[a.PipelineId][sc.SidecarId], to.SidecarId)
				}
			}
		}
	}
	for pipeline, ways := range next {
		for start := range ways {
			if way := circleFrom(start, func(id string) []string { return ways[id] }); way != nil {
				k.fault("at revision %d records of %s go round: %v", r.Revision, pipeline, way)
				break
			}
		}
	}
}

// expiries notes who is expired, and finds those that keep something for too long.
func (k *fleetChecker) expiries(r *clusterpb.ListSidecarsResponse) {
	served := k.served()
	for _, sc := range r.Sidecars {
		if sc.State != clusterpb.SidecarState_SIDECAR_STATE_EXPIRED {
			continue
		}
		e := expiry{sc.SidecarId, sc.StateChangedAt.AsTime().UnixMilli()}
		h := k.expired[e]
		if h == nil {
			h = &expiredHolder{since: -1, answered: k.s.answeredBy(sc.SidecarId)}
			k.expired[e] = h
		}
		switch {
		case len(sc.Assignments) == 0:
		case h.since < 0:
			h.since = served
		case served-h.since > k.leases.release && !h.done:
			h.done = true
			k.fault("%s expired and kept %s for %v in which the cluster served", sc.SidecarId, sc.Assignments[0].PipelineId, served-h.since)
		}
	}
}

// leasesKept finds sidecars that were expired although a node that was well, and
// stayed so for long enough to pass it on, had acknowledged a heartbeat of theirs
// less than a lease before.
func (k *fleetChecker) leasesKept() {
	for e, h := range k.expired {
		decided := time.UnixMilli(e.at)
		for _, b := range h.answered {
			// Decisions are stamped with milliseconds, downwards.
			if age := decided.Sub(b.sent); age < k.leases.expire-time.Millisecond && b.at.Add(passedOn).Before(decided) && k.s.weather.fine(b.node, b.sent, b.at.Add(recovery)) {
				k.fault("%s was expired at %v, although node %d acknowledged a heartbeat that was sent %v before", e.id, decided.Format("15:04:05.000"), b.node, age)
				break
			}
		}
	}
}

// answeredBy returns the heartbeats of a sidecar that were answered last.
func (s *Sidecars) answeredBy(id string) []answeredBeat {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.byID[id]; x != nil {
		return append([]answeredBeat(nil), x.answered...)
	}
	return nil
}

// settled returns nil once all sidecars are alive and hold exactly what the cluster
// says at one revision.
func (s *Sidecars) settled(ctx context.Context, n *Node) error {
	r, err := n.Cluster().ListSidecars(ctx, &clusterpb.ListSidecarsRequest{PageSize: 10_000})
	if err != nil {
		return err
	}
	if len(r.Sidecars) != len(s.all) {
		return fmt.Errorf("node %d knows %d of %d sidecars", n.ID, len(r.Sidecars), len(s.all))
	}
	for _, sc := range r.Sidecars {
		if sc.State != clusterpb.SidecarState_SIDECAR_STATE_ALIVE {
			return fmt.Errorf("node %d holds %s for %v", n.ID, sc.SidecarId, sc.State)
		}
		if diff := s.agrees(sc.SidecarId, sc.Assignments); diff != "" {
			return fmt.Errorf("%s %s", sc.SidecarId, diff)
		}
	}
	return nil
}

// runs lists by stage who runs it.
func runs(sidecars []*clusterpb.SidecarInfo, pipeline string) map[string][]string {
	out := map[string][]string{}
	for _, sc := range sidecars {
		for _, a := range sc.Assignments {
			if a.PipelineId != pipeline {
				continue
			}
			for _, st := range a.Stages {
				if _, local := st.Target.(*sidecarpb.StageAssignment_LocalEndpoint); local {
					out[st.StageId] = append(out[st.StageId], sc.SidecarId)
				}
			}
		}
	}
	return out
}
