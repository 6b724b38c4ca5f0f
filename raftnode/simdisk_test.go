package raftnode

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"go.etcd.io/raft/v3/raftpb"
)

// simCrash is thrown at a crash point and caught by whoever runs the step.
type simCrash struct {
	node *simNode
	at   string
}

// point is a place where a crash can hit, before or after something durable.
// When the fuse burns down, what the disk holds at this very moment is set
// aside first: deferred functions run while the stack unwinds, and a dead
// process cleans nothing up.
func (n *simNode) point(at string) {
	if n.doomed == "" && !n.burns() {
		return
	}
	panic(simCrash{n, at})
}

// burns burns the fuse down by one and says whether that was the end.
func (n *simNode) burns() bool {
	if n.fuse == 0 {
		return false
	}
	if n.fuse--; n.fuse > 0 {
		return false
	}
	n.freeze(n.sim.rng.IntN(2) == 0)
	return true
}

// fileOp is a crash point in the file system. Those who call it may hold locks
// they cannot give back while the stack unwinds, so the node is doomed instead:
// nothing it does from here on leaves it, and it ends with the step.
func (n *simNode) fileOp(op errorfs.Op) error {
	if n.doomed == "" && op.Kind.ReadOrWrite() == errorfs.OpIsWrite && n.burns() {
		n.doomed = "at a file of its images"
	}
	if n.doomed != "" {
		return errSimDead
	}
	return nil
}

var errSimDead = errors.New("the node has crashed")

// simLog is memLog with crash points and checks of what the real log refuses.
type simLog struct {
	*memLog
	node *simNode
}

func (l *simLog) Append(hs *raftpb.HardState, ents []*raftpb.Entry, sync bool) error {
	n := l.node
	n.sim.oracle.appended(n, ents)
	for k, e := range ents {
		// What the real log refuses.
		before, _ := l.Term(e.GetIndex() - 1)
		if k > 0 && ents[k-1].GetIndex() == e.GetIndex()-1 {
			before = ents[k-1].GetTerm()
		}
		if k > 0 && ents[k-1].GetIndex() >= e.GetIndex() {
			continue // overwrites
		}
		if e.GetTerm() < before {
			return fmt.Errorf("entry %d has term %d after term %d", e.GetIndex(), e.GetTerm(), before)
		}
	}
	n.point("append")
	if n.fuse == 1 {
		// Cut short: any prefix may have reached the disk.
		if err := l.memLog.Append(nil, ents[:n.sim.rng.IntN(len(ents)+1)], false); err != nil {
			return err
		}
		n.point("append, cut short")
	}
	if n.sim.sab.forgetVotes && hs != nil {
		hs = &raftpb.HardState{Term: hs.Term, Vote: new(uint64(0)), Commit: hs.Commit}
		l.hs.Vote = new(uint64(0))
	}
	if err := l.memLog.Append(hs, ents, sync && !n.sim.sab.ackBeforeSync); err != nil {
		return err
	}
	n.point("append, written")
	return nil
}

func (l *simLog) InstallSnapshot(index, term uint64, cs *raftpb.ConfState, hs *raftpb.HardState) error {
	n := l.node
	n.point("log reset")
	// What the real log refuses.
	if index <= l.hs.GetCommit() || index <= l.index {
		return fmt.Errorf("a snapshot at %d lies before the commit %d", index, l.hs.GetCommit())
	}
	if t, err := l.Term(index); err == nil && t == term {
		return fmt.Errorf("a snapshot at %d, term %d repeats an entry the log holds", index, term)
	}
	if d := n.machine.disk.pos.Index; d < index && !n.sim.sab.installForgets {
		n.sim.violate("durability", "n%d empties its log for a snapshot at %d while its durable state is at %d", n.id, index, d)
	}
	if err := l.memLog.InstallSnapshot(index, term, cs, hs); err != nil {
		return err
	}
	n.point("log reset, written")
	return nil
}

func (l *simLog) Compact(upTo uint64, cs *raftpb.ConfState) error {
	n := l.node
	n.point("truncate")
	if d := n.machine.disk.pos.Index; d < upTo && !n.sim.sab.durableLies {
		n.sim.violate("durability", "n%d truncates its log at %d while its durable state is at %d", n.id, upTo, d)
	}
	if err := l.memLog.Compact(upTo, cs); err != nil {
		return err
	}
	n.sim.stats.truncations++
	n.point("truncate, written")
	return nil
}

// simState is what the replicated state consists of: the commands in order, and
// a hash over everything applied. The slice is only ever appended to, so that
// states share it.
type simState struct {
	pos   Position
	chain uint64
	cmds  []uint64
}

func (st simState) clone() simState {
	st.cmds = st.cmds[:len(st.cmds):len(st.cmds)]
	return st
}

// simImage is simState in a file.
type simImage struct {
	Index, Term uint64
	Voters      []uint64
	Members     []Member
	Chain       uint64
	Cmds        []uint64
}

// simMachine is a StateMachine of which a crash leaves what was flushed last.
// It flushes by itself at times, as a memtable would. It tells the oracle of
// every entry it applies. The result of a command is its number.
type simMachine struct {
	node *simNode
	mem  simState
	disk simState
	// claimed is an index said to be durable that is not (sabotage).
	claimed uint64
}

