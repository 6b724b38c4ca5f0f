package control

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

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
	// VoterLag is how many entries a voter must lack, for VoterLooks in a row, to be
	// shown as one that catches up. Defaults 5,000 and 10.
	VoterLag   uint64
	VoterLooks int
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
	if c.VoterLag == 0 {
		c.VoterLag = 5000
	}
	if c.VoterLooks <= 0 {
		c.VoterLooks = 10
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
// keeps an operation for each member that catches up, which says how far it is and
// can be cancelled. Read replicas stay what they are.
type Promoter struct {
	c   PromoterConfig
	ops catchUps
}

// NewPromoter returns a Promoter; Run makes it work.
func NewPromoter(c PromoterConfig) *Promoter {
	c.ensureDefaults()
	return &Promoter{c: c, ops: catchUps{c.State, c.Submit, c.Now}}
}

// Run works until ctx is done.
func (p *Promoter) Run(ctx context.Context) { whileLeading(ctx, p.c.Node, p.reign) }

// follower is what is known of one member.
type follower struct {
	// looks counts how often in a row a learner was caught up, or a voter lacked
	// much.
	looks int
	// shown is when its operation was last told, match what it had then.
	shown time.Time
	match uint64
	begun string // the operation that is known to exist
	// quiet: the operation has ended; a read replica that caught up once.
	quiet bool
	votes bool
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
		learners, voters := st.Position.ConfState.GetLearners(), st.Position.ConfState.GetVoters()
		for id, f := range known {
			if f.votes != slices.Contains(voters, id) || !f.votes && !slices.Contains(learners, id) {
				delete(known, id)
			}
		}
		for _, m := range raftnode.Live(st.Position.Members) {
			votes := slices.Contains(voters, m.ID)
			if m.ID == st.ID || !votes && !slices.Contains(learners, m.ID) {
				continue
			}
			f := known[m.ID]
			if f == nil {
				f = &follower{votes: votes}
				known[m.ID] = f
			}
			if votes {
				p.lookAtVoter(ctx, st, m, f)
			} else {
				p.look(ctx, st, m, f)
			}
		}
	}
}

// lookAtVoter shows how far a voter is that lacks much, or gets an image. One that
// does not answer is not catching up; it is down.
func (p *Promoter) lookAtVoter(ctx context.Context, st raftnode.Status, m raftnode.Member, f *follower) {
	peer := peerOf(st, m.ID)
	if peer.ID == 0 {
		return
	}
	catching := peer.State == "snapshot" || peer.Answered && !peer.Silent && peer.Match+p.c.VoterLag < st.Commit
	if !catching && (f.begun == "" || p.ready(st, m.ID)) {
		f.looks, f.begun = 0, "" // tidy ends what there is
		return
	}
	if f.looks++; f.looks >= p.c.VoterLooks {
		p.show(ctx, st, m, peer, f)
	}
}

