package raftnode

import (
	"fmt"
	"sync/atomic"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// applyItem is work for the applier: committed entries, or a snapshot the
// appender waits for.
type applyItem struct {
	msg     *raftpb.Message
	install *raftpb.Snapshot
	done    chan error
}

// applier owns the write side of the state machine, the applied index, and the
// answers to local callers.
type applier struct {
	cfg   *Config
	sm    StateMachine
	tr    Transport
	in    *inbox
	q     *queue[applyItem]
	props *proposals
	waits *waits
	snaps *snapshots
	// poke is called when entries were applied: the log may be truncated.
	poke func()
	// confChange tells the RawNode of a change at index; nil when a snapshot
	// has already taken it further.
	confChange func(index uint64, cc *raftpb.ConfChangeV2) (*raftpb.ConfState, error)

	// pos is the position of the state machine.
	pos Position
	// members mirrors pos.Members for other goroutines.
	members atomic.Pointer[[]Member]
	confPtr atomic.Pointer[raftpb.ConfState]
	// joint is a local membership change that waits for its joint
	// configuration to be left.
	joint *batch

	run      []Batch
	owners   []*batch
	offsets  []int
	cmds     [][]byte
	runBytes int
	commands int
	resps    []*raftpb.Message
}

func (a *applier) setPosition(pos Position) {
	a.pos = pos.clone()
	members, cs := a.pos.Members, a.pos.ConfState
	a.members.Store(&members)
	a.confPtr.Store(cs)
}

// step works on everything queued. Any error is final.
func (a *applier) step() (bool, error) {
	items := a.q.take()
	if len(items) == 0 {
		return false, nil
	}
	err := a.process(items)
	a.q.done(items)
	return true, err
}

func (a *applier) process(items []applyItem) error {
	for i := range items {
		it := &items[i]
		if it.install != nil {
			err := a.flush()
			if err == nil {
				err = a.install(it.install)
			}
			if it.done != nil {
				it.done <- err
			}
			if err != nil {
				return err
			}
			continue
		}
		for _, e := range it.msg.GetEntries() {
			if err := a.entry(e); err != nil {
				return err
			}
		}
		a.resps = append(a.resps, it.msg.GetResponses()...)
	}
	return a.flush()
}

func (a *applier) entry(e *raftpb.Entry) error {
	index, term := e.GetIndex(), e.GetTerm()
	if want := a.pos.Index + uint64(len(a.run)) + 1; index != want {
		return fmt.Errorf("raftnode: raft hands out entry %d to apply after %d", index, want-1)
	}
	if t := e.GetType(); t != raftpb.EntryNormal {
		if err := a.flush(); err != nil {
			return err
		}
		return a.applyChange(e)
	}
	mine, lost := a.props.observe(index, term)
	a.tellLost(lost)
	from := len(a.cmds)
	if data := e.GetData(); len(data) > 0 {
		id, cmds, err := decodeEnvelope(data, a.cmds)
		if err != nil {
			return fmt.Errorf("raftnode: entry %d: %w", index, err)
		}
		a.cmds = cmds
		if mine != nil && (mine.conf || mine.id != id || len(mine.waiters) != len(cmds)-from) {
			return fmt.Errorf("raftnode: entry %d of term %d is not the batch this node proposed there", index, term)
		}
	} else if mine != nil {
		// Raft put an empty entry in the place of a membership change.
		a.props.finish(mine, nil, ErrMembershipPending)
		mine = nil
	}
	a.run = append(a.run, Batch{Index: index, Term: term, Local: mine != nil})
	a.owners = append(a.owners, mine)
	a.offsets = append(a.offsets, from)
	a.commands += len(a.cmds) - from
	if a.runBytes += len(e.GetData()); a.runBytes >= a.cfg.MaxApplyBytes {
		return a.flush()
	}
	return nil
}

func (a *applier) tellLost(lost []*batch) {
	for _, b := range lost {
		a.cfg.Events.ProposalsLost(len(b.waiters))
		b.fail(ErrOverwritten)
		a.props.release(b)
	}
}

// flush applies the gathered entries in one call and answers for them: first
// the local callers, then the readers, last raft, whose next batch can only
// gather once the callers know.
func (a *applier) flush() error {
	if len(a.run) > 0 {
		if err := a.apply(); err != nil {
			return err
		}
	}
	if len(a.resps) > 0 {
		a.in.pushLocal(a.resps)
		clear(a.resps)
		a.resps = a.resps[:0]
	}
	return nil
}

func (a *applier) apply() error {
	for i := range a.run {
		end := len(a.cmds)
		if i+1 < len(a.run) {
			end = a.offsets[i+1]
		}
		a.run[i].Commands = a.cmds[a.offsets[i]:end:end]
	}
	start := a.cfg.Clock.Now()
	results, err := a.sm.Apply(a.run)
	last := &a.run[len(a.run)-1]
	if err != nil {
		return fmt.Errorf("raftnode: the state machine failed at entries %d to %d: %w", a.run[0].Index, last.Index, err)
	}
	if len(results) != len(a.run) {
		return fmt.Errorf("raftnode: the state machine returned %d results for %d batches", len(results), len(a.run))
	}
	d := a.cfg.Clock.Now().Sub(start)
	a.pos.Index, a.pos.Term = last.Index, last.Term
	for i, b := range a.owners {
		if b == nil {
			continue
		}
		if len(results[i]) != len(b.waiters) {
			return fmt.Errorf("raftnode: the state machine returned %d results for the %d commands of entry %d",
				len(results[i]), len(b.waiters), a.run[i].Index)
		}
		// The applied index first: a caller that reads after its result
		// arrived must find its command.
		a.waits.advance(a.run[i].Index)
		a.props.finish(b, results[i], nil)
	}
	a.waits.advance(last.Index)
	a.cfg.Events.Applied(d, len(a.run), a.commands)
	const keep = 4096
	clear(a.run)
	clear(a.owners)
	clear(a.cmds)
	a.run, a.owners, a.offsets, a.cmds = a.run[:0], a.owners[:0], a.offsets[:0], a.cmds[:0]
	if cap(a.cmds) > keep*16 {
		a.cmds = nil
	}
	a.runBytes, a.commands = 0, 0
	a.poke()
	return nil
}

// applyChange applies one membership change. The RawNode is told before the
// answer of the message that carries it is sent (raft evaluates leaving a joint
// configuration there).
func (a *applier) applyChange(e *raftpb.Entry) error {
	index, term := e.GetIndex(), e.GetTerm()
	cc, more, err := decodeChange(e)
	if err != nil {
		return fmt.Errorf("raftnode: entry %d: %w", index, err)
	}
	mine, lost := a.props.observe(index, term)
	a.tellLost(lost)

	// A change that makes no sense where it is applied is refused alike by
	// every node, and the RawNode, which would panic, never hears of it.
	pos, refused := a.pos.after(index, term, cc, more)
	if refused == nil {
		inRaft, err := a.confChange(index, cc)
		if err != nil {
			return err
		}
		if inRaft != nil && !sameConfState(inRaft, pos.ConfState) {
			return fmt.Errorf("raftnode: entry %d makes the configuration %v by the log and %v by raft", index, pos.ConfState, inRaft)
		}
	}
	if err := a.sm.ApplyMembership(pos.clone()); err != nil {
		return fmt.Errorf("raftnode: the state machine failed at the membership change of entry %d: %w", index, err)
	}
	a.setPosition(pos)
	if refused == nil {
		a.tr.SetMembers(pos.clone().Members)
		a.cfg.Events.MembershipChanged(pos.clone())
	}
	a.waits.advance(index)
	switch {
	case mine != nil && refused != nil:
		a.props.finish(mine, nil, fmt.Errorf("%w: %w", ErrMembershipRefused, refused))
	case mine != nil && isJoint(pos.ConfState):
		a.joint = mine
	case mine != nil:
		a.props.finish(mine, []any{pos.clone()}, nil)
	}
	a.finishJoint()
	a.poke()
	return nil
}

// finishJoint answers for a change whose joint configuration has been left.
func (a *applier) finishJoint() {
	if a.joint != nil && !isJoint(a.pos.ConfState) {
		a.props.finish(a.joint, []any{a.pos.clone()}, nil)
		a.joint = nil
	}
}

func decodeChange(e *raftpb.Entry) (*raftpb.ConfChangeV2, changeContext, error) {
	cc := &raftpb.ConfChangeV2{}
	if e.GetType() == raftpb.EntryConfChange {
		var v1 raftpb.ConfChange
		if err := proto.Unmarshal(e.GetData(), &v1); err != nil {
			return nil, changeContext{}, fmt.Errorf("membership change: %w", err)
		}
		cc = v1.AsV2()
	} else if err := proto.Unmarshal(e.GetData(), cc); err != nil {
		return nil, changeContext{}, fmt.Errorf("membership change: %w", err)
	}
	more, err := decodeChangeContext(cc.GetContext())
	return cc, more, err
}

// install replaces the state by the image a snapshot names.
func (a *applier) install(s *raftpb.Snapshot) error {
	meta := s.GetMetadata()
	image, err := a.snaps.accepted(s)
	if err != nil {
		return fmt.Errorf("raftnode: the image of the snapshot at %d: %w", meta.GetIndex(), err)
	}
	defer image.Close()
	start := a.cfg.Clock.Now()
	pos, err := a.sm.Install(image.Dir())
	if err != nil {
		return fmt.Errorf("raftnode: install image %s: %w", image.Info().ID, err)
	}
	if pos.Index != meta.GetIndex() || pos.Term != meta.GetTerm() || !sameConfState(pos.ConfState, meta.GetConfState()) {
		return fmt.Errorf("raftnode: image %s holds the state at %d (term %d), its snapshot says %d (term %d)",
			image.Info().ID, pos.Index, pos.Term, meta.GetIndex(), meta.GetTerm())
	}
	if a.sm.Durable() < pos.Index {
		if _, err := a.sm.Flush(); err != nil {
			return fmt.Errorf("raftnode: flush after installing image %s: %w", image.Info().ID, err)
		}
	}
	lost, unknown := a.props.overtaken(pos.Index, pos.Term)
	a.setPosition(pos)
	a.tr.SetMembers(pos.clone().Members)
	a.tellLost(lost)
	for _, b := range unknown {
		b.fail(fmt.Errorf("%w: a snapshot overtook the command", ErrAmbiguous))
		a.props.release(b)
	}
	a.waits.advance(pos.Index)
	a.finishJoint()
	a.cfg.Events.ImageInstalled(a.cfg.Clock.Now().Sub(start), pos.Index)
	a.cfg.Events.MembershipChanged(pos.clone())
	a.snaps.requestPurge()
	return nil
}
