package control

import (
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"strconv"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// A service that is deregistered in peace drains: it is in the state with a deadline,
// as a sidecar that leaves is, and the leader removes it. It has nothing left when it
// holds no partition of a group and no stage runs with it on its sidecar.

// drainingService notes whether s is one that drains.
func (m *mirror) drainingService(s *commandpb.Service) {
	if s.DrainSinceMs > 0 {
		m.leaving[s.ServiceId] = s
	} else {
		delete(m.leaving, s.ServiceId)
	}
}

// hasLeaving is true when a service registered with a sidecar drains.
func (m *mirror) hasLeaving(sidecar string) bool {
	if len(m.leaving) == 0 {
		return false
	}
	for _, s := range m.services[sidecar] {
		if s.DrainSinceMs > 0 {
			return true
		}
	}
	return false
}

// serves is true when stages run, or have yet to be let go of, with a service that
// drains. Which of them a sidecar has yet to let go of is not told apart: it takes
// only as long as a handover may.
func (m *mirror) serves(s *commandpb.Service) bool {
	if s.SidecarId == "" || m.gone(s.SidecarId) {
		return false
	}
	if len(m.letting[s.SidecarId]) > 0 {
		return true
	}
	name := router.NormalizeName(s.Name)
	for _, other := range m.services[s.SidecarId] {
		if other.DrainSinceMs == 0 && other.State != commandpb.ServiceState_SERVICE_STATE_EXPIRED && router.NormalizeName(other.Name) == name {
			return false // that one goes on with them
		}
	}
	var at []string
	for _, l := range m.sidecars[s.SidecarId].Services {
		if router.NormalizeName(l.Name) == name {
			at = append(at, l.Endpoint)
		}
	}
	if len(at) == 0 && s.Endpoint != nil {
		at = append(at, net.JoinHostPort(s.Endpoint.Host, strconv.FormatUint(uint64(s.Endpoint.Port), 10)))
	}
	return m.engine.RunsAt(s.SidecarId, at)
}

// hasLeft is true when a service that drains has nothing left to do. One that is
// expired does nothing.
func (p *Placer) hasLeft(m *mirror, s *commandpb.Service) (bool, error) {
	if s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED {
		return true, nil
	}
	if m.serves(s) {
		return false, nil
	}
	holds := false
	v := p.c.State.View()
	err := v.GroupsOf(s.ServiceId, func(g *commandpb.Group) bool {
		for _, member := range g.Members {
			holds = holds || member.ServiceId == s.ServiceId && len(member.Partitions) > 0
		}
		return !holds
	})
	return !holds, errors.Join(err, v.Close())
}

// maxRemoved is how many services are removed before the next plan: each removal is a
// command, and thousands that go at once must not keep a pipeline waiting.
const maxRemoved = 32

// tidyServices removes the services that have drained, some of them if they are many.
func (p *Placer) tidyServices(ctx context.Context, m *mirror, past func(waitKey) bool) error {
	removed := 0
	for _, id := range slices.Sorted(maps.Keys(m.leaving)) {
		if removed == maxRemoved {
			return nil // what is left is due soon
		}
		s := m.leaving[id]
		atLeast, over := uint64(0), past(waitKey{service: id, ms: s.DrainDeadlineMs})
		if over {
			atLeast = s.DrainDeadlineMs
		} else if left, err := p.hasLeft(m, s); err != nil || !left {
			if err != nil {
				return err
			}
			continue
		}
		res, err := p.submit(ctx, m, atLeast, &commandpb.Command{Op: &commandpb.Command_DeregisterService{
			DeregisterService: &commandpb.DeregisterService{ServiceId: id, RegistrationId: s.RegistrationId, DrainedOnly: true},
		}})
		removed++
		switch {
		case err != nil:
			return err
		case res.GetRejection() != nil: // it was registered again, or is not done after all
			p.c.Logger.Debug("a service that drains is not removed yet", "service", id, "reason", res.Rejection.Reason)
		case over:
			p.c.Logger.Warn("a service has not drained within its time; it is removed", "service", id)
		default:
			p.c.Logger.Info("a service has drained and is removed", "service", id)
		}
	}
	return nil
}

// concerns is true when a change of a group may leave a service that drains with
// nothing to do.
func (m *mirror) concerns(c *router.Change) bool {
	if len(m.leaving) == 0 {
		return false
	}
	prev, _ := c.Prev.(*commandpb.Group)
	for _, member := range prev.GetMembers() {
		if m.leaving[member.ServiceId] != nil {
			return true
		}
	}
	return false
}
