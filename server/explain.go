package server

import (
	"conveyor.etl/router/control"
	"conveyor.etl/router/placement"
)

// newStudy makes what answers questions about the placement on this node.
func newStudy(s *Server) *control.Study {
	return control.NewStudy(control.StudyConfig{State: s.disk.fsm, Logger: s.log.With("part", "placement")})
}

// moved implements rpc.ServerConfig.Moved.
func (s *Server) moved(pipeline string) (q placement.Quality, revision uint64, ok bool) {
	if pipeline == "" {
		all, ok := s.control.placer.Scores()
		return all.Quality, all.Last.Revision, ok
	}
	m, ok := s.control.placer.Moved(pipeline)
	return placement.Quality{Moves: m.Moves, Least: m.Least}, m.Revision, ok
}

// placementMetrics adds what the plans of this node came to; nothing while it does
// not lead.
func (s *Server) placementMetrics(out map[string]float64) {
	p, ok := s.control.placer.Scores()
	if !ok {
		return
	}
	q := &p.Quality
	out["placement_plans_total"], out["placement_plan_seconds"] = float64(p.Plans), p.Took.Seconds()
	out["placement_moves_total"], out["placement_least_moves_total"] = float64(p.Moves), float64(p.Least)
	out["placement_even_moves_total"] = float64(p.Evened)
	out["placement_last_moves"], out["placement_last_least_moves"] = float64(p.Last.Moves), float64(p.Last.Least)
	out["placement_instances_asked"], out["placement_instances_placed"] = float64(q.Asked), float64(q.Placed)
	out["placement_stages_pending"] = float64(q.Pending)
	out["placement_edges"], out["placement_edges_in_pod"] = float64(q.Edges), float64(q.InPod)
	out["placement_edges_in_node"], out["placement_edges_in_zone"] = float64(q.InNode), float64(q.InZone)
	out["placement_local_edge_share"] = q.LocalShare()
	out["placement_load_highest"], out["placement_load_mean"] = q.Highest, q.Mean
	if r := q.MaxOverMean(); r > 0 {
		out["placement_load_max_over_mean"] = r
	}
}

// reachable says whether this node is connected to another one.
func (s *Server) reachable(node uint64) bool {
	for _, p := range s.transport.Stats() {
		if p.ID == node {
			return p.Connected
		}
	}
	return false
}
