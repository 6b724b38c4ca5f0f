package placement

import (
	"fmt"
	"math/rand/v2"
)

// fleetSize is the size of a generated world.
type fleetSize struct {
	sidecars, pipelines, parallelism int
}

// full is the size the planner is made for.
var full = fleetSize{sidecars: 100_000, pipelines: 10_000, parallelism: 10}

// bigView makes families of 100 sidecars and 10 pipelines of five stages each.
// The pods of two families in three hold all five services; those of the third
// hold two of them, or one, so that records have to travel. Sidecars are spread
// over ten zones and nodes of ten.
func bigView(size fleetSize) View {
	var v View
	nodes := max(1, size.sidecars/10)
	rng := rand.New(rand.NewPCG(7, 7))
	families := max(1, size.sidecars/100)
	for i := range size.sidecars {
		family, member := i%families, i/families
		node := rng.IntN(nodes)
		s := &Sidecar{
			ID: fmt.Sprintf("team-%04d/pod-%03d", family, member), Endpoint: fmt.Sprintf("10.%d.%d.%d:50053", i>>16, i>>8&255, i&255),
			Generation: 1, Zone: fmt.Sprintf("zone-%d", node%10), Node: fmt.Sprintf("node-%05d", node),
		}
		for k := range 5 {
			if family%3 == 2 && member%5 != k {
				continue
			}
			s.Offers = append(s.Offers, Offer{
				Name: fmt.Sprintf("svc%d%04d", k, family), Raw: fmt.Sprintf("svc-%d-%04d", k, family),
				Type: serviceAt(k), Endpoint: fmt.Sprintf("127.0.0.1:%d", 9001+k),
			})
		}
		v.Sidecars = append(v.Sidecars, s)
	}
	for i := range size.pipelines {
		family := i % families
		p := &Pipeline{ID: fmt.Sprintf("team-%04d/pipeline-%03d", family, i/families), Version: 1, Enabled: true}
		for k := range 5 {
			p.Stages = append(p.Stages, Stage{
				ID: fmt.Sprintf("stage-%d", k), Type: stageAt(k), Parallelism: uint32(size.parallelism),
				Name: fmt.Sprintf("svc%d%04d", k, family), Raw: fmt.Sprintf("svc-%d-%04d", k, family), Strategy: RoundRobin,
			})
			if k > 0 {
				p.Edges = append(p.Edges, Edge{p.Stages[k-1].ID, p.Stages[k].ID})
			}
		}
		v.Pipelines = append(v.Pipelines, p)
	}
	return v
}

func stageAt(k int) StageType {
	switch k {
	case 0:
		return SourceStage
	case 4:
		return SinkStage
	}
	return TransformStage
}

func serviceAt(k int) ServiceType {
	switch k {
	case 0:
		return SourceService
	case 4:
		return SinkService
	}
	return TransformService
}

// carryOut lets v have what p decided, as the state machine would.
func carryOut(v *View, p Plan) {
	at := make(map[[2]string]int, len(v.Assignments))
	for i, a := range v.Assignments {
		at[[2]string{a.Pipeline, a.Sidecar}] = i
	}
	for _, a := range decided(p) {
		k := [2]string{a.Pipeline, a.Sidecar}
		if i, ok := at[k]; ok {
			a.Changed = v.Assignments[i].Changed + 1
			v.Assignments[i] = a
		} else if !a.Revoked {
			at[k] = len(v.Assignments)
			v.Assignments = append(v.Assignments, a)
		}
	}
}

// decided renders the changes of p as assignments.
func decided(p Plan) (out []*Assignment) {
	for i := range p.Steps {
		for k := range p.Steps[i].Changes {
			out = append(out, p.Steps[i].assignment(k))
		}
	}
	return out
}

// assignment is what change k of s makes of a sidecar's assignment.
func (s *Step) assignment(k int) *Assignment {
	c := &s.Changes[k]
	return &Assignment{Sidecar: c.Sidecar, Pipeline: s.Pipeline, Revoked: c.Revoke, LocalComplete: c.LocalComplete, Stages: c.Stages, MovedTo: c.MovedTo, Moved: c.Releases}
}
