package router

import (
	"errors"
	"slices"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// maxPurged bounds the services that one command removes. Part of the state machine,
// so no option.
const maxPurged = 1000

// drainService marks a service as draining: it is given nothing new, keeps the
// partitions it holds, and is removed by the leader once it has nothing left, or at
// the deadline, which the result holds. It is in the state and not in the leader's
// memory, so that the next leader goes on with it. Of one that drains already the
// earlier deadline stands: were it the newer, a client that asks again and again would
// put the end off for ever.
//
// Rejections: INVALID (id, no timeout), LIMIT (timeout), FENCED (the registration is
// another one). Draining what is not there succeeds with existed unset.
func (t *tx) drainService(c *commandpb.DrainService) *commandpb.Rejection {
	if r := checkID("service id", c.ServiceId); r != nil {
		return r
	}
	subject := "service " + c.ServiceId
	if c.TimeoutMs == 0 {
		return invalid(subject, "a drain needs a timeout")
	}
	if c.TimeoutMs > maxDrainMS {
		return limit(subject, "a drain of %d ms, at most %d are allowed", c.TimeoutMs, maxDrainMS)
	}
	prev := t.service(c.ServiceId)
	if prev == nil {
		return nil
	}
	if r := otherRegistration(prev, c.RegistrationId); r != nil {
		return r
	}
	t.res.Existed = true
	next := proto.Clone(prev).(*commandpb.Service)
	if prev.DrainSinceMs == 0 {
		// Never 0, which would say that it does not drain.
		next.DrainSinceMs = max(t.now, 1)
	}
	next.DrainDeadlineMs = earlier(prev.DrainDeadlineMs, t.now+c.TimeoutMs)
	t.res.DeadlineMs = next.DrainDeadlineMs
	if proto.Equal(prev, next) {
		return nil
	}
	t.drainMemberships(c.ServiceId, true)
	return t.saveService(prev, next)
}

// earlier returns the earlier of two deadlines, the first of which may be 0 for none.
func earlier(stands, asked uint64) uint64 {
	if stands == 0 {
		return asked
	}
	return min(stands, asked)
}

// otherRegistration refuses what is meant for another registration than that of s.
func otherRegistration(s *commandpb.Service, registration string) *commandpb.Rejection {
	if registration == "" || registration == s.RegistrationId {
		return nil
	}
	return reject(commandpb.Code_CODE_FENCED, "service "+s.ServiceId, "the service was registered again since, as %q; only the current registration can be removed", s.RegistrationId)
}

// drainMemberships notes in its groups whether a service drains. That alone moves no
// partition: the next change of a group gives a member that drains no more than it
// has.
func (t *tx) drainMemberships(service string, draining bool) {
	for _, id := range t.groupsOf(service) {
		prev := t.group(id)
		i, ok := findMember(prev, service)
		if !ok || prev.Members[i].Draining == draining {
			continue
		}
		next := proto.Clone(prev).(*commandpb.Group)
		next.Members[i].Draining = draining
		t.saveGroup(prev, next)
	}
}

// groupsOf lists the groups a service is a member of.
func (t *tx) groupsOf(service string) []string {
	var groups []string
	t.scan(t.buf.group(prefixMembership, service), func(k, _ []byte) {
		_, group, err := decodePair(k)
		t.fail(err)
		groups = append(groups, group)
	})
	return groups
}

// drained refuses the removal of a service that has not drained yet. What it runs of
// pipelines is the leader's to know; that it holds partitions is looked at here, for
// they would change hands while it still works on them.
func (t *tx) drained(s *commandpb.Service) *commandpb.Rejection {
	subject := "service " + s.ServiceId
	if s.DrainSinceMs == 0 {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "it does not drain: it was registered again since")
	}
	if s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED || t.now >= s.DrainDeadlineMs {
		return nil
	}
	for _, id := range t.groupsOf(s.ServiceId) {
		g := t.group(id)
		if i, ok := findMember(g, s.ServiceId); ok && len(g.Members[i].Partitions) > 0 {
			return reject(commandpb.Code_CODE_PRECONDITION, subject, "it drains and still holds %d partitions of group %s", len(g.Members[i].Partitions), id)
		}
	}
	return nil
}

