package raftnode

import (
	"maps"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
)

// heldCommits keeps back messages that carry nothing but a new commit index
// while further commands wait, or are to be expected, since batches follow each other:
// the message with these says the same. That is half of all messages between nodes,
// and each costs two processes several system calls, and an answer. Otherwise they
// leave at once, so that followers learn of a lone commit without delay.
//
// Holding is safe: a message between nodes may be lost anyway. What is held
// leaves with the next tick at the latest, so nobody on a follower who waits for
// an index to be applied there waits longer than that; and with the answer to that
// follower's question for the index of a read, which is about to wait for it.
//
// It belongs to the loop.
type heldCommits struct {
	msgs map[uint64]*raftpb.Message
	// batches counts those proposed in the running tick, before those of the one
	// before.
	batches, before int
}

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
	return l.in.hasProposals() || max(l.commits.batches, l.commits.before) >= l.cfg.CrowdedRounds
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

// tick begins another tick and returns what is held, in the order of ids.
func (h *heldCommits) tick() []*raftpb.Message {
	h.before, h.batches = h.batches, 0
	return takeHeld(h.msgs)
}

// takeHeld empties msgs and returns them in the order of ids, so that a simulation sends
// them in the same one each time.
func takeHeld(msgs map[uint64]*raftpb.Message) []*raftpb.Message {
	if len(msgs) == 0 {
		return nil
	}
	out := make([]*raftpb.Message, 0, len(msgs))
	for _, id := range slices.Sorted(maps.Keys(msgs)) {
		out = append(out, msgs[id])
	}
	clear(msgs)
	return out
}

// takeFor returns what is held for one peer, nil if nothing is, and forgets it.
func (h *heldCommits) takeFor(id uint64) *raftpb.Message {
	m := h.msgs[id]
	delete(h.msgs, id)
	return m
}

// drop forgets what is held: it was for a leadership that is over.
func (h *heldCommits) drop() { clear(h.msgs) }
