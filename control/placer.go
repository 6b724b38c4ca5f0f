package control

import (
	"context"
	"errors"
	"log/slog"
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
	// every sidecar hundreds of times. Defaults 20 ms and 200 ms.
	Quiet, MaxDelay time.Duration
	// Retry is the pause after a plan that could not be replicated. Default
	// 200 ms.
	Retry time.Duration
	// ChunkChanges and ChunkBytes bound one command. Defaults 1,000 changes
	// and 512 KiB.
	ChunkChanges, ChunkBytes int
	// Planned is told about every plan that was carried out; may be nil.
	Planned func(PlanInfo)
}

// PlanInfo tells what came of one plan.
type PlanInfo struct {
	Revision uint64        // planned from
	Took     time.Duration // reading and planning
	Changes  int
	Stale    int // skipped, because the state had moved on; planned again
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
	if c.Planned == nil {
		c.Planned = func(PlanInfo) {}
	}
}

// Placer keeps the assignments in step with pipelines, sidecars and services
// while this node leads.
type Placer struct{ c PlacerConfig }

// NewPlacer returns a Placer; Run makes it work.
func NewPlacer(c PlacerConfig) *Placer {
	c.EnsureDefaults()
	return &Placer{c: c}
}

// Run works until ctx is done.
func (p *Placer) Run(ctx context.Context) {
	eachReign(ctx, p.c.Node, p.reign)
}

// reign follows the state for as long as ctx lasts.
func (p *Placer) reign(ctx context.Context, term uint64) {
	if !caughtUp(ctx, p.c.Node, p.c.Retry) {
		return
	}
	for ctx.Err() == nil {
		if err := p.follow(ctx, term); err != nil && ctx.Err() == nil && !errors.Is(err, router.ErrResync) {
			p.c.Logger.Warn("placement starts over", "err", err)
			sleep(ctx, p.c.Retry)
		}
	}
}

// follow plans, and again after every change, until it loses track of them. The
// state is read once; from then on its changes are followed, so that a plan costs
// what the changes concern and not a look at the whole fleet.
func (p *Placer) follow(ctx context.Context, term uint64) error {
	v := p.c.State.View()
	m, err := newMirror(v)
	if closeErr := v.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	sub, err := p.c.State.Hub().Subscribe(m.revision,
		router.TablePipelines, router.TableSidecars, router.TableServices, router.TableAssignments)
	if err != nil {
		return err
	}
	defer sub.Close()
	for {
		own, err := p.plan(ctx, term, m, sub)
		if err != nil {
			return err
		}
		if err := p.settled(ctx, m, sub, own); err != nil {
			return err
		}
	}
}

// settled returns when something changed that the placer did not do itself,
// and things have calmed down. own holds the revisions of its own commands.
func (p *Placer) settled(ctx context.Context, m *mirror, sub *router.Subscription, own map[uint64]bool) error {
	for {
		changes, at, err := sub.Next(ctx)
		if err != nil {
			return err
		}
		m.follow(changes, at)
		if foreign(changes, own) {
			break
		}
	}
	last := time.NewTimer(p.c.MaxDelay)
	defer last.Stop()
	for {
		calm, cancel := context.WithTimeout(ctx, p.c.Quiet)
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
		select {
		case <-last.C:
			return nil
		default:
		}
	}
}

// drain takes over the changes that are there, without waiting for any.
func drain(m *mirror, sub *router.Subscription) error {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	for {
		changes, at, err := sub.Next(now)
		switch {
		case errors.Is(err, context.Canceled):
			return nil
		case err != nil:
			return err
		}
		m.follow(changes, at)
	}
}

// foreign is true when any of changes is not of the placer's own making.
func foreign(changes []router.Change, own map[uint64]bool) bool {
	for _, c := range changes {
		if c.Table != router.TableAssignments || !own[c.Revision] {
			return true
		}
	}
	return false
}

// plan makes the assignments what they should be, and again if the state moved
// on meanwhile. It returns the revisions of its commands.
func (p *Placer) plan(ctx context.Context, term uint64, m *mirror, sub *router.Subscription) (own map[uint64]bool, err error) {
	own = make(map[uint64]bool)
	for {
		start := time.Now()
		// What this placer's commands did is there once they are answered: a
		// plan that did not know of it could send records round.
		if err := drain(m, sub); err != nil {
			return nil, err
		}
		plan := m.engine.Plan()
		changes := changesOf(plan.Steps)
		info := PlanInfo{Revision: m.revision, Took: time.Since(start), Changes: len(changes), Quality: plan.Quality}
		for _, chunk := range p.chunks(changes) {
			res, err := p.c.Submit.Submit(ctx, &commandpb.Command{
				TimeMs: uint64(p.c.Now().UnixMilli()),
				// A state restored meanwhile may have the very generations and
				// versions the plan was made from.
				ExpectedEpoch: &m.epoch,
				// Whoever leads since has made plans that this one knows nothing of:
				// both could give one stage away, to different sidecars.
				ExpectedTerm: &term,
				Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{
					Changes: chunk, PlannedRevision: m.revision,
				}},
			})
			if err != nil {
				return nil, err
			}
			if res.GetRejection().GetCode() == commandpb.Code_CODE_EPOCH {
				return nil, router.ErrResync
			}
			if r := res.GetRejection(); r != nil {
				return nil, errors.New("the state refused a plan: " + r.Reason)
			}
			own[res.GetRevision()] = true
			info.Stale += int(res.GetStale())
		}
		p.c.Planned(info)
		if len(changes) > 0 {
			p.c.Logger.Info("assignments changed", "changes", len(changes), "stale", info.Stale, "moves", plan.Quality.Moves,
				"least", plan.Quality.Least, "revision", info.Revision, "took", info.Took)
		}
		if info.Stale == 0 {
			return own, nil
		}
		if !sleep(ctx, p.c.Quiet) {
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
