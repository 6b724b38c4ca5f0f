package rpc

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// bell wakes one waiter. Rings that arrive while it is not listening melt into
// one: whoever is woken reads the state, not the events.
type bell chan struct{}

func newBell() bell { return make(bell, 1) }

func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}

// bells are the waiters interested in one object each.
type bells map[string]map[bell]struct{}

func (bs bells) add(key string, b bell) {
	if bs[key] == nil {
		bs[key] = make(map[bell]struct{})
	}
	bs[key][b] = struct{}{}
}

func (bs bells) remove(key string, b bell) {
	delete(bs[key], b)
	if len(bs[key]) == 0 {
		delete(bs, key)
	}
}

func (bs bells) ring(key string) {
	for b := range bs[key] {
		b.ring()
	}
}

func (bs bells) ringAll() {
	for key := range bs {
		bs.ring(key)
	}
}

// feed follows the changes of the state once for the whole server and wakes
// those concerned. A subscription per watching sidecar would wake every one of
// them for every change.
//
// It never hands out changes: those it wakes compare the state with what they
// sent last, so what is outstanding for one of them never exceeds its state.
type feed struct {
	state *router.FSM
	log   *slog.Logger

	// Called from the goroutine of follow, without mu; set before it starts.
	onAssignment func(sidecar string, revision uint64)
	onSidecar    func(sidecar string)
	onExpired    func(sidecar string)
	onReplaced   func(prev, next *commandpb.Sidecar)
	onReset      func()
	onHandover   func(prev, next *commandpb.Handover)
	onLoad       func(v *router.View) error // also from load's caller

	mu       sync.Mutex
	sidecars bells                     // by sidecar id: its assignments changed
	services bells                     // by service id: the service or a group it is in changed
	demand   map[string]pipelineDemand // by pipeline id, enabled ones only
	names    map[string]int            // how many stages of demand name this service
	types    map[commandpb.StageType]int
	// reached is the revision up to which changes were seen.
	reached uint64
	// rung is the revision up to which every bell was rung that had to be.
	rung uint64
	// floor is the oldest revision a watch of assignments can resume from:
	// revocations before it may have been forgotten by now.
	floor uint64
}

// pipelineDemand is what one enabled pipeline asks of sidecars.
type pipelineDemand struct {
	names []string // normalised
	types []commandpb.StageType
}

func newFeed(state *router.FSM, log *slog.Logger) *feed {
	return &feed{
		state:        state,
		log:          log,
		onAssignment: func(string, uint64) {},
		onSidecar:    func(string) {},
		onExpired:    func(string) {},
		onReplaced:   func(_, _ *commandpb.Sidecar) {},
		onReset:      func() {},
		onHandover:   func(_, _ *commandpb.Handover) {},
		onLoad:       func(*router.View) error { return nil },
		sidecars:     make(bells),
		services:     make(bells),
	}
}

// follow runs until ctx is done. load must have been called and have returned
// revision.
func (f *feed) follow(ctx context.Context, revision uint64) {
	for {
		err := f.session(ctx, revision)
		for err != nil {
			if ctx.Err() != nil || errors.Is(err, router.ErrClosed) {
				return
			}
			f.log.Warn("the change feed was interrupted; reading the whole state again", "error", err)
			// The hub refuses only for reasons that pass at once, but a loop
			// that cannot pause can starve what would end it.
			pause := time.NewTimer(10 * time.Millisecond)
			select {
			case <-ctx.Done():
			case <-pause.C:
			}
			pause.Stop()
			revision, err = f.load()
		}
	}
}

// session follows the state from revision on until the hub cuts it off.
func (f *feed) session(ctx context.Context, revision uint64) error {
	sub, err := f.state.Hub().Subscribe(revision, router.TablePipelines, router.TableSidecars,
		router.TableServices, router.TableGroups, router.TableAssignments, router.TableHandovers)
	if err != nil {
		return err
	}
	defer sub.Close()
	f.onReset()
	f.mu.Lock()
	f.sidecars.ringAll()
	f.services.ringAll()
	f.rung = max(f.rung, revision)
	f.mu.Unlock()
	for {
		some, cancel := context.WithTimeout(ctx, progressEvery)
		changes, reached, err := sub.Next(some)
		cancel()
		switch {
		case err == nil:
			f.dispatch(changes, reached)
		case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
			f.dispatch(nil, sub.Reached())
		default:
			return err
		}
	}
}