// removeService removes a service, and it from its groups.
func (t *tx) removeService(prev *commandpb.Service) {
	t.unindexService(prev)
	t.remove(t.buf.single(prefixService, prev.ServiceId))
	t.count(countServices, -1)
	t.emit(TableServices, prev.ServiceId, prev, nil)
	t.leaveAll(prev.ServiceId)
}

// Offers is true when a sidecar reports a service of a name, compared as NormalizeName
// does, that it has found beside it. It is false for no sidecar.
func Offers(s *commandpb.Sidecar, name string) bool {
	return slices.Contains(localNames(s), NormalizeName(name))
}

// withdraw takes a service that has drained out of what its sidecar has reported,
// unless another one of the name is registered there. The sidecar reports it until it
// registers again, and without the registration that said it drains it would be given
// back at once what it has just let go of.
func (t *tx) withdraw(s *commandpb.Service) {
	if s.SidecarId == "" {
		return
	}
	prev := t.sidecar(s.SidecarId)
	if !Offers(prev, s.Name) {
		return
	}
	name := NormalizeName(s.Name)
	var others []string
	t.scan(t.buf.group(prefixBySidecar, s.SidecarId), func(k, _ []byte) {
		_, id, err := decodePair(k)
		t.fail(err)
		others = append(others, id)
	})
	for _, id := range others {
		if id != s.ServiceId && NormalizeName(t.service(id).GetName()) == name {
			return
		}
	}
	next := proto.Clone(prev).(*commandpb.Sidecar)
	next.Services = slices.DeleteFunc(next.Services, func(l *commandpb.LocalService) bool { return NormalizeName(l.Name) == name })
	t.saveSidecar(prev, next)
}

// purgeServices forgets services that have been expired for at least the retention.
// A service that comes back meanwhile is as it was; one that comes back later has to
// register again. One that its sidecar still reports stays: that it is expired is all
// there is to say that the sidecar must not be given work for it.
//
// Rejections: INVALID (ids), LIMIT.
func (t *tx) purgeServices(c *commandpb.PurgeServices) *commandpb.Rejection {
	if len(c.Services) > maxPurged {
		return limit("services", "%d to be purged, at most %d are allowed", len(c.Services), maxPurged)
	}
	for _, x := range c.Services {
		if r := checkID("service id", x.GetServiceId()); r != nil {
			return r
		}
	}
	for _, x := range c.Services {
		prev := t.service(x.ServiceId)
		if prev == nil || prev.State != commandpb.ServiceState_SERVICE_STATE_EXPIRED ||
			prev.ModRevision != x.ExpectedRevision || t.now < prev.ExpiredAtMs+c.RetentionMs ||
			prev.SidecarId != "" && Offers(t.sidecar(prev.SidecarId), prev.Name) {
			t.res.Stale++
			continue
		}
		t.removeService(prev)
	}
	return nil
}

// setState changes the state of a service, and notes since when it is expired.
func (t *tx) setState(s *commandpb.Service, state commandpb.ServiceState) {
	was := s.State
	s.State = state
	switch {
	case state != commandpb.ServiceState_SERVICE_STATE_EXPIRED:
		s.ExpiredAtMs = 0
	case was != state:
		s.ExpiredAtMs = t.now
	}
}

// reviveService makes a service that was expired alive.
func (t *tx) reviveService(prev *commandpb.Service) {
	next := proto.Clone(prev).(*commandpb.Service)
	t.setState(next, commandpb.ServiceState_SERVICE_STATE_ALIVE)
	if r := t.saveService(prev, next); r != nil {
		t.fail(errors.New("router: a stored service cannot be stored again: " + r.Reason))
	}
}
