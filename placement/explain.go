package placement

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Query says what Explain is to tell.
type Query struct {
	// Stage restricts it to one stage; empty is all.
	Stage string
	// Candidates and NextHops are how many of either are listed for each stage
	// at most; 0 lists none, and spares looking for them.
	Candidates, NextHops int
}

// StageStatus says where a stage runs, who else could run it, and why not.
type StageStatus struct {
	Stage string
	// Asks says in words what the stage asks for.
	Asks string
	// Asked is how many instances are wanted.
	Asked int
	// Sidecars run the stage by their present assignments, in order of ids.
	Sidecars []string
	// Pending says why no sidecar runs the stage and what would help; empty
	// when one does.
	Pending string
	// Placed: that is only because what the planner has decided is not carried out yet.
	// Why is not known to it.
	Placed bool
	// Candidates are sidecars that offer what the stage asks for, in order of
	// ids, those that run it before others when not all can be listed.
	Candidates []Candidate
	// Offering counts all that offer it, Strangers those that do not.
	Offering, Strangers int
	// Verdicts counts those of Offering that do not run the stage by what rules
	// them out, as far as that can be told without trying: the most frequent
	// first, "" for nothing.
	Verdicts []Tally
	// Unexamined: the stages before it had so many candidates that those of this
	// one were not looked at. Ask for it alone.
	Unexamined bool
	// NextHops are where its instances hand records on, by sidecar; NextHopsTotal
	// counts them all.
	NextHops      []NextHop
	NextHopsTotal int
}

// Candidate is a sidecar that offers what a stage asks for.
type Candidate struct {
	Sidecar  string
	Endpoint string // of the service that would run the stage
	// StandsIn is the name of that service if it is the only one of its type there
	// and stands in for the name that the stage asks for, which nobody offers.
	StandsIn string
	Runs     bool
	// Verdict says what rules it out; empty when it runs the stage or could.
	Verdict string
	// Load is what it runs, of all pipelines, by capacity.
	Load float64
}

// Tally counts the candidates with one verdict.
type Tally struct {
	Verdict string
	Count   int
}

// examined is how many candidates one call looks at, over all stages. A pipeline
// may have a thousand stages, and each of them a hundred thousand candidates.
const examined = 1 << 20

// Explain tells where the stages of a pipeline run, in the order it declares
// them; nil when there is no such pipeline, and empty when it has not the stage
// asked for. Nothing is changed, but the engine works on it like on a plan.
func (e *Engine) Explain(pipeline string, q Query) []StageStatus {
	i, ok := e.pipeID[pipeline]
	if !ok || e.pipes[i].spec == nil {
		return nil
	}
	x := &e.pipes[i]
	runs := x.runs()
	out := make([]StageStatus, 0, len(x.stages))
	missing := q.Candidates > 0
	for k := range x.stages {
		s := &x.stages[k]
		if q.Stage != "" && s.ID != q.Stage {
			continue
		}
		st := StageStatus{Stage: s.ID, Asks: asks(s), Asked: int(s.count), Sidecars: runs[k]}
		if q.NextHops > 0 {
			st.NextHops, st.NextHopsTotal = e.nextHops(x, int32(k), runs, q.NextHops)
		}
		missing = missing || len(runs[k]) == 0
		out = append(out, st)
	}
	if !missing || len(out) == 0 {
		return out
	}
	l := &e.l
	l.reset(x)
	l.solve()
	left := examined
	for at := range out {
		st := &out[at]
		k := x.stage(st.Stage, int32(at))
		if len(st.Sidecars) == 0 {
			st.Pending = l.pending(k)
			st.Placed = st.Pending == AboutToBeAssigned
		}
		if q.Candidates > 0 {
			l.candidates(st, k, q.Candidates, &left)
		}
	}
	l.release()
	return out
}

// runs lists per stage the sidecars that run it by their present assignments, in
// order of ids.
func (x *pipe) runs() [][]string {
	out := make([][]string, len(x.stages))
	for _, a := range x.recorded {
		if a.Revoked {
			continue
		}
		for j := range a.Stages {
			if k := x.stage(a.Stages[j].Stage, int32(j)); k >= 0 && a.Stages[j].Remote == "" {
				out[k] = append(out[k], a.Sidecar)
			}
		}
	}
	return out
}

// release lets the sidecars be found again that the layout looked at by
// themselves, without taking over what it has come to.
func (l *layout) release() {
	for n := range l.nodes {
		h := l.nodes[n].host
		l.e.hosts[h].held = false
		l.e.refresh(h)
	}
}

// Waiting is a stage that has no place.
type Waiting struct{ Pipeline, Stage, Reason string }

