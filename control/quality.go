package control

import (
	"sync"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// PipelineQuality tells how good the place of a pipeline is in v, false when there
// is no such pipeline. It reads what concerns the pipeline and no more: its
// assignments, and the sidecars that hold them with all they run.
func PipelineQuality(v *router.View, id string) (placement.Quality, bool, error) {
	p, err := v.Pipeline(id)
	if p == nil || err != nil {
		return placement.Quality{}, false, err
	}
	var recorded []*placement.Assignment
	err = v.PipelineAssignments(id, func(a *commandpb.Assignment) bool {
		if !a.Revoked {
			recorded = append(recorded, assignmentOf(a))
		}
		return true
	})
	if err != nil {
		return placement.Quality{}, true, err
	}
	type seen struct {
		s    *placement.Sidecar
		runs int
	}
	known := make(map[string]seen)
	look := func(id string) (*placement.Sidecar, int) {
		k, ok := known[id]
		if !ok && err == nil {
			k.s, k.runs, err = sidecarLoad(v, id)
			known[id] = k
		}
		return k.s, k.runs
	}
	q := placement.Judge(pipelineOf(p), recorded, look)
	return q, true, err
}

// sidecarLoad returns a sidecar, nil when there is none, and how many stages it
// runs.
func sidecarLoad(v *router.View, id string) (*placement.Sidecar, int, error) {
	s, err := v.Sidecar(id)
	if s == nil || err != nil {
		return nil, 0, err
	}
	n := 0
	err = v.Assignments(id, func(a *commandpb.Assignment) bool {
		for _, st := range a.Stages {
			if !a.Revoked && st.RemoteSidecarId == "" {
				n++
			}
		}
		return true
	})
	return sidecarOf(s, nil), n, err
}

// Moves are those of one plan against the fewest that any plan could do with.
type Moves struct {
	Revision     uint64 // planned from
	Moves, Least int
}

// Scores tells what the plans of a node came to since it leads.
type Scores struct {
	// Quality is that of all pipelines after the newest plan; what waits for another
	// sidecar to let go of it counts as waiting. Its load, which takes a look at every
	// sidecar, is measured a little later when plans follow each other closely. Its
	// moves are those of Last.
	Quality placement.Quality
	// Last is the newest plan that moved anything.
	Last Moves
	// Plans counts plans, Moves and Least add up theirs.
	Plans, Moves, Least uint64
	// Evened counts the stages that were moved for balance alone. Those that another
	// sidecar had to let go of first begin in a plan of their own, and are among Moves, too.
	Evened uint64
	// Took is how long the newest plan took.
	Took time.Duration
}

// scores keeps Scores and, by pipeline, the newest plan that moved any of it. Its
// methods are safe for concurrent use.
type scores struct {
	mu      sync.Mutex
	known   bool
	all     Scores
	by      map[string]Moves
	measure measuring
}

// measuring spaces out the measuring of the load so that it takes at most a
// hundredth of the time.
type measuring struct {
	next time.Time
	owed bool
}

// reset forgets everything: another node may have planned since.
func (s *scores) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known, s.all, s.by, s.measure = false, Scores{}, make(map[string]Moves), measuring{}
}

// note takes over a plan of e.
func (s *scores) note(e *placement.Engine, p *placement.Plan, info PlanInfo) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := p.Quality
	q.SetLoad(&s.all.Quality)
	// The plan is made as if they ran already.
	q.Placed, q.Pending = q.Placed-info.Unplaced, q.Pending+info.Idle
	if q.Moves > 0 {
		s.all.Last = Moves{info.Revision, q.Moves, q.Least}
	}
	q.Moves, q.Least = s.all.Last.Moves, s.all.Last.Least
	s.all.Quality, s.all.Took, s.known = q, info.Took, true
	s.all.Plans++
	s.all.Evened += uint64(info.Evened)
	s.all.Moves += uint64(p.Quality.Moves)
	s.all.Least += uint64(p.Quality.Least)
	for i := range p.Steps {
		if st := &p.Steps[i]; st.Moves > 0 {
			s.by[st.Pipeline] = Moves{info.Revision, st.Moves, st.Least}
		}
	}
	s.measure.owed = true
	s.measureLocked(e)
}

// forget drops what is known of a pipeline that is gone.
func (s *scores) forget(pipeline string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.by, pipeline)
}

// owed returns in how long the load is to be measured, false when it is known.
func (s *scores) owed() (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, time.Until(s.measure.next)), s.measure.owed
}

// settle measures the load if that is owed and due.
func (s *scores) settle(e *placement.Engine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.measureLocked(e)
}

func (s *scores) measureLocked(e *placement.Engine) {
	start := time.Now()
	if !s.measure.owed || start.Before(s.measure.next) {
		return
	}
	q := e.Measure()
	s.all.Quality.SetLoad(&q)
	s.measure.owed = false
	end := time.Now()
	s.measure.next = end.Add(100 * end.Sub(start))
}

// Scores tells what the plans of this node came to; false while it has made none
// since it leads.
func (p *Placer) Scores() (Scores, bool) {
	p.scores.mu.Lock()
	defer p.scores.mu.Unlock()
	return p.scores.all, p.scores.known
}

// Moved returns the newest plan of this node that moved any of a pipeline; false when
// there is none since it leads.
func (p *Placer) Moved(pipeline string) (Moves, bool) {
	p.scores.mu.Lock()
	defer p.scores.mu.Unlock()
	m, ok := p.scores.by[pipeline]
	return m, ok
}
