package rpc

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// maxServicesPerStream bounds the services that may beat on one stream; an
// agent may speak for all of its machine.
const maxServicesPerStream = 1024

// heldGroup is what a service was last told to hold of one group.
type heldGroup struct {
	partitions []uint32
	generation uint64
}

// serviceBeat is one service on one heartbeat stream.
type serviceBeat struct {
	id           string
	registration string
	unwatch      func()
	told         map[string]heldGroup
	// expired: its lease was seen to have run out, and it was not told to resume
	// since.
	expired bool
	// drains is the deadline, in ms, of the drain it was told of; 0 = of none.
	drains uint64
}

// beatMessage is what the receiving goroutine hands to the answering one.
type beatMessage struct {
	req *registrypb.HeartbeatRequest
	err error
}

// Heartbeat takes the heartbeats of one or more services. Each is answered, in
// order; a change of what a service holds of a group is also sent at once,
// without waiting for its next heartbeat, and so is that it is to drain since it was
// deregistered in peace (drain, with the time it has), that it was removed (drain,
// not acknowledged), that its lease ran out, by which it has left its groups
// (drain), and that it counts again (resume: it may join them again). Health becomes a command only when it
// changes.
func (a *registryAPI) Heartbeat(stream registrypb.ServiceRegistry_HeartbeatServer) error {
	closeWatch, err := a.openWatch()
	if err != nil {
		return err
	}
	defer closeWatch()
	ctx := stream.Context()
	// One message at a time: a client that sends faster than it is answered is
	// held up by flow control.
	messages := make(chan beatMessage)
	go func() {
		for {
			req, err := stream.Recv()
			select {
			case messages <- beatMessage{req, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	s := &beatStream{api: a, stream: stream, services: make(map[string]*serviceBeat), pushes: newBell()}
	defer s.close()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m := <-messages:
			if errors.Is(m.err, io.EOF) {
				return nil
			}
			if m.err != nil {
				return m.err
			}
			if err := s.beat(ctx, m.req); err != nil {
				return err
			}
		case <-s.pushes:
			if err := s.push(); err != nil {
				return err
			}
		}
	}
}

// beatStream is the answering half of one heartbeat stream; it belongs to the
// handler's goroutine.
type beatStream struct {
	api      *registryAPI
	stream   registrypb.ServiceRegistry_HeartbeatServer
	services map[string]*serviceBeat
	pushes   bell // rung when any service of the stream may have changed
}

func (s *beatStream) close() {
	for _, sb := range s.services {
		sb.unwatch()
	}
}

// beat answers one heartbeat.
func (s *beatStream) beat(ctx context.Context, req *registrypb.HeartbeatRequest) error {
	a, id := s.api, req.GetServiceId()
	if err := checkID("service_id", id); err != nil {
		return err
	}
	if err := checkText("registration_id", req.GetRegistrationId(), MaxText); err != nil {
		return err
	}
	if err := checkHealth(req.GetHealth()); err != nil {
		return err
	}
	rec, err := a.currentService(ctx, id, req.GetRegistrationId())
	if err != nil {
		return err
	}
	if rec == nil || (req.GetRegistrationId() != "" && req.GetRegistrationId() != rec.RegistrationId) {
		// Gone, or replaced by a newer registration: this one is not alive.
		s.drop(id)
		return s.stream.Send(&registrypb.HeartbeatResponse{})
	}
	a.cfg.Beats.Touch(rec.SidecarId, id)
	sb := s.services[id]
	if sb == nil {
		if len(s.services) >= maxServicesPerStream {
			return invalid("service_id", "%d services beat on this stream already, the limit; open another stream", maxServicesPerStream)
		}
		sb = &serviceBeat{id: id, told: make(map[string]heldGroup)}
		sb.unwatch = a.feed.watchService(id, s.pushes)
		s.services[id] = sb
	}
	if sb.registration != rec.RegistrationId {
		sb.drains = 0
	}
	sb.registration = rec.RegistrationId
	s.noteHealth(rec, req.GetHealth())
	commands, err := a.groupCommands(sb)
	if err != nil {
		return err
	}
	commands = append(commands, sb.drain(rec, a.cfg.Now())...)
	if rec.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED {
		// This very heartbeat brings it back; that is told when it has taken effect.
		sb.expired = true
	} else {
		commands = append(commands, sb.resume()...)
	}
	return s.stream.Send(&registrypb.HeartbeatResponse{
		Acknowledged:          true,
		NextHeartbeatDeadline: durationMs(uint64(a.lease(rec.HeartbeatIntervalMs) / time.Millisecond)),
		Commands:              commands,
	})
}

func (s *beatStream) drop(id string) {
	if sb := s.services[id]; sb != nil {
		sb.unwatch()
		delete(s.services, id)
	}
}

// push sends what changed since the last answer.
func (s *beatStream) push() error {
	for id, sb := range s.services {
		commands, err := s.api.groupCommands(sb)
		if err != nil {
			return err
		}
		v := s.api.cfg.State.Latest()
		rec, err := v.Service(id)
		v.Close()
		if err != nil {
			return err
		}
		switch {
		case rec == nil:
			s.drop(id)
			commands = append(commands, drainService("the service was removed; register it to take part again"))
			if err := s.stream.Send(&registrypb.HeartbeatResponse{Commands: commands}); err != nil {
				return err
			}
			continue
		case rec.RegistrationId != sb.registration:
			continue // its next heartbeat is told so; it may be the same process
		}
		commands = append(commands, sb.drain(rec, s.api.cfg.Now())...)
		switch {
		case rec.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED && !sb.expired:
			sb.expired = true
			commands = append(commands, drainService("it was silent for longer than its lease and has left its groups; its next heartbeat brings it back"))
		case rec.State == commandpb.ServiceState_SERVICE_STATE_ALIVE:
			commands = append(commands, sb.resume()...)
		}
		if len(commands) == 0 {
			continue
		}
		err = s.stream.Send(&registrypb.HeartbeatResponse{
			Acknowledged:          true,
			NextHeartbeatDeadline: durationMs(uint64(s.api.lease(rec.HeartbeatIntervalMs) / time.Millisecond)),
			Commands:              commands,
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// drain returns what to tell a service that was deregistered in peace, if it was not
// told yet.
func (sb *serviceBeat) drain(rec *commandpb.Service, now time.Time) []*registrypb.RouterCommand {
	if rec.DrainSinceMs == 0 || sb.drains == rec.DrainDeadlineMs {
		return nil
	}
	sb.drains = rec.DrainDeadlineMs
	left := max(0, time.UnixMilli(int64(rec.DrainDeadlineMs)).Sub(now))
	cmd := drainService("it was deregistered: it is given nothing new, and is removed once it holds no partitions and no stage runs on it, or when the timeout is over")
	cmd.GetDrain().Timeout = durationMs(uint64(left / time.Millisecond))
	return []*registrypb.RouterCommand{cmd}
}

func drainService(reason string) *registrypb.RouterCommand {
	return &registrypb.RouterCommand{Command: &registrypb.RouterCommand_Drain{Drain: &registrypb.DrainCommand{Reason: reason}}}
}

// resume returns what to tell a service that is alive, if it was not.
func (sb *serviceBeat) resume() []*registrypb.RouterCommand {
	if !sb.expired {
		return nil
	}
	sb.expired = false
	return []*registrypb.RouterCommand{{Command: &registrypb.RouterCommand_Resume{Resume: &registrypb.ResumeCommand{}}}}
}

// noteHealth proposes what a service says of its health when that is news. The
// heartbeat is not held up by it; should the command be lost, the next heartbeat
// proposes it again.
func (s *beatStream) noteHealth(rec *commandpb.Service, h *registrypb.ServiceHealth) {
	if h == nil || h.GetStatus() == commonpb.HealthStatus_HEALTH_STATUS_UNSPECIFIED {
		return
	}
	said := healthFromAPI(h)
	if sameHealth(said, rec.Health) {
		return
	}
	log := s.api.log
	s.api.cfg.Submitter.SubmitFunc(&commandpb.Command{
		TimeMs: uint64(s.api.cfg.Now().UnixMilli()),
		Op: &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
			ServiceId: rec.ServiceId, Health: said,
		}},
	}, func(_ *commandpb.Result, _ uint64, err error) {
		if err != nil {
			log.Warn("health of a service not recorded", "service", rec.ServiceId, "error", err)
		}
	})
}

// sameHealth compares what decisions are made by. Texts are left out: a message
// with a number in it would make every heartbeat a command.
func sameHealth(a, b *commandpb.Health) bool {
	if a.GetStatus() != b.GetStatus() || len(a.GetComponents()) != len(b.GetComponents()) {
		return false
	}
	for k, c := range a.GetComponents() {
		if d, ok := b.GetComponents()[k]; !ok || c.GetStatus() != d.GetStatus() {
			return false
		}
	}
	return true
}

// currentService returns the record of a service, nil when it is not
// registered. Only when this node's own record does not fit the heartbeat is
// the leader asked: the node may merely be behind.
func (a *registryAPI) currentService(ctx context.Context, id, registration string) (*commandpb.Service, error) {
	read := func() (*commandpb.Service, error) {
		v := a.cfg.State.Latest()
		defer v.Close()
		return v.Service(id)
	}
	rec, err := read()
	if err != nil || (rec != nil && (registration == "" || rec.RegistrationId == registration)) {
		return rec, err
	}
	// A stream has no deadline of its own.
	ctx, cancel := context.WithTimeout(ctx, a.cfg.CallTimeout)
	defer cancel()
	if err := a.reader.Wait(ctx); err != nil {
		return nil, err
	}
	return read()
}

// groupCommands compares what a service was told to hold with what it holds now.
// What it lost is revoked before what it gained is assigned.
func (a *registryAPI) groupCommands(sb *serviceBeat) ([]*registrypb.RouterCommand, error) {
	v := a.cfg.State.View()
	defer v.Close()
	var ids []string
	err := v.GroupsOf(sb.id, func(g *commandpb.Group) bool {
		ids = append(ids, g.GroupId)
		return true
	})
	if err != nil {
		return nil, err
	}
	for id := range sb.told {
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	var revokes, assigns []*registrypb.RouterCommand
	for _, id := range ids {
		r, as, err := sb.compareGroup(v, id)
		if err != nil {
			return nil, err
		}
		if r != nil {
			revokes = append(revokes, &registrypb.RouterCommand{Command: &registrypb.RouterCommand_Revoke{Revoke: r}})
		}
		if as != nil {
			assigns = append(assigns, &registrypb.RouterCommand{Command: &registrypb.RouterCommand_Assign{Assign: as}})
		}
	}
	return append(revokes, assigns...), nil
}

// compareGroup returns what to tell about one group. The assignment carries all
// partitions held, with the generation that commits have to name: a member that
// keeps its partitions through a rebalance still has to learn the generation.
func (sb *serviceBeat) compareGroup(v *router.View, group string) (*registrypb.RevokePartitions, *registrypb.AssignPartitions, error) {
	g, err := v.Group(group)
	if err != nil {
		return nil, nil, err
	}
	was, known := sb.told[group]
	// As commits have to name it: after a restore the group may come to the same
	// number again.
	generation := router.Fence(v.Epoch(), g.GetGeneration())
	if !isMember(g, sb.id) {
		if !known {
			return nil, nil, nil
		}
		delete(sb.told, group)
		if len(was.partitions) == 0 {
			return nil, nil, nil
		}
		return &registrypb.RevokePartitions{
			GroupId: group, Partitions: was.partitions, Generation: max(generation, was.generation),
		}, nil, nil
	}
	now := memberPartitions(g, sb.id)
	if known && was.generation == generation && slices.Equal(was.partitions, now) {
		return nil, nil, nil
	}
	sb.told[group] = heldGroup{partitions: now, generation: generation}
	var revoke *registrypb.RevokePartitions
	if lost := without(was.partitions, now); len(lost) > 0 {
		revoke = &registrypb.RevokePartitions{GroupId: group, Partitions: lost, Generation: generation}
	}
	return revoke, &registrypb.AssignPartitions{GroupId: group, Partitions: now, Generation: generation}, nil
}

// without returns the elements of a that are not in b; both ascend.
func without(a, b []uint32) []uint32 {
	var out []uint32
	for _, p := range a {
		if _, found := slices.BinarySearch(b, p); !found {
			out = append(out, p)
		}
	}
	return out
}
