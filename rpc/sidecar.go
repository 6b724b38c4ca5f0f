package rpc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// placementQuiet is how long a registration waits for further assignments once
// the first have come: a placement may arrive in several commands.
const placementQuiet = 20 * time.Millisecond

// sidecarAPI implements SidecarCoordinator.
//
// The sidecars in the field register once at start, beat every ten seconds on
// one connection without a deadline, and do nothing else: they never register
// again, never watch, never acknowledge. So a registration lasts until it is
// replaced, and every change has to reach them in the answer to a heartbeat.
type sidecarAPI struct {
	sidecarpb.UnimplementedSidecarCoordinatorServer
	*Server
}

// RegisterSidecar stores a registration durably and answers what the sidecar has
// to run, for which it waits a bounded time.
func (a *sidecarAPI) RegisterSidecar(ctx context.Context, req *sidecarpb.RegisterSidecarRequest) (*sidecarpb.RegisterSidecarResponse, error) {
	if err := checkRegisterSidecar(req); err != nil {
		return nil, err
	}
	id := req.SidecarId
	rec := &commandpb.Sidecar{
		SidecarId: id,
		PodName:   req.PodName,
		Namespace: req.Namespace,
		Endpoint:  req.SidecarEndpoint,
		Services:  make([]*commandpb.LocalService, 0, len(req.LocalServices)),
	}
	for _, ls := range req.LocalServices {
		rec.Services = append(rec.Services, &commandpb.LocalService{
			Name: localName(ls), Type: commandpb.ServiceType(ls.ServiceType), Endpoint: ls.LocalEndpoint,
		})
	}
	warnings := placementLabels(rec, req.Labels)
	// Before the command, so that no assignment made for it is missed.
	b := newBell()
	defer a.feed.watchSidecar(id, b)()
	before, err := a.localSidecar(id)
	if err != nil {
		return nil, err
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{
		RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: rec},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return &sidecarpb.RegisterSidecarResponse{Error: rej.GetReason()}, nil
	}
	a.cfg.Beats.Touch(id, "")
	resp := &sidecarpb.RegisterSidecarResponse{
		Success:             true,
		RegistrationId:      registrationOf(id, res.GetGeneration()),
		Revision:            res.GetRevision(),
		HeartbeatIntervalMs: a.nextBeatMs(),
		TtlMs:               uint64(a.cfg.SidecarTTL.Milliseconds()),
		Warnings:            append(warnings, registrationWarnings(before, rec)...),
	}
	for _, w := range resp.Warnings {
		a.log.Warn(w, "sidecar", id)
	}
	// It is registered: whatever fails from here on must not tell it otherwise,
	// because it exits when told so. Its first heartbeat brings the rest.
	if err := a.reader.waitRevision(ctx, res.GetRevision()); err != nil {
		return resp, nil
	}
	// The same registration of a live sidecar leaves its assignments as they are.
	same := before.GetState() == commandpb.SidecarState_SIDECAR_STATE_ALIVE && before.GetGeneration() == res.GetGeneration()
	if !same && a.feed.wanted(rec.Services) {
		a.awaitPlacement(ctx, id, res.GetRevision(), b)
	}
	// The epoch is that of the answer or, when it is restored meanwhile, an older
	// one: then the next heartbeat tells all of it again.
	epoch := a.cfg.State.Epoch()
	assignments, _, err := a.currentAssignments(id)
	if err != nil {
		a.log.Error("reading the assignments of a new sidecar", "sidecar", id, "error", err)
		return resp, nil
	}
	for _, as := range assignments {
		resp.InitialAssignments = append(resp.InitialAssignments, assignmentToAPI(as, epoch))
	}
	a.told.registered(id, a.cfg.Now(), assignments, epoch)
	return resp, nil
}

// localName returns the name of a local service. A sidecar derives names from
// gRPC service names, and one called just "Service" has none left; it is known
// by its type then, because a refusal would keep its pod from starting.
func localName(ls *sidecarpb.LocalService) string {
	if ls.ServiceName != "" {
		return ls.ServiceName
	}
	return strings.ToLower(strings.TrimPrefix(ls.ServiceType.String(), "SERVICE_TYPE_"))
}

