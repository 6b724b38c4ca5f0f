package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// LivenessConfig holds the parts and limits of a Liveness; EnsureDefaults fills
// zero limits, Validate reports all faults at once.
type LivenessConfig struct {
	Node   Node
	State  State
	Submit Submitter
	Logger *slog.Logger
	// Now is the clock; time.Now when nil. Differences must be monotonic.
	Now func() time.Time

	// SuspectAfter is the silence after which a sidecar gets nothing more to
	// do, ExpireAfter the one after which what it does is moved elsewhere.
	// Defaults 30 s and 45 s. A service expires after ExpireAfter, or three of
	// the heartbeat intervals it announced when those are longer.
	SuspectAfter, ExpireAfter time.Duration
	// Sweep is the time between two looks at all leases. Default: a thirtieth
	// of SuspectAfter, at most 1 s.
	Sweep time.Duration
	// MassFraction bounds how many of all sidecars (or services) may expire
	// within ExpireAfter; MassFloor is how many always may. Defaults 0.5, 10.
	MassFraction float64
	MassFloor    int
	// MassHold is how long a mass expiry is held back. Default ten times
	// ExpireAfter.
	MassHold time.Duration
	// InFlight bounds the transitions on their way at once. Default 256.
	InFlight int
	// Transitioned is told about every transition that was replicated; may be
	// nil. It must not block.
	Transitioned func(TransitionInfo)
}

// TransitionInfo tells of one change of condition.
type TransitionInfo struct {
	Kind     string // "sidecar" or "service"
	ID       string
	From, To string // "alive", "suspect", "expired"
	Silent   time.Duration
}

// EnsureDefaults fills what is zero.
func (c *LivenessConfig) EnsureDefaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.SuspectAfter == 0 {
		c.SuspectAfter = 30 * time.Second
	}
	if c.ExpireAfter == 0 {
		c.ExpireAfter = c.SuspectAfter + c.SuspectAfter/2
	}
	if c.Sweep == 0 {
		c.Sweep = min(max(c.SuspectAfter/30, time.Millisecond), time.Second)
	}
	if c.MassFraction == 0 {
		c.MassFraction = 0.5
	}
	if c.MassFloor == 0 {
		c.MassFloor = 10
	}
	if c.MassHold == 0 {
		c.MassHold = 10 * c.ExpireAfter
	}
	if c.InFlight == 0 {
		c.InFlight = 256
	}
	if c.Transitioned == nil {
		c.Transitioned = func(TransitionInfo) {}
	}
}

// Validate returns every fault of the limits, joined.
func (c *LivenessConfig) Validate() error {
	var errs []error
	if c.SuspectAfter < 0 || c.ExpireAfter <= c.SuspectAfter {
		errs = append(errs, fmt.Errorf("liveness: expire after %v must be longer than suspect after %v, and both positive", c.ExpireAfter, c.SuspectAfter))
	}
	if c.MassFraction < 0 || c.MassFraction > 1 {
		errs = append(errs, fmt.Errorf("liveness: mass fraction %v is not between 0 and 1", c.MassFraction))
	}
	if c.Sweep < 0 || c.MassFloor < 0 || c.MassHold < 0 || c.InFlight < 0 {
		errs = append(errs, errors.New("liveness: sweep, mass floor, mass hold and in-flight limit must not be negative"))
	}
	return errors.Join(errs...)
}

// Liveness decides which sidecars and services are still there. Heartbeats stay
// in its memory while this node leads; only transitions are replicated. Its
// methods are safe for concurrent use.
type Liveness struct {
	c    LivenessConfig
	wake chan struct{} // a dead one was heard of

	mu       sync.Mutex
	leading  bool
	sidecars *leases
	services *leases
	epoch    uint64 // restore epoch of the state the leases are of
}

// NewLiveness returns a Liveness; Run makes it work.
func NewLiveness(c LivenessConfig) (*Liveness, error) {
	c.EnsureDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Liveness{c: c, wake: make(chan struct{}, 1)}, nil
}

// Touch notes that a sidecar, a service, or both (empty = none) were heard of.
// It does nothing while another node leads, and never blocks for long.
func (l *Liveness) Touch(sidecarID, serviceID string) {
	now := l.c.Now()
	l.mu.Lock()
	revive := false
	if l.leading {
		if sidecarID != "" && l.sidecars.touch(now, sidecarID) {
			revive = true
		}
		if serviceID != "" && l.services.touch(now, serviceID) {
			revive = true
		}
	}
	l.mu.Unlock()
	if revive {
		l.look()
	}
}

