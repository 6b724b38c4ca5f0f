package raftnode

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// readBatch is callers whose index one ReadIndex request will establish.
type readBatch struct {
	calls []*call
	since time.Time
	// first and last bound the ids asked for this batch; any of them answers
	// it, since all were asked after the callers came.
	first, last uint64
	issued      time.Time
}

// reads turns waiting callers into ReadIndex requests: one in flight at a time,
// for all that wait. Asking for each caller would cost a round of heartbeats
// each; those who come while one is in flight must wait for the next, because
// the index may have been taken before they came.
//
// It belongs to the loop.
type reads struct {
	next   readBatch
	flight readBatch
	lastID uint64
}

func (r *reads) add(calls []*call, now time.Time) {
	if len(calls) == 0 {
		return
	}
	if len(r.next.calls) == 0 {
		r.next.since = now
	}
	r.next.calls = append(r.next.calls, calls...)
}

// serveReads asks for the waiting reads, or again for those raft forgot: raft
// drops reads silently when a message is lost or the leader changes.
func (l *loop) serveReads() {
	r := &l.reads
	if len(r.flight.calls) == 0 {
		if len(r.next.calls) == 0 {
			return
		}
		if l.leading() && l.canAsk() {
			// Another node's request travels anyway, and those that come meanwhile
			// wait no longer for the next one than they would for this.
			l.letOthersCome()
			r.next.calls = l.in.takeReads(r.next.calls)
		}
		r.flight, r.next = r.next, readBatch{}
	} else if !r.flight.issued.IsZero() && l.now.Sub(r.flight.issued) < l.cfg.ReadRetry {
		return
	}
	if !l.canAsk() {
		return
	}
	r.lastID++
	if r.flight.issued.IsZero() && r.flight.first == 0 {
		r.flight.first = r.lastID
	}
	r.flight.last = r.lastID
	r.flight.issued = l.now
	l.rn.ReadIndex(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, l.cfg.Incarnation), r.lastID))
}

// canAsk reports whether somebody can answer a read.
//
// A leader may hand out its commit index only after it has committed an entry of
// its own term. Raft sees to that, except in a group of one voter: there it
// answers at once, and after a restart, when the commit index on disk is older
// than the log, the answer would hide acknowledged commands.
func (l *loop) canAsk() bool {
	return l.leader != 0 && (!l.leading() || l.termCommitted())
}

// answerReader answers m, a follower's request for the index of a read, if that
// request proves that nobody else leads; term is that of the follower when it left. It
// is for a leader that has committed in its term.
//
// What a round of heartbeats would find out is whether a majority was still in this
// term after the readers came. This node is, and so was whoever asks, which says so in
// its request. Where the two are a majority, any other leader was elected later by one
// of them, and has committed nothing that was acknowledged before. So a linearizable
// read through a follower of three costs one message each way, where raft would have
// two more follow, and two come back. That the term need not be durable, neither
// there nor here, is the same for heartbeats.
//
// The index is raft's own, not what was handed out of it: that may be older than what
// was acknowledged.
func (l *loop) answerReader(m *raftpb.Message, term uint64) bool {
	need, simple := l.needed()
	if need > 1 || !simple || !slices.Contains(l.confState.GetVoters(), m.GetFrom()) {
		return false
	}
	// So that news of a commit which is part of the answer are on their way, or held.
	l.drain()
	st := l.rn.BasicStatus()
	if term == 0 || term != st.GetTerm() || st.RaftState != raft.StateLeader {
		return false
	}
	out := []*raftpb.Message{{
		Type: raftpb.MsgReadIndexResp.Enum(), To: m.From, From: new(l.cfg.ID), Term: new(term),
		Index: new(st.GetCommit()), Entries: m.GetEntries(),
	}}
	if news := l.commits.takeFor(m.GetFrom()); news != nil {
		out = append(out, news)
	}
	l.tr.Send(out)
	return true
}

// readsDue reports whether serveReads would ask now.
func (l *loop) readsDue() bool {
	r := &l.reads
	waiting := len(r.next.calls) > 0
	if len(r.flight.calls) > 0 {
		waiting = r.flight.issued.IsZero()
	}
	return waiting && l.canAsk()
}

// reissue makes the batch in flight be asked again, after a leader change.
func (r *reads) reissue() { r.flight.issued = time.Time{} }

// readStates takes raft's answers.
func (l *loop) readStates(states []raft.ReadState) {
	r := &l.reads
	for _, rs := range states {
		if len(rs.RequestCtx) != 16 || binary.LittleEndian.Uint64(rs.RequestCtx) != l.cfg.Incarnation {
			continue
		}
		id := binary.LittleEndian.Uint64(rs.RequestCtx[8:])
		if len(r.flight.calls) == 0 || id < r.flight.first || id > r.flight.last {
			continue
		}
		l.waits.add(rs.Index, r.flight.calls)
		r.flight = readBatch{}
	}
}

// expireReads tells callers that nobody answered.
func (l *loop) expireReads() {
	r := &l.reads
	for _, b := range []*readBatch{&r.flight, &r.next} {
		if len(b.calls) > 0 && l.now.Sub(b.since) >= l.cfg.ReadTimeout {
			resolveCalls(b.calls, outcome{err: fmt.Errorf("%w that answered a read within %v", ErrNoLeader, l.cfg.ReadTimeout)})
			*b = readBatch{}
		}
	}
}

func (r *reads) stop() {
	resolveCalls(r.flight.calls, outcome{err: ErrStopping})
	resolveCalls(r.next.calls, outcome{err: ErrStopping})
	r.flight, r.next = readBatch{}, readBatch{}
}
