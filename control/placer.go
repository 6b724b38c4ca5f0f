package control

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// PlacerConfig holds the parts and limits of a Placer; EnsureDefaults fills
// zero limits.
type PlacerConfig struct {
	Node   Node
	State  State
	Submit Submitter
	Logger *slog.Logger
	// Now stamps the commands; time.Now when nil.
	Now func() time.Time

	// Quiet is how long nothing must have happened before a plan is made, and
	// MaxDelay how long changes may hold it up in all. A rollout changes
	// hundreds of sidecars within a second; planning after each would tell
	// every sidecar hundreds of times. The first change after a calm is planned at
	// once: most come alone. Defaults 20 ms and 200 ms.
	Quiet, MaxDelay time.Duration
	// Retry is the pause after a plan that could not be replicated. Default
	// 200 ms.
	Retry time.Duration
	// ChunkChanges and ChunkBytes bound one command. Defaults 1,000 changes
	// and 512 KiB.
	ChunkChanges, ChunkBytes int
	// HandoverTimeout is how long a sidecar is waited for that was told to let go of
	// a stage only so many may run, unless its drain has a deadline. After it the
	// stage is given to another one, and the late one is fenced by the generation of
	// the assignment alone. Default 45 s, at most an hour.
	HandoverTimeout time.Duration
	// MovesPerMinute bounds how many stages are moved that could run where they are:
	// plans for the sake of others (placement.Rearrange) and of balance (placement.Even).
	// What is lost or drained is not held back. 0 = no bound.
	MovesPerMinute int
	// BalanceInterval is how often stages are moved for balance alone, within that
	// bound: see placement.Engine.Balance. 0 = never.
	BalanceInterval time.Duration
	// FlapGrace is that of LivenessConfig: who has expired less than ten times this ago is
	// given nothing for balance. 0 = it makes no difference.
	FlapGrace time.Duration
	// Planned is told about every plan that was carried out, Stopped when this node
	// leads no more; either may be nil.
	Planned func(PlanInfo)
	Stopped func()
}

// PlanInfo tells what came of one plan.
type PlanInfo struct {
	Revision uint64        // planned from
	Took     time.Duration // reading and planning
	Changes  int
	Stale    int // skipped, because the state had moved on; planned again
	// Held counts the stages whose move waits for the budget, Waiting those that wait
	// for a sidecar that has yet to let go of them.
	Held, Waiting int
	// Later counts the changes that are told once other sidecars must have heard of
	// theirs: until then records could go round between them.
	Later int
	// Unplaced counts the stages to begin that are not begun yet, for either reason.
	Unplaced int
	// Idle counts the stages that run nowhere until then.
	Idle int
	// Evened counts the stages that are moved for balance alone.
	Evened int
	// Quality tells how good the placement is that the plan leads to; its load
	// figures are not filled in.
	Quality placement.Quality
}

// EnsureDefaults fills what is zero.
func (c *PlacerConfig) EnsureDefaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Quiet <= 0 {
		c.Quiet = 20 * time.Millisecond
	}
	if c.MaxDelay <= 0 {
		c.MaxDelay = 200 * time.Millisecond
	}
	if c.Retry <= 0 {
		c.Retry = 200 * time.Millisecond
	}
	if c.ChunkChanges <= 0 {
		c.ChunkChanges = 1000
	}
	if c.ChunkBytes <= 0 {
		c.ChunkBytes = 512 << 10
	}
	if c.HandoverTimeout <= 0 {
		c.HandoverTimeout = 45 * time.Second
	}
	if c.BalanceInterval > 0 {
		c.BalanceInterval = max(c.BalanceInterval, minBalanceInterval)
	}
	if c.Planned == nil {
		c.Planned = func(PlanInfo) {}
	}
	if c.Stopped == nil {
		c.Stopped = func() {}
	}
}