func newSimMachine(n *simNode, pos Position) *simMachine {
	st := simState{pos: pos.clone(), chain: 1}
	return &simMachine{node: n, mem: st, disk: st}
}

// crash returns the machine a restart finds.
func (m *simMachine) crash() *simMachine {
	return &simMachine{node: m.node, mem: m.disk.clone(), disk: m.disk.clone()}
}

func (m *simMachine) Applied() Position { return m.mem.pos.clone() }

func mix(h, v uint64) uint64 {
	h ^= v + 0x9e3779b97f4a7c15 + h<<6 + h>>2
	h ^= h >> 29
	return h * 0xbf58476d1ce4e5b9
}

// Apply implements StateMachine.
func (m *simMachine) Apply(batches []Batch) ([][]any, error) {
	s := m.node.sim
	m.node.point("apply")
	out := make([][]any, len(batches))
	for i := range batches {
		b := &batches[i]
		if b.Index != m.mem.pos.Index+1 {
			return nil, fmt.Errorf("entry %d after %d", b.Index, m.mem.pos.Index)
		}
		if b.Term < m.mem.pos.Term {
			return nil, fmt.Errorf("entry %d of term %d after term %d", b.Index, b.Term, m.mem.pos.Term)
		}
		cmds := b.Commands
		if s.sab.applyOrder && m.node.id == 2 && len(cmds) > 1 {
			cmds = append([][]byte(nil), cmds...)
			cmds[0], cmds[1] = cmds[1], cmds[0]
		}
		chain := mix(mix(m.mem.chain, b.Index), b.Term)
		first := len(m.mem.cmds)
		for _, c := range cmds {
			id, err := decodeSimCommand(c)
			if err != nil {
				return nil, fmt.Errorf("entry %d: %w", b.Index, err)
			}
			chain = mix(chain, id)
			m.mem.cmds = append(m.mem.cmds, id)
			if b.Local {
				out[i] = append(out[i], uint64(len(m.mem.cmds)))
			}
		}
		m.mem.chain = chain
		m.mem.pos.Index, m.mem.pos.Term = b.Index, b.Term
		s.oracle.applied(m.node, &m.mem, first)
	}
	m.node.point("apply, done")
	if s.rng.IntN(100) < s.prof.flushPct {
		m.disk = m.mem.clone()
	}
	return out, nil
}

// ApplyMembership implements StateMachine.
func (m *simMachine) ApplyMembership(pos Position) error {
	m.node.point("membership")
	if pos.Index != m.mem.pos.Index+1 {
		return fmt.Errorf("membership at %d after %d", pos.Index, m.mem.pos.Index)
	}
	m.mem.pos = pos.clone()
	m.mem.chain = mix(mix(m.mem.chain, pos.Index), pos.Term)
	for _, mem := range pos.Members {
		m.mem.chain = mix(m.mem.chain, mem.ID)
		for _, c := range mem.Addr {
			m.mem.chain = mix(m.mem.chain, uint64(c))
		}
	}
	m.node.sim.oracle.applied(m.node, &m.mem, len(m.mem.cmds))
	return nil
}

// Durable implements StateMachine.
func (m *simMachine) Durable() uint64 {
	if m.node.sim.sab.durableLies {
		return m.mem.pos.Index
	}
	return max(m.disk.pos.Index, m.claimed)
}

// Flush implements StateMachine.
func (m *simMachine) Flush() (uint64, error) {
	m.node.point("flush")
	m.disk = m.mem.clone()
	m.node.point("flush, done")
	return m.disk.pos.Index, nil
}

// Image implements StateMachine.
func (m *simMachine) Image(dir string) (Position, error) {
	st := m.mem.clone()
	b, err := json.Marshal(simImage{
		Index: st.pos.Index, Term: st.pos.Term, Voters: st.pos.ConfState.GetVoters(), Members: st.pos.Members,
		Chain: st.chain, Cmds: st.cmds,
	})
	if err != nil {
		return Position{}, err
	}
	fs := m.node.fs
	if err := fs.MkdirAll(dir, 0o755); err != nil {
		return Position{}, err
	}
	f, err := fs.Create(fs.PathJoin(dir, "state.json"), vfs.WriteCategoryUnspecified)
	if err != nil {
		return Position{}, err
	}
	if _, err := f.Write(b); err != nil {
		return Position{}, err
	}
	return st.pos.clone(), f.Close()
}

// Install implements StateMachine.
func (m *simMachine) Install(dir string) (Position, error) {
	n := m.node
	n.point("state swap")
	f, err := n.fs.Open(n.fs.PathJoin(dir, "state.json"))
	if err != nil {
		return Position{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return Position{}, err
	}
	var im simImage
	if err := json.Unmarshal(b, &im); err != nil {
		return Position{}, err
	}
	m.mem = simState{
		pos: Position{
			Index: im.Index, Term: im.Term, ConfState: &raftpb.ConfState{Voters: im.Voters}, Members: im.Members,
		},
		chain: im.Chain, cmds: im.Cmds,
	}
	n.sim.oracle.restored(n, &m.mem, "the installed image")
	if n.sim.sab.installForgets {
		m.claimed = m.mem.pos.Index
	} else {
		m.disk = m.mem.clone()
	}
	n.sim.stats.installs++
	n.point("state swap, done")
	return m.mem.pos.clone(), nil
}
