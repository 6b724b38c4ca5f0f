package rpc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// WatchServices streams the services that match: the state as ADDED, SYNCED when
// that is complete, then every change with its kind, and SYNCED again now and
// then so that a quiet watch has a recent revision to resume from.
//
// Unless the caller includes unhealthy services the state leaves them out, and
// so do changes of a service that was unhealthy before and is after; becoming
// unhealthy and becoming healthy again are always told, as HEALTH_CHANGED.
// Whoever gets any event but REMOVED may take it as the service's new record.
//
// A watch that cannot go on without a gap says RESYNC and starts over with the
// whole state.
func (a *registryAPI) WatchServices(req *registrypb.WatchServicesRequest, stream registrypb.ServiceRegistry_WatchServicesServer) error {
	w := &serviceWatch{
		filter: serviceFilter{req.GetTypeFilter(), req.GetLabelSelector(), req.GetIncludeUnhealthy()},
		state:  a.cfg.State,
		send:   stream.Send,
	}
	if err := w.filter.check(); err != nil {
		return err
	}
	closeWatch, err := a.openWatch()
	if err != nil {
		return err
	}
	defer closeWatch()
	ctx := stream.Context()
	if err := a.reader.Wait(ctx); err != nil {
		return err
	}
	a.reader.SetHeader(ctx, a.cfg.State.Revision(), a.cfg.State.Epoch())
	from := req.GetFromRevision()
	w.epoch = a.cfg.State.Epoch()
	if known := req.GetFromEpoch(); from > 0 && known != 0 && known != w.epoch {
		if err := w.resync(restoredReason(known, w.epoch)); err != nil {
			return err
		}
		from = 0
	}
	for {
		if from == 0 {
			if from, err = w.sendState(); err != nil {
				return err
			}
		}
		err := w.follow(ctx, from, a.cfg.SyncEvery)
		switch {
		case errors.Is(err, router.ErrCompacted), errors.Is(err, router.ErrFutureRevision), errors.Is(err, router.ErrResync):
			reason := fmt.Sprintf("the changes after revision %d cannot be told one by one: %v", max(from, w.reached), err)
			if now := a.cfg.State.Epoch(); now != w.epoch {
				reason = restoredReason(w.epoch, now)
			}
			if err := w.resync(reason); err != nil {
				return err
			}
			from, w.reached = 0, 0
		default:
			return err
		}
	}
}

// serviceWatch is one stream of service events.
type serviceWatch struct {
	filter  serviceFilter
	state   *router.FSM
	send    func(*registrypb.ServiceEvent) error
	reached uint64 // newest revision the client can resume from
	epoch   uint64 // restore epoch of what is sent
}

// resync tells the client to forget everything.
func (w *serviceWatch) resync(reason string) error {
	return w.send(&registrypb.ServiceEvent{EventType: registrypb.EventType_EVENT_TYPE_RESYNC, Reason: reason, Epoch: w.epoch})
}

// sendState sends every service that is shown, then SYNCED, and returns the
// revision of the state sent. The events carry no revision: a state received in
// part cannot be resumed.
func (w *serviceWatch) sendState() (uint64, error) {
	v := w.state.View()
	defer v.Close()
	w.epoch = v.Epoch()
	idx, err := indexPartitions(v)
	if err != nil {
		return 0, err
	}
	var sendErr error
	err = v.Services("", 0, func(s *commandpb.Service) bool {
		if w.filter.shows(s) {
			sendErr = w.send(&registrypb.ServiceEvent{
				EventType: registrypb.EventType_EVENT_TYPE_ADDED, Service: serviceToAPI(s, idx.of(s)),
			})
		}
		return sendErr == nil
	})
	if err == nil {
		err = sendErr
	}
	if err != nil {
		return 0, err
	}
	return v.Revision(), w.synced(v.Revision())
}

func (w *serviceWatch) synced(revision uint64) error {
	w.reached = revision
	return w.send(&registrypb.ServiceEvent{EventType: registrypb.EventType_EVENT_TYPE_SYNCED, Revision: revision, Epoch: w.epoch})
}

// follow sends the changes after revision from until an error.
func (w *serviceWatch) follow(ctx context.Context, from uint64, every time.Duration) error {
	sub, err := w.state.Hub().Subscribe(from, router.TableServices, router.TableGroups)
	if err != nil {
		return err
	}
	defer sub.Close()
	if w.reached < from {
		// The client resumed: tell it that this works.
		if err := w.synced(from); err != nil {
			return err
		}
	}
	for {
		tick, cancel := context.WithTimeout(ctx, every)
		changes, reached, err := sub.Next(tick)
		cancel()
		switch {
		case err == nil:
			if err := w.sendChanges(changes); err != nil {
				return err
			}
			// What the filter held back still moves the place to resume from.
			if reached > w.reached && len(changes) > 0 {
				w.reached = max(w.reached, changes[len(changes)-1].Revision)
			}
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			if at := sub.Reached(); at > w.reached {
				if err := w.synced(at); err != nil {
					return err
				}
			}
		default:
			return err
		}
	}
}

