package router

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// sidecar loads a sidecar; nil when absent. Each call returns a fresh message.
func (t *tx) sidecar(id string) *commandpb.Sidecar {
	s := &commandpb.Sidecar{}
	if !t.load(t.buf.single(prefixSidecar, id), s) {
		return nil
	}
	return s
}

// localNames returns the distinct normalised names of a sidecar's services.
func localNames(s *commandpb.Sidecar) []string {
	var out []string
	for _, l := range s.GetServices() {
		out = append(out, NormalizeName(l.Name))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (t *tx) saveSidecar(prev, next *commandpb.Sidecar) {
	next.ModRevision = t.revision
	var before proto.Message
	if prev != nil {
		before = prev
	} else {
		t.count(countSidecars, 1)
	}
	was, is := localNames(prev), localNames(next)
	for _, n := range was {
		if _, still := slices.BinarySearch(is, n); !still {
			t.unmark(t.buf.pair(prefixLocalName, n, next.SidecarId))
		}
	}
	for _, n := range is {
		if _, known := slices.BinarySearch(was, n); !known {
			t.mark(t.buf.pair(prefixLocalName, n, next.SidecarId))
		}
	}
	t.store(t.buf.single(prefixSidecar, next.SidecarId), next)
	t.emit(TableSidecars, next.SidecarId, before, next)
}

// registerSidecar creates or replaces a registration and keeps the sidecar's
// assignments. The same one again only brings it back to life. The generation
// moves when what placement decides by has changed: the endpoint or the
// services. An operator's drain outlasts a registration, since a pod that is
// restarted comes back under its name; one that was about to leave has not.
//
// Rejections: INVALID (ids, texts), LIMIT.
func (t *tx) registerSidecar(c *commandpb.RegisterSidecar) *commandpb.Rejection {
	next := c.GetSidecar()
	if next == nil {
		return invalid("sidecar", "the command holds no sidecar")
	}
	if r := first(
		checkID("sidecar id", next.SidecarId), checkText("pod name", next.PodName),
		checkText("namespace", next.Namespace), checkText("endpoint", next.Endpoint),
		checkText("zone", next.Zone), checkText("node", next.Node),
	); r != nil {
		return r
	}
	if len(next.Services) > maxLocalServices {
		return limit("sidecar "+next.SidecarId, "it reports %d services, at most %d are allowed", len(next.Services), maxLocalServices)
	}
	for _, s := range next.Services {
		if r := first(checkID("service name", s.GetName()), checkText("service endpoint", s.GetEndpoint())); r != nil {
			return r
		}
	}
	next.Services = canonicalServices(next.Services)
	next.State = commandpb.SidecarState_SIDECAR_STATE_ALIVE
	next.Generation = 1
	next.RegisteredAtMs, next.StateChangedAtMs = t.now, t.now
	next.CreateRevision, next.ModRevision = t.revision, t.revision
	next.Draining, next.Leaves, next.DrainSinceMs, next.DrainDeadlineMs = false, false, 0, 0
	next.ExpiredAtMs, next.GraceUntilMs = 0, 0
	prev := t.sidecar(next.SidecarId)
	if prev != nil {
		t.res.Existed = true
		next.Generation = prev.Generation
		next.RegisteredAtMs, next.StateChangedAtMs = prev.RegisteredAtMs, prev.StateChangedAtMs
		next.CreateRevision, next.ModRevision = prev.CreateRevision, prev.ModRevision
		t.res.Generation = prev.Generation
		next.ExpiredAtMs = prev.ExpiredAtMs
		if prev.Draining && !prev.Leaves {
			next.Draining, next.DrainSinceMs, next.DrainDeadlineMs = true, prev.DrainSinceMs, prev.DrainDeadlineMs
		}
		if proto.Equal(prev, next) {
			return nil
		}
		same := next.Endpoint == prev.Endpoint && slices.EqualFunc(next.Services, prev.Services, func(a, b *commandpb.LocalService) bool {
			return proto.Equal(a, b)
		})
		if !same {
			next.Generation++
			next.RegisteredAtMs = t.now
		}
		if next.State != prev.State {
			next.StateChangedAtMs = t.now
		}
	}
	t.saveSidecar(prev, next)
	t.res.Generation = next.Generation
	return nil
}

// deregisterSidecar removes a sidecar and revokes its assignments, which stay
// as revocations for a while in case it is still running.
//
// Rejections: INVALID (id), PRECONDITION (it does not leave any more).
func (t *tx) deregisterSidecar(c *commandpb.DeregisterSidecar) *commandpb.Rejection {
	if r := checkID("sidecar id", c.SidecarId); r != nil {
		return r
	}
	prev := t.sidecar(c.SidecarId)
	if prev == nil {
		return nil
	}
	if c.LeavingOnly && !(prev.Draining && prev.Leaves) {
		return reject(commandpb.Code_CODE_PRECONDITION, "sidecar "+c.SidecarId, "it is not about to leave: it was undrained, or registered again, since")
	}
	for _, n := range localNames(prev) {
		t.unmark(t.buf.pair(prefixLocalName, n, c.SidecarId))
	}
	t.remove(t.buf.single(prefixSidecar, c.SidecarId))
	t.count(countSidecars, -1)
	t.emit(TableSidecars, c.SidecarId, prev, nil)
	t.res.Existed, t.res.Generation = true, prev.Generation
	var runs []*commandpb.Assignment
	t.scan(t.buf.group(prefixAssignment, c.SidecarId), func(_, v []byte) {
		a := &commandpb.Assignment{}
		t.fail(a.UnmarshalVT(v))
		runs = append(runs, a)
	})
	for _, a := range runs {
		if t.revoke(a, 0) { // it is gone, by the word of the caller
			t.forgetOldest(c.SidecarId)
		}
	}
	t.purgeRevoked()
	return nil
}

// transitionSidecar records what the leader's liveness found out. One that expires
// again soon after it did keeps what it has for a while: moving it there and back
// each time would disturb more than its absence.
//
// Rejections: INVALID (id, state), NOT_FOUND, CONFLICT (registered again
// since).
func (t *tx) transitionSidecar(c *commandpb.TransitionSidecar) *commandpb.Rejection {
	if r := checkID("sidecar id", c.SidecarId); r != nil {
		return r
	}
	subject := "sidecar " + c.SidecarId
	if _, ok := commandpb.SidecarState_name[int32(c.State)]; !ok || c.State == commandpb.SidecarState_SIDECAR_STATE_UNSPECIFIED {
		return invalid(subject, "%d is no state a sidecar can be in", c.State)
	}
	prev := t.sidecar(c.SidecarId)
	if prev == nil {
		return notFound("sidecar", c.SidecarId)
	}
	t.res.Existed, t.res.Generation = true, prev.Generation
	if c.ExpectedGeneration != 0 && c.ExpectedGeneration != prev.Generation {
		return conflict(subject, prev.Generation, "generation %d was expected, it registered again since and is at %d", c.ExpectedGeneration, prev.Generation)
	}
	expired := c.State == commandpb.SidecarState_SIDECAR_STATE_EXPIRED
	if prev.State == c.State {
		if !expired || c.GraceMs > 0 || prev.GraceUntilMs == 0 || t.now < prev.GraceUntilMs {
			return nil
		}
		next := proto.Clone(prev).(*commandpb.Sidecar)
		next.GraceUntilMs = 0
		t.saveSidecar(prev, next)
		return nil
	}
	next := proto.Clone(prev).(*commandpb.Sidecar)
	next.State, next.StateChangedAtMs = c.State, t.now
	next.GraceUntilMs = 0
	if grace := min(c.GraceMs, maxReleaseMS); expired && grace > 0 {
		if prev.ExpiredAtMs > 0 && t.now <= prev.ExpiredAtMs+FlapFactor*grace {
			next.GraceUntilMs = t.now + grace
		}
		next.ExpiredAtMs = t.now
	}
	t.saveSidecar(prev, next)
	return nil
}
