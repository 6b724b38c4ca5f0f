package server

import (
	"fmt"
	"path/filepath"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
)

func removedError(node uint64, dir string) error {
	if full, err := filepath.Abs(dir); err == nil {
		dir = full // a bare "data" reads as a word of the sentence
	}
	return fmt.Errorf("%w: node %d is no member any more, and the directory %s is of no use: move it away; "+
		"to add a new node, start it on an empty directory with --join and without --node-id", ErrRemoved, node, dir)
}

// eventListener is what raft tells this node.
func (s *Server) eventListener() raftnode.EventListener {
	events := eventLog(s.log)
	told := events.MembershipChanged
	events.MembershipChanged = func(p raftnode.Position) {
		told(p)
		// Called by the applier: a node that applies its own removal goes no
		// further.
		if m, ok := p.Member(s.c.NodeID); ok && m.Removed {
			s.leave(fmt.Sprintf("entry %d of the log", p.Index))
		}
	}
	return events
}

// leave ends the node because it was removed: it can do nothing any more, and
// whoever waits for it should hear so from it. It blocks on the disk.
func (s *Server) leave(saidBy string) {
	s.leaving.Do(func() {
		s.log.Error("this node was removed from the cluster; it stops, for good", "event", "removed", "said_by", saidBy)
		s.fail(s.markRemoved())
	})
}

// markRemoved makes the directory one that is never started again, and returns
// the error that says so.
func (s *Server) markRemoved() error {
	id := s.disk.id
	id.Removed = true
	s.disk.points.Pass("removed:before")
	if err := datadir.WriteIdentity(s.disk.dir, id); err != nil {
		return fmt.Errorf("%w; this could not be noted for the next start: %w", removedError(id.NodeID, s.disk.dir), err)
	}
	s.disk.points.Pass("removed:after")
	return removedError(id.NodeID, s.disk.dir)
}

// checkMember refuses to start a node whose own state says that it was removed:
// it was killed before it could note that.
func (s *Server) checkMember() error {
	if m, ok := s.disk.machine.Applied().Member(s.c.NodeID); ok && m.Removed {
		return s.markRemoved()
	}
	return nil
}
