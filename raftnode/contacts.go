package raftnode

import (
	"slices"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// silentAfter is how long a peer may owe its answers before the status calls it
// silent: twenty heartbeats with the usual settings. With slow ones it is two
// election timeouts.
const silentAfter = time.Second

// contacts notes when each peer last answered this leader. Only the loop uses it.
//
// Raft's own Progress.RecentActive cannot be asked instead. CheckQuorum resets it
// for all peers once per election timeout, so for the time until the next answer
// it calls everybody silent: a network round trip for who looks at raft itself,
// a whole heartbeat interval for who looks at what was published in between.
//
// The unit is this node's own ticks, not time. A leader that was held up itself,
// by a full CPU or a suspended machine, gets one tick afterwards; by the clock it
// would take its own absence for that of all the others.
type contacts struct {
	tick  uint64 // of the loop
	since uint64 // tick at which this leadership began
	// heard holds the tick of the newest answer of this leadership. Raft refuses
	// answers of others than members, so it has no more entries than there
	// were members.
	heard map[uint64]uint64
	// joined holds the tick at which a member of this leadership was added.
	joined map[uint64]uint64
}

// begin forgets everything: this node has just begun to lead, or ceased to.
func (c *contacts) begin() {
	c.since = c.tick
	clear(c.heard)
	clear(c.joined)
}

// members takes note of a change of members: a node that was just added has not
// been silent since the leadership began.
func (c *contacts) members(was, now *raftpb.ConfState) {
	old := idsOf(was)
	for _, id := range idsOf(now) {
		if slices.Contains(old, id) {
			continue
		}
		if c.joined == nil {
			c.joined = make(map[uint64]uint64)
		}
		c.joined[id] = c.tick
	}
}

// idsOf lists all nodes a configuration names, some of them twice.
func idsOf(cs *raftpb.ConfState) []uint64 {
	return slices.Concat(cs.GetVoters(), cs.GetVotersOutgoing(), cs.GetLearners(), cs.GetLearnersNext())
}

// note takes down m, which raft has accepted. Only answers count: a peer that
// this node can no longer reach may still send requests for votes.
func (c *contacts) note(m *raftpb.Message, term uint64) {
	switch m.GetType() {
	case raftpb.MsgAppResp, raftpb.MsgHeartbeatResp:
	default:
		return
	}
	if m.GetTerm() != term {
		return // raft ignores it, too
	}
	if c.heard == nil {
		c.heard = make(map[uint64]uint64)
	}
	c.heard[m.GetFrom()] = c.tick
}

// silence returns how many ticks ago the newest answer of a peer came; without
// one in this leadership, how long that has lasted.
func (c *contacts) silence(id uint64) (ticks uint64, answered bool) {
	at, answered := c.heard[id]
	if !answered {
		at = max(c.since, c.joined[id])
	}
	return c.tick - at, answered
}

// answers reports whether a peer has answered within the last election timeout,
// which is what RecentActive is meant to say. It is for decisions that rest on
// who is alive.
func (l *loop) answers(id uint64) bool {
	ticks, answered := l.contacts.silence(id)
	return id == l.cfg.ID || answered && ticks <= uint64(l.cfg.ElectionTicks)
}

// describeContact fills in what is known of a peer's answers.
func (l *loop) describeContact(p *PeerStatus) {
	if p.ID == l.cfg.ID {
		p.Answered = true
		return
	}
	ticks, answered := l.contacts.silence(p.ID)
	p.Silence, p.Answered = time.Duration(ticks)*l.cfg.TickInterval, answered
	// Several heartbeats lie in two election timeouts whatever the settings.
	p.Silent = p.Silence > max(silentAfter, time.Duration(2*l.cfg.ElectionTicks)*l.cfg.TickInterval)
}
