package server

import (
	"fmt"
	"path/filepath"

	"conveyor.etl/router/datadir"
)

// alarms returns what an operator of this node should act on.
func (s *Server) alarms() []string {
	var out []string
	if s.guard.Full() {
		out = append(out, fmt.Sprintf("node %d: the disk of %s is nearly full (%d bytes free): writes that add data are refused; free space or delete data",
			s.c.NodeID, s.c.DataDir, s.guard.FreeBytes()))
	}
	if err := s.Err(); err != nil {
		out = append(out, fmt.Sprintf("node %d is stopping: %v", s.c.NodeID, err))
	}
	if reason := s.gate.Reason(); reason != "" {
		out = append(out, fmt.Sprintf("node %d answers nobody: %s", s.c.NodeID, reason))
	}
	out = append(out, s.control.checker.Alarms()...)
	out = append(out, s.recovery.Alarms()...)
	return append(out, s.control.liveness.Alarms()...)
}

// stateBytes returns the size of the state on disk, 0 when it cannot be told.
func (s *Server) stateBytes() uint64 {
	n, err := datadir.Size(filepath.Join(s.c.DataDir, datadir.StateName))
	if err != nil {
		s.log.Debug("the state cannot be measured", "err", err)
	}
	return n
}

// metrics returns the numbers of this node that the API server does not know.
func (s *Server) metrics() map[string]float64 {
	out := map[string]float64{
		"disk_free_bytes": float64(s.guard.FreeBytes()),
		// Of files that are removed, and take their place for some minutes more.
		"disk_freeing_bytes": float64(s.disk.reaper.Waiting()),
		"images":             float64(len(s.disk.images.List())),
		"beats_lost":         float64(s.beats.Lost()),
	}
	rounds, compared, differing := s.control.checker.Stats()
	out["state_checks_total"], out["state_compared_index"] = float64(rounds), float64(compared)
	out["state_differing_members"] = float64(differing)
	out["state_quarantined"] = 0
	if s.gate.Reason() != "" {
		out["state_quarantined"] = 1
	}
	s.leaseMetrics(out)
	placing := s.control.placer.Stats()
	out["placement_held_moves"], out["placement_pending_handovers"] = float64(placing.Held), float64(placing.Handovers)
	out["placement_draining_sidecars"], out["placement_graced_sidecars"] = float64(placing.Draining), float64(placing.Graced)
	out["placement_draining_services"] = float64(placing.DrainingServices)
	s.placementMetrics(out)
	for _, p := range s.transport.Stats() {
		prefix := fmt.Sprintf("peer_%d_", p.ID)
		connected := 0.0
		if p.Connected {
			connected = 1
		}
		out[prefix+"connected"] = connected
		out[prefix+"queued_bytes"] = float64(p.QueuedBytes)
		out[prefix+"messages_sent"] = float64(p.Sent)
		out[prefix+"messages_dropped"] = float64(p.Dropped)
	}
	return out
}
