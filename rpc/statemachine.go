package rpc

import (
	"encoding/json"
	"fmt"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

// stateMachine makes a *router.FSM what raftnode drives. It translates types
// and decides nothing.
type stateMachine struct {
	*router.FSM
	entries []router.Entry // scratch of Apply, which one goroutine calls
}

var _ raftnode.StateMachine = (*stateMachine)(nil)

// NewStateMachine returns fsm as the state machine of a node. It fails when the
// configuration stored in fsm cannot be decoded.
func NewStateMachine(fsm *router.FSM) (raftnode.StateMachine, error) {
	if _, err := DecodePosition(fsm.Applied()); err != nil {
		return nil, err
	}
	return &stateMachine{FSM: fsm}, nil
}

// EncodePosition returns p in the form router keeps it in; router.Options wants
// it for the first start.
func EncodePosition(p raftnode.Position) (router.Position, error) {
	cs, err := proto.MarshalOptions{Deterministic: true}.Marshal(p.ConfState)
	if err != nil {
		return router.Position{}, fmt.Errorf("rpc: encode a group configuration: %w", err)
	}
	members, err := json.Marshal(p.Members)
	if err != nil {
		return router.Position{}, fmt.Errorf("rpc: encode the members: %w", err)
	}
	return router.Position{Index: p.Index, Term: p.Term, ConfState: cs, Members: members}, nil
}

// DecodePosition undoes EncodePosition. Its errors match router.ErrCorrupt.
func DecodePosition(p router.Position) (raftnode.Position, error) {
	out := raftnode.Position{Index: p.Index, Term: p.Term, ConfState: &raftpb.ConfState{}}
	if err := proto.Unmarshal(p.ConfState, out.ConfState); err != nil {
		return out, fmt.Errorf("%w: the group configuration at index %d: %w", router.ErrCorrupt, p.Index, err)
	}
	if len(p.Members) > 0 {
		if err := json.Unmarshal(p.Members, &out.Members); err != nil {
			return out, fmt.Errorf("%w: the members at index %d: %w", router.ErrCorrupt, p.Index, err)
		}
	}
	return out, nil
}

// Applied implements raftnode.StateMachine.
func (s *stateMachine) Applied() raftnode.Position {
	p, err := DecodePosition(s.FSM.Applied())
	if err != nil {
		// Every position got in through NewStateMachine, ApplyMembership or
		// Install, which decoded or encoded it.
		panic(err)
	}
	return p
}

// Apply implements raftnode.StateMachine.
func (s *stateMachine) Apply(batches []raftnode.Batch) ([][]any, error) {
	s.entries = s.entries[:0]
	for _, b := range batches {
		s.entries = append(s.entries, router.Entry{Index: b.Index, Term: b.Term, Commands: b.Commands, Local: b.Local})
	}
	results, err := s.FSM.Apply(s.entries)
	clear(s.entries) // the commands are the log's
	if err != nil {
		return nil, err
	}
	out := make([][]any, len(batches))
	for i, rs := range results {
		if len(rs) == 0 {
			continue
		}
		out[i] = make([]any, len(rs))
		for j, r := range rs {
			out[i][j] = r
		}
	}
	return out, nil
}

// ApplyMembership implements raftnode.StateMachine.
func (s *stateMachine) ApplyMembership(pos raftnode.Position) error {
	p, err := EncodePosition(pos)
	if err != nil {
		return err
	}
	return s.FSM.ApplyMembership(p)
}

// Image implements raftnode.StateMachine.
func (s *stateMachine) Image(dir string) (raftnode.Position, error) {
	p, err := s.FSM.Image(dir)
	if err != nil {
		return raftnode.Position{}, err
	}
	return DecodePosition(p)
}

// Install implements raftnode.StateMachine.
func (s *stateMachine) Install(dir string) (raftnode.Position, error) {
	p, err := s.FSM.Install(dir)
	if err != nil {
		return raftnode.Position{}, err
	}
	return DecodePosition(p)
}