// progressEvery is how often the feed notes how far the state has come when no
// change of its tables tells it.
const progressEvery = 5 * time.Second

// rungUp returns the revision up to which every change that concerns a watch has
// rung its bell.
func (f *feed) rungUp() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.rung
}

// load rebuilds what is derived from the state and returns its revision.
func (f *feed) load() (uint64, error) {
	v := f.state.View()
	defer v.Close()
	demand := make(map[string]pipelineDemand)
	err := v.Pipelines("", 0, func(p *commandpb.Pipeline) bool {
		if p.GetSpec().GetEnabled() {
			demand[p.Spec.Id] = demandOf(p.Spec)
		}
		return true
	})
	if err == nil {
		err = f.onLoad(v)
	}
	if err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.demand = make(map[string]pipelineDemand)
	f.names, f.types = make(map[string]int), make(map[commandpb.StageType]int)
	for id, d := range demand {
		f.setDemandLocked(id, d, true)
	}
	f.reached = v.Revision()
	f.floor = v.Revision()
	return v.Revision(), nil
}

// dispatchPart is how many changes are taken over before those concerned are woken. One
// revision may change ten thousand assignments, and whoever is concerned by the first
// need not wait until the last was looked at.
const dispatchPart = 256

func (f *feed) dispatch(changes []router.Change, reached uint64) {
	for len(changes) > dispatchPart {
		f.hear(changes[:dispatchPart])
		f.mu.Lock()
		f.ringLocked(changes[:dispatchPart])
		f.mu.Unlock()
		changes = changes[dispatchPart:]
	}
	f.hear(changes)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reached = max(f.reached, reached)
	f.ringLocked(changes)
	f.rung = max(f.rung, reached)
}

// hear hands changes on one by one.
func (f *feed) hear(changes []router.Change) {
	for i := range changes {
		switch c := &changes[i]; c.Table {
		case router.TableAssignments:
			prev, _ := c.Prev.(*commandpb.Assignment)
			next, _ := c.Next.(*commandpb.Assignment)
			if id := cmp.Or(next.GetSidecarId(), prev.GetSidecarId()); id != "" {
				f.onAssignment(id, c.Revision)
			}
		case router.TableHandovers:
			prev, _ := c.Prev.(*commandpb.Handover)
			next, _ := c.Next.(*commandpb.Handover)
			f.onHandover(prev, next)
		case router.TableSidecars:
			prev, _ := c.Prev.(*commandpb.Sidecar)
			next, _ := c.Next.(*commandpb.Sidecar)
			// Before onSidecar, by which a stream looks at its sidecar anew.
			if prev != nil && next != nil && prev.Endpoint != next.Endpoint {
				f.onReplaced(prev, next)
			}
			if expired := commandpb.SidecarState_SIDECAR_STATE_EXPIRED; prev != nil && next.GetState() == expired && prev.State != expired {
				f.onExpired(next.SidecarId)
			}
			// A new registration, or none: what was told before counts no
			// more. A change of its liveness says nothing about its memory.
			if prev == nil || next == nil || prev.Generation != next.Generation || prev.RegisteredAtMs != next.RegisteredAtMs {
				f.onSidecar(cmp.Or(next.GetSidecarId(), prev.GetSidecarId()))
			}
		}
	}
}

// ringLocked wakes those whom changes concern.
func (f *feed) ringLocked(changes []router.Change) {
	for i := range changes {
		f.ringOneLocked(&changes[i])
	}
}

func (f *feed) ringOneLocked(c *router.Change) {
	switch c.Table {
	case router.TableAssignments:
		prev, _ := c.Prev.(*commandpb.Assignment)
		next, _ := c.Next.(*commandpb.Assignment)
		f.floor = max(f.floor, forgotten(c))
		f.sidecars.ring(cmp.Or(next.GetSidecarId(), prev.GetSidecarId()))
	case router.TableServices:
		f.services.ring(c.Key)
	case router.TableGroups:
		prev, _ := c.Prev.(*commandpb.Group)
		next, _ := c.Next.(*commandpb.Group)
		for _, m := range next.GetMembers() {
			f.services.ring(m.ServiceId)
		}
		for _, m := range prev.GetMembers() {
			f.services.ring(m.ServiceId)
		}
	case router.TablePipelines:
		next, _ := c.Next.(*commandpb.Pipeline)
		enabled := next.GetSpec().GetEnabled()
		f.setDemandLocked(c.Key, demandOf(next.GetSpec()), enabled)
	}
}