// look judges one learner.
func (p *Promoter) look(ctx context.Context, st raftnode.Status, m raftnode.Member, f *follower) {
	peer := peerOf(st, m.ID)
	if peer.ID == 0 {
		return
	}
	if !p.ready(st, m.ID) {
		f.looks = 0
		p.show(ctx, st, m, peer, f)
		return
	}
	if f.looks++; f.looks < p.c.Looks || p.c.Held(m.ID) {
		return
	}
	// A quiet one may have fallen behind and been sent an image meanwhile, whose
	// operation is another.
	if f.quiet && f.looks%tidyEvery != 0 {
		return
	}
	newest, _, err := p.ops.newest(m)
	if err != nil {
		p.note(err, m)
		return
	}
	if running(newest) && newest.CancelRequested {
		p.note(p.ops.cancel(ctx, m, newest), m)
		return
	}
	if p.ops.held(newest) > 0 {
		return
	}
	if m.ReadReplica || !p.c.Promote {
		if f.quiet && !running(newest) {
			return
		}
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

// tidy ends the operations that nobody ends otherwise: of nodes that are members no
// more, and of voters that have caught up, which an earlier leader may have begun,
// or whoever sent them an image; and of members that came back while the leader that
// took them in died.
func (p *Promoter) tidy(ctx context.Context, st raftnode.Status) {
	if p.c.State == nil {
		return
	}
	v := p.c.State.View()
	var all []*commandpb.Operation
	err := v.Operations(func(op *commandpb.Operation) bool {
		if (op.Kind == KindCatchUp || op.Kind == router.OperationRejoin) && running(op) {
			all = append(all, op)
		}
		return true
	})
	if err = errors.Join(err, v.Close()); err != nil {
		p.c.Logger.Error("cannot read how far the members are", "err", err)
		return
	}
	for _, op := range all {
		m, ok := st.Position.Member(op.NodeId)
		switch {
		case op.Kind == router.OperationRejoin && (!ok || m.Removed || bytes.Equal(op.Detail, router.RejoinDetail(m.Disk))):
			continue // it is not back
		case op.Kind == router.OperationRejoin:
			op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, "it is back, on another data directory"
		case !ok || m.Removed:
			op.State, op.Message = commandpb.OperationState_OPERATION_STATE_CANCELLED, "the node is no member any more"
		case !ofMember(op, m):
			op.State, op.Message = commandpb.OperationState_OPERATION_STATE_CANCELLED, "the node has come with a directory of its own since; an operation of that one shows how far it is"
		case slices.Contains(st.Position.ConfState.GetLearners(), m.ID):
			continue // look ends it
		case op.CancelRequested:
			p.note(p.ops.cancel(ctx, m, op), m)
			continue
		case p.ready(st, m.ID):
			op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, "caught up; the node votes"
		default:
			continue
		}
		p.note(p.ops.put(ctx, op, false), m)
	}
}

// ready says whether a member has what this leader has, and answers.
func (p *Promoter) ready(st raftnode.Status, id uint64) bool {
	peer := peerOf(st, id)
	return peer.Answered && !peer.Silent && peer.State == "replicate" && peer.Match+p.c.MaxLag >= st.Commit
}

// show tells how far a member is, once a second.
func (p *Promoter) show(ctx context.Context, st raftnode.Status, m raftnode.Member, peer raftnode.PeerStatus, f *follower) {
	now := p.c.Now()
	since := now.Sub(f.shown)
	if since < time.Second || f.quiet {
		return
	}
	f.shown = now
	newest, next, err := p.ops.newest(m)
	switch {
	case err != nil:
		p.note(err, m)
		return
	case running(newest) && newest.CancelRequested:
		p.note(p.ops.cancel(ctx, m, newest), m)
		return
	case p.ops.held(newest) > 0, p.ops.fresh(newest):
		return
	}
	op := operation(m, newest, next)
	op.Phase, op.Unit, op.Done, op.Total = phaseLog, "entries", min(peer.Match, st.Commit), st.Commit
	switch {
	case peer.State == "snapshot" && running(newest) && newest.Phase == phaseImage && newest.Total == 0:
		return // said already; once more could take the place of the sender's word
	case peer.State == "snapshot":
		// Whoever sends it says how much of it.
		op.Phase, op.Unit, op.Done, op.Total = phaseImage, "bytes", 0, 0
	case peer.Silent || !peer.Answered:
		op.Message = "the node is not heard of"
	case since < time.Minute && f.match > 0 && peer.Match > f.match:
		op.Rate = uint64(float64(peer.Match-f.match) / since.Seconds())
	}
	f.match = peer.Match
	p.note(p.put(ctx, op, f, running(newest)), m)
}

// put records an operation, creating it when it is not known to exist.
func (p *Promoter) put(ctx context.Context, op *commandpb.Operation, f *follower, exists bool) error {
	create := !exists && f.begun != op.OperationId
	err := p.ops.put(ctx, op, create)
	if err == nil {
		f.begun = op.OperationId
	}
	return err
}

func (p *Promoter) note(err error, m raftnode.Member) {
	if err != nil {
		p.c.Logger.Debug("the progress of a member was not recorded", "node_changed", m.ID, "err", err)
	}
}

// end records that a member is caught up.
func (p *Promoter) end(ctx context.Context, m raftnode.Member, f *follower, total uint64, message string) {
	newest, next, err := p.ops.newest(m)
	if err != nil {
		p.note(err, m)
		return
	}
	op := operation(m, newest, next)
	op.Phase, op.Unit, op.Done, op.Total = phaseLog, "entries", total, total
	op.State, op.Message = commandpb.OperationState_OPERATION_STATE_DONE, message
	p.note(p.put(ctx, op, f, running(newest)), m)
}
