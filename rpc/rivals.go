package rpc

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	grpcpeer "google.golang.org/grpc/peer"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

const (
	// maxRivals bounds the pods remembered that lost their sidecar id to another.
	maxRivals = 4096
	// rivalAlarm is how long after its last heartbeat one is reported.
	rivalAlarm = time.Minute
)

// rivals are the pods whose sidecar id another pod has registered since. The
// newest registration wins: refusing it would keep a restarted pod from
// starting. But the earlier pod may still be there, when two were given one id
// by mistake, and its heartbeats name nothing but the id. It is known by the
// address they come from, which is that of its endpoint. Answered like the new
// one it would run the same stages a second time, and keep the registration of
// the other alive after that has died.
//
// It is soft state of each node, about the changes it has seen.
type rivals struct {
	n  atomic.Int64 // of by, for the heartbeats of everybody else
	mu sync.Mutex
	by map[string]*rival // by sidecar id
}

type rival struct {
	host, pod string    // of the earlier registration
	winner    string    // pod and endpoint of the one in force
	seen      time.Time // its last heartbeat; zero = none
}

// replaced takes note that a registration took the place of another.
func (r *rivals) replaced(prev, next *commandpb.Sidecar) {
	host, _, err := net.SplitHostPort(prev.GetEndpoint())
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	defer func() { r.n.Store(int64(len(r.by))) }()
	now, _, err := net.SplitHostPort(next.GetEndpoint())
	if err != nil || now == host {
		// The same pod, or two on one machine, which cannot be told apart.
		if e := r.by[next.GetSidecarId()]; e != nil && e.host == now {
			delete(r.by, next.GetSidecarId())
		}
		return
	}
	if r.by == nil {
		r.by = make(map[string]*rival)
	}
	if len(r.by) >= maxRivals && r.by[next.GetSidecarId()] == nil {
		for id := range r.by { // any: the likeliest to be gone long since
			delete(r.by, id)
			break
		}
	}
	r.by[next.GetSidecarId()] = &rival{host: host, pod: podName(prev), winner: podName(next) + " at " + next.GetEndpoint()}
}

func podName(s *commandpb.Sidecar) string {
	return strings.TrimPrefix(s.GetNamespace()+"/"+s.GetPodName(), "/")
}

// find returns why the caller is not the one that holds the registration of
// sidecar id, "" when it may be.
func (r *rivals) find(ctx context.Context, id string, now time.Time) string {
	if r.n.Load() == 0 {
		return ""
	}
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return ""
	}
	// Everybody on this machine, a proxy in front of others included.
	if ip := net.ParseIP(host); ip == nil || ip.IsLoopback() {
		return ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.by[id]
	if e == nil || e.host != host {
		return ""
	}
	e.seen = now
	return fmt.Sprintf("sidecar %s was registered again by pod %s, so this pod, %s at %s, has nothing to run any more; give each pod a sidecar id of its own, or restart this one to take over",
		id, e.winner, e.pod, host)
}

// alarms tells of the pods that still beat under an id that is not theirs.
func (r *rivals) alarms(now time.Time) []string {
	if r.n.Load() == 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	type one struct {
		id string
		*rival
	}
	var out []one
	for id, e := range r.by {
		if !e.seen.IsZero() && now.Sub(e.seen) < rivalAlarm {
			out = append(out, one{id, e})
		}
	}
	if len(out) == 0 {
		return nil
	}
	first := slices.MinFunc(out, func(a, b one) int { return cmp.Compare(a.id, b.id) })
	text := fmt.Sprintf("two pods use sidecar id %s: %s has the registration, %s at %s still beats and was told to stop; give each pod an id of its own",
		first.id, first.winner, first.pod, first.host)
	if n := len(out) - 1; n > 0 {
		text += fmt.Sprintf(" (and %d more ids like it)", n)
	}
	return []string{text}
}

// answerRival tells a pod that lost its id to drop all that the id has to run.
// It is acknowledged: the sidecars in the field do what they are told only then.
func (a *sidecarAPI) answerRival(ctx context.Context, id, reason string, resp *sidecarpb.HeartbeatResponse) (*sidecarpb.HeartbeatResponse, error) {
	v := a.cfg.State.View()
	defer v.Close()
	if err := tellRival(v, id, reason, resp); err != nil {
		return nil, err
	}
	a.reader.SetHeader(ctx, v.Revision(), v.Epoch())
	return resp, nil
}

func tellRival(v *router.View, id, reason string, resp *sidecarpb.HeartbeatResponse) error {
	err := v.Assignments(id, func(as *commandpb.Assignment) bool {
		resp.Commands = append(resp.Commands, revokeCommand(as.PipelineId, true))
		return true
	})
	resp.Acknowledged, resp.Reason, resp.Revision = true, reason, v.Revision()
	return err
}

// registrationOf is the id of one registration of a sidecar.
func registrationOf(id string, generation uint64) string { return id + "#" + formatUint(generation) }

// registrationWarnings says what is accepted of a registration and is probably
// not meant. before is the registration that was in force, nil without one.
func registrationWarnings(before, rec *commandpb.Sidecar) []string {
	var out []string
	if before != nil && before.State == commandpb.SidecarState_SIDECAR_STATE_ALIVE && podName(before) != podName(rec) {
		out = append(out, fmt.Sprintf("sidecar %s was registered by pod %s at %s, which was alive until now, and is this pod's from here on; if both are meant to run, give each an id of its own",
			rec.SidecarId, podName(before), before.Endpoint))
	}
	return append(out, sameNames(rec.Services)...)
}

// sameNames tells of services of one pod that no pipeline can tell apart.
func sameNames(services []*commandpb.LocalService) []string {
	var out []string
	byName := make(map[string][]string)
	for _, s := range services {
		key := s.Name + " (" + strings.ToLower(strings.TrimPrefix(s.Type.String(), "SERVICE_TYPE_")) + ")"
		if !slices.Contains(byName[key], s.Endpoint) {
			byName[key] = append(byName[key], s.Endpoint)
		}
	}
	for name, endpoints := range byName {
		if len(endpoints) > 1 {
			slices.Sort(endpoints)
			out = append(out, fmt.Sprintf("%d services of this pod are called %s, at %s: a stage that asks for the name gets one of them, always the same; give them different names to use all",
				len(endpoints), name, strings.Join(endpoints[:min(len(endpoints), 3)], ", ")))
		}
	}
	slices.Sort(out)
	return out[:min(len(out), 16)]
}
