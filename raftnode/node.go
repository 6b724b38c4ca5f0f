package raftnode

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// Node runs one replica of the group; its methods are safe for concurrent use.
type Node struct {
	cfg    Config
	sm     StateMachine
	log    Log
	images *snap.Store
	tr     Transport

	inbox     *inbox
	appendQ   *queue[*raftpb.Message]
	applyQ    *queue[applyItem]
	props     *proposals
	waits     *waits
	calls     callPool
	loop      *loop
	appender  *appender
	applier   *applier
	truncator *truncator
	snaps     *snapshots

	lead atomic.Pointer[Leadership]

	mu sync.Mutex
	// changed is closed and replaced when lead changes.
	changed chan struct{}

	started atomic.Bool
	stopped chan struct{}
}

// New puts a node together from what was found on disk: the state machine, the
// log (recovered is what opening it said), the images, and the way to the peers.
// It finishes an image installation that a crash interrupted. It starts nothing;
// see Run. The caller keeps ownership of its arguments and closes them after Run
// has returned.
//
// ErrStateBehindLog and ErrDiverged say that the directory cannot be used.
func New(cfg Config, sm StateMachine, log Log, recovered wal.Recovered, images *snap.Store, tr Transport) (*Node, error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Incarnation == 0 {
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return nil, fmt.Errorf("raftnode: draw an incarnation: %w", err)
		}
		cfg.Incarnation = binary.LittleEndian.Uint64(b[:])
	}
	if recovered.LastIndex != 0 {
		if last, err := log.LastIndex(); err == nil && last != recovered.LastIndex {
			return nil, fmt.Errorf("raftnode: the log ends at %d, recovery said %d: it was written to in between", last, recovered.LastIndex)
		}
	}
	hs, err := reconcile(&cfg, sm, log, images)
	if err != nil {
		return nil, err
	}
	stored, _, err := log.InitialState()
	if err != nil {
		return nil, fmt.Errorf("raftnode: read the log's hard state: %w", err)
	}
	pos := sm.Applied().clone()

	n := &Node{
		sm: sm, log: log, images: images, tr: tr,
		changed: make(chan struct{}), stopped: make(chan struct{}),
	}
	n.cfg = cfg
	n.inbox = newInbox(&n.cfg)
	n.appendQ = newQueue[*raftpb.Message](cfg.Clock)
	n.applyQ = newQueue[applyItem](cfg.Clock)
	n.props = &proposals{release: n.inbox.release}
	n.waits = &waits{}
	n.waits.applied.Store(pos.Index)
	n.snaps = newSnapshots(&n.cfg, sm, images, tr, n.inbox)
	n.lead.Store(&Leadership{Term: hs.GetTerm()})

	n.appender = &appender{
		id: cfg.ID, log: log, tr: tr, in: n.inbox, q: n.appendQ, clock: cfg.Clock,
		events: &n.cfg.Events, hard: raftHardState(stored),
	}
	n.applier = &applier{
		cfg: &n.cfg, sm: sm, tr: tr, in: n.inbox, q: n.applyQ, props: n.props, waits: n.waits, snaps: n.snaps,
	}
	n.applier.setPosition(pos)
	n.loop = &loop{
		yield: runtime.Gosched, cfg: &n.cfg, in: n.inbox, appendQ: n.appendQ, applyQ: n.applyQ, tr: tr, snaps: n.snaps,
		props: n.props, waits: n.waits,
		leaderChanged: n.leaderChanged, notLeaderErr: n.notLeader, diskBusy: n.appender.installing.Load, members: n.members,
		now: cfg.Clock.Now(), term: hs.GetTerm(), commit: hs.GetCommit(), confState: cloneConfState(pos.ConfState),
	}
	n.loop.commitPtr.Store(hs.GetCommit())
	n.loop.followerFloor.Store(math.MaxUint64)
	n.loop.acked.Store(pos.Index)
	n.truncator = &truncator{
		cfg: &n.cfg, sm: sm, log: log, snaps: n.snaps, conf: sm.Applied,
		follower: &n.loop.followerFloor, acked: &n.loop.acked, wake: make(chan struct{}, 1),
	}
	n.applier.poke = n.truncator.poke
	n.inline()

	rn, err := raft.NewRawNode(&raft.Config{
		ID:            cfg.ID,
		ElectionTick:  cfg.ElectionTicks,
		HeartbeatTick: cfg.HeartbeatTicks,
		Storage: &storage{
			Log: log, hs: hs, cs: cloneConfState(pos.ConfState), snaps: n.snaps, loop: n.loop,
		},
		Applied:                   pos.Index,
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             cfg.MaxSizePerMsg,
		MaxCommittedSizePerReady:  cfg.MaxCommittedBytes,
		MaxUncommittedEntriesSize: cfg.MaxUncommittedBytes,
		MaxInflightMsgs:           cfg.MaxInflightMsgs,
		MaxInflightBytes:          cfg.MaxInflightBytes,
		CheckQuorum:               true,
		PreVote:                   true,
		ReadOnlyOption:            raft.ReadOnlySafe,
		Logger:                    raftLogger{cfg.Logger},
		// A forwarded proposal gives its origin no answer; the caller asks the
		// leader itself.
		DisableProposalForwarding: true,
		StepDownOnRemoval:         true,
	})
	if err != nil {
		return nil, fmt.Errorf("raftnode: start raft: %w", err)
	}
	n.loop.rn = rn
	n.loop.told = Leadership{Term: hs.GetTerm()}
	n.loop.publish()
	tr.SetMembers(pos.clone().Members)
	return n, nil
}

