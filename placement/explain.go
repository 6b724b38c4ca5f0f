package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// StageStatus says where a stage runs, who else could run it, and why not.
type StageStatus struct {
	Stage string
	// Asked is how many instances are wanted.
	Asked int
	// Sidecars run the stage by their present assignments, in order of ids.
	Sidecars []string
	// Pending says why no sidecar runs the stage and what would help; empty
	// when one does.
	Pending string
	// Candidates are the sidecars that offer what the stage asks for, in order
	// of ids; empty unless asked for.
	Candidates []Candidate
	// Strangers counts the sidecars that do not offer it.
	Strangers int
}

// Candidate is a sidecar that offers what a stage asks for.
type Candidate struct {
	Sidecar  string
	Endpoint string // of the service that would run the stage
	Runs     bool
	// Verdict says what rules it out; empty when it runs the stage or could.
	Verdict string
	// Load is what it runs, of all pipelines, by capacity.
	Load float64
}

// Explain tells where the stages of a pipeline run, in the order it declares
// them; nil when there is no such pipeline. With candidates set it lists those as
// well, which takes a look at every sidecar.
func (e *Engine) Explain(pipeline string, candidates bool) []StageStatus {
	i, ok := e.pipeID[pipeline]
	if !ok || e.pipes[i].spec == nil {
		return nil
	}
	x := &e.pipes[i]
	out := make([]StageStatus, len(x.stages))
	missing := candidates
	for k := range x.stages {
		s := &x.stages[k]
		out[k].Stage, out[k].Asked = s.ID, int(s.count)
		for _, a := range x.recorded {
			if a.Revoked {
				continue
			}
			for j := range a.Stages {
				if a.Stages[j].Stage == s.ID && a.Stages[j].Remote == "" {
					out[k].Sidecars = append(out[k].Sidecars, a.Sidecar)
				}
			}
		}
		missing = missing || len(out[k].Sidecars) == 0
	}
	if !missing {
		return out
	}
	l := &e.l
	l.reset(x)
	l.solve()
	for k := range out {
		if len(out[k].Sidecars) == 0 {
			out[k].Pending = l.pending(int32(k))
		}
		if candidates {
			out[k].Candidates, out[k].Strangers = l.candidates(int32(k), out[k].Sidecars)
		}
	}
	l.release()
	return out
}

// release lets go of the sidecars the layout has looked at by itself, without
// taking over what it has come to.
func (l *layout) release() {
	for n := range l.nodes {
		h := l.nodes[n].host
		l.e.hosts[h].held = false
		l.e.refresh(h)
	}
}

// pending says why stage i has no place.
func (l *layout) pending(i int32) string {
	some := l.able[i] || l.someKeeps(i)
	switch {
	case !l.x.spec.Enabled:
		return "the pipeline is disabled"
	case l.x.cyclic:
		return "the edges of the pipeline form a cycle"
	case l.kept[i]:
		return fmt.Sprintf("held back until stage %q downstream is served: records would be lost there", l.x.stages[l.gap[i]].ID)
	case !some:
		if ids := l.shutOut(i); len(ids) > 0 {
			return "held back together with a source on the same sidecar: " + someOf(ids)
		}
		return l.nobody(i)
	case l.circular:
		return "every way to place the stages would hand records back to a sidecar they have passed; offer one of the services on another sidecar"
	}
	return "about to be assigned"
}

// shutOut lists the sidecars that could take stage i, were an entry stage not
// kept back on them.
func (l *layout) shutOut(i int32) []string {
	s := &l.x.stages[i]
	var ids []string
	for _, pl := range l.e.wants[s.want].in {
		if pl.fit != fresh || l.x.rival(s, pl.standIn) {
			continue
		}
		for _, h := range l.e.profiles[pl.profile].members {
			if l.e.hosts[h].takes {
				ids = append(ids, l.e.hosts[h].s.ID)
			}
		}
	}
	slices.Sort(ids)
	return ids
}

// byID lists the sidecars there are, by id.
func (e *Engine) byID() []int32 {
	all := make([]int32, 0, len(e.hostID))
	for i := range e.hosts {
		if e.hosts[i].profile >= 0 {
			all = append(all, int32(i))
		}
	}
	slices.SortFunc(all, e.compareIDs)
	return all
}

// loose finds the offer of s that would meet w if labels and group did not
// matter.
func (s *Sidecar) loose(w *want) *Offer {
	if !w.byType {
		return s.offer(w)
	}
	return s.only(&want{stage: w.stage})
}

