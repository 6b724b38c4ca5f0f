package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// ReplacerNode is what a Replacer needs of the local replica. *raftnode.Node
// implements it.
type ReplacerNode interface {
	Node
	Status() raftnode.Status
	ChangeMembership(ctx context.Context, c raftnode.Change) (raftnode.Position, error)
	TransferLeader(ctx context.Context, to uint64) error
}

// ReplacerConfig wires a Replacer.
type ReplacerConfig struct {
	Node   ReplacerNode
	State  State
	Submit Submitter
	// Interval is how often running replacements are looked at. Default 200 ms.
	Interval time.Duration
	// MaxLag is how many entries the new node may lack when it takes its place.
	// Default 200.
	MaxLag uint64
	// CallTimeout bounds one change of the membership. Default 5 s.
	CallTimeout time.Duration
	// SilentFor is how long the new node may be silent before the replacement is
	// given up. Default 1 min.
	SilentFor time.Duration
	Now       func() time.Time
	Logger    *slog.Logger
}

func (c *ReplacerConfig) ensureDefaults() {
	if c.Interval <= 0 {
		c.Interval = 200 * time.Millisecond
	}
	if c.MaxLag == 0 {
		c.MaxLag = 200
	}
	if c.CallTimeout <= 0 {
		c.CallTimeout = 5 * time.Second
	}
	if c.SilentFor <= 0 {
		c.SilentFor = time.Minute
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Replacer carries replacements of voters out while this node leads.
type Replacer struct {
	c    ReplacerConfig
	mu   sync.Mutex
	held map[uint64]bool
	// told is when the progress of an operation was last recorded; of the running
	// reign.
	told map[string]time.Time
}

// NewReplacer returns a Replacer; Run starts it.
func NewReplacer(c ReplacerConfig) *Replacer {
	c.ensureDefaults()
	return &Replacer{c: c}
}

// Holds reports whether node is to take the place of a voter.
func (m *Replacer) Holds(node uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held[node]
}

func (m *Replacer) hold(nodes map[uint64]bool) {
	m.mu.Lock()
	m.held = nodes
	m.mu.Unlock()
}

// Run works whenever this node leads, until ctx is done.
func (m *Replacer) Run(ctx context.Context) { whileLeading(ctx, m.c.Node, m.reign) }

func (m *Replacer) reign(ctx context.Context) {
	m.told = map[string]time.Time{}
	if !caughtUp(ctx, m.c.Node, m.c.Interval) {
		return
	}
	defer m.hold(nil)
	for sleep(ctx, m.c.Interval) {
		running, err := m.running()
		if err != nil {
			m.c.Logger.Warn("the replacements cannot be read; trying again", "err", err)
			continue
		}
		held := map[uint64]bool{}
		for _, op := range running {
			if r, err := router.DecodeReplacement(op.Detail); err == nil {
				held[r.New] = true
			}
		}
		m.hold(held)
		for _, op := range running {
			r, err := router.DecodeReplacement(op.Detail)
			if err != nil {
				m.end(ctx, op, commandpb.OperationState_OPERATION_STATE_FAILED, err.Error())
				continue
			}
			m.step(ctx, op, r, m.c.Node.Status())
		}
	}
}

// running returns the replacements that have not ended.
func (m *Replacer) running() (out []*commandpb.Operation, err error) {
	v := m.c.State.View()
	defer v.Close()
	err = v.Operations(func(op *commandpb.Operation) bool {
		if op.Kind == router.OperationReplace && op.State == commandpb.OperationState_OPERATION_STATE_RUNNING {
			out = append(out, proto.CloneOf(op))
		}
		return true
	})
	return out, err
}

// step does the next step of a replacement. It asks what is there, never what
// was done before, so that the next leader goes on wherever the last one stopped.
//
// Until the one change that matters nothing has changed; that change is a single
// entry, through a joint configuration in which both groups must agree. So the
// group is never weaker than before, and there is nothing to roll back.
func (m *Replacer) step(ctx context.Context, op *commandpb.Operation, r router.Replacement, st raftnode.Status) {
	fail := func(format string, args ...any) {
		m.end(ctx, op, commandpb.OperationState_OPERATION_STATE_FAILED, fmt.Sprintf(format, args...)+"; the voters are as they were")
	}
	voters := st.Position.ConfState.GetVoters()
	if len(st.Position.ConfState.GetVotersOutgoing()) > 0 {
		return // the change is being completed
	}
	old, oldKnown := st.Position.Member(r.Old)
	next, nextKnown := st.Position.Member(r.New)
	oldVotes, nextVotes := slices.Contains(voters, r.Old), slices.Contains(voters, r.New)
	switch {
	case !oldVotes && nextVotes:
		m.end(ctx, op, commandpb.OperationState_OPERATION_STATE_DONE, fmt.Sprintf("node %d votes in the place of node %d; voters: %v", r.New, r.Old, voters))
		return
	case op.CancelRequested:
		m.end(ctx, op, commandpb.OperationState_OPERATION_STATE_CANCELLED, "nothing was changed")
		return
	case !nextKnown || next.Removed:
		fail("node %d is no member any more", r.New)
		return
	case !oldKnown || old.Removed || !oldVotes:
		fail("node %d is no voter any more", r.Old)
		return
	}
	p := peerOf(st, r.New)
	if ready := p.Answered && !p.Silent && p.State == "replicate" && p.Match+m.c.MaxLag >= st.Commit; !ready && r.New != st.ID {
		if p.Silence > m.c.SilentFor {
			fail("node %d has not answered for %v", r.New, p.Silence)
			return
		}
		if m.due(op.OperationId) {
			op.Phase, op.Done, op.Total, op.NodeId = "catching up", p.Match, st.Commit, st.ID
			m.put(ctx, op)
		}
		return
	}
	if r.Old == st.ID {
		// The next leader goes on from here.
		op.Phase = "handing leadership over"
		m.put(ctx, op)
		if err := m.c.Node.TransferLeader(ctx, 0); err != nil {
			m.c.Logger.Warn("the leader is to be replaced and could not hand over; trying on", "err", err)
		}
		return
	}
	change := raftnode.Change{Kind: raftnode.Promote, ID: r.New, Replaces: r.Old}
	if nextVotes {
		// It was promoted meanwhile: then the old one only has to go.
		change = raftnode.Change{Kind: raftnode.Remove, ID: r.Old}
	}
	op.Phase, op.Done, op.Total = "exchanging", p.Match, st.Commit
	m.put(ctx, op)
	bound, cancel := context.WithTimeout(ctx, m.c.CallTimeout)
	pos, err := m.c.Node.ChangeMembership(bound, change)
	cancel()
	switch {
	case err == nil:
		m.c.Logger.Info("a voter was replaced", "event", "member_replaced", "old", r.Old, "new", r.New, "index", pos.Index)
		m.end(ctx, op, commandpb.OperationState_OPERATION_STATE_DONE,
			fmt.Sprintf("node %d votes in the place of node %d; voters: %v", r.New, r.Old, pos.ConfState.GetVoters()))
	case errors.Is(err, raftnode.ErrMembershipRefused):
		fail("%v", err)
	default:
		// Pending, unknown or elsewhere: the next look sees what became of it.
		m.c.Logger.Info("the exchange is not decided yet", "err", err)
	}
}

func peerOf(st raftnode.Status, id uint64) raftnode.PeerStatus {
	for _, p := range st.Peers {
		if p.ID == id {
			return p
		}
	}
	return raftnode.PeerStatus{}
}

// due limits how often progress becomes a command.
func (m *Replacer) due(operation string) bool {
	now := m.c.Now()
	if now.Sub(m.told[operation]) < time.Second {
		return false
	}
	m.told[operation] = now
	return true
}

// put records an operation. A failure is made up for by the next look.
func (m *Replacer) put(ctx context.Context, op *commandpb.Operation) {
	ctx, cancel := context.WithTimeout(ctx, m.c.CallTimeout)
	defer cancel()
	res, err := m.c.Submit.Submit(ctx, &commandpb.Command{
		TimeMs: uint64(m.c.Now().UnixMilli()),
		Op:     &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{Operation: proto.CloneOf(op)}},
	})
	if err == nil && res.GetRejection() != nil {
		err = errors.New(res.GetRejection().GetReason())
	}
	if err != nil && ctx.Err() == nil {
		m.c.Logger.Warn("the progress of a replacement was not recorded", "operation", op.OperationId, "err", err)
	}
}

func (m *Replacer) end(ctx context.Context, op *commandpb.Operation, state commandpb.OperationState, message string) {
	op.State, op.Message = state, message
	if state == commandpb.OperationState_OPERATION_STATE_DONE && op.Total != 0 {
		op.Done = op.Total
	}
	m.put(ctx, op)
	m.c.Logger.Info("replacement ended", "event", "replacement_ended", "operation", op.OperationId, "subject", op.Subject,
		"state", state.String(), "message", message)
}
