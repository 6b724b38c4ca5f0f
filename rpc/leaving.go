package rpc

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// runner is a sidecar that runs a stage, and the endpoint of the service it does so with.
type runner struct{ sidecar, endpoint string }

// runnersOf returns by stage of a pipeline who runs it, by id.
func runnersOf(v *router.View, pipeline string) (map[string][]runner, error) {
	out := make(map[string][]runner)
	err := v.PipelineAssignments(pipeline, func(a *commandpb.Assignment) bool {
		if a.Revoked {
			return true
		}
		for _, sa := range a.Stages {
			if sa.RemoteSidecarId == "" {
				out[sa.StageId] = append(out[sa.StageId], runner{a.SidecarId, sa.LocalEndpoint})
			}
		}
		return true
	})
	for _, by := range out {
		slices.SortFunc(by, func(x, y runner) int { return strings.Compare(x.sidecar, y.sidecar) })
	}
	return out, err
}

// leavers finds the services that drain, since they were deregistered in peace, and that
// stages still run with. It looks at each sidecar once.
type leavers struct {
	v  *router.View
	by map[string]map[string]*commandpb.Service // by sidecar and endpoint
}

// of returns the service that drains of those a stage runs with.
func (l *leavers) of(r runner) (*commandpb.Service, error) {
	at, known := l.by[r.sidecar]
	if !known {
		var err error
		if at, err = l.on(r.sidecar); err != nil {
			return nil, err
		}
		if l.by == nil {
			l.by = make(map[string]map[string]*commandpb.Service)
		}
		l.by[r.sidecar] = at
	}
	return at[r.endpoint], nil
}

// on returns by endpoint the services of a sidecar that drain. Where another service of
// the name goes on there is none: the stages stay with that one. The leader decides the
// same way when it looks whether a service is done (control/servicedrains.go).
func (l *leavers) on(sidecar string) (map[string]*commandpb.Service, error) {
	var draining []*commandpb.Service
	stays := make(map[string]bool)
	err := l.v.ServicesOfSidecar(sidecar, func(s *commandpb.Service) bool {
		if s.DrainSinceMs > 0 {
			draining = append(draining, s)
		} else if s.State != commandpb.ServiceState_SERVICE_STATE_EXPIRED {
			stays[router.NormalizeName(s.Name)] = true
		}
		return true
	})
	if err != nil || len(draining) == 0 {
		return nil, err
	}
	sc, err := l.v.Sidecar(sidecar)
	if err != nil {
		return nil, err
	}
	out := make(map[string]*commandpb.Service)
	for _, s := range draining {
		name := router.NormalizeName(s.Name)
		if stays[name] {
			continue
		}
		found := false
		for _, ls := range sc.GetServices() {
			if router.NormalizeName(ls.Name) == name {
				out[ls.Endpoint], found = s, true
			}
		}
		if !found && s.Endpoint != nil {
			out[net.JoinHostPort(s.Endpoint.Host, strconv.FormatUint(uint64(s.Endpoint.Port), 10))] = s
		}
	}
	return out, nil
}

// maxLeaversAsked bounds on how many sidecars of one stage it is looked for services that
// drain: each costs a scan, and a stage may run on ten thousand. Those that drain on
// others are not told of here; the sidecars themselves show them.
const maxLeaversAsked = 1000

// reason says which of the services that a stage runs with drain, and until when; "" when
// none does.
func (l *leavers) reason(by []runner) (string, error) {
	n, until := 0, uint64(0)
	var first *commandpb.Service
	if len(by) > maxLeaversAsked {
		by = by[:maxLeaversAsked]
	}
	for _, r := range by {
		s, err := l.of(r)
		if err != nil {
			return "", err
		}
		if s == nil {
			continue
		}
		if n++; first == nil {
			first = s
		}
		until = max(until, s.DrainDeadlineMs)
	}
	if n == 0 {
		return "", nil
	}
	who := fmt.Sprintf("service %s of sidecar %s was deregistered and is", first.ServiceId, first.SidecarId)
	if n > 1 {
		who = fmt.Sprintf("services %s of sidecar %s and %d more were deregistered and are", first.ServiceId, first.SidecarId, n-1)
	}
	return fmt.Sprintf("%s removed by %s; what runs with %s moves to another sidecar that can run it, and waits for one otherwise",
		who, clock(time.UnixMilli(int64(until))), plural(n, "it", "them")), nil
}
