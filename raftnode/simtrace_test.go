package raftnode

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// simTraceLines is how many of the last events a failure shows.
const simTraceLines = 400

// simTrace keeps one line per event: the last ones to show, all of them in a
// hash, so that two runs of a seed can be compared.
//
// A line reads
//
//	step  time/ms  who  what happened  | role term leader commit applied durable log
//
// where the part behind the bar is the node after the event: L, C, P, F for
// leader, candidate, pre-candidate and follower, T its term, l whom it follows,
// c, a, d the committed, applied and durably applied index, and [first,last] of
// its log with ~ before the last entry that is not yet synced.
type simTrace struct {
	ring [simTraceLines][]byte
	n    int
	hash uint64
	// out receives every line as it is made.
	out io.Writer
	buf []byte
}

func newSimTrace() *simTrace { return &simTrace{hash: 14695981039346656037} }

func (t *simTrace) emit(line []byte) {
	for _, c := range line {
		t.hash = (t.hash ^ uint64(c)) * 1099511628211
	}
	slot := &t.ring[t.n%simTraceLines]
	*slot = append((*slot)[:0], line...)
	t.n++
	if t.out != nil {
		fmt.Fprintf(t.out, "%s\n", line)
	}
}

// String returns the kept lines.
func (t *simTrace) String() string {
	var b strings.Builder
	from := max(0, t.n-simTraceLines)
	if from > 0 {
		fmt.Fprintf(&b, "... %d earlier events\n", from)
	}
	for i := from; i < t.n; i++ {
		b.Write(t.ring[i%simTraceLines])
		b.WriteByte('\n')
	}
	return b.String()
}

func pad(b []byte, n int, width int) []byte {
	for len(b)-n < width {
		b = append(b, ' ')
	}
	return b
}

func appendInt(b []byte, prefix string, v uint64) []byte {
	return strconv.AppendUint(append(b, prefix...), v, 10)
}

// event writes a line about node (nil: the whole cluster).
func (s *sim) event(node *simNode, parts ...string) {
	b := s.trace.buf[:0]
	b = strconv.AppendInt(b, int64(s.steps), 10)
	b = pad(b, 0, 6)
	b = strconv.AppendInt(b, s.now/1000, 10)
	b = append(b, '.')
	b = strconv.AppendInt(b, s.now%1000/100, 10)
	b = pad(b, 0, 15)
	if node != nil {
		b = appendInt(b, "n", node.id)
		b = appendInt(b, ".", uint64(node.life))
	}
	b = pad(b, 0, 21)
	for i, p := range parts {
		if i > 0 {
			b = append(b, ' ')
		}
		b = append(b, p...)
	}
	if node != nil && node.node != nil {
		b = pad(b, 0, 78)
		b = append(b, '|', ' ')
		b = node.appendState(b)
	}
	s.trace.buf = b
	s.trace.emit(b)
}

func (n *simNode) appendState(b []byte) []byte {
	l := n.node.loop
	role := byte('F')
	switch l.state {
	case raft.StateLeader:
		role = 'L'
	case raft.StateCandidate:
		role = 'C'
	case raft.StatePreCandidate:
		role = 'P'
	}
	b = append(b, role)
	b = appendInt(b, " T", l.term)
	b = appendInt(b, " l", l.leader)
	b = appendInt(b, " c", l.commit)
	b = appendInt(b, " a", n.machine.mem.pos.Index)
	b = appendInt(b, " d", n.machine.disk.pos.Index)
	b = appendInt(b, " [", n.log.index+1)
	b = append(b, ',')
	if n.log.durable.last() != n.log.last() {
		b = append(b, '~')
	}
	b = appendInt(b, "", n.log.last())
	return append(b, ']')
}

// describe says in a few characters what m is.
func describe(m *raftpb.Message) string {
	b := make([]byte, 0, 48)
	b = appendInt(b, "", m.GetFrom())
	b = appendInt(b, ">", m.GetTo())
	b = append(b, ' ')
	b = append(b, strings.TrimPrefix(m.GetType().String(), "Msg")...)
	b = appendInt(b, " T", m.GetTerm())
	if m.GetIndex() != 0 || m.GetLogTerm() != 0 {
		b = appendInt(b, " ", m.GetIndex())
		b = appendInt(b, "@", m.GetLogTerm())
	}
	if n := len(m.GetEntries()); n > 0 {
		b = appendInt(b, "+", uint64(n))
	}
	if m.GetCommit() != 0 {
		b = appendInt(b, " c", m.GetCommit())
	}
	if m.GetReject() {
		b = appendInt(b, " reject hint ", m.GetRejectHint())
	}
	if hasSnapshot(m) {
		b = appendInt(b, " image ", m.GetSnapshot().GetMetadata().GetIndex())
	}
	return string(b)
}