// awaitPlacement returns once the placement has looked at the sidecar as registered
// at revision, or when PlacementWait has passed. When nobody says how far the placement
// is, it waits for a newer assignment, which a sidecar that gets nothing to do never
// sees.
func (a *sidecarAPI) awaitPlacement(ctx context.Context, id string, revision uint64, b bell) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.PlacementWait)
	defer cancel()
	if a.planned(ctx, revision) {
		return
	}
	for {
		if _, newest, err := a.currentAssignments(id); err != nil || newest > revision {
			break
		}
		select {
		case <-b:
		case <-ctx.Done():
			return
		case <-a.run.Done():
			return
		}
	}
	for {
		quiet := time.NewTimer(placementQuiet)
		select {
		case <-b:
			quiet.Stop()
			continue
		case <-quiet.C:
		case <-ctx.Done():
			quiet.Stop()
		}
		return
	}
}

// localSidecar reads the record of a sidecar as this node has it, nil when it
// has none.
func (a *sidecarAPI) localSidecar(id string) (*commandpb.Sidecar, error) {
	v := a.cfg.State.Latest()
	defer v.Close()
	return v.Sidecar(id)
}

// currentAssignments returns the assignments in force, and the revision of the
// newest change among all of them, revocations included.
func (a *sidecarAPI) currentAssignments(id string) (out []*commandpb.Assignment, newest uint64, err error) {
	v := a.cfg.State.Latest()
	defer v.Close()
	err = v.Assignments(id, func(as *commandpb.Assignment) bool {
		newest = max(newest, as.ModRevision)
		if !as.Revoked {
			out = append(out, as)
		}
		return true
	})
	return out, newest, err
}

// Heartbeat notes that a sidecar is alive and answers what changed for it. It
// never writes to the log.
func (a *sidecarAPI) Heartbeat(ctx context.Context, req *sidecarpb.SidecarHeartbeatRequest) (*sidecarpb.HeartbeatResponse, error) {
	id := req.GetSidecarId()
	if err := checkHeartbeat(req); err != nil {
		return nil, err
	}
	resp := &sidecarpb.HeartbeatResponse{
		HeartbeatIntervalMs: a.nextBeatMs(),
		TtlMs:               uint64(a.cfg.SidecarTTL.Milliseconds()),
	}
	if reason := a.rivals.find(ctx, id, a.cfg.Now()); reason != "" {
		return a.answerRival(ctx, id, reason, resp)
	}
	if req.RegistrationId != "" {
		reason, err := a.otherRegistration(ctx, id, req.RegistrationId)
		if err != nil {
			return nil, err
		}
		if reason != "" {
			resp.Reason, resp.Revision = reason, a.cfg.State.Revision()
			a.reader.SetHeader(ctx, resp.Revision, a.cfg.State.Epoch())
			return resp, nil
		}
	}
	current := false // whether the state is known to be up to date
	// Before the look whether something is due: of changes up to here it knows.
	epoch, noted := a.cfg.State.Epoch(), a.feed.rungUp()
	entry, what := a.told.beat(id, a.cfg.Now())
	doubt := entry != nil && a.told.takeDoubt(entry)
	if doubt { // one that is there needs no quorum
		sc, err := a.localSidecar(id)
		doubt = err != nil || sc == nil
	}
	if entry == nil || doubt {
		// "Unknown" must not be said by a node that is merely behind.
		err := a.reader.Wait(ctx)
		var sc *commandpb.Sidecar
		if err == nil {
			sc, err = a.localSidecar(id)
		}
		if err != nil {
			if doubt {
				a.told.giveBackDoubt(entry)
			}
			return nil, err
		}
		current = true
		if sc == nil {
			a.told.forget(id)
			resp.Reason = unknownSidecar(id)
			resp.Revision = a.cfg.State.Revision()
			a.reader.SetHeader(ctx, resp.Revision, a.cfg.State.Epoch())
			return resp, nil
		}
	}
	a.cfg.Beats.Touch(id, "")
	resp.Acknowledged = true
	if entry == nil {
		entry, what = a.told.first(id, a.cfg.Now()), firstDue
	}
	var counts bool
	resp.Reason, counts = a.appliedFuture(ctx, claimOf(req))
	a.told.heardBack(ctx, entry, claimOf(req), counts)
	a.confirm(id, entry)
	if what == nothingDue {
		// The newest revision there is may be of a change that is not noted yet. Whoever
		// was told of it without its commands would confirm what it never heard of.
		if resp.Revision = entry.comparedUpTo(noted, epoch); resp.Revision == 0 {
			what = changesDue
		}
	}
	if what != nothingDue {
		if what == firstDue && !current {
			if err := a.reader.Wait(ctx); err != nil {
				a.told.forget(id)
				return nil, err
			}
		}
		v := a.cfg.State.View()
		cmds, again, err := entry.commands(v, id, what, false)
		resp.Revision, resp.Commands, epoch = v.Revision(), cmds, v.Epoch()
		v.Close()
		if err != nil {
			a.told.forget(id)
			return nil, err
		}
		if again {
			a.told.again(id)
		}
	}
	a.reader.SetHeader(ctx, resp.Revision, epoch)
	a.noteHealth(id, entry, req.GetServiceHealth())
	if len(resp.Commands) > 0 {
		entry.telling(ctx)
	}
	return resp, nil
}

