package raftnode

import (
	"go.etcd.io/raft/v3/raftpb"
)

// Member is one node of the group and where its peers reach it, or what is left
// of one that was removed.
type Member struct {
	// ID is the raft id; never zero, never reused by another node.
	ID uint64
	// Addr is the host:port of the node's peer listener.
	Addr string
	// Disk is the random id of the data directory it joined with; zero for the
	// first members of a group, who agreed on themselves without a log.
	Disk uint64 `json:",omitempty"`
	// ReadReplica: a learner on purpose, not to be promoted by a machine.
	ReadReplica bool `json:",omitempty"`
	// Removed: it was a member and is none; the id and the disk are kept so that
	// neither comes back.
	Removed bool `json:",omitempty"`
}

// Live returns those of members that take part in the group.
func Live(members []Member) []Member {
	out := make([]Member, 0, len(members))
	for _, m := range members {
		if !m.Removed {
			out = append(out, m)
		}
	}
	return out
}

// Position says which prefix of the log a state reflects, together with the
// group configuration that was in force there.
//
// The three travel together because raft must be restarted with the
// configuration *at* the applied index: taking the newest known one instead
// makes a restarted node count quorums of a group it has not joined yet.
type Position struct {
	Index     uint64
	Term      uint64
	ConfState *raftpb.ConfState
	// Members lists the members known at Index, sorted by ID, those that were
	// removed among them: see Live.
	Members []Member
}

// Member returns what is known of a node, removed or not; false when it never
// was a member.
func (p Position) Member(id uint64) (Member, bool) {
	for _, m := range p.Members {
		if m.ID == id {
			return m, true
		}
	}
	return Member{}, false
}

// Batch is one committed log entry: the commands that were packed into it.
type Batch struct {
	Index uint64
	Term  uint64
	// Commands alias the log's memory: valid until Apply returns, never to be
	// modified. Empty for the entry a new leader appends to its term.
	Commands [][]byte
	// Local is true when a caller on this node waits for the results.
	Local bool
}

// StateMachine is the replicated state. It applies committed commands in log
// order, exactly once per index, and stores the index with their effects.
//
// Contract:
//
//   - Apply, ApplyMembership and Install are called by one goroutine, never
//     concurrently with each other. Every other method may be called at any
//     time from any goroutine.
//   - The effects of a batch and its index become durable together or not at
//     all. A crash may lose a suffix of what was applied (the log replays it);
//     it may never leave a hole.
//   - Results depend on the log alone: no clock, randomness, environment or
//     map order.
//   - A returned error means this replica cannot go on: the node stops. What a
//     caller did wrong is a result, not an error.
type StateMachine interface {
	// Applied returns the position of the newest applied entry.
	Applied() Position

	// Apply applies batches in order and moves Applied to the last of them.
	// It returns one slice per batch: one result per command for batches with
	// Local set, nil for the others.
	Apply(batches []Batch) ([][]any, error)

	// ApplyMembership records a committed configuration change and moves
	// Applied to pos.
	ApplyMembership(pos Position) error

	// Durable returns the index up to which the state survives power loss.
	// The log may be truncated up to there and no further.
	Durable() uint64

	// Flush makes what is applied now durable and returns the new Durable
	// index. It blocks on the disk; Apply may go on meanwhile.
	Flush() (uint64, error)

	// Image writes a consistent copy of the state into dir, which must not
	// exist, and returns the position the copy reflects (which may be newer
	// than Applied was when Image was called). Apply may go on meanwhile.
	Image(dir string) (Position, error)

	// Install replaces the whole state by the image in dir (as written by
	// Image, on any node) and returns its position. After a crash either the
	// old or the new state is found, never a mixture. Install does not take
	// over or remove dir.
	Install(dir string) (Position, error)
}
