package server

import (
	"conveyor.etl/router/control"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// explain makes the placement's own words on pending stages available to the
// API, which must not know how placement works.
func explain(v *router.View) (func(p *commandpb.Pipeline, stage string) string, error) {
	in, err := control.ReadInput(v)
	if err != nil {
		return nil, err
	}
	e := control.NewExplainer(in)
	var last *commandpb.Pipeline // stages of one pipeline are asked for in a row
	var reasons map[string]string
	return func(p *commandpb.Pipeline, stage string) string {
		if p != last {
			last, reasons = p, make(map[string]string)
			for _, pl := range e.Placements(p) {
				reasons[pl.StageID] = pl.Pending
			}
		}
		return reasons[stage]
	}, nil
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