func unknownSidecar(id string) string {
	return fmt.Sprintf("no sidecar %q is registered; register it, then send heartbeats", id)
}

// nextBeatMs returns when a sidecar should beat again. It differs by a tenth
// either way: a fleet that was started, or cut off, at once would beat in step
// for ever otherwise.
func (s *Server) nextBeatMs() uint64 {
	ms := s.cfg.HeartbeatInterval.Milliseconds()
	return uint64(ms - ms/10 + rand.Int64N(max(1, ms/5+1)))
}

// otherRegistration says why a heartbeat for one registration does not count,
// "" when it does. The leader is asked only when this node's own record is
// another one: it may merely be behind.
func (a *sidecarAPI) otherRegistration(ctx context.Context, id, registration string) (string, error) {
	sc, err := a.localSidecar(id)
	if err != nil || sc != nil && registration == registrationOf(id, sc.Generation) {
		return "", err
	}
	if err := a.reader.Wait(ctx); err != nil {
		return "", err
	}
	sc, err = a.localSidecar(id)
	switch {
	case err != nil:
		return "", err
	case sc == nil:
		return unknownSidecar(id), nil
	}
	return replacedRegistration(sc, registration), nil
}

// replacedRegistration says why a registration of sc does not count, "" when it
// is the one in force.
func replacedRegistration(sc *commandpb.Sidecar, registration string) string {
	if registration == registrationOf(sc.SidecarId, sc.Generation) {
		return ""
	}
	return fmt.Sprintf("registration %q of sidecar %s is not in force any more: pod %s at %s has registered since, as %q; register again to take over",
		registration, sc.SidecarId, podName(sc), sc.Endpoint, registrationOf(sc.SidecarId, sc.Generation))
}

// noteHealth passes on what a sidecar says of the health of its services, when
// that differs from what it said last, to those of them that are registered.
func (a *sidecarAPI) noteHealth(id string, e *told, said []*sidecarpb.LocalServiceHealth) {
	var changed map[string]bool
	e.mu.Lock()
	for _, h := range said {
		if len(e.unhealthy) == 0 && h.GetHealthy() {
			continue // what nearly every heartbeat says
		}
		name := router.NormalizeName(h.GetServiceName())
		_, was := e.unhealthy[name]
		if was == !h.GetHealthy() {
			continue
		}
		if changed == nil {
			changed = make(map[string]bool)
		}
		changed[name] = h.GetHealthy()
		if h.GetHealthy() {
			delete(e.unhealthy, name)
			continue
		}
		if len(e.unhealthy) >= MaxLocalServices {
			continue // more than it can have, under names it makes up
		}
		if e.unhealthy == nil {
			e.unhealthy = make(map[string]struct{})
		}
		e.unhealthy[name] = struct{}{}
	}
	e.mu.Unlock()
	if len(changed) == 0 {
		return
	}
	v := a.cfg.State.Latest()
	defer v.Close()
	err := v.ServicesOfSidecar(id, func(s *commandpb.Service) bool {
		healthy, ok := changed[router.NormalizeName(s.Name)]
		if !ok {
			return true
		}
		health := &commandpb.Health{Status: commandpb.HealthStatus_HEALTH_STATUS_HEALTHY}
		if !healthy {
			health.Status = commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY
			health.Message = "its sidecar " + id + " reports it unhealthy"
		}
		a.cfg.Submitter.SubmitFunc(&commandpb.Command{
			TimeMs: uint64(a.cfg.Now().UnixMilli()),
			Op: &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
				ServiceId: s.ServiceId, Health: health,
			}},
		}, func(_ *commandpb.Result, _ uint64, err error) {
			if err != nil {
				// The sidecar's next word about this service makes up for it.
				a.log.Warn("health of a service not recorded", "service", s.ServiceId, "error", err)
				e.mu.Lock()
				defer e.mu.Unlock()
				delete(e.unhealthy, router.NormalizeName(s.Name))
			}
		})
		return true
	})
	if err != nil {
		a.log.Error("reading the services of a sidecar", "sidecar", id, "error", err)
	}
}
