package raftnode

import (
	"hash/fnv"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// simOracle knows what every node ever did and says at once when two facts
// contradict each other:
//
//   - one leader per term, and a leader has every committed entry;
//   - an entry is known by index and term: the same content and the same
//     predecessor in every log (by induction, log matching);
//   - an entry counts as committed only when a majority has it on disk, and
//     stays the same for ever;
//   - a node promises nothing (a vote, an acknowledgement) that its disk does
//     not hold;
//   - all states are equal at equal index, and carry the configuration;
//   - a command takes effect once, never after it was refused for good, and
//     where its caller was told;
//   - commands and reads see everything acknowledged before they began.
type simOracle struct {
	sim *sim

	leaders map[uint64]simLeader
	entries map[simEntryID]simEntry
	// committed[i] is the term of the committed entry i, zero while unknown.
	// committedIn[i] is the term in which that was first known.
	committed, committedIn []uint64
	maxCommit              uint64
	// states[i] is the state after entry i, from whoever got there first.
	states  []simCanon
	top     uint64
	where   map[uint64]simPlace
	refused map[uint64]bool
	acked   []uint64
	// known is the highest index anyone outside has heard of.
	known   uint64
	lastCmd uint64
}

type simLeader struct {
	node uint64
	life int
}

type simEntryID struct{ index, term uint64 }

type simEntry struct {
	hash, prevTerm uint64
}

type simCanon struct {
	term, chain uint64
	cmds        int
}

// simPlace is where a command took effect: the entry, and its number.
type simPlace struct {
	index  uint64
	number uint64
}

func newSimOracle(s *sim, boot Position) *simOracle {
	o := &simOracle{
		sim: s, leaders: map[uint64]simLeader{}, entries: map[simEntryID]simEntry{},
		where: map[uint64]simPlace{}, refused: map[uint64]bool{},
	}
	o.known, o.top, o.maxCommit = boot.Index, boot.Index, boot.Index
	o.grow(boot.Index)
	o.committed[boot.Index], o.committedIn[boot.Index] = boot.Term, boot.Term
	o.states[boot.Index] = simCanon{term: boot.Term, chain: 1}
	return o
}

func (o *simOracle) grow(i uint64) {
	for uint64(len(o.states)) <= i {
		o.states = append(o.states, simCanon{})
		o.committed = append(o.committed, 0)
		o.committedIn = append(o.committedIn, 0)
	}
}

func (o *simOracle) newCommand() uint64 {
	o.lastCmd++
	return o.lastCmd
}

// appended looks at what a node is about to write: runs of entries, of which a
// later one may overwrite an earlier one.
func (o *simOracle) appended(n *simNode, ents []*raftpb.Entry) {
	for k, e := range ents {
		i := e.GetIndex()
		prev, _ := n.log.Term(i - 1)
		for j := k - 1; j >= 0; j-- {
			if ents[j].GetIndex() == i-1 {
				prev = ents[j].GetTerm()
				break
			}
		}
		h := fnv.New64a()
		h.Write([]byte{byte(e.GetType())})
		h.Write(e.GetData())
		got := simEntry{hash: h.Sum64(), prevTerm: prev}
		id := simEntryID{i, e.GetTerm()}
		if want, ok := o.entries[id]; !ok {
			o.entries[id] = got
		} else if want != got {
			o.sim.violate("log matching", "n%d has another entry %d of term %d than an earlier log (predecessor of term %d, was %d; same content %t)",
				n.id, i, e.GetTerm(), got.prevTerm, want.prevTerm, got.hash == want.hash)
		}
	}
}

// observe looks at a node after each of its steps.
func (o *simOracle) observe(n *simNode) {
	if n.node == nil {
		return
	}
	s := o.sim
	st := n.node.loop.rn.BasicStatus()
	term := st.GetTerm()
	if term < n.seenTerm {
		s.violate("election safety", "n%d goes back from term %d to %d", n.id, n.seenTerm, term)
	}
	n.seenTerm = term
	if st.RaftState == raft.StateLeader {
		o.leads(n, term)
	}
	if commit := st.GetCommit(); commit > n.seenCommit {
		o.commits(n, commit)
		n.seenCommit = commit
	}
	if a := n.machine.mem.pos.Index; a > st.GetCommit() && !n.node.appender.installing.Load() {
		s.violate("state equality", "n%d applied %d, beyond its commit index %d", n.id, a, st.GetCommit())
	}
}

func (o *simOracle) leads(n *simNode, term uint64) {
	s := o.sim
	me := simLeader{n.id, n.life}
	had, ok := o.leaders[term]
	if ok {
		if had != me {
			s.violate("election safety", "n%d (life %d) and n%d (life %d) both lead term %d", had.node, had.life, n.id, n.life, term)
		}
		return
	}
	o.leaders[term] = me
	s.stats.elections++
	// It must have what was committed in earlier terms. (One that wins late, of
	// an old term, owes nothing to newer ones.)
	for i := o.maxCommit; i > n.log.index; i-- {
		if o.committed[i] == 0 || o.committedIn[i] >= term {
			continue
		}
		if t, ok := n.lastTermOf(i); !ok || t != 0 && t != o.committed[i] {
			s.violate("leader completeness", "n%d leads term %d with entry %d of term %d (log up to %d), the one committed in term %d is of term %d",
				n.id, term, i, t, n.lastIndex(), o.committedIn[i], o.committed[i])
			return
		}
	}
}

// commits notes what a node takes for committed.
func (o *simOracle) commits(n *simNode, commit uint64) {
	s := o.sim
	o.grow(commit)
	for i := max(n.seenCommit+1, n.log.index+1); i <= commit; i++ {
		term, ok := n.lastTermOf(i)
		if !ok {
			s.violate("leader completeness", "n%d takes %d for committed, its log ends at %d", n.id, i, n.lastIndex())
			return
		}
		if term == 0 {
			continue // behind a snapshot
		}
		if had := o.committed[i]; had != 0 && had != term {
			s.violate("durability", "n%d takes entry %d of term %d for committed, it was committed with term %d", n.id, i, term, had)
			return
		}
		o.committed[i] = term
		if o.committedIn[i] == 0 {
			o.committedIn[i] = n.seenTerm
		}
	}
	if commit <= o.maxCommit {
		return
	}
	o.maxCommit = commit
	term, have := o.committed[commit], 0
	for _, x := range s.nodes {
		if x.holds(commit, term) {
			have++
		}
	}
	if have <= len(s.nodes)/2 {
		s.violate("durability", "n%d takes entry %d of term %d for committed, only %d of %d disks have it", n.id, commit, term, have, len(s.nodes))
	}
}

// promised checks a message that gives a promise against the sender's disk.
func (o *simOracle) promised(n *simNode, m *raftpb.Message) {
	s := o.sim
	term, vote := n.durableTerm()
	switch m.GetType() {
	case raftpb.MsgVote:
		// A candidate that forgets its term could campaign for it twice.
		if term < m.GetTerm() || term == m.GetTerm() && vote != n.id {
			s.violate("promises", "n%d asks for votes in term %d, its disk says term %d, vote %d", n.id, m.GetTerm(), term, vote)
		}
	case raftpb.MsgApp, raftpb.MsgHeartbeat:
		if term < m.GetTerm() {
			s.violate("promises", "n%d leads term %d, its disk knows term %d", n.id, m.GetTerm(), term)
		}
	case raftpb.MsgAppResp:
		if m.GetReject() {
			return
		}
		if term < m.GetTerm() {
			s.violate("promises", "n%d acknowledges in term %d, its disk knows term %d", n.id, m.GetTerm(), term)
		}
		// One of an earlier term may leave with the write that overwrites what it
		// attests: as if it had left at once and taken long.
		if last := n.log.durable.last(); last < m.GetIndex() && term == m.GetTerm() {
			s.violate("promises", "n%d acknowledges entry %d, its disk ends at %d", n.id, m.GetIndex(), last)
		}
	case raftpb.MsgVoteResp:
		if m.GetReject() {
			return
		}
		if term < m.GetTerm() || term == m.GetTerm() && vote != m.GetTo() {
			s.violate("promises", "n%d votes for %d in term %d, its disk says term %d, vote %d", n.id, m.GetTo(), m.GetTerm(), term, vote)
		}
	}
}

// durableTerm returns the term and vote a restart would find: what a node holds
// of a term proves that it has been in it, even if a write that was cut short
// left no more.
func (n *simNode) durableTerm() (term, vote uint64) {
	d := &n.log.durable
	term, vote = d.hs.GetTerm(), d.hs.GetVote()
	last := max(d.term, n.machine.disk.pos.Term)
	if k := len(d.ents); k > 0 {
		last = max(last, d.ents[k-1].GetTerm())
	}
	if last > term {
		return last, 0
	}
	return term, vote
}

// applied looks at the state of a node after one entry; first is the number of
// commands before it.
func (o *simOracle) applied(n *simNode, st *simState, first int) {
	s := o.sim
	i := st.pos.Index
	o.grow(i)
	if i > o.top {
		if i != o.top+1 {
			s.violate("state equality", "n%d applies entry %d, nobody has applied those after %d", n.id, i, o.top)
			return
		}
		o.top = i
		o.states[i] = simCanon{term: st.pos.Term, chain: st.chain, cmds: len(st.cmds)}
		for k, id := range st.cmds[first:] {
			o.tookEffect(n, id, simPlace{i, uint64(first + k + 1)})
		}
	} else {
		o.restored(n, st, "applying")
	}
	if t := o.committed[i]; t != 0 && t != st.pos.Term {
		s.violate("state equality", "n%d applies entry %d of term %d, the committed one is of term %d", n.id, i, st.pos.Term, t)
	}
	if cs := st.pos.ConfState; !sameConfState(cs, s.boot.ConfState) {
		s.violate("state equality", "n%d has the configuration %v at %d", n.id, cs, i)
	}
}

func (o *simOracle) tookEffect(n *simNode, id uint64, at simPlace) {
	s := o.sim
	switch before, ok := o.where[id]; {
	case ok:
		s.violate("exactly once", "command %d takes effect at %d and at %d", id, before.index, at.index)
	case o.refused[id]:
		s.violate("definite errors", "command %d takes effect at %d on n%d after its caller was told that it never will", id, at.index, n.id)
	case id == 0 || id > o.lastCmd:
		s.violate("state equality", "command %d at %d was never proposed", id, at.index)
	}
	o.where[id] = at
}

// restored compares a state that came from somewhere with what it must be.
func (o *simOracle) restored(n *simNode, st *simState, from string) {
	i := st.pos.Index
	if i > o.top {
		o.sim.violate("state equality", "n%d has state %d from %s, nobody has applied more than %d", n.id, i, from, o.top)
		return
	}
	if want := o.states[i]; want.chain != st.chain || want.term != st.pos.Term || want.cmds != len(st.cmds) {
		o.sim.violate("state equality", "n%d has another state at %d than the others (%s): %d commands, term %d; theirs %d and %d",
			n.id, i, from, len(st.cmds), st.pos.Term, want.cmds, want.term)
	}
}

func (o *simOracle) acknowledged(n *simNode, op *simOp, r Result) {
	s := o.sim
	at, ok := o.where[op.cmd]
	switch {
	case !ok:
		s.violate("durability", "n%d acknowledges command %d, which has not taken effect", n.id, op.cmd)
		return
	case at.index != r.Index:
		s.violate("answers", "n%d acknowledges command %d at %d, it took effect at %d", n.id, op.cmd, r.Index, at.index)
	case at.number != r.Value.(uint64):
		s.violate("answers", "n%d answers %d to command %d, which had number %d", n.id, r.Value, op.cmd, at.number)
	case at.index <= op.floor:
		s.violate("linearizability", "command %d began after index %d was known and took effect at %d", op.cmd, op.floor, at.index)
	}
	if n.node.Applied() < r.Index {
		s.violate("linearizability", "n%d acknowledges command %d at %d before readers are let at it (%d)", n.id, op.cmd, r.Index, n.node.Applied())
	}
	o.known = max(o.known, at.index)
	o.acked = append(o.acked, op.cmd)
}

func (o *simOracle) refuse(n *simNode, cmd uint64, err error) {
	if at, ok := o.where[cmd]; ok {
		o.sim.violate("definite errors", "n%d says of command %d that it was not done (%v), it took effect at %d", n.id, cmd, err, at.index)
	}
	o.refused[cmd] = true
}

// hasRead is told of a read that was answered with index.
func (o *simOracle) hasRead(op *simOp, index uint64) {
	s := o.sim
	n := op.node
	state := n.machine.mem.pos.Index
	s.event(n, "read")
	if n.life != op.life {
		return
	}
	switch {
	case state < index:
		s.violate("linearizability", "n%d lets a reader at its state %d, which should be at %d", n.id, state, index)
	case index < op.floor:
		s.violate("linearizability", "n%d answers a read with index %d, %d was known when it began", n.id, index, op.floor)
	}
	o.known = max(o.known, state)
}

// converged returns what is still missing until all nodes agree, empty when
// nothing is.
func (o *simOracle) converged() string {
	s := o.sim
	first := s.nodes[0]
	for _, n := range s.nodes {
		switch {
		case n.node == nil:
			return "a node is down"
		case n.pending > 0:
			return "a command is without an answer"
		case n.machine.mem.pos.Index != first.machine.mem.pos.Index:
			return "the nodes have not applied the same"
		case n.machine.mem.chain != first.machine.mem.chain:
			return "the states differ"
		case n.node.Leadership().Leader == 0 || n.node.Leadership() != n.leadershipLike(first):
			return "the nodes do not follow one leader"
		}
	}
	if top := first.machine.mem.pos.Index; top < o.top {
		return "nobody has applied what was applied once"
	}
	return ""
}

func (n *simNode) leadershipLike(first *simNode) Leadership {
	l := first.node.Leadership()
	l.Leading = l.Leader == n.id
	return l
}

// finish checks what was promised against the final state.
func (o *simOracle) finish() {
	s := o.sim
	have := make(map[uint64]int, o.lastCmd)
	for _, id := range s.nodes[0].machine.mem.cmds {
		have[id]++
	}
	for _, id := range o.acked {
		if have[id] != 1 {
			s.violate("durability", "acknowledged command %d is %d times in the final state", id, have[id])
			return
		}
	}
}