// Waiting lists the stages of an enabled pipeline that have no place in its
// newest layout, and why.
func (e *Engine) Waiting(pipeline string) []Waiting {
	i, ok := e.pipeID[pipeline]
	if !ok {
		return nil
	}
	x := &e.pipes[i]
	if x.spec == nil || !x.spec.Enabled || len(x.placed) != len(x.stages) || !slices.Contains(x.placed, false) {
		return nil
	}
	l := &e.l
	l.reset(x)
	l.solve()
	var out []Waiting
	for k := range x.stages {
		if !x.placed[k] {
			out = append(out, Waiting{x.id, x.stages[k].ID, l.pending(int32(k))})
		}
	}
	l.release()
	return out
}

// AboutToBeAssigned is why a stage runs nowhere that the planner has a place for.
const AboutToBeAssigned = "about to be assigned"

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
	return AboutToBeAssigned
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

// offering lists the sidecars with an offer that is loose for w, by id. The list
// is not the caller's.
func (e *Engine) offering(w *want) []int32 {
	if !w.byType {
		var out []int32
		for _, h := range e.names[e.nameID[w.name]].hosts {
			if e.hosts[h].s.offer(w) != nil {
				out = append(out, h)
			}
		}
		slices.SortFunc(out, e.compareIDs)
		return out
	}
	t := min(w.stage, SinkStage)
	if !e.loneKnown {
		e.lone, e.loneKnown = [4][]int32{}, true
		for _, h := range e.byID() {
			for t := range e.lone {
				if e.hosts[h].s.only(&want{stage: StageType(t)}) != nil {
					e.lone[t] = append(e.lone[t], h)
				}
			}
		}
	}
	return e.lone[t]
}

// nobody says why no sidecar may be given stage i.
func (l *layout) nobody(i int32) string {
	s := &l.x.stages[i]
	w := &l.e.wants[s.want]
	what := describe(s)
	var expired, suspect, draining, leavers, unqualified, unwell []string
	for _, h := range l.e.offering(w) {
		x := l.e.hosts[h].s
		o := x.loose(w)
		if w.byType && l.x.rival(s, l.e.nameID[o.Name]) {
			continue
		}
		switch {
		case x.Condition == Expired:
			expired = append(expired, x.ID)
		case o.fitness(w) == unfit && w.qualified():
			unqualified = append(unqualified, x.ID)
		case o.fitness(w) == leaving:
			leavers = append(leavers, x.ID)
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
	case len(leavers) > 0:
		return fmt.Sprintf("%s drains on %s: it is to be deregistered", what, someOf(leavers))
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

// asks is describe with the group and labels.
func asks(s *stage) string {
	out := describe(s)
	if s.Group != "" {
		out += fmt.Sprintf(" of group %q", s.Group)
	}
	for i, k := range slices.Sorted(maps.Keys(s.Labels)) {
		switch i {
		case 0:
			out += " with "
		default:
			out += ", "
		}
		out += k + "=" + s.Labels[k]
	}
	return out
}

// candidates fills in who offers what stage i asks for, limit of them one by one.
// left is how many may yet be looked at.
func (l *layout) candidates(st *StageStatus, i int32, limit int, left *int) {
	e := l.e
	w := &e.wants[l.x.stages[i].want]
	offering := e.offering(w)
	st.Offering, st.Strangers = len(offering), len(e.hostID)-len(offering)
	if *left -= len(offering); *left < 0 {
		st.Unexamined = true
		return
	}
	others := max(0, limit-len(st.Sidecars)) // that may be listed though they do not run it
	verdicts := make(map[string]int)
	for _, h := range offering {
		x := &e.hosts[h]
		o := x.s.loose(w)
		c := Candidate{Sidecar: x.s.ID, Endpoint: o.Endpoint, Load: float64(x.load) / float64(x.capacity)}
		if w.byType && l.x.stages[i].Raw != "" {
			c.StandsIn = o.Raw
		}
		_, c.Runs = slices.BinarySearch(st.Sidecars, x.s.ID)
		if !c.Runs {
			c.Verdict = l.verdict(i, h, o)
			verdicts[c.Verdict]++
			if others == 0 {
				continue
			}
			others--
			if c.Verdict == "" {
				if n, ok := l.nodeOf(h); ok && l.loops(i, n) {
					c.Verdict = comesBack
				}
			}
		}
		if len(st.Candidates) < limit {
			st.Candidates = append(st.Candidates, c)
		}
	}
	for v, n := range verdicts { // sorted below
		st.Verdicts = append(st.Verdicts, Tally{v, n})
	}
	slices.SortFunc(st.Verdicts, func(a, b Tally) int {
		return cmp.Or(-cmp.Compare(a.Count, b.Count), cmp.Compare(a.Verdict, b.Verdict))
	})
}

const comesBack = "records would come back to a sidecar they have passed"

// verdict says what rules out that h, with offer o, is given stage i, as far as
// that can be told without trying.
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
	case o.fitness(w) == leaving:
		return "its service drains: it is to be deregistered"
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
		return comesBack
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
