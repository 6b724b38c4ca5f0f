package placement

import (
	"cmp"
	"maps"
	"slices"
	"strings"
)

// want is what a stage asks for. Stages that ask for the same share one.
type want struct {
	stage  StageType
	name   string // normalised, "" when byType
	raw    string
	labels map[string]string
	group  string
	// byType: nobody known offers the name, so that the type decides.
	byType bool
	fixed  bool // there even when nobody asks for it

	stages int // stages that ask for it, of all pipelines
	// in lists the profiles that can meet it.
	in []place
	// short holds the pipelines that have less of it than they ask for.
	short map[int32]bool
	// demand is how many instances enabled pipelines ask for.
	demand int64
	// longest is how many stages the longest pipeline that asks for it has, together
	// how many of one pipeline a sidecar that can meet it may run.
	longest, together int32
}

// place is a profile that can meet a want.
type place struct {
	profile int32
	fit     fitness
	standIn int32 // name of the service that stands in, 0 = none that matters
}

// fitness says what an offer is good for.
type fitness uint8

const (
	unfit   fitness = iota
	leaving         // may keep the stage while nobody else can run it: drains
	keeping         // may keep the stage, gets it no more: unhealthy
	fresh           // may be given the stage
)

// qualified is true when w asks for more than a name or type.
func (w *want) qualified() bool { return len(w.labels) > 0 || w.group != "" }

// key tells wants apart.
func (w *want) key() string {
	var b strings.Builder
	b.WriteByte('0' + byte(w.stage))
	if w.byType {
		b.WriteByte('*')
	}
	for _, s := range [...]string{w.name, w.raw, w.group} {
		b.WriteString(s)
		b.WriteByte(0)
	}
	for _, k := range slices.Sorted(maps.Keys(w.labels)) {
		b.WriteString(k)
		b.WriteByte(0)
		b.WriteString(w.labels[k])
		b.WriteByte(0)
	}
	return b.String()
}

// sortOffers puts offers into the order in which matching looks at them.
func sortOffers(offers []Offer) []Offer {
	byName := func(a, b Offer) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Raw, b.Raw), cmp.Compare(a.Endpoint, b.Endpoint), cmp.Compare(a.Type, b.Type))
	}
	if slices.IsSortedFunc(offers, byName) {
		return offers
	}
	offers = slices.Clone(offers)
	slices.SortStableFunc(offers, byName)
	return offers
}

// offer finds the offer with which s would meet w, whatever state it is in.
// Only offers that have the labels and group asked for stand in for a name.
func (s *Sidecar) offer(w *want) *Offer {
	if w.byType {
		return s.only(w)
	}
	at := 0
	if len(s.Offers) > 8 {
		at, _ = slices.BinarySearchFunc(s.Offers, w.name, func(o Offer, name string) int { return cmp.Compare(o.Name, name) })
	} else {
		for at < len(s.Offers) && s.Offers[at].Name != w.name {
			at++
		}
	}
	var best *Offer
	for i := at; i < len(s.Offers) && s.Offers[i].Name == w.name; i++ {
		o := &s.Offers[i]
		if !w.stage.fits(o.Type) {
			continue
		}
		if o.Raw == w.raw {
			return o
		}
		if best == nil {
			best = o
		}
	}
	return best
}

// only finds the single offer of s that has the type of w's stage.
func (s *Sidecar) only(w *want) *Offer {
	t, ok := w.stage.service()
	if !ok {
		return nil
	}
	var found *Offer
	for i := range s.Offers {
		o := &s.Offers[i]
		if o.Type != t || (w.qualified() && o.fitness(w) == unfit) {
			continue
		}
		if found != nil {
			return nil
		}
		found = o
	}
	return found
}

// fitness judges o by its registrations: labels and group are known only there,
// and a service that expired or reports ill health there is not used because its
// pod is well.
func (o *Offer) fitness(w *want) fitness {
	if len(o.Registrations) == 0 {
		if w.qualified() {
			return unfit
		}
		return fresh
	}
	best := unfit
	for i := range o.Registrations {
		switch r := &o.Registrations[i]; {
		case r.Expired || !w.qualifies(r):
		case r.Draining:
			best = max(best, leaving)
		case r.Unhealthy:
			best = max(best, keeping)
		default:
			return fresh
		}
	}
	return best
}

// leaves is true when stage i, which host h runs, is to be given to another one that
// can run it: the sidecar drains, or the service on it.
func (l *layout) leaves(i, h int32) bool {
	return l.e.hosts[h].s.Draining || l.fit(i, h) == leaving
}

func (w *want) qualifies(r *Registration) bool {
	if w.group != "" && r.Group != w.group {
		return false
	}
	for k, v := range w.labels {
		if got, ok := r.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