func raftHardState(hs *raftpb.HardState) *raftpb.HardState {
	if hs == nil {
		return &raftpb.HardState{}
	}
	return proto.CloneOf(hs)
}

// inline wires the storage steps to call each other directly, so that whoever
// calls the step functions decides the order of everything. Run replaces it.
func (n *Node) inline() {
	n.applier.confChange = func(index uint64, cc *raftpb.ConfChangeV2) (*raftpb.ConfState, error) {
		return n.loop.applyConfChange(index, cc), nil
	}
	n.appender.install = func(s *raftpb.Snapshot) error {
		// What the loop queued before the snapshot is older and goes first.
		for {
			if more, err := n.applier.step(); err != nil {
				return err
			} else if !more {
				break
			}
		}
		return n.applier.install(s)
	}
}

// Propose replicates cmd and returns its result once it is applied here. cmd may
// be reused after return.
//
// An error for which NotDone holds is definite: the command has and will have no
// effect. Any other (ErrAmbiguous, alone or wrapping what ended ctx) leaves open
// whether it takes effect. Losing leadership alone is no reason for either: the
// call goes on waiting until the entry is applied here, or overwritten.
func (n *Node) Propose(ctx context.Context, cmd []byte) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("raftnode: nothing was proposed: %w", err)
	}
	if err := n.checkLeading(); err != nil {
		return Result{}, err
	}
	c := n.calls.get()
	if err := n.inbox.pushCommand(cmd, waiter{call: c}); err != nil {
		n.calls.put(c)
		return Result{}, err
	}
	return n.calls.await(ctx, c, ErrAmbiguous)
}

// ProposeFunc is Propose without a goroutine to wait: done is called exactly
// once, on the caller's goroutine if the command is refused at once, else by the
// goroutine that applies. It must not block. cmd may be reused after return.
func (n *Node) ProposeFunc(cmd []byte, done func(Result, error)) {
	err := n.checkLeading()
	if err == nil {
		err = n.inbox.pushCommand(cmd, waiter{done: done})
	}
	if err != nil {
		done(Result{}, err)
	}
}

func (n *Node) checkLeading() error {
	if n.lead.Load().Leading {
		return nil
	}
	select {
	case <-n.stopped:
		return ErrStopping
	default:
		return n.notLeader()
	}
}

// notLeader says who leads instead.
func (n *Node) notLeader() error {
	lead := n.Leadership()
	if lead.Leader == 0 || lead.Leader == n.cfg.ID {
		return ErrNoLeader
	}
	e := &NotLeaderError{Leader: lead.Leader, Term: lead.Term}
	for _, m := range n.members() {
		if m.ID == lead.Leader {
			e.Addr = m.Addr
		}
	}
	return e
}

func (n *Node) members() []Member { return *n.applier.members.Load() }