// Placer keeps the assignments in step with pipelines, sidecars and services
// while this node leads.
type Placer struct {
	c      PlacerConfig
	scores scores
	// budget is of the reign. A new leader begins with a full one: what was moved
	// before is not worth a record.
	budget *budget
	// evenAt is when load is evened next; zero = never.
	evenAt time.Time
	term   uint64
	older  *olderTables
	// rests is since when the last plan is through; of Run's goroutine.
	rests time.Time

	// mirror is what the plans are made from, and sent what was sent last and is not in
	// the mirror yet; of Run's goroutine.
	mirror *mirror
	sent   []*commandpb.AssignmentChange

	mu    sync.Mutex
	stats PlacerStats
	held  map[string]Held // by pipeline; replaced, never changed
}

// PlacerStats tells what placement waits for; all zero while another node leads.
type PlacerStats struct {
	Held      int // stages whose move waits for the movement budget
	Handovers int // sidecars, per pipeline, that have yet to let go of a stage
	Draining  int // sidecars
	// DrainingServices have been deregistered in peace and have something left to do.
	DrainingServices int
	Graced           int // sidecars that expired again soon and keep what they have for now
}

// Stats returns what placement waits for.
func (p *Placer) Stats() PlacerStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

func (p *Placer) setStats(s PlacerStats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stats = s
}

// NewPlacer returns a Placer; Run makes it work.
func NewPlacer(c PlacerConfig) *Placer {
	c.EnsureDefaults()
	return &Placer{c: c, older: newOlderTables(c.HandoverTimeout)}
}

// Run works until ctx is done.
func (p *Placer) Run(ctx context.Context) {
	eachReign(ctx, p.c.Node, p.reign)
}

// reign follows the state for as long as ctx lasts.
func (p *Placer) reign(ctx context.Context, term uint64) {
	p.term, p.budget = term, newBudget(p.c.MovesPerMinute, time.Now())
	p.older = newOlderTables(p.c.HandoverTimeout)
	if p.evenAt = (time.Time{}); p.c.BalanceInterval > 0 {
		p.evenAt = time.Now().Add(p.c.BalanceInterval)
	}
	defer p.setHeld(nil)
	defer p.c.Stopped() // before what is held is forgotten: nothing is decided any more
	defer func() { p.mirror, p.sent = nil, nil }()
	defer p.setStats(PlacerStats{})
	if !caughtUp(ctx, p.c.Node, p.c.Retry) {
		return
	}
	p.scores.reset()
	defer p.scores.reset()
	for ctx.Err() == nil {
		if err := p.follow(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, router.ErrResync) {
			p.c.Logger.Warn("placement starts over", "err", err)
			sleep(ctx, p.c.Retry)
		}
	}
}

// follow plans, and again after every change, until it loses track of them. The
// state is read once; from then on its changes are followed, so that a plan costs
// what the changes concern and not a look at the whole fleet.
func (p *Placer) follow(ctx context.Context) error {
	v := p.c.State.View()
	if p.mirror != nil && p.mirror.epoch != v.Epoch() {
		p.older.restored(p.mirror, p.sent, time.Now())
	}
	p.mirror, p.sent = nil, nil // not two of them
	ms, err := v.Time()
	var m *mirror
	if err == nil {
		m, err = newMirror(v)
	}
	if err = errors.Join(err, v.Close()); err != nil {
		return err
	}
	p.mirror = m
	p.older.load(m, ms, time.Now())
	m.removed = p.scores.forget
	m.seen = func(changes []router.Change) { p.older.changed(m, changes, p.sent, time.Now()) }
	// The groups decide when a service has drained.
	sub, err := p.c.State.Hub().Subscribe(m.revision, append(placementTables(), router.TableGroups)...)
	if err != nil {
		return err
	}
	defer sub.Close()
	w := newWaits(m)
	for {
		own, err := p.plan(ctx, m, sub, w)
		if err != nil {
			return err
		}
		p.rests = time.Now()
		if err := p.settled(ctx, m, sub, own, w); err != nil {
			return err
		}
	}
}