// sendChanges sends the events of whole revisions. All events of one revision but
// its last carry the revision before, so that resuming never loses the rest.
func (w *serviceWatch) sendChanges(changes []router.Change) error {
	var pending *registrypb.ServiceEvent
	for i := range changes {
		events, err := w.events(&changes[i])
		if err != nil {
			return err
		}
		for _, ev := range events {
			ev.Revision, ev.Epoch = changes[i].Revision, w.epoch
			if pending != nil {
				if pending.Revision == ev.Revision {
					pending.Revision--
				}
				if err := w.send(pending); err != nil {
					return err
				}
			}
			pending = ev
		}
	}
	if pending == nil {
		return nil
	}
	return w.send(pending)
}

// events turns one change into what this watch is told.
func (w *serviceWatch) events(c *router.Change) ([]*registrypb.ServiceEvent, error) {
	switch c.Table {
	case router.TableServices:
		prev, _ := c.Prev.(*commandpb.Service)
		next, _ := c.Next.(*commandpb.Service)
		return w.serviceEvents(prev, next)
	case router.TableGroups:
		prev, _ := c.Prev.(*commandpb.Group)
		next, _ := c.Next.(*commandpb.Group)
		return w.groupEvents(prev, next)
	}
	return nil, nil
}

func (w *serviceWatch) serviceEvents(prev, next *commandpb.Service) ([]*registrypb.ServiceEvent, error) {
	had, has := w.filter.matches(prev), w.filter.matches(next)
	switch {
	case !had && !has:
		return nil, nil
	case !has:
		return w.event(registrypb.EventType_EVENT_TYPE_REMOVED, prev)
	case !had:
		if !w.filter.shows(next) {
			return nil, nil
		}
		return w.event(registrypb.EventType_EVENT_TYPE_ADDED, next)
	}
	if !w.filter.unhealthy && !usable(prev) && !usable(next) {
		return nil, nil
	}
	var out []*registrypb.ServiceEvent
	if !sameService(prev, next) {
		evs, err := w.event(registrypb.EventType_EVENT_TYPE_MODIFIED, next)
		if err != nil {
			return nil, err
		}
		out = append(out, evs...)
	}
	if healthOf(prev) != healthOf(next) {
		evs, err := w.event(registrypb.EventType_EVENT_TYPE_HEALTH_CHANGED, next)
		if err != nil {
			return nil, err
		}
		out = append(out, evs...)
	}
	return out, nil
}

// sameService says whether two records differ in nothing but health, times and
// revisions.
func sameService(a, b *commandpb.Service) bool {
	strip := func(s *commandpb.Service) *commandpb.Service {
		c := proto.Clone(s).(*commandpb.Service)
		c.State, c.LastHeartbeatMs, c.ModRevision, c.ExpiredAtMs = 0, 0, 0, 0
		if c.Health != nil {
			c.Health.Status = 0
		} else {
			c.Health = &commandpb.Health{}
		}
		return c
	}
	return proto.Equal(strip(a), strip(b))
}

func (w *serviceWatch) event(kind registrypb.EventType, s *commandpb.Service) ([]*registrypb.ServiceEvent, error) {
	v := w.state.Latest()
	defer v.Close()
	partitions, err := partitionsOf(v, s)
	if err != nil {
		return nil, err
	}
	return []*registrypb.ServiceEvent{{EventType: kind, Service: serviceToAPI(s, partitions)}}, nil
}

// groupEvents tells which members gained and which lost partitions. The record
// shows what the service holds now, and names the group concerned.
func (w *serviceWatch) groupEvents(prev, next *commandpb.Group) ([]*registrypb.ServiceEvent, error) {
	v := w.state.Latest()
	defer v.Close()
	was, now := membersOf(prev), membersOf(next)
	var out []*registrypb.ServiceEvent
	add := func(kind registrypb.EventType, service, group string, holds []uint32) error {
		s, err := v.Service(service)
		if err != nil || s == nil || !w.filter.shows(s) {
			return err
		}
		rec := serviceToAPI(s, holds)
		rec.Identity.GroupId = group
		out = append(out, &registrypb.ServiceEvent{EventType: kind, Service: rec})
		return nil
	}
	// Losses first: a watcher that keeps one owner per partition never sees two.
	for _, m := range prev.GetMembers() {
		if len(without(m.Partitions, now[m.ServiceId])) > 0 {
			if err := add(registrypb.EventType_EVENT_TYPE_PARTITIONS_REVOKED, m.ServiceId, prev.GroupId, now[m.ServiceId]); err != nil {
				return nil, err
			}
		}
	}
	for _, m := range next.GetMembers() {
		if len(without(m.Partitions, was[m.ServiceId])) > 0 {
			if err := add(registrypb.EventType_EVENT_TYPE_PARTITIONS_ASSIGNED, m.ServiceId, next.GroupId, m.Partitions); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

func membersOf(g *commandpb.Group) map[string][]uint32 {
	out := make(map[string][]uint32, len(g.GetMembers()))
	for _, m := range g.GetMembers() {
		out[m.ServiceId] = m.Partitions
	}
	return out
}
