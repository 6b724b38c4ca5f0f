package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"

	"conveyor.etl/router/control"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newChecker(s *Server) *control.Checker {
	interval := s.c.Check.Interval
	if interval == 0 {
		interval = -1
	}
	return control.NewChecker(control.CheckerConfig{
		Self: s.c.NodeID, Node: s.node, State: s.disk.fsm, Members: s.transport, Electorate: s.electorate,
		Nudge: s.nudge, Diverged: s.divergedLeader, Agreed: s.agreed, Hold: s.gate.Hold, Release: s.gate.Release,
		Interval: interval, Logger: s.log.With("part", "check"),
	})
}

func (s *Server) electorate() control.Electorate {
	cs := s.node.Status().Position.ConfState
	return control.Electorate{
		Voters: cs.GetVoters(), Outgoing: cs.GetVotersOutgoing(),
		Learners: slices.Concat(cs.GetLearners(), cs.GetLearnersNext()),
	}
}

// nudge moves the log on by an entry that changes nothing: a command that names
// no operation is refused by every replica.
func (s *Server) nudge(ctx context.Context) error {
	raw, err := (&commandpb.Command{}).MarshalVT()
	if err != nil {
		return fmt.Errorf("encode a command: %w", err)
	}
	_, err = s.node.Propose(ctx, raw)
	return err
}

// checkState implements rpc.ServerConfig.CheckState.
func (s *Server) checkState(ctx context.Context, full bool) (*clusterpb.CheckStateResponse, error) {
	r, err := s.control.checker.Check(ctx, full)
	if err != nil {
		return nil, err
	}
	resp := &clusterpb.CheckStateResponse{Equal: r.Equal, Index: r.Index, Message: r.Message}
	tables := router.SumTables()
	for _, m := range r.Members {
		state := &clusterpb.MemberState{NodeId: m.Node, Index: m.Index, Equal: m.Equal, Hashes: map[string]string{}}
		for i, sum := range m.Sums.Sums {
			name := fmt.Sprintf("table-%d", i) // of a newer release
			if i < len(tables) {
				name = tables[i]
			}
			state.Hashes[name] = fmt.Sprintf("%016x", sum)
		}
		if m.Full != nil {
			state.Hashes["all"] = hex.EncodeToString(m.Full)
		}
		if m.Err != nil {
			state.Error = m.Err.Error()
		}
		resp.Members = append(resp.Members, state)
	}
	return resp, nil
}
