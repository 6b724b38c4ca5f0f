package server

import (
	"context"
	"fmt"
	"time"

	"conveyor.etl/router/control"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/router"
)

// suspect looks into the word of another node that the state here is not that of
// the majority. It returns once nothing is answered from it any more, or why it
// is.
func (s *Server) suspect(ctx context.Context, from uint64, expected router.Sums, reason string) (bool, string) {
	if len(expected.Sums) == 0 {
		// Nobody knows who is right. Only the leader may say so: it says it
		// again as long as it is so.
		if s.node.Leadership().Leader != from {
			return false, fmt.Sprintf("node %d does not follow node %d", s.c.NodeID, from)
		}
		s.gate.Hold(reason, 3*s.c.Check.Interval+2*time.Second)
		return true, ""
	}
	f, differs, why := s.control.checker.Verify(ctx, expected)
	if !differs {
		s.log.Warn("another node says that the state here is wrong; it is not", "event", "suspected", "peer", from, "says", reason, "why", why)
		return false, why
	}
	s.isolate(f)
	s.quarantined.Do(func() { close(s.rebuilds) })
	return true, ""
}

// divergedLeader is suspect for a node that leads and found out by itself. It
// hands over first, to a node that is known to be right.
func (s *Server) divergedLeader(ctx context.Context, f control.Finding) {
	s.isolate(f)
	for _, id := range f.Agreed {
		handover, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*s.c.Raft.ElectionTimeout)
		err := s.node.TransferLeader(handover, id)
		cancel()
		if err == nil {
			break
		}
		s.log.Warn("the leadership could not be handed over", "event", "handover_failed", "peer", id, "err", err)
	}
	// Whoever leads now: this node stops, which ends its leadership as well.
	s.quarantined.Do(func() { close(s.rebuilds) })
}

// agreed takes note that the state of this node was found to be right, for the
// snapshots that were made of it.
func (s *Server) agreed(index, epoch uint64) {
	s.recovery.Agreed(index, epoch)
	if err := s.disk.shelf.Agree(index, epoch); err != nil {
		s.log.Warn("that the snapshots of this node can be trusted was not written down; it is tried again", "err", err)
	}
}

// isolate ends every answer from the state of this node, for good, and writes
// down why.
func (s *Server) isolate(f control.Finding) {
	s.isolated.Do(func() { s.isolateOnce(f) })
}

func (s *Server) isolateOnce(f control.Finding) {
	s.gate.Quarantine(f.Reason)
	s.log.Error("the state of this node is wrong: nothing is answered from it any more, it is going to be rebuilt", "event", "quarantined",
		"index", f.Expected.Index, "epoch", f.Expected.Epoch, "own", hexSums(f.Own.Sums), "expected", hexSums(f.Expected.Sums), "agreed", f.Agreed)
	err := datadir.WriteQuarantine(s.c.DataDir, &datadir.Quarantine{
		Reason: f.Reason, Index: f.Expected.Index, Epoch: f.Expected.Epoch, Own: hexSums(f.Own.Sums), Expected: hexSums(f.Expected.Sums),
		Agreed: f.Agreed, Since: s.o.Now().UTC().Truncate(time.Second),
	})
	if err != nil {
		// Without the word on disk a restart would answer from the wrong state.
		s.fail(fmt.Errorf("the state of this node is wrong, which could not be written down: %w", err))
	}
}

func hexSums(sums []uint64) []string {
	out := make([]string, len(sums))
	for i, v := range sums {
		out[i] = fmt.Sprintf("%016x", v)
	}
	return out
}

// Quarantined returns a channel that is closed when the state of this node was
// found to be wrong. Stop it then and start another Server on the data
// directory, which rebuilds the state before it answers.
func (s *Server) Quarantined() <-chan struct{} { return s.rebuilds }