// ReadIndex returns an index such that a read of this node's state at or after
// it is linearizable; the state machine has already applied it. It works on every
// member. It waits through leader changes, up to Config.ReadTimeout without an
// answer: then ErrNoLeader. Asking again is always safe.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	return n.ReadIndexUntil(ctx, nil)
}

// ReadIndexUntil is ReadIndex for a caller that leaves when up delivers, too, with
// context.DeadlineExceeded: a timer that is used again costs a fraction of a context
// with a deadline, which is a twentieth of all that a read costs. up may be nil.
func (n *Node) ReadIndexUntil(ctx context.Context, up <-chan time.Time) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	c := n.calls.get()
	if err := n.inbox.pushRead(c); err != nil {
		n.calls.put(c)
		return 0, err
	}
	res, err := n.calls.awaitUntil(ctx, up, c)
	return res.Index, err
}

// WaitApplied returns once index is applied here.
func (n *Node) WaitApplied(ctx context.Context, index uint64) error {
	if index <= n.waits.applied.Load() {
		return nil
	}
	c := n.calls.get()
	n.waits.add(index, []*call{c})
	_, err := n.calls.await(ctx, c, nil)
	if err != nil && ctx.Err() != nil {
		n.waits.drop(c)
	}
	return err
}

// Applied returns the newest applied index.
func (n *Node) Applied() uint64 { return n.waits.applied.Load() }

// Leadership returns whom this node follows at the moment.
func (n *Node) Leadership() Leadership { return *n.lead.Load() }

// Changed returns a channel that is closed at the next change of Leadership.
// Take it before looking at Leadership, or a change in between is missed.
func (n *Node) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

func (n *Node) leaderChanged(lead Leadership) {
	n.mu.Lock()
	n.lead.Store(&lead)
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
	n.cfg.Events.LeaderChanged(lead)
}

// Step takes messages of peers. It does not block; under overload messages are
// dropped, which raft tolerates. The image a MsgSnap names must be in Images
// already. The messages belong to the node afterwards. An error is about
// messages that no member of this group sends, or a missing image.
func (n *Node) Step(ctx context.Context, msgs []*raftpb.Message) error {
	var errs []error
	items := make([]peerItem, 0, len(msgs))
	for _, m := range msgs {
		if err := n.checkPeer(m); err != nil {
			errs = append(errs, err)
			continue
		}
		it := peerItem{msg: m}
		if m.GetType() == raftpb.MsgSnap {
			image, err := n.snaps.check(m)
			if err != nil {
				errs = append(errs, fmt.Errorf("raftnode: snapshot of node %d: %w", m.GetFrom(), err))
				continue
			}
			it.image = image
		}
		items = append(items, it)
	}
	dropped, err := n.inbox.pushPeer(items)
	if err != nil {
		for _, it := range items {
			if it.image != nil {
				it.image.Close()
			}
		}
		return err
	}
	if dropped > 0 {
		n.cfg.Events.MessagesDropped(msgs[0].GetFrom(), dropped)
	}
	return errors.Join(errs...)
}

// checkPeer refuses what only this node may tell its own raft.
func (n *Node) checkPeer(m *raftpb.Message) error {
	switch {
	case m == nil:
		return errors.New("raftnode: an empty message of a peer")
	case m.GetTo() != n.cfg.ID:
		return fmt.Errorf("raftnode: a message for node %d came to node %d: the addresses of the members are mixed up", m.GetTo(), n.cfg.ID)
	case m.GetFrom() == 0, m.GetFrom() == n.cfg.ID, raft.IsLocalMsgTarget(m.GetFrom()),
		raft.IsLocalMsg(m.GetType()), m.GetType() == raftpb.MsgProp:
		return fmt.Errorf("raftnode: a %v of %d is no message of a peer", m.GetType(), m.GetFrom())
	}
	return nil
}

// ReportUnreachable says that messages to a peer were lost.
func (n *Node) ReportUnreachable(id uint64) { n.inbox.reportUnreachable(id) }

// Images returns the store of images, for those who receive and send them.
func (n *Node) Images() *snap.Store { return n.images }

// ID returns the raft id of this node.
func (n *Node) ID() uint64 { return n.cfg.ID }
