package control

import (
	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// mirror is what the planner knows of the state, as of one revision, kept up to
// date by the changes of the state. It belongs to one goroutine.
type mirror struct {
	engine   *placement.Engine
	revision uint64
	epoch    uint64
	sidecars map[string]*commandpb.Sidecar
	// services are the registrations on each sidecar, by id. They may come
	// before their sidecar does.
	services map[string]map[string]*commandpb.Service
	// handovers are what sidecars have yet to let go of, by pipeline and sidecar.
	handovers map[string]map[string]*commandpb.Handover
	// timed are the sidecars with whom something is due at a time: they leave, or
	// their grace ends.
	timed map[string]bool
	// draining and graced are the sidecars that are.
	draining, graced map[string]bool
	// leaving are the services that drain.
	leaving map[string]*commandpb.Service
	// letting are the same by sidecar and pipeline.
	letting map[string]map[string]*commandpb.Handover
	// waits is told of the handovers that begin and end, and of the sidecars that
	// change; may be nil.
	waits *waits
	// shared are the services that sidecars have reported, once each; see slim.
	shared map[sharedService]*commandpb.LocalService
	// replaced are the assignments, when the state was read, that say whom a sidecar may
	// hand over to besides; for who asks at once.
	replaced []*commandpb.Assignment
	// removed is told of pipelines that are gone, seen of all changes once they are taken
	// over; either may be nil.
	removed func(pipeline string)
	seen    func(changes []router.Change)
}

// newMirror reads v. It does not close it.
func newMirror(v *router.View) (*mirror, error) {
	in, err := ReadInput(v)
	if err != nil {
		return nil, err
	}
	m := &mirror{
		revision: v.Revision(), epoch: v.Epoch(),
		sidecars:  make(map[string]*commandpb.Sidecar, len(in.Sidecars)),
		services:  make(map[string]map[string]*commandpb.Service),
		handovers: make(map[string]map[string]*commandpb.Handover),
		letting:   make(map[string]map[string]*commandpb.Handover),
		timed:     make(map[string]bool),
		draining:  make(map[string]bool),
		graced:    make(map[string]bool),
		leaving:   make(map[string]*commandpb.Service),
	}
	for i, s := range in.Sidecars {
		s = m.slim(s)
		in.Sidecars[i] = s
		m.sidecars[s.SidecarId] = s
		m.clock(s)
	}
	for _, a := range in.Assignments {
		if len(a.Replaced) > 0 {
			m.replaced = append(m.replaced, a)
		}
	}
	m.engine = placement.NewEngine(viewOf(in))
	for _, h := range in.Handovers {
		m.putHandover(h)
	}
	for _, s := range in.Services {
		m.putService(s)
	}
	return m, nil
}

// follow takes over changes up to a revision.
func (m *mirror) follow(changes []router.Change, revision uint64) {
	for i := range changes {
		m.change(&changes[i])
	}
	m.revision = max(m.revision, revision)
	if m.seen != nil {
		m.seen(changes)
	}
}

func (m *mirror) change(c *router.Change) {
	switch c.Table {
	case router.TablePipelines:
		if p, ok := c.Next.(*commandpb.Pipeline); ok {
			m.engine.PutPipeline(pipelineOf(p))
		} else {
			m.engine.RemovePipeline(c.Key)
			if m.removed != nil {
				m.removed(c.Key)
			}
		}
	case router.TableSidecars:
		if m.waits != nil {
			m.waits.look[c.Key] = struct{}{}
		}
		if s, ok := c.Next.(*commandpb.Sidecar); ok {
			s = m.slim(s)
			m.sidecars[s.SidecarId] = s
			m.clock(s)
			m.putSidecar(s.SidecarId)
		} else {
			delete(m.sidecars, c.Key)
			m.clock(&commandpb.Sidecar{SidecarId: c.Key})
			m.engine.RemoveSidecar(c.Key)
		}
	case router.TableServices:
		prev, _ := c.Prev.(*commandpb.Service)
		next, _ := c.Next.(*commandpb.Service)
		if prev != nil {
			m.dropService(prev)
		}
		if next != nil {
			m.putService(next)
		}
		if prev != nil && prev.SidecarId != next.GetSidecarId() {
			m.putSidecar(prev.SidecarId)
		}
		m.putSidecar(next.GetSidecarId())
	case router.TableAssignments:
		if a, ok := c.Next.(*commandpb.Assignment); ok {
			m.engine.PutAssignment(assignmentOf(a))
		} else if a, ok := c.Prev.(*commandpb.Assignment); ok {
			m.engine.RemoveAssignment(a.SidecarId, a.PipelineId)
		}
	case router.TableHandovers:
		// Pipelines that wait for one are planned each time, so the engine need not
		// know.
		if h, ok := c.Next.(*commandpb.Handover); ok {
			m.putHandover(h)
		} else if h, ok := c.Prev.(*commandpb.Handover); ok {
			m.dropHandover(h)
		}
	}
}

// sharedService is what a sidecar reports of a service.
type sharedService struct {
	name, endpoint string
	kind           commandpb.ServiceType
}

// slim returns what the mirror needs of s. Pods of one deployment report the same
// services, letter for letter: of 100,000 sidecars these are most of what there is to
// keep, and are kept once for all that are alike.
func (m *mirror) slim(s *commandpb.Sidecar) *commandpb.Sidecar {
	if len(m.shared) > 4*len(m.sidecars)+1024 { // they are named anew with every release
		m.shared = nil
	}
	if m.shared == nil {
		m.shared = make(map[sharedService]*commandpb.LocalService)
	}
	out := &commandpb.Sidecar{
		SidecarId: s.SidecarId, Endpoint: s.Endpoint, State: s.State, Generation: s.Generation,
		Zone: s.Zone, Node: s.Node, Capacity: s.Capacity,
		Draining: s.Draining, Leaves: s.Leaves, DrainSinceMs: s.DrainSinceMs, DrainDeadlineMs: s.DrainDeadlineMs,
		ExpiredAtMs: s.ExpiredAtMs, GraceUntilMs: s.GraceUntilMs,
		Services: make([]*commandpb.LocalService, len(s.Services)),
	}
	for i, l := range s.Services {
		k := sharedService{l.Name, l.Endpoint, l.Type}
		if m.shared[k] == nil {
			m.shared[k] = &commandpb.LocalService{Name: l.Name, Endpoint: l.Endpoint, Type: l.Type}
		}
		out.Services[i] = m.shared[k]
	}
	return out
}

func (m *mirror) putHandover(h *commandpb.Handover) {
	if m.waits != nil {
		m.waits.handover(m.handovers[h.PipelineId][h.SidecarId], h)
	}
	put := func(in map[string]map[string]*commandpb.Handover, a, b string) {
		if in[a] == nil {
			in[a] = make(map[string]*commandpb.Handover)
		}
		in[a][b] = h
	}
	put(m.handovers, h.PipelineId, h.SidecarId)
	put(m.letting, h.SidecarId, h.PipelineId)
}

func (m *mirror) dropHandover(h *commandpb.Handover) {
	if m.waits != nil {
		m.waits.handover(m.handovers[h.PipelineId][h.SidecarId], nil)
	}
	drop := func(in map[string]map[string]*commandpb.Handover, a, b string) {
		if delete(in[a], b); len(in[a]) == 0 {
			delete(in, a)
		}
	}
	drop(m.handovers, h.PipelineId, h.SidecarId)
	drop(m.letting, h.SidecarId, h.PipelineId)
}

// clock notes what there is to watch of s.
func (m *mirror) clock(s *commandpb.Sidecar) {
	set := func(in map[string]bool, is bool) {
		if is {
			in[s.SidecarId] = true
		} else {
			delete(in, s.SidecarId)
		}
	}
	set(m.timed, s.Draining && s.Leaves || s.GraceUntilMs > 0)
	set(m.draining, s.Draining)
	set(m.graced, s.GraceUntilMs > 0)
}

// holder is who has yet to let go of a stage: how many sidecars, and one of them.
type holder struct {
	n  int
	id string
}

// holders lists per stage of a pipeline who has yet to let go of it. A step that asks
// for each of its changes anew would look at every handover as often as there are
// changes, which took half a minute for ten thousand sidecars.
func (m *mirror) holders(pipeline string) map[string]holder {
	out := make(map[string]holder)
	for id, h := range m.handovers[pipeline] {
		seen := make(map[string]bool, len(h.Releases))
		for _, r := range h.Releases {
			if !r.Shared && !seen[r.StageId] {
				seen[r.StageId] = true
				out[r.StageId] = holder{out[r.StageId].n + 1, id}
			}
		}
	}
	return out
}

// but is true when somebody other than sidecar has yet to let go.
func (h holder) but(sidecar string) bool { return h.n > 1 || h.n == 1 && h.id != sidecar }

// gone is true for a sidecar nobody waits for.
func (m *mirror) gone(id string) bool {
	s := m.sidecars[id]
	return s == nil || s.State == commandpb.SidecarState_SIDECAR_STATE_EXPIRED
}

func (m *mirror) putService(s *commandpb.Service) {
	m.drainingService(s)
	if s.SidecarId == "" {
		return
	}
	if m.services[s.SidecarId] == nil {
		m.services[s.SidecarId] = make(map[string]*commandpb.Service)
	}
	m.services[s.SidecarId][s.ServiceId] = s
}

func (m *mirror) dropService(s *commandpb.Service) {
	delete(m.leaving, s.ServiceId)
	delete(m.services[s.SidecarId], s.ServiceId)
	if len(m.services[s.SidecarId]) == 0 {
		delete(m.services, s.SidecarId)
	}
}

// putSidecar tells the engine what is known of a sidecar now.
func (m *mirror) putSidecar(id string) {
	s := m.sidecars[id]
	if s == nil {
		return
	}
	registered := make([]*commandpb.Service, 0, len(m.services[id]))
	for _, r := range m.services[id] { // sidecarOf puts them in order
		registered = append(registered, r)
	}
	m.engine.PutSidecar(sidecarOf(s, registered))
}