// setDemandLocked replaces what a pipeline asks for.
func (f *feed) setDemandLocked(pipeline string, d pipelineDemand, enabled bool) {
	count := func(d pipelineDemand, by int) {
		for _, n := range d.names {
			if f.names[n] += by; f.names[n] == 0 {
				delete(f.names, n)
			}
		}
		for _, t := range d.types {
			f.types[t] += by
		}
	}
	if old, ok := f.demand[pipeline]; ok {
		count(old, -1)
		delete(f.demand, pipeline)
	}
	if enabled {
		f.demand[pipeline] = d
		count(d, +1)
	}
}

func demandOf(spec *commandpb.PipelineSpec) pipelineDemand {
	var d pipelineDemand
	for _, st := range spec.GetStages() {
		d.names = append(d.names, router.NormalizeName(st.GetSelector().GetServiceName()))
		d.types = append(d.types, st.GetType())
	}
	return d
}

// wanted says whether an enabled pipeline has a stage that a sidecar with these
// services could be given: by name, or because it is the only service of the
// stage's type in its pod. It errs on the side of yes.
func (f *feed) wanted(services []*commandpb.LocalService) bool {
	ofType := make(map[commandpb.ServiceType]int)
	for _, s := range services {
		ofType[s.GetType()]++
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range services {
		if f.names[router.NormalizeName(s.GetName())] > 0 {
			return true
		}
		// The numbers of the three stage types are those of the service types.
		if ofType[s.GetType()] == 1 && f.types[commandpb.StageType(s.GetType())] > 0 {
			return true
		}
	}
	return false
}

// watchSidecar rings b whenever the assignments of a sidecar may have changed,
// until the returned function is called.
func (f *feed) watchSidecar(id string, b bell) func() { return f.watch(f.sidecars, id, b) }

// watchService rings b whenever a service or a group it is in may have changed.
func (f *feed) watchService(id string, b bell) func() { return f.watch(f.services, id, b) }

func (f *feed) watch(in bells, id string, b bell) func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	in.add(id, b)
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		in.remove(id, b)
	}
}

// resumeFloor returns the oldest revision from which a watch that begins with the
// state of revision can resume without missing a revocation.
//
// What follow has not come to yet counts as well. A state may already have
// forgotten a revocation of which follow has still to hear, and a watch resumed
// then would leave its sidecar running for ever what it lost.
func (f *feed) resumeFloor(ctx context.Context, revision uint64) (uint64, error) {
	f.mu.Lock()
	reached, floor := f.reached, f.floor
	f.mu.Unlock()
	if reached >= revision {
		return floor, nil
	}
	sub, err := f.state.Hub().Subscribe(reached, router.TableAssignments)
	if errors.Is(err, router.ErrCompacted) {
		return revision + 1, nil // overrun: nothing can be resumed
	}
	if err != nil {
		return 0, err
	}
	defer sub.Close()
	atOnce, cancel := context.WithCancel(ctx)
	cancel()
	for {
		changes, _, err := sub.Next(atOnce)
		for i := range changes {
			floor = max(floor, forgotten(&changes[i]))
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, router.ErrResync):
			return revision + 1, nil
		case !errors.Is(err, context.Canceled):
			return 0, err
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case sub.Reached() >= revision:
			return floor, nil
		}
		// The state shows a commit whose changes are being published.
		pause := time.NewTimer(time.Millisecond)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

// forgotten returns the revision of the revocation that a change of an
// assignment made the state forget, 0 when it did not.
func forgotten(c *router.Change) uint64 {
	prev, _ := c.Prev.(*commandpb.Assignment)
	next, _ := c.Next.(*commandpb.Assignment)
	if next == nil && prev.GetRevoked() {
		return prev.GetModRevision()
	}
	return 0
}
