package raftnode

import (
	"maps"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
)

// heldCommits keeps back messages that carry nothing but a new commit index
// while further commands wait: the message with these, which leaves as soon as
// the batch at hand is applied, says the same. Under load that is half of all
// messages between nodes, and each costs two processes several system calls.
// With nothing waiting they leave at once, so that followers learn of a lone
// commit without delay.
//
// Holding is safe: a message between nodes may be lost anyway. What is held
// leaves with the next tick at the latest, so nobody on a follower who waits for
// an index to be applied there waits longer than that.
//
// It belongs to the loop.
type heldCommits struct{ msgs map[uint64]*raftpb.Message }

// superfluous reports whether m, a MsgApp of raft's, says nothing that the next
// one will not.
func (l *loop) superfluous(m *raftpb.Message) bool {
	switch {
	case len(m.GetEntries()) > 0, !l.leading(), l.transferTicks > 0:
		return false
	case l.lastChange > l.acked.Load():
		// The commit may be that of a change of members. A node that it removes
		// is sent nothing any more once it is applied here, so this is the last
		// it can hear of it.
		return false
	}
	return l.in.hasProposals()
}

// hold reports whether m, a MsgApp, is kept back, as it is when superfluous. Any
// other MsgApp to the same peer takes the place of a held one: it was made later
// and tells of no less.
func (h *heldCommits) hold(m *raftpb.Message, superfluous bool) bool {
	if !superfluous {
		delete(h.msgs, m.GetTo())
		return false
	}
	if h.msgs == nil {
		h.msgs = map[uint64]*raftpb.Message{}
	}
	h.msgs[m.GetTo()] = m
	return true
}

// take returns what is held, in the order of ids, and forgets it.
func (h *heldCommits) take() []*raftpb.Message {
	if len(h.msgs) == 0 {
		return nil
	}
	out := make([]*raftpb.Message, 0, len(h.msgs))
	for _, id := range slices.Sorted(maps.Keys(h.msgs)) {
		out = append(out, h.msgs[id])
	}
	clear(h.msgs)
	return out
}

// drop forgets what is held: it was for a leadership that is over.
func (h *heldCommits) drop() { clear(h.msgs) }