// settled returns when something changed that the placer did not do itself,
// and, unless it came after a calm, things have calmed down, or when something is
// due by w. own holds the revisions of its own commands.
func (p *Placer) settled(ctx context.Context, m *mirror, sub *router.Subscription, own map[uint64]bool, w *waits) error {
	due, cancel := context.WithCancel(ctx)
	if at := w.next; !at.IsZero() {
		due, cancel = context.WithDeadline(ctx, at)
	}
	defer cancel()
	for {
		changes, at, err := p.next(due, m, sub)
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return nil
		}
		if err != nil {
			return err
		}
		m.follow(changes, at)
		if m.foreign(changes, own) {
			break
		}
	}
	if time.Since(p.rests) >= p.c.Quiet {
		return nil // the first after a calm
	}
	last := time.NewTimer(p.c.MaxDelay)
	defer last.Stop()
	quiet := time.Now().Add(p.c.Quiet)
	for {
		calm, cancel := context.WithDeadline(ctx, quiet)
		changes, at, err := sub.Next(calm)
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			return nil
		case err != nil:
			return err
		}
		m.follow(changes, at)
		if m.foreign(changes, own) { // groups change without a reason to wait for them
			quiet = time.Now().Add(p.c.Quiet)
		}
		select {
		case <-last.C:
			return nil
		default:
		}
	}
}

// next is sub.Next, and measures the load meanwhile when that is owed.
func (p *Placer) next(ctx context.Context, m *mirror, sub *router.Subscription) ([]router.Change, uint64, error) {
	in, owed := p.scores.owed()
	if !owed {
		return sub.Next(ctx)
	}
	due, cancel := context.WithTimeout(ctx, in)
	changes, at, err := sub.Next(due)
	cancel()
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		p.scores.settle(m.engine)
		return nil, at, nil
	}
	return changes, at, err
}

// drain takes over the changes that are there, without waiting for any. It reports
// whether any of them is not of the placer's own making; see mirror.foreign.
func drain(m *mirror, sub *router.Subscription, own map[uint64]bool) (others bool, err error) {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	for {
		changes, at, err := sub.Next(now)
		switch {
		case errors.Is(err, context.Canceled):
			return others, nil
		case err != nil:
			return others, err
		}
		m.follow(changes, at)
		others = m.foreign(changes, own) || others
	}
}

// foreign is true when any of changes is not of the placer's own making and may make
// a difference to it.
func (m *mirror) foreign(changes []router.Change, own map[uint64]bool) bool {
	for i := range changes {
		c := &changes[i]
		if c.Table == router.TableGroups {
			if m.concerns(c) {
				return true
			}
			continue
		}
		if c.Table != router.TableAssignments && c.Table != router.TableHandovers || !own[c.Revision] || ends(c) {
			return true
		}
	}
	return false
}

// ends is true when c ends releases of a handover. The revision does not tell whose doing
// that is, since one entry of the log holds commands of many, and what was confirmed may be
// what a stage waits for. A placer that takes back releases of its own plans once more.
func ends(c *router.Change) bool {
	prev, _ := c.Prev.(*commandpb.Handover)
	next, _ := c.Next.(*commandpb.Handover)
	return len(prev.GetReleases()) > len(next.GetReleases())
}

