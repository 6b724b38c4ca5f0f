package router

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// NormalizeName returns the form in which service names are compared: lower
// case without '-', '_' and '.'. Only A to Z are lowered: other letters by the
// tables of the Go release, which index entries must not depend on.
func NormalizeName(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '-', r == '_', r == '.':
			return -1
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

func checkMap(what string, m map[string]string) *commandpb.Rejection {
	if len(m) > maxMapEntries {
		return limit(what, "%d %s, at most %d are allowed", len(m), what, maxMapEntries)
	}
	// Any of several faults may be found first, so the answer must not name
	// the entry: map order would reach the result.
	for k, v := range m {
		if checkText(what, k) != nil || checkText(what, v) != nil {
			return invalid(what, "%s must be valid UTF-8 of at most %d bytes each", what, maxTextBytes)
		}
	}
	return nil
}

func checkTexts(what string, texts []string) *commandpb.Rejection {
	if len(texts) > maxMapEntries {
		return limit(what, "%d %s, at most %d are allowed", len(texts), what, maxMapEntries)
	}
	for _, s := range texts {
		if r := checkText(what, s); r != nil {
			return r
		}
	}
	return nil
}

func checkHealth(h *commandpb.Health) *commandpb.Rejection {
	if h == nil {
		return nil
	}
	if len(h.Components) > maxMapEntries {
		return limit("health", "%d components, at most %d are allowed", len(h.Components), maxMapEntries)
	}
	for k, c := range h.Components {
		if checkText("", k) != nil || checkText("", c.GetName()) != nil || checkText("", c.GetMessage()) != nil {
			return invalid("health", "names and messages of components must be valid UTF-8 of at most %d bytes", maxTextBytes)
		}
	}
	return checkText("health message", h.Message)
}

// service loads a service; nil when absent. Each call returns a fresh message.
func (t *tx) service(id string) *commandpb.Service {
	s := &commandpb.Service{}
	if !t.load(t.buf.single(prefixService, id), s) {
		return nil
	}
	return s
}

// saveService stores next in place of prev (nil = new) with its index entries.
func (t *tx) saveService(prev, next *commandpb.Service) *commandpb.Rejection {
	next.ModRevision = t.revision
	v, err := encode(next)
	if err != nil {
		return invalid("service "+next.ServiceId, "it cannot be stored: a text in it is not valid UTF-8")
	}
	var before proto.Message
	if prev != nil {
		before = prev
		t.unindexService(prev)
	} else {
		t.count(countServices, 1)
	}
	t.put(t.cell(t.buf.single(prefixService, next.ServiceId)), v, nil)
	t.mark(t.buf.pair(prefixByName, NormalizeName(next.Name), next.ServiceId))
	if next.SidecarId != "" {
		t.mark(t.buf.pair(prefixBySidecar, next.SidecarId, next.ServiceId))
	}
	t.emit(TableServices, next.ServiceId, before, next)
	return nil
}

func (t *tx) unindexService(s *commandpb.Service) {
	t.unmark(t.buf.pair(prefixByName, NormalizeName(s.Name), s.ServiceId))
	if s.SidecarId != "" {
		t.unmark(t.buf.pair(prefixBySidecar, s.SidecarId, s.ServiceId))
	}
}

// registerService creates or replaces a registration. The same one again only
// brings the service back to life, if it was expired.
//
// Rejections: INVALID (ids, texts), LIMIT.
func (t *tx) registerService(c *commandpb.RegisterService) *commandpb.Rejection {
	in := c.GetService()
	if in == nil {
		return invalid("service", "the command holds no service")
	}
	if r := first(
		checkID("service id", in.ServiceId), checkID("service name", in.Name),
		checkText("service version", in.Version), checkTexts("capabilities", in.Capabilities),
		checkTexts("record types", in.RecordTypes), checkText("group id", in.GroupId),
		checkText("host", in.GetEndpoint().GetHost()), checkMap("labels", in.Labels),
		checkText("registration id", in.RegistrationId), checkHealth(in.Health),
	); r != nil {
		return r
	}
	if in.SidecarId != "" {
		if r := checkID("sidecar id", in.SidecarId); r != nil {
			return r
		}
	}
	prev := t.service(in.ServiceId)
	next := in
	next.State = commandpb.ServiceState_SERVICE_STATE_ALIVE
	next.RegisteredAtMs, next.LastHeartbeatMs = t.now, t.now
	next.CreateRevision, next.ModRevision = t.revision, t.revision
	next.DrainSinceMs, next.DrainDeadlineMs, next.ExpiredAtMs = 0, 0, 0
	if prev != nil {
		t.res.Existed = true
		next.CreateRevision, next.ModRevision = prev.CreateRevision, prev.ModRevision
		if next.RegistrationId == prev.RegistrationId && next.Health == nil {
			next.Health = prev.Health
		}
	}
	if next.Health == nil {
		next.Health = &commandpb.Health{Status: commandpb.HealthStatus_HEALTH_STATUS_HEALTHY}
	}
	if prev != nil {
		next.RegisteredAtMs, next.LastHeartbeatMs = prev.RegisteredAtMs, prev.LastHeartbeatMs
		if proto.Equal(prev, next) {
			return nil
		}
		next.RegisteredAtMs, next.LastHeartbeatMs = t.now, t.now
		if prev.DrainSinceMs > 0 {
			t.drainMemberships(next.ServiceId, false)
		}
	}
	return t.saveService(prev, next)
}

// deregisterService removes a service, and it from its groups. Removing what
// is not there succeeds with existed unset.
//
// Rejections: INVALID (id), FENCED (the registration is another one), PRECONDITION
// (it has not drained).
func (t *tx) deregisterService(c *commandpb.DeregisterService) *commandpb.Rejection {
	if r := checkID("service id", c.ServiceId); r != nil {
		return r
	}
	prev := t.service(c.ServiceId)
	if prev == nil {
		return nil
	}
	if r := otherRegistration(prev, c.RegistrationId); r != nil {
		return r
	}
	if c.DrainedOnly {
		if r := t.drained(prev); r != nil {
			return r
		}
		t.withdraw(prev)
	}
	t.removeService(prev)
	t.res.Existed = true
	return nil
}

// renewLease records a heartbeat that has to outlive the leader.
//
// Rejections: INVALID (id), NOT_FOUND.
func (t *tx) renewLease(c *commandpb.RenewLease) *commandpb.Rejection {
	if r := checkID("service id", c.ServiceId); r != nil {
		return r
	}
	prev := t.service(c.ServiceId)
	if prev == nil {
		return notFound("service", c.ServiceId)
	}
	t.res.Existed = true
	if prev.LastHeartbeatMs == t.now && prev.State == commandpb.ServiceState_SERVICE_STATE_ALIVE {
		return nil
	}
	next := proto.Clone(prev).(*commandpb.Service)
	next.LastHeartbeatMs = t.now
	t.setState(next, commandpb.ServiceState_SERVICE_STATE_ALIVE)
	return t.saveService(prev, next)
}

// updateServiceHealth records a change of health or state. A service that
// expires leaves its groups in the same step: its partitions must not wait for
// an owner that is gone.
//
// Rejections: INVALID (id, texts, state), LIMIT, NOT_FOUND, CONFLICT (expected
// revision).
func (t *tx) updateServiceHealth(c *commandpb.UpdateServiceHealth) *commandpb.Rejection {
	if r := first(checkID("service id", c.ServiceId), checkHealth(c.Health)); r != nil {
		return r
	}
	if _, ok := commandpb.ServiceState_name[int32(c.State)]; !ok {
		return invalid("service "+c.ServiceId, "unknown state %d", c.State)
	}
	prev := t.service(c.ServiceId)
	if prev == nil {
		return notFound("service", c.ServiceId)
	}
	t.res.Existed = true
	if c.ExpectedRevision != 0 && c.ExpectedRevision != prev.ModRevision {
		return conflict("service "+c.ServiceId, prev.ModRevision,
			"it was registered again or changed since revision %d, it is at %d; nothing was changed", c.ExpectedRevision, prev.ModRevision)
	}
	next := proto.Clone(prev).(*commandpb.Service)
	if c.Health != nil {
		next.Health = c.Health
	}
	if c.State != commandpb.ServiceState_SERVICE_STATE_UNSPECIFIED {
		t.setState(next, c.State)
	}
	if proto.Equal(prev, next) {
		return nil
	}
	if r := t.saveService(prev, next); r != nil {
		return r
	}
	if next.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED && prev.State != next.State {
		t.leaveAll(c.ServiceId)
	}
	return nil
}

// canonicalServices sorts a sidecar's services and drops repetitions: a
// sidecar finds them in any order, and an order is no change.
func canonicalServices(in []*commandpb.LocalService) []*commandpb.LocalService {
	text := func(s *commandpb.LocalService) string {
		return fmt.Sprintf("%s\x00%d\x00%s", s.Name, s.Type, s.Endpoint)
	}
	slices.SortStableFunc(in, func(a, b *commandpb.LocalService) int { return strings.Compare(text(a), text(b)) })
	return slices.CompactFunc(in, func(a, b *commandpb.LocalService) bool { return text(a) == text(b) })
}
