package raftnode

import (
	"fmt"

	"go.etcd.io/raft/v3/raftpb"
)

// Replay applies entries of a log to a state machine without a group, as the
// applier of a node does: for tools that work on the files of a node that does
// not run. It is for one goroutine.
type Replay struct {
	sm       StateMachine
	pos      Position
	run      []Batch
	bytes    int
	maxBytes int
}

// NewReplay returns a Replay onto sm. It hands sm about maxBytes of entries at
// a time.
func NewReplay(sm StateMachine, maxBytes int) *Replay {
	return &Replay{sm: sm, pos: sm.Applied().clone(), maxBytes: maxBytes}
}

// Add takes the entry after the last one, which must not be changed any more.
// It may be applied at once or with later ones.
func (r *Replay) Add(e *raftpb.Entry) error {
	index := r.pos.Index + uint64(len(r.run)) + 1
	if e.GetIndex() != index {
		return fmt.Errorf("raftnode: entry %d handed in where %d follows", e.GetIndex(), index)
	}
	if e.GetType() != raftpb.EntryNormal {
		if err := r.Flush(); err != nil {
			return err
		}
		return r.change(e)
	}
	cmds, err := EntryCommands(e.GetData())
	if err != nil {
		return fmt.Errorf("raftnode: entry %d: %w", index, err)
	}
	r.run = append(r.run, Batch{Index: index, Term: e.GetTerm(), Commands: cmds})
	if r.bytes += len(e.GetData()); r.bytes >= r.maxBytes {
		return r.Flush()
	}
	return nil
}

// Flush applies what was added and not applied yet. Call it after the last Add.
func (r *Replay) Flush() error {
	if len(r.run) == 0 {
		return nil
	}
	last := r.run[len(r.run)-1]
	if _, err := r.sm.Apply(r.run); err != nil {
		return fmt.Errorf("raftnode: the state machine failed at entries %d to %d: %w", r.run[0].Index, last.Index, err)
	}
	r.pos.Index, r.pos.Term = last.Index, last.Term
	clear(r.run)
	r.run, r.bytes = r.run[:0], 0
	return nil
}

// change applies a membership change by the rules of the applier: one that
// makes no sense changes nothing but the position.
func (r *Replay) change(e *raftpb.Entry) error {
	cc, more, err := decodeChange(e)
	if err != nil {
		return fmt.Errorf("raftnode: entry %d: %w", e.GetIndex(), err)
	}
	pos, _ := r.pos.after(e.GetIndex(), e.GetTerm(), cc, more)
	if err := r.sm.ApplyMembership(pos.clone()); err != nil {
		return fmt.Errorf("raftnode: the state machine failed at the membership change of entry %d: %w", pos.Index, err)
	}
	r.pos = pos
	return nil
}

// CheckChange returns why the membership change e could not be applied by this
// release, nil when it can.
func CheckChange(e *raftpb.Entry) error {
	_, _, err := decodeChange(e)
	return err
}
