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
	// Beat is how often everybody is asked to beat. Default a third of
	// SuspectAfter.
	Beat time.Duration
	// Period is the time between two digests of the leases, and the least that
	// a leader which could not listen for a while waits before it judges: all who
	// live beat within it. Default five quarters of Beat.
	Period time.Duration
	// Share brings a digest to the other nodes and returns an error when one did
	// not get it; nil keeps it here. It may block until ctx is done.
	Share func(ctx context.Context, d Digest) error
	// MassFraction bounds how many of all sidecars (or services) may expire
	// within ExpireAfter, 1 = any number; MassFloor is how many always may.
	// Defaults 0.5, 10.
	MassFraction float64
	MassFloor    int
	// MassHold is how long a mass expiry is held back. Default ten times
	// ExpireAfter.
	MassHold time.Duration
	// FlapGrace is how long a sidecar keeps what it has, expired, that expired less
	// than ten times this ago already. Default 1 min, at most an hour.
	FlapGrace time.Duration
	// Retention is how long a service that is expired stays registered, in case it
	// comes back. Default 24 h; not shorter than ExpireAfter.
	Retention time.Duration
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
	if c.Beat == 0 {
		c.Beat = c.SuspectAfter / 3
	}
	if c.Period == 0 {
		c.Period = c.Beat + c.Beat/4
	}
	if c.Share == nil {
		c.Share = func(context.Context, Digest) error { return nil }
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
	if c.FlapGrace == 0 {
		c.FlapGrace = time.Minute
	}
	if c.Retention == 0 {
		c.Retention = max(24*time.Hour, c.ExpireAfter)
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
	if c.Beat < 0 || c.Period < c.Beat {
		errs = append(errs, fmt.Errorf("liveness: a period of %v must not be shorter than the %v between two beats, and both positive", c.Period, c.Beat))
	}
	if c.Retention < c.ExpireAfter {
		errs = append(errs, fmt.Errorf("liveness: expired services stay for %v, which must not be shorter than the %v after which they expire", c.Retention, c.ExpireAfter))
	}
	if c.Sweep < 0 || c.MassFloor < 0 || c.MassHold < 0 || c.InFlight < 0 || c.FlapGrace < 0 {
		errs = append(errs, errors.New("liveness: sweep, mass floor, mass hold, flap grace and in-flight limit must not be negative"))
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
	loaded   bool   // the leases are those of the state, while leading
	early    early  // what was heard before
	term     uint64 // of the reign, while leading
	sidecars *leases
	services *leases
	// epoch and revision are of the state the leases are in line with.
	epoch, revision uint64
	heard           *heardDigest // by the leader of now or before; nil = nothing
	stats           LivenessStats
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
// It does nothing while another node leads, and never blocks for long. What comes
// before the leases are there is kept for them.
func (l *Liveness) Touch(sidecarID, serviceID string) {
	now := l.c.Now()
	l.mu.Lock()
	revive := false
	switch {
	case l.loaded:
		if sidecarID != "" && l.sidecars.touch(now, sidecarID) {
			revive = true
		}
		if serviceID != "" && l.services.touch(now, serviceID) {
			revive = true
		}
	case l.c.Node.Leadership().Leading:
		l.early.add(now, sidecarID, serviceID)
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
// keeps none of the bytes.
func (l *Liveness) TouchAll(sidecars, services [][]byte) {
	now := l.c.Now()
	l.mu.Lock()
	revive := false
	switch {
	case l.loaded:
		for _, id := range sidecars {
			revive = l.sidecars.touchBytes(now, id) || revive
		}
		for _, id := range services {
			revive = l.services.touchBytes(now, id) || revive
		}
	case l.c.Node.Leadership().Leading:
		for _, id := range sidecars {
			l.early.add(now, string(id), "")
		}
		for _, id := range services {
			l.early.add(now, "", string(id))
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
			out = append(out, t.alarm(l.c.Now()))
		}
	}
	return out
}

// Run works until ctx is done.
func (l *Liveness) Run(ctx context.Context) {
	eachReign(ctx, l.c.Node, l.reign)
}

// reign starts with the replicated state and what the leader before told of the
// leases. Without that everybody gets a full lease, because a new leader has
// heard from nobody and the last one may have heard from all. Either way nobody
// is judged before those that live have had the time to beat here.
func (l *Liveness) reign(ctx context.Context, term uint64) {
	const retry = 200 * time.Millisecond
	if !caughtUp(ctx, l.c.Node, retry) {
		return
	}
	limits := massLimits{fraction: l.c.MassFraction, floor: l.c.MassFloor, hold: l.c.MassHold, settle: l.c.Period}
	l.mu.Lock()
	l.sidecars = newLeases("sidecars", l.c.SuspectAfter, l.c.ExpireAfter, limits)
	l.services = newLeases("services", 0, l.c.ExpireAfter, limits)
	l.leading, l.term = true, term
	l.mu.Unlock()
	first := true
	var flying sync.WaitGroup
	defer func() {
		l.mu.Lock()
		l.leading, l.loaded = false, false
		l.mu.Unlock()
		flying.Wait()
	}()

	for ctx.Err() == nil {
		err := l.follow(ctx, func() {
			if first {
				first = false
				flying.Go(func() { l.judge(ctx, term, &flying) })
				flying.Go(func() { l.share(ctx, term) })
				flying.Go(func() { l.purge(ctx, term) })
			}
		})
		if err != nil && ctx.Err() == nil && !errors.Is(err, router.ErrResync) {
			l.c.Logger.Warn("liveness starts over", "err", err)
			sleep(ctx, retry)
		}
	}
}

// follow takes over who is registered, calls loaded, and takes over the changes
// until it loses track of them.
func (l *Liveness) follow(ctx context.Context, loaded func()) error {
	v := l.c.State.View()
	from := v.Revision()
	err := l.load(v)
	if closeErr := v.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	loaded()
	sub, err := l.c.State.Hub().Subscribe(from, router.TableSidecars, router.TableServices)
	if err != nil {
		return err
	}
	defer sub.Close()
	for {
		changes, upTo, err := sub.Next(ctx)
		if err != nil {
			return err
		}
		now := l.c.Now()
		l.mu.Lock()
		for _, c := range changes {
			l.changedLocked(now, c)
		}
		l.revision = max(l.revision, upTo)
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
	l.epoch, l.revision = v.Epoch(), v.Revision()
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
	l.recallLocked(now, v, sidecars, services)
	l.hearLocked()
	l.loaded = true
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
