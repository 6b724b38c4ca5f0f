package dev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// sidecar is a demo sidecar. It registers, sends heartbeats and watches its
// assignments as one of the field does; only the records are missing.
type sidecar struct {
	id       string
	port     int
	services []*sidecarpb.LocalService
	leases   Leases
	events   *events

	mu       sync.Mutex
	told     map[string]*sidecarpb.PipelineAssignment // by pipeline
	silenced bool
	synced   bool
}

// demoSidecars spreads the services that the pipelines ask for over pods:
// sources, transforms and sinks in two pods each, so that every stage has
// somewhere to go when a pod is lost, and no record has to come back to a pod
// it has passed.
func demoSidecars(o *Options, ev *events) []*sidecar {
	offered := make(map[adminpb.StageType][]string)
	for _, p := range o.Pipelines {
		for _, st := range p.GetStages() {
			name, t := st.GetServiceSelector().GetServiceName(), st.GetStageType()
			if name != "" && !slices.Contains(offered[t], name) {
				offered[t] = append(offered[t], name)
			}
		}
	}
	var out []*sidecar
	for _, kind := range []struct {
		pod   string
		stage adminpb.StageType
		typ   sidecarpb.ServiceType
	}{
		{"ingest", adminpb.StageType_STAGE_TYPE_SOURCE, sidecarpb.ServiceType_SERVICE_TYPE_SOURCE},
		{"work", adminpb.StageType_STAGE_TYPE_TRANSFORM, sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM},
		{"store", adminpb.StageType_STAGE_TYPE_SINK, sidecarpb.ServiceType_SERVICE_TYPE_SINK},
	} {
		for i := range 2 {
			s := &sidecar{
				id: fmt.Sprintf("demo/%s-%d", kind.pod, i), port: 53000 + len(out), leases: o.Leases, events: ev,
				told: make(map[string]*sidecarpb.PipelineAssignment),
			}
			for j, name := range offered[kind.stage] {
				s.services = append(s.services, &sidecarpb.LocalService{
					ServiceName: name, ServiceType: kind.typ, LocalEndpoint: fmt.Sprintf("127.0.0.1:%d", 54000+100*len(out)+j),
				})
			}
			if len(s.services) > 0 {
				out = append(out, s)
			}
		}
	}
	return out
}

// silence stops or starts its heartbeats, as if its network were cut.
func (s *sidecar) silence() {
	s.mu.Lock()
	s.silenced = !s.silenced
	silenced := s.silenced
	s.mu.Unlock()
	if silenced {
		s.events.add("%s falls silent: suspect after %v, its stages move after %v", s.id, s.leases.SuspectAfter, s.leases.ExpireAfter)
	} else {
		s.events.add("%s is heard of again", s.id)
	}
}

// run lives the life of a sidecar until ctx is done.
func (s *sidecar) run(ctx context.Context, endpoints []string, registered func()) error {
	conn, err := dial(endpoints)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := sidecarpb.NewSidecarCoordinatorClient(conn)
	for {
		if err := s.register(ctx, client); err == nil {
			break
		} else if !pause(ctx, 300*time.Millisecond) {
			return nil
		}
	}
	registered()
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { s.watch(ctx, client) })
	for pause(ctx, s.leases.HeartbeatEvery) {
		s.mu.Lock()
		silenced := s.silenced
		s.mu.Unlock()
		if !silenced {
			s.beat(ctx, client)
		}
	}
	return nil
}

func (s *sidecar) register(ctx context.Context, client sidecarpb.SidecarCoordinatorClient) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	namespace, pod, _ := strings.Cut(s.id, "/")
	reply, err := client.RegisterSidecar(ctx, &sidecarpb.RegisterSidecarRequest{
		SidecarId: s.id, PodName: pod, Namespace: namespace,
		SidecarEndpoint: fmt.Sprintf("127.0.0.1:%d", s.port), LocalServices: s.services,
	}, grpc.WaitForReady(true))
	if err == nil && !reply.GetSuccess() {
		err = errors.New(reply.GetError())
	}
	return err
}

func (s *sidecar) beat(ctx context.Context, client sidecarpb.SidecarCoordinatorClient) {
	ctx, cancel := context.WithTimeout(ctx, s.leases.HeartbeatEvery)
	defer cancel()
	req := &sidecarpb.SidecarHeartbeatRequest{SidecarId: s.id}
	for _, svc := range s.services {
		req.ServiceHealth = append(req.ServiceHealth, &sidecarpb.LocalServiceHealth{ServiceName: svc.ServiceName, Healthy: true})
	}
	reply, err := client.Heartbeat(ctx, req)
	if err == nil && !reply.GetAcknowledged() {
		_ = s.register(ctx, client) // the next heartbeat shows whether it helped
	}
}

// watch follows the assignments. A broken stream is resumed where it ended.
func (s *sidecar) watch(ctx context.Context, client sidecarpb.SidecarCoordinatorClient) {
	from := uint64(0)
	for ctx.Err() == nil {
		stream, err := client.WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{SidecarId: s.id, FromRevision: from}, grpc.WaitForReady(true))
		for err == nil {
			var ev *sidecarpb.PipelineAssignmentEvent
			if ev, err = stream.Recv(); err == nil {
				from = max(from, ev.GetRevision())
				if ev.GetEventType() == sidecarpb.EventType_EVENT_TYPE_RESYNC {
					from = 0
				}
				s.take(ev)
			}
		}
		if !pause(ctx, 300*time.Millisecond) {
			return
		}
	}
}

func (s *sidecar) take(ev *sidecarpb.PipelineAssignmentEvent) {
	a := ev.GetAssignment()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch ev.GetEventType() {
	case sidecarpb.EventType_EVENT_TYPE_ASSIGNED, sidecarpb.EventType_EVENT_TYPE_UPDATED:
		s.told[a.GetPipelineId()] = a
	case sidecarpb.EventType_EVENT_TYPE_REVOKED:
		delete(s.told, a.GetPipelineId())
	case sidecarpb.EventType_EVENT_TYPE_RESYNC:
		clear(s.told)
	case sidecarpb.EventType_EVENT_TYPE_SYNCED:
		s.synced = true
	}
}

// holds lists what the sidecar was told to run, by pipeline: the stages it runs
// itself, and where it hands on to.
func (s *sidecar) holds() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for id := range s.told {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var out []string
	for _, id := range ids {
		var local, next []string
		for _, st := range s.told[id].GetStages() {
			if r := st.GetRemoteSidecar(); r != nil {
				if to := shortID(r.GetSidecarId()); !slices.Contains(next, to) {
					next = append(next, to)
				}
			} else {
				local = append(local, st.GetStageId())
			}
		}
		text := shortID(id) + ": " + strings.Join(local, ", ")
		if len(next) > 0 {
			text += " > " + strings.Join(next, ", ")
		}
		out = append(out, text)
	}
	return out
}

// shortID drops the namespace of an id: in the demonstration it says nothing.
func shortID(id string) string {
	if i := strings.LastIndexByte(id, '/'); i >= 0 {
		return id[i+1:]
	}
	return id
}
