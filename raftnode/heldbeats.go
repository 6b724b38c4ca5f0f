package raftnode

import (
	"bytes"
	"maps"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
)

// heldBeats has a leader confirm reads with no more followers than it needs, while
// reads come one round after the other.
//
// Raft asks all of them each time whether they still follow, and counts those who
// answer first. With many reads that is most of what they cost beside gRPC: a message
// and an answer wake some ten goroutines in two processes, and in a group of three
// half of them are for an answer nobody waits for. So the question to the others is
// held back; the swiftest are asked, which are those whose answer last made a
// majority.
//
// Holding is safe: a message between nodes may be lost anyway, and raft counts whoever
// answers. What is held leaves with the next tick, the newest question of each
// follower, which covers those before it. So a follower that is asked and does not
// answer costs a tick, not [Config.ReadRetry], until another's answer has taken its
// place; and one that is not asked hears of its leader every tick, and more often than
// by heartbeats.
//
// With a round now and then all are asked: there is little to gain, and the first of
// two answers comes earlier than a certain one.
//
// It belongs to the loop, whose ticks come late when it is held up.
type heldBeats struct {
	msgs map[uint64]*raftpb.Message
	// question is the context of the newest round of this leadership; answered are
	// those who did.
	question []byte
	answered []uint64
	// swift holds whom to ask, at most as many as are needed.
	swift []uint64
	// rounds counts those of the running tick, before those of the one before.
	rounds, before int
}

// needed returns how many followers' answers make a majority together with this
// node, and false when that is no matter of their number: during a joint change, and
// for a leader that is no voter.
func (l *loop) needed() (int, bool) {
	cs := l.confState
	return len(cs.GetVoters()) / 2, len(cs.GetVotersOutgoing()) == 0 && slices.Contains(cs.GetVoters(), l.cfg.ID)
}

// holdBeat reports whether m, a heartbeat of raft's, is kept back.
func (l *loop) holdBeat(m *raftpb.Message) bool {
	b := &l.beats
	if len(m.GetContext()) == 0 || !l.leading() {
		return false
	}
	if !bytes.Equal(b.question, m.GetContext()) {
		b.question, b.answered = m.GetContext(), b.answered[:0]
		b.rounds++
	}
	need, simple := l.needed()
	if max(b.rounds, b.before) < l.cfg.CrowdedRounds || !simple || len(b.swift) < need ||
		slices.Contains(b.swift, m.GetTo()) {
		delete(b.msgs, m.GetTo()) // m says all that it says
		return false
	}
	if b.msgs == nil {
		b.msgs = map[uint64]*raftpb.Message{}
	}
	b.msgs[m.GetTo()] = m
	return true
}

// noteBeat takes down m, a message that raft has not refused.
func (l *loop) noteBeat(m *raftpb.Message) {
	b := &l.beats
	if m.GetType() != raftpb.MsgHeartbeatResp || m.GetTerm() != l.term || len(b.question) == 0 || !bytes.Equal(b.question, m.GetContext()) ||
		slices.Contains(b.answered, m.GetFrom()) || !slices.Contains(l.confState.GetVoters(), m.GetFrom()) {
		return
	}
	need, _ := l.needed()
	if b.answered = append(b.answered, m.GetFrom()); len(b.answered) > need || slices.Contains(b.swift, m.GetFrom()) {
		return
	}
	// Whoever was asked and is slower than this one goes.
	slow := slices.IndexFunc(b.swift, func(id uint64) bool { return !slices.Contains(b.answered, id) })
	if len(b.swift) >= need && slow >= 0 {
		b.swift = slices.Delete(b.swift, slow, slow+1)
	}
	if len(b.swift) < need {
		b.swift = append(b.swift, m.GetFrom())
	}
}

// tick begins another tick and returns what is held, in the order of ids.
func (b *heldBeats) tick() []*raftpb.Message {
	b.before, b.rounds = b.rounds, 0
	return takeHeld(b.msgs)
}

// members takes note of a change of members: whoever was asked may not count any more.
// What is held still leaves with the next tick, or a read whose one asked follower was
// removed would wait for the next heartbeat.
func (b *heldBeats) members(now *raftpb.ConfState) {
	b.swift, b.answered = nil, nil
	ids := idsOf(now)
	maps.DeleteFunc(b.msgs, func(id uint64, _ *raftpb.Message) bool { return !slices.Contains(ids, id) })
}

// drop forgets everything: leadership has changed.
func (b *heldBeats) drop() { *b = heldBeats{before: b.before, rounds: b.rounds} }