// look makes judge sweep without waiting for its time.
func (l *Liveness) look() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// TouchAll is Touch for a batch of heartbeats that another node received. It
// keeps none of the ids.
func (l *Liveness) TouchAll(sidecars, services [][]byte) {
	now := l.c.Now()
	l.mu.Lock()
	revive := false
	if l.leading {
		for _, id := range sidecars {
			revive = l.sidecars.touchBytes(now, id) || revive
		}
		for _, id := range services {
			revive = l.services.touchBytes(now, id) || revive
		}
	}
	l.mu.Unlock()
	if revive {
		l.look()
	}
}

// Alarms returns the conditions an operator should act on, a sentence each.
func (l *Liveness) Alarms() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.leading {
		return nil
	}
	var out []string
	for _, t := range []*leases{l.sidecars, l.services} {
		if t.due > 0 {
			out = append(out, fmt.Sprintf("%d of %d %s have been silent for longer than their lease at once; they keep their assignments until %s in case the fault is in the network between them and the cluster",
				t.due, len(t.all), t.what, t.holding.Add(t.limits.hold).UTC().Format(time.RFC3339)))
		}
	}
	return out
}

// Run works until ctx is done.
func (l *Liveness) Run(ctx context.Context) {
	whileLeading(ctx, l.c.Node, l.reign)
}

// reign starts with nothing but the replicated state: everybody gets a full
// lease, because a new leader has heard from nobody and the last one may have
// heard from all.
func (l *Liveness) reign(ctx context.Context) {
	const retry = 200 * time.Millisecond
	if !caughtUp(ctx, l.c.Node, retry) {
		return
	}
	limits := massLimits{fraction: l.c.MassFraction, floor: l.c.MassFloor, hold: l.c.MassHold}
	l.mu.Lock()
	l.sidecars = newLeases("sidecars", l.c.SuspectAfter, l.c.ExpireAfter, limits)
	l.services = newLeases("services", 0, l.c.ExpireAfter, limits)
	l.leading = true
	l.mu.Unlock()
	var flying sync.WaitGroup
	defer func() {
		l.mu.Lock()
		l.leading = false
		l.mu.Unlock()
		flying.Wait()
	}()

	flying.Go(func() { l.judge(ctx, &flying) })
	for ctx.Err() == nil {
		if err := l.follow(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, router.ErrResync) {
			l.c.Logger.Warn("liveness starts over", "err", err)
			sleep(ctx, retry)
		}
	}
}

// follow takes over who is registered, until it loses track of the changes.
func (l *Liveness) follow(ctx context.Context) error {
	v := l.c.State.View()
	from := v.Revision()
	err := l.load(v)
	if closeErr := v.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	sub, err := l.c.State.Hub().Subscribe(from, router.TableSidecars, router.TableServices)
	if err != nil {
		return err
	}
	defer sub.Close()
	for {
		changes, _, err := sub.Next(ctx)
		if err != nil {
			return err
		}
		now := l.c.Now()
		l.mu.Lock()
		for _, c := range changes {
			l.changedLocked(now, c)
		}
		l.mu.Unlock()
	}
}

func (l *Liveness) changedLocked(now time.Time, c router.Change) {
	switch c.Table {
	case router.TableSidecars:
		if s, ok := c.Next.(*commandpb.Sidecar); ok && s != nil {
			l.sidecars.put(now, s.SidecarId, sidecarCondition(s), s.Generation, 0)
		} else {
			l.sidecars.drop(c.Key)
		}
	case router.TableServices:
		if s, ok := c.Next.(*commandpb.Service); ok && s != nil {
			l.services.put(now, s.ServiceId, serviceCondition(s), s.ModRevision, servicePatience(s))
		} else {
			l.services.drop(c.Key)
		}
	}
}

// load brings the leases in line with v and forgets who is no longer in it.
func (l *Liveness) load(v *router.View) error {
	var sidecars []*commandpb.Sidecar
	var services []*commandpb.Service
	if err := eachSidecar(v, func(s *commandpb.Sidecar) { sidecars = append(sidecars, s) }); err != nil {
		return err
	}
	if err := eachService(v, func(s *commandpb.Service) { services = append(services, s) }); err != nil {
		return err
	}
	now := l.c.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch = v.Epoch()
	known := make(map[string]bool, len(sidecars))
	for _, s := range sidecars {
		known[s.SidecarId] = true
		l.sidecars.put(now, s.SidecarId, sidecarCondition(s), s.Generation, 0)
	}
	for id := range l.sidecars.all {
		if !known[id] {
			l.sidecars.drop(id)
		}
	}
	known = make(map[string]bool, len(services))
	for _, s := range services {
		known[s.ServiceId] = true
		l.services.put(now, s.ServiceId, serviceCondition(s), s.ModRevision, servicePatience(s))
	}
	for id := range l.services.all {
		if !known[id] {
			l.services.drop(id)
		}
	}
	return nil
}

