package raftnode

import (
	"math"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"
)

// Leadership says whom this node follows.
type Leadership struct {
	// Leader is the id of the leader, zero when none is known.
	Leader uint64
	// Term is the current term.
	Term uint64
	// Leading: this node leads. It may not have applied everything its
	// predecessors committed yet: call ReadIndex before acting on the state.
	Leading bool
}

// Role is what a node does in its term.
type Role string

// The roles of a node.
const (
	RoleFollower     Role = "follower"
	RoleCandidate    Role = "candidate"
	RolePreCandidate Role = "pre-candidate"
	RoleLeader       Role = "leader"
)

func roleOf(s raft.StateType) Role {
	switch s {
	case raft.StateLeader:
		return RoleLeader
	case raft.StateCandidate:
		return RoleCandidate
	case raft.StatePreCandidate:
		return RolePreCandidate
	}
	return RoleFollower
}

// PeerStatus is what a leader knows of a member, itself included.
type PeerStatus struct {
	ID      uint64
	Learner bool
	// Match is the last entry the peer is known to hold, Next the one to be
	// sent next.
	Match, Next uint64
	// State is raft's view: probe, replicate or snapshot.
	State string
	// Silence is how long ago the peer's newest answer came, or this leadership
	// began if none has come since; Answered tells which. It is counted in the
	// leader's own ticks, so that a leader that was held up does not take that
	// for the silence of the others. A peer that is alive answers every
	// heartbeat.
	Silence  time.Duration
	Answered bool
	// Silent: the peer owes so many answers that it must be down or cut off.
	Silent bool
	// PendingSnapshot is the index of an image on its way, else zero.
	PendingSnapshot uint64
}

// Status describes a node at one moment. The parts are gathered without
// stopping the node and may be some milliseconds apart.
type Status struct {
	ID     uint64
	Term   uint64
	Role   Role
	Leader uint64
	// Commit, Applied and Durable are log indexes: known committed, applied
	// here, and applied and safe from power loss here.
	Commit, Applied, Durable uint64
	FirstIndex, LastIndex    uint64
	LogBytes                 int64
	// Position holds the applied configuration and addresses.
	Position Position
	// Peers is filled on the leader, sorted by ID.
	Peers []PeerStatus
	// LeadTransferee is the target of a transfer in progress, else zero.
	LeadTransferee uint64
	// WaitingProposals and their bytes count commands without a result yet.
	WaitingProposals int
	WaitingBytes     int64
	// AppendQueue and ApplyQueue count messages, the ages are of their heads.
	AppendQueue, ApplyQueue       int
	AppendQueueAge, ApplyQueueAge time.Duration
	// Syncs counts durable writes of the log, SyncTime is their total.
	Syncs    int64
	SyncTime time.Duration
	// SinceSync is the time since the last durable write, zero before the first.
	SinceSync time.Duration
	// TickLag is how late the last tick came.
	TickLag time.Duration
}

// loopStatus is the part only the loop can see; it is never changed once
// published.
type loopStatus struct {
	term, commit, leader, transferee uint64
	role                             Role
	peers                            []PeerStatus
	tickLag                          time.Duration
}

// publish makes the loop's view available to Status and the truncator.
func (l *loop) publish() {
	st := &loopStatus{
		term: l.term, commit: l.commit, leader: l.leader, role: roleOf(l.state), tickLag: l.tickLag,
	}
	floor := uint64(math.MaxUint64)
	if l.leading() {
		st.transferee = l.transferee
		l.rn.WithProgress(func(id uint64, typ raft.ProgressType, pr tracker.Progress) {
			p := PeerStatus{
				ID: id, Learner: typ == raft.ProgressTypeLearner, Match: pr.Match, Next: pr.Next,
				State: peerState(pr.State), PendingSnapshot: pr.PendingSnapshot,
			}
			l.describeContact(&p)
			st.peers = append(st.peers, p)
			if id != l.cfg.ID && l.answers(id) && pr.State != tracker.StateSnapshot {
				floor = min(floor, pr.Match)
			}
		})
		slices.SortFunc(st.peers, func(a, b PeerStatus) int {
			if a.ID < b.ID {
				return -1
			}
			return 1
		})
	}
	l.followerFloor.Store(floor)
	l.published.Store(st)
}

func peerState(s tracker.StateType) string {
	switch s {
	case tracker.StateReplicate:
		return "replicate"
	case tracker.StateSnapshot:
		return "snapshot"
	}
	return "probe"
}

// Status returns what the node is doing. It does not wait for the loop: raft's
// part is at most a heartbeat old.
func (n *Node) Status() Status {
	ls := n.loop.published.Load()
	lead := n.Leadership()
	now := n.cfg.Clock.Now()
	st := Status{
		ID: n.cfg.ID, Term: lead.Term, Role: ls.role, Leader: lead.Leader,
		Commit: n.loop.commitPtr.Load(), Applied: n.waits.applied.Load(), Durable: n.sm.Durable(),
		LogBytes: n.log.Bytes(), Position: n.sm.Applied(),
		Peers: slices.Clone(ls.peers), LeadTransferee: ls.transferee,
		AppendQueue: n.appendQ.len(), ApplyQueue: n.applyQ.len(),
		AppendQueueAge: n.appendQ.age(now), ApplyQueueAge: n.applyQ.age(now),
		Syncs: n.appender.syncs.Load(), SyncTime: time.Duration(n.appender.syncNanos.Load()),
		TickLag: ls.tickLag,
	}
	st.FirstIndex, _ = n.log.FirstIndex()
	st.LastIndex, _ = n.log.LastIndex()
	st.WaitingProposals, st.WaitingBytes = n.inbox.gauges()
	if at := n.appender.lastSync.Load(); at != 0 {
		st.SinceSync = now.Sub(time.Unix(0, at))
	}
	return st
}
