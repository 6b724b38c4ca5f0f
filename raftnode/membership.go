package raftnode

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
)

// ChangeKind says what a Change does.
type ChangeKind int

// The kinds of a Change.
const (
	// AddLearner adds a node that receives the log and does not vote.
	AddLearner ChangeKind = iota + 1
	// Promote makes a learner that has caught up a voter.
	Promote
	// Remove takes a node out. Its id is never used again, but for the same
	// member that lost its disk: see Change.Rejoin.
	Remove
	// UpdateAddr changes where a member is reached.
	UpdateAddr
)

// String implements fmt.Stringer; it reads as the verb before a node.
func (k ChangeKind) String() string {
	switch k {
	case AddLearner:
		return "add learner"
	case Promote:
		return "promote"
	case Remove:
		return "remove"
	case UpdateAddr:
		return "update address of"
	}
	return fmt.Sprintf("change %d of", int(k))
}

// Change is one change of the group.
type Change struct {
	Kind ChangeKind
	// ID is the member changed.
	ID uint64
	// Addr is its peer address: for AddLearner and UpdateAddr.
	Addr string
	// Disk is the id of its data directory: of AddLearner; of UpdateAddr for a
	// member of which it is not known, while another than the known one is
	// refused; of Remove, so that it is remembered.
	Disk uint64
	// ReadReplica, with AddLearner, keeps it a learner.
	ReadReplica bool
	// Rejoin, with AddLearner, lets a removed member return under its id with
	// another disk. A member whose disk was lost is brought back by Remove and
	// then this. Demoting it would not do: raft would go on believing that it
	// holds what it once acknowledged, and never send it again.
	Rejoin bool
	// Replaces, with Promote, removes this voter in the same step, so that the
	// group is never smaller in between.
	Replaces uint64
}

// ChangeMembership changes the group and returns the position at which the
// change is in force here. Only the leader can; one change runs at a time. The
// errors mean what they mean for Propose; ErrMembershipRefused says why the
// change is no good. A leader asked to remove itself hands leadership over
// first and returns a NotLeaderError naming its successor: ask there; with
// ErrTransferFailed it could not, and nothing was proposed.
func (n *Node) ChangeMembership(ctx context.Context, c Change) (Position, error) {
	if err := ctx.Err(); err != nil {
		return Position{}, err
	}
	lead := n.Leadership()
	if !lead.Leading {
		return Position{}, n.notLeader()
	}
	if removed := c.removed(); removed == n.cfg.ID {
		if len(Live(n.members())) <= 1 {
			return Position{}, fmt.Errorf("%w: node %d is the only member", ErrMembershipRefused, removed)
		}
		if err := n.TransferLeader(ctx, 0); err != nil {
			return Position{}, fmt.Errorf("node %d leads and must hand over before it is removed: %w", removed, err)
		}
		return Position{}, n.notLeader()
	}
	cl := n.calls.get()
	if !n.inbox.pushControl(cl, func(l *loop) { l.changeMembership(c, cl) }) {
		return Position{}, ErrStopping
	}
	res, err := n.calls.await(ctx, cl, ErrAmbiguous)
	if err != nil {
		return Position{}, err
	}
	return res.Value.(Position), nil
}

func (c Change) removed() uint64 {
	switch c.Kind {
	case Remove:
		return c.ID
	case Promote:
		return c.Replaces
	}
	return 0
}

// confChange builds raft's form of c.
func (c Change) confChange() (*raftpb.ConfChangeV2, error) {
	single := func(t raftpb.ConfChangeType, id uint64) *raftpb.ConfChangeSingle {
		return &raftpb.ConfChangeSingle{Type: t.Enum(), NodeId: new(id)}
	}
	cc := &raftpb.ConfChangeV2{}
	var more changeContext
	switch c.Kind {
	case AddLearner:
		cc.Changes = append(cc.Changes, single(raftpb.ConfChangeAddLearnerNode, c.ID))
		more.Members = []Member{{ID: c.ID, Addr: c.Addr, Disk: c.Disk, ReadReplica: c.ReadReplica}}
		more.Rejoin = c.Rejoin
	case Promote:
		cc.Changes = append(cc.Changes, single(raftpb.ConfChangeAddNode, c.ID))
		if c.Replaces != 0 {
			// Two changes make raft use a joint configuration, which it leaves
			// by itself.
			cc.Changes = append(cc.Changes, single(raftpb.ConfChangeRemoveNode, c.Replaces))
		}
	case Remove:
		cc.Changes = append(cc.Changes, single(raftpb.ConfChangeRemoveNode, c.ID))
		if c.Disk != 0 {
			more.Members = []Member{{ID: c.ID, Disk: c.Disk}}
		}
	case UpdateAddr:
		cc.Changes = append(cc.Changes, single(raftpb.ConfChangeUpdateNode, c.ID))
		more.Members = []Member{{ID: c.ID, Addr: c.Addr, Disk: c.Disk}}
	}
	ctx, err := more.encode()
	if err != nil {
		return nil, err
	}
	cc.Context = ctx
	return cc, nil
}