// nobody says why no sidecar may be given stage i.
func (l *layout) nobody(i int32) string {
	s := &l.x.stages[i]
	w := &l.e.wants[s.want]
	what := describe(s)
	var expired, suspect, draining, unqualified, unwell []string
	for _, h := range l.e.byID() {
		x := l.e.hosts[h].s
		o := x.loose(w)
		if o == nil || (w.byType && l.x.rival(s, l.e.nameID[o.Name])) {
			continue
		}
		switch {
		case x.Condition == Expired:
			expired = append(expired, x.ID)
		case o.fitness(w) == unfit && w.qualified():
			unqualified = append(unqualified, x.ID)
		case o.fitness(w) != fresh:
			unwell = append(unwell, x.ID)
		case x.Draining:
			draining = append(draining, x.ID)
		case x.Condition == Suspect || x.Grace:
			suspect = append(suspect, x.ID)
		}
	}
	switch {
	case len(suspect) > 0:
		return fmt.Sprintf("only sidecars that miss heartbeats offer %s: %s", what, someOf(suspect))
	case len(draining) > 0:
		return fmt.Sprintf("only sidecars that drain offer %s: %s", what, someOf(draining))
	case len(unwell) > 0:
		return fmt.Sprintf("%s is expired or unhealthy on %s", what, someOf(unwell))
	case len(unqualified) > 0:
		return fmt.Sprintf("no registered service has the labels and group asked for; %s runs without them on %s", what, someOf(unqualified))
	case len(expired) > 0:
		return fmt.Sprintf("every sidecar that offers %s has expired: %s", what, someOf(expired))
	}
	return "no sidecar offers " + what
}

func describe(s *stage) string {
	if s.Raw != "" {
		return fmt.Sprintf("%s service %q", s.Type, s.Raw)
	}
	return "exactly one " + s.Type.String() + " service"
}

// someOf lists at most five ids.
func someOf(ids []string) string {
	if len(ids) > 5 {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:5], ", "), len(ids)-5)
	}
	return strings.Join(ids, ", ")
}

// candidates lists who offers what stage i asks for.
func (l *layout) candidates(i int32, runs []string) (out []Candidate, strangers int) {
	e, s := l.e, &l.x.stages[i]
	w := &e.wants[s.want]
	for _, h := range e.byID() {
		x := &e.hosts[h]
		o := x.s.loose(w)
		if o == nil {
			strangers++
			continue
		}
		c := Candidate{Sidecar: x.s.ID, Endpoint: o.Endpoint, Load: float64(x.load) / float64(x.capacity)}
		_, c.Runs = slices.BinarySearch(runs, x.s.ID)
		if !c.Runs {
			c.Verdict = l.verdict(i, h, o)
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Candidate) int { return cmp.Compare(a.Sidecar, b.Sidecar) })
	return out, strangers
}

// verdict says what rules out that h, with offer o, is given stage i.
func (l *layout) verdict(i, h int32, o *Offer) string {
	e, s := l.e, &l.x.stages[i]
	w := &e.wants[s.want]
	x := &e.hosts[h]
	switch {
	case x.s.Condition == Expired:
		return "it has expired"
	case x.s.Condition == Suspect:
		return "it misses heartbeats: it keeps what it has and is given nothing"
	case x.s.Grace:
		return "it comes and goes: it is given nothing until it has stayed for a while"
	case x.s.Draining:
		return "it drains"
	case o.fitness(w) == unfit && w.qualified():
		return "its service has not the labels and group asked for"
	case o.fitness(w) == unfit:
		return "its service has expired"
	case o.fitness(w) == keeping:
		return "its service is unhealthy"
	case w.byType && l.x.rival(s, e.nameID[o.Name]):
		return fmt.Sprintf("its service %q is what another stage of the pipeline asks for", o.Raw)
	case !l.x.spec.Enabled:
		return "the pipeline is disabled"
	case l.kept[i]:
		return fmt.Sprintf("the stage is held back until stage %q is served", l.x.stages[l.gap[i]].ID)
	case x.profile >= 0 && l.closed(x.profile):
		return "a source on it is held back, and with it all of the pipeline"
	case l.circular || l.x.cyclic:
		return "records would come back to a sidecar they have passed"
	}
	if n, ok := l.nodeOf(h); ok && l.loops(i, n) {
		return "records would come back to a sidecar they have passed"
	}
	return ""
}

// loops is true when node n cannot run stage i besides what the layout has.
func (l *layout) loops(i, n int32) bool {
	if l.nodes[n].local.has(i) {
		return false
	}
	mark := len(l.undo)
	defer l.rollback(mark)
	return !l.place(i, n, false)
}
