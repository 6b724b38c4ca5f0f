package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// KindCatchUp is the kind of the operations that show how far a new member is.
const KindCatchUp = "catch-up"

// MemberNode is what a Promoter needs of the local replica.
type MemberNode interface {
	Node
	Status() raftnode.Status
	ChangeMembership(ctx context.Context, c raftnode.Change) (raftnode.Position, error)
}

// PromoterConfig wires a Promoter.
type PromoterConfig struct {
	Node MemberNode
	// State holds the operations; optional, for tests of the rest.
	State  State
	Submit Submitter
	Logger *slog.Logger
	Now    func() time.Time
	// Promote: learners that have caught up become voters. Without it the loop
	// only shows how far they are.
	Promote bool
	// Held reports whether a learner must not be promoted by itself, because it is
	// to take the place of a voter; optional. It must not block.
	Held func(node uint64) bool
	// Interval is how often it looks. Default 100 ms.
	Interval time.Duration
	// Looks is how often in a row a learner must have been caught up. Default 3:
	// one that has just come may be gone again.
	Looks int
	// MaxLag is how many entries a learner that counts as caught up may lack.
	// Default 500, some milliseconds of a loaded cluster.
	MaxLag uint64
}

func (c *PromoterConfig) ensureDefaults() {
	if c.Interval <= 0 {
		c.Interval = 100 * time.Millisecond
	}
	if c.Looks <= 0 {
		c.Looks = 3
	}
	if c.MaxLag == 0 {
		c.MaxLag = 500
	}
	if c.Held == nil {
		c.Held = func(uint64) bool { return false }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Promoter makes learners that have caught up voters while this node leads, and
// keeps an operation for each that says how far it is. Read replicas stay what
// they are.
type Promoter struct{ c PromoterConfig }

// NewPromoter returns a Promoter; Run makes it work.
func NewPromoter(c PromoterConfig) *Promoter {
	c.ensureDefaults()
	return &Promoter{c: c}
}

// Run works until ctx is done.
func (p *Promoter) Run(ctx context.Context) { whileLeading(ctx, p.c.Node, p.reign) }

// follower is what is known of one learner.
type follower struct {
	looks int
	// shown is when its operation was last told, done what it said.
	shown time.Time
	begun bool
	// quiet: the operation has ended; a read replica that caught up once.
	quiet bool
}

func (p *Promoter) reign(ctx context.Context) {
	if !caughtUp(ctx, p.c.Node, p.c.Interval) {
		return
	}
	known := map[uint64]*follower{}
	for n := 0; sleep(ctx, p.c.Interval); n++ {
		st := p.c.Node.Status()
		if n%tidyEvery == tidyEvery-1 {
			p.tidy(ctx, st)
		}
		learners := st.Position.ConfState.GetLearners()
		for id := range known {
			if !slices.Contains(learners, id) {
				delete(known, id)
			}
		}
		for _, id := range learners {
			m, ok := st.Position.Member(id)
			if !ok || m.Removed {
				continue
			}
			f := known[id]
			if f == nil {
				f = &follower{}
				known[id] = f
			}
			p.look(ctx, st, m, f)
		}
	}
}

// look judges one learner.
func (p *Promoter) look(ctx context.Context, st raftnode.Status, m raftnode.Member, f *follower) {
	i := slices.IndexFunc(st.Peers, func(s raftnode.PeerStatus) bool { return s.ID == m.ID })
	if i < 0 {
		return
	}
	peer := st.Peers[i]
	if ready := peer.Answered && !peer.Silent && peer.State == "replicate" && peer.Match+p.c.MaxLag >= st.Commit; !ready {
		f.looks = 0
		p.show(ctx, st, m, peer, f)
		return
	}
	if f.looks++; f.looks < p.c.Looks || f.quiet || p.c.Held(m.ID) {
		return
	}
	if m.ReadReplica || !p.c.Promote {
		f.quiet = true
		p.end(ctx, m, f, st.Commit, "caught up; it stays a learner")
		return
	}
	if _, err := p.c.Node.ChangeMembership(ctx, raftnode.Change{Kind: raftnode.Promote, ID: m.ID}); err != nil {
		if ctx.Err() == nil && !errors.Is(err, raftnode.ErrMembershipPending) && !errors.Is(err, raftnode.ErrBusy) {
			p.c.Logger.Warn("a learner that has caught up was not made a voter; trying again", "node_changed", m.ID, "err", err)
		}
		f.looks = 0
		return
	}
	p.c.Logger.Info("a learner has caught up and votes now", "event", "promoted", "node_changed", m.ID)
	p.end(ctx, m, f, st.Commit, "caught up, and votes now")
}

// tidyEvery is every how many looks what has nothing to show any more is ended.
const tidyEvery = 20

// tidy ends the operations of nodes that are learners no more: somebody else made
// them voters, or took them out, or this leader's predecessor did not come to it.
func (p *Promoter) tidy(ctx context.Context, st raftnode.Status) {
	if p.c.State == nil {
		return
	}
	v := p.c.State.View()
	var left []*commandpb.Operation
	err := v.Operations(func(op *commandpb.Operation) bool {
		if op.Kind != KindCatchUp || op.State != commandpb.OperationState_OPERATION_STATE_RUNNING {
			return true
		}
		for _, id := range st.Position.ConfState.GetLearners() {
			if m, ok := st.Position.Member(id); ok && operationID(m) == op.OperationId {
				return true
			}
		}
		left = append(left, op)
		return true
	})
	if err = errors.Join(err, v.Close()); err != nil {
		p.c.Logger.Error("cannot read how far the learners are", "err", err)
		return
	}
	for _, op := range left {
		op.State, op.Message = commandpb.OperationState_OPERATION_STATE_CANCELLED, "the node is no learner any more"
		if slices.Contains(st.Position.ConfState.GetLearners(), op.NodeId) {
			op.Message = "the node has come with a directory of its own since; an operation of that one shows how far it is"
		}
		if slices.Contains(st.Position.ConfState.GetVoters(), op.NodeId) {
			op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, "the node votes now"
		}
		p.put(ctx, op, &follower{begun: true})
	}
}

// operationID is the same for every leader that sees this member.
func operationID(m raftnode.Member) string { return fmt.Sprintf("catch-up-%d-%016x", m.ID, m.Disk) }

// show tells how far a learner is, once a second.
func (p *Promoter) show(ctx context.Context, st raftnode.Status, m raftnode.Member, peer raftnode.PeerStatus, f *follower) {
	now := p.c.Now()
	if now.Sub(f.shown) < time.Second || f.quiet {
		return
	}
	f.shown = now
	op := p.operation(m, peer.Match, st.Commit)
	switch {
	case peer.State == "snapshot":
		op.Phase = "image"
	case peer.Silent || !peer.Answered:
		op.Message = "the node is not heard of"
	}
	p.put(ctx, op, f)
}

func (p *Promoter) operation(m raftnode.Member, done, total uint64) *commandpb.Operation {
	return &commandpb.Operation{
		OperationId: operationID(m), Kind: KindCatchUp, Subject: fmt.Sprintf("node %d", m.ID), NodeId: m.ID,
		State: commandpb.OperationState_OPERATION_STATE_RUNNING, Phase: "log", Done: min(done, total), Total: total, Unit: "entries",
	}
}

// put records an operation, creating it the first time. Failures are made up for
// by the next.
func (p *Promoter) put(ctx context.Context, op *commandpb.Operation, f *follower) {
	submit := func(create bool) (*commandpb.Result, error) {
		return p.c.Submit.Submit(ctx, &commandpb.Command{
			TimeMs: uint64(p.c.Now().UnixMilli()),
			Op:     &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{Operation: op, Create: create}},
		})
	}
	if !f.begun {
		if _, err := submit(true); err != nil { // one of an earlier leader is there already
			return
		}
		f.begun = true
	}
	if _, err := submit(false); err != nil && ctx.Err() == nil {
		p.c.Logger.Debug("the progress of a learner was not recorded", "node_changed", op.NodeId, "err", err)
	}
}

// end records that a learner is caught up.
func (p *Promoter) end(ctx context.Context, m raftnode.Member, f *follower, total uint64, message string) {
	op := p.operation(m, total, total)
	op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, message
	p.put(ctx, op, f)
}