// plan makes the assignments what they should be, and again if the state moved
// on meanwhile. It returns the revisions of its commands.
func (p *Placer) plan(ctx context.Context, m *mirror, sub *router.Subscription, w *waits) (own map[uint64]bool, err error) {
	own = make(map[uint64]bool)
	for pause := p.c.Quiet; ; pause = min(2*pause, time.Second) {
		start := time.Now()
		// What this placer's commands did is there once they are answered: a
		// plan that did not know of it could send records round.
		if _, err := drain(m, sub, own); err != nil {
			return nil, err
		}
		if err := p.tidy(ctx, m, w); err != nil {
			return nil, err
		}
		if _, err := drain(m, sub, own); err != nil {
			return nil, err
		}
		ms, err := p.stateTime()
		if err != nil {
			return nil, err
		}
		plan := m.engine.Plan()
		planned, moved := m.revision, false
		info := PlanInfo{Revision: planned, Quality: plan.Quality}
		changes := p.now(m, plan.Steps, w, &info, ms)
		if len(changes) == 0 {
			changes = p.even(m, w, &info, ms)
		} else {
			w.even = p.evenAt
		}
		info.Took, info.Changes = time.Since(start), len(changes)
		for _, chunk := range p.chunks(changes) {
			p.older.add(m, chunk, time.Now())
			p.sent = chunk
			res, err := p.submit(ctx, m, 0, &commandpb.Command{
				Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{
					Changes: chunk, PlannedRevision: planned, Handovers: true,
					ReplacedMs: uint64(p.c.HandoverTimeout.Milliseconds()),
				}},
			})
			if err != nil {
				return nil, err
			}
			if r := res.GetRejection(); r != nil {
				return nil, errors.New("the state refused a plan: " + r.Reason)
			}
			if res.GetChanged() { // otherwise it is the revision of somebody else
				own[res.GetRevision()] = true
			}
			if info.Stale += int(res.GetStale()); info.Stale > 0 {
				info.Evened = 0 // not all of it, at least
			}
			// A large plan is more than what is kept for subscribers. Whoever took its
			// changes over only at the end would have lost its place by then, and
			// read the whole state again.
			others, err := drain(m, sub, own)
			if err != nil {
				return nil, err
			}
			p.sent = nil
			moved = moved || others
		}
		if err := p.watchClock(m, w); err != nil {
			return nil, err
		}
		p.setStats(m.stats(info.Held))
		p.scores.note(m.engine, &plan, info)
		p.c.Planned(info)
		if len(changes) > 0 {
			p.c.Logger.Info("assignments changed", "changes", len(changes), "stale", info.Stale, "moves", plan.Quality.Moves,
				"least", plan.Quality.Least, "evened", info.Evened, "held", info.Held, "waiting", info.Waiting, "later", info.Later, "revision", info.Revision, "took", info.Took)
		}
		// What waits may wait for a handover that this very plan has ended, by giving a
		// stage back to who had yet to let go of it. Nobody else would say so.
		freed := info.Waiting > 0 && len(changes) > 0
		if info.Stale == 0 && !moved && !freed {
			return own, nil
		}
		if !sleep(ctx, pause) {
			return nil, ctx.Err()
		}
	}
}

// chunks cuts a plan into commands, between pipelines as long as one pipeline
// fits: its tables must change together, since half a change could let records
// go round.
func (p *Placer) chunks(changes []*commandpb.AssignmentChange) [][]*commandpb.AssignmentChange {
	var out [][]*commandpb.AssignmentChange
	var chunk []*commandpb.AssignmentChange
	bytes := 0
	flush := func() {
		if len(chunk) > 0 {
			out = append(out, chunk)
			chunk, bytes = nil, 0
		}
	}
	for len(changes) > 0 {
		n, size := 1, proto.Size(changes[0])
		for n < len(changes) && changes[n].PipelineId == changes[0].PipelineId {
			size += proto.Size(changes[n])
			n++
		}
		if len(chunk)+n > p.c.ChunkChanges || bytes+size > p.c.ChunkBytes {
			flush()
		}
		for _, c := range changes[:n] {
			if len(chunk) >= p.c.ChunkChanges || (len(chunk) > 0 && bytes+proto.Size(c) > p.c.ChunkBytes) {
				flush()
			}
			chunk = append(chunk, c)
			bytes += proto.Size(c)
		}
		changes = changes[n:]
	}
	flush()
	return out
}