// changeMembership runs on the loop.
func (l *loop) changeMembership(c Change, cl *call) {
	fail := func(err error) { cl.ch <- outcome{err: err} }
	// Everything raft has is handed out first: then the entry to come is the
	// first new one, which is how its index is found (see place).
	l.drain()
	if !l.leading() {
		fail(l.notLeaderErr())
		return
	}
	if l.transferTicks > 0 {
		fail(fmt.Errorf("%w: leadership is being handed over", ErrBusy))
		return
	}
	if err := l.checkChange(c); err != nil {
		fail(err)
		return
	}
	cc, err := c.confChange()
	if err == nil {
		err = l.admit(cc)
	}
	if err != nil {
		fail(fmt.Errorf("%w: cannot %v node %d: %w", ErrMembershipRefused, c.Kind, c.ID, err))
		return
	}
	if err := l.rn.ProposeConfChange(cc); err != nil {
		if errors.Is(err, raft.ErrProposalDropped) {
			err = fmt.Errorf("%w: %w", ErrBusy, err)
		}
		fail(err)
		return
	}
	l.unplaced = append(l.unplaced, &batch{conf: true, waiters: []waiter{{call: cl}}})
	l.drain()
}

// admit is what the applier will ask of cc, as far as it can be known here.
func (l *loop) admit(cc *raftpb.ConfChangeV2) error {
	ctx, err := decodeChangeContext(cc.GetContext())
	if err != nil {
		return err
	}
	return admit(l.members(), cc, ctx)
}

// checkChange refuses what is wrong with c as far as the leader can see. What
// it lets through in error is refused again where it is applied.
func (l *loop) checkChange(c Change) error {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%w: cannot %v node %d: %s", ErrMembershipRefused, c.Kind, c.ID, fmt.Sprintf(format, args...))
	}
	if c.ID == 0 || raft.IsLocalMsgTarget(c.ID) {
		return refuse("not a node id")
	}
	cs := l.confState
	if isJoint(cs) {
		return ErrMembershipPending
	}
	member := inConfState(cs, c.ID)
	switch c.Kind {
	case AddLearner:
		if member {
			return refuse("it is a member already")
		}
		if c.Addr == "" {
			return refuse("its address is missing")
		}
	case Promote:
		if slices.Contains(cs.GetVoters(), c.ID) {
			return refuse("it is a voter already")
		}
		if !member {
			return refuse("it is not a member; add it as a learner first")
		}
		if c.Replaces != 0 && !slices.Contains(cs.GetVoters(), c.Replaces) {
			return refuse("node %d, which it would replace, is not a voter", c.Replaces)
		}
		if lag, known := l.lag(c.ID); !known {
			return refuse("it does not follow the log yet")
		} else if lag > l.cfg.PromoteMaxLag {
			return refuse("it still lacks %d entries (at most %d may be missing)", lag, l.cfg.PromoteMaxLag)
		}
	case Remove:
		if !member {
			return refuse("it is not a member")
		}
	case UpdateAddr:
		if !member {
			return refuse("it is not a member")
		}
		if c.Addr == "" {
			return refuse("the address is missing")
		}
		// Where it is applied, the disk known before stays: without this the
		// caller would take it for replaced.
		for _, m := range l.members() {
			if m.ID == c.ID && c.Disk != 0 && m.Disk != 0 && m.Disk != c.Disk {
				return refuse("it has the data directory %016x and not %016x; if that one is lost, remove the node and let it rejoin", m.Disk, c.Disk)
			}
		}
		return nil
	default:
		return refuse("unknown kind of change")
	}
	return l.checkQuorum(c, refuse)
}

// lag returns how many entries a member lacks; false when that is not known
// because it does not answer, or is not yet receiving the log.
func (l *loop) lag(id uint64) (uint64, bool) {
	var match uint64
	known := false
	l.rn.WithProgress(func(i uint64, _ raft.ProgressType, pr tracker.Progress) {
		if i == id {
			match, known = pr.Match, l.answers(id) && pr.State == tracker.StateReplicate
		}
	})
	if match >= l.commit {
		return 0, known
	}
	return l.commit - match, known
}

// checkQuorum refuses a change after which too few voters would be alive to
// commit anything, the change itself included.
func (l *loop) checkQuorum(c Change, refuse func(string, ...any) error) error {
	voters := map[uint64]bool{}
	for _, id := range l.confState.GetVoters() {
		voters[id] = true
	}
	before := len(voters)
	if c.Kind == Promote {
		voters[c.ID] = true
	}
	if r := c.removed(); voters[r] {
		delete(voters, r)
	} else if c.Kind != Promote {
		return nil
	}
	if len(voters) == 0 {
		return refuse("it is the last voter")
	}
	active := 0
	for id := range voters {
		if l.answers(id) {
			active++
		}
	}
	if active < len(voters)/2+1 {
		return refuse("only %d of then %d voters (now %d) are alive, too few to go on", active, len(voters), before)
	}
	return nil
}

// applyConfChange runs on the loop for the applier. A change at or before the
// snapshot raft has already switched to must not be applied to it again: raft
// would mix two configurations, or panic.
func (l *loop) applyConfChange(index uint64, cc *raftpb.ConfChangeV2) *raftpb.ConfState {
	if index <= l.restored {
		return nil
	}
	was := l.confState
	l.confState = cloneConfState(l.rn.ApplyConfChange(cc))
	l.contacts.members(was, l.confState)
	l.beats.members(l.confState)
	return cloneConfState(l.confState)
}