func sidecarCondition(s *commandpb.Sidecar) condition {
	switch s.State {
	case commandpb.SidecarState_SIDECAR_STATE_SUSPECT:
		return suspect
	case commandpb.SidecarState_SIDECAR_STATE_EXPIRED:
		return expired
	}
	return alive
}

func serviceCondition(s *commandpb.Service) condition {
	if s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED {
		return expired
	}
	return alive
}

func servicePatience(s *commandpb.Service) time.Duration {
	return 3 * time.Duration(min(s.HeartbeatIntervalMs, 24*3600*1000)) * time.Millisecond
}

// judge sweeps the leases until ctx is done.
func (l *Liveness) judge(ctx context.Context, flying *sync.WaitGroup) {
	tick := time.NewTicker(l.c.Sweep)
	defer tick.Stop()
	slots := make(chan struct{}, l.c.InFlight)
	last := l.c.Now()
	var alarmed [2]bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-l.wake:
		}
		now := l.c.Now()
		l.mu.Lock()
		// A leader that was stopped or starved for a while could hear nobody
		// in that time; the silence is its own.
		if gap := now.Sub(last); gap > l.c.SuspectAfter/3+l.c.Sweep {
			l.sidecars.shift(now, gap)
			l.services.shift(now, gap)
			l.c.Logger.Warn("liveness was held up; all leases are extended", "by", gap)
		}
		last = now
		sidecars, services := l.sidecars.sweep(now), l.services.sweep(now)
		held := [2]int{l.sidecars.due, l.services.due}
		l.mu.Unlock()
		for i, kind := range []string{"sidecars", "services"} {
			if (held[i] > 0) != alarmed[i] {
				alarmed[i] = held[i] > 0
				if alarmed[i] {
					l.c.Logger.Error("too many leases run out at once; holding them back", "what", kind, "held", held[i], "for", l.c.MassHold)
				} else {
					l.c.Logger.Info("no leases are held back any more", "what", kind)
				}
			}
		}
		for _, t := range sidecars {
			l.propose(ctx, flying, slots, "sidecar", t)
		}
		for _, t := range services {
			l.propose(ctx, flying, slots, "service", t)
		}
	}
}

// propose sends one transition on its way.
func (l *Liveness) propose(ctx context.Context, flying *sync.WaitGroup, slots chan struct{}, kind string, t transition) {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return // the leases end with the reign
	}
	flying.Add(1)
	cmd := transitionCommand(l.c.Now(), kind, t)
	l.mu.Lock()
	epoch := l.epoch
	l.mu.Unlock()
	// A state restored since may have a record that looks the same.
	cmd.ExpectedEpoch = &epoch
	l.c.Submit.SubmitFunc(cmd, func(res *commandpb.Result, _ uint64, err error) {
		defer flying.Done()
		<-slots
		l.mu.Lock()
		table := l.sidecars
		if kind == "service" {
			table = l.services
		}
		table.done(t.id)
		l.mu.Unlock()
		switch {
		case err != nil:
			if ctx.Err() == nil {
				l.c.Logger.Warn("a transition was not replicated; it is tried again", "kind", kind, "id", t.id, "to", t.to, "err", err)
			}
		case res.GetRejection() != nil:
			// It registered again or is gone: the decision was about another.
			l.c.Logger.Debug("a transition came too late", "kind", kind, "id", t.id, "to", t.to, "reason", res.Rejection.Reason)
		case res.GetChanged():
			l.c.Logger.Info(kind+" is "+t.to.String(), "id", t.id, "was", t.from, "silent", t.silent.Round(time.Millisecond))
			l.c.Transitioned(TransitionInfo{Kind: kind, ID: t.id, From: t.from.String(), To: t.to.String(), Silent: t.silent})
		}
	})
}

func transitionCommand(now time.Time, kind string, t transition) *commandpb.Command {
	cmd := &commandpb.Command{TimeMs: uint64(now.UnixMilli())}
	if kind == "service" {
		state := commandpb.ServiceState_SERVICE_STATE_ALIVE
		if t.to == expired {
			state = commandpb.ServiceState_SERVICE_STATE_EXPIRED
		}
		cmd.Op = &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
			// Without it, a service that registered again meanwhile would be put
			// out of its groups right after it has come back.
			ServiceId: t.id, State: state, ExpectedRevision: t.generation,
		}}
		return cmd
	}
	state := map[condition]commandpb.SidecarState{
		alive:   commandpb.SidecarState_SIDECAR_STATE_ALIVE,
		suspect: commandpb.SidecarState_SIDECAR_STATE_SUSPECT,
		expired: commandpb.SidecarState_SIDECAR_STATE_EXPIRED,
	}[t.to]
	cmd.Op = &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: t.id, ExpectedGeneration: t.generation, State: state,
	}}
	return cmd
}
