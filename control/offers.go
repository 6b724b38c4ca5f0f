package control

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// offer is one service a sidecar can run a stage with.
type offer struct {
	name     string // normalised
	raw      string // as registered
	typ      commandpb.ServiceType
	endpoint string
	// regs are the ServiceRegistry registrations of this service on this
	// sidecar, by id; empty when the sidecar alone reported it.
	regs []*commandpb.Service
}

// host is a sidecar as the planner sees it.
type host struct {
	*commandpb.Sidecar
	offers []offer // by normalised name, then name as registered
}

// gone is true for a sidecar that has lost what it had.
func (h *host) gone() bool { return h.State == commandpb.SidecarState_SIDECAR_STATE_EXPIRED }

// fleet indexes sidecars and what they offer. It is immutable once built.
type fleet struct {
	hosts []host         // by sidecar id
	byID  map[string]int // into hosts
	// named finds the hosts that offer a name, expired ones included: a name
	// that somebody is known to offer never falls back to a namesake by type
	// while its owner is away.
	named map[string][]int
	// typed finds the hosts with exactly one offer of a type.
	typed map[commandpb.ServiceType][]int
}

func newFleet(in Input) *fleet {
	f := &fleet{
		hosts: make([]host, 0, len(in.Sidecars)),
		byID:  make(map[string]int, len(in.Sidecars)),
		named: make(map[string][]int),
		typed: make(map[commandpb.ServiceType][]int),
	}
	for _, s := range in.Sidecars {
		f.hosts = append(f.hosts, host{Sidecar: s})
	}
	slices.SortFunc(f.hosts, func(a, b host) int { return cmp.Compare(a.SidecarId, b.SidecarId) })
	for i := range f.hosts {
		h := &f.hosts[i]
		f.byID[h.SidecarId] = i
		for _, s := range h.Services {
			h.offers = append(h.offers, offer{
				name: router.NormalizeName(s.Name), raw: s.Name, typ: s.Type, endpoint: s.Endpoint,
			})
		}
	}
	services := slices.Clone(in.Services)
	slices.SortFunc(services, func(a, b *commandpb.Service) int { return cmp.Compare(a.ServiceId, b.ServiceId) })
	for _, s := range services {
		if i, ok := f.byID[s.SidecarId]; ok && s.SidecarId != "" {
			f.hosts[i].register(s)
		}
	}
	for i := range f.hosts {
		h := &f.hosts[i]
		slices.SortStableFunc(h.offers, func(a, b offer) int {
			return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.raw, b.raw), cmp.Compare(a.endpoint, b.endpoint))
		})
		perType := make(map[commandpb.ServiceType]int)
		for j, o := range h.offers {
			if j == 0 || h.offers[j-1].name != o.name {
				f.named[o.name] = append(f.named[o.name], i)
			}
			perType[o.typ]++
		}
		for t, n := range perType {
			if n == 1 {
				f.typed[t] = append(f.typed[t], i)
			}
		}
	}
	return f
}

// register adds a ServiceRegistry registration: to the offer of its name when
// the sidecar reported that itself, as an offer of its own otherwise.
func (h *host) register(s *commandpb.Service) {
	name := router.NormalizeName(s.Name)
	found := false
	for i := range h.offers {
		if h.offers[i].name == name {
			h.offers[i].regs = append(h.offers[i].regs, s)
			found = true
		}
	}
	if !found && s.Endpoint != nil {
		h.offers = append(h.offers, offer{
			name: name, raw: s.Name, typ: s.Type,
			endpoint: net.JoinHostPort(s.Endpoint.Host, strconv.FormatUint(uint64(s.Endpoint.Port), 10)),
			regs:     []*commandpb.Service{s},
		})
	}
}

// fits says whether a service of type s can run a stage of type st. Lookups
// have no stage type of their own: they run as transforms.
func fits(st commandpb.StageType, s commandpb.ServiceType) bool {
	switch st {
	case commandpb.StageType_STAGE_TYPE_SOURCE:
		return s == commandpb.ServiceType_SERVICE_TYPE_SOURCE || s == commandpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	case commandpb.StageType_STAGE_TYPE_TRANSFORM:
		return s == commandpb.ServiceType_SERVICE_TYPE_TRANSFORM || s == commandpb.ServiceType_SERVICE_TYPE_LOOKUP ||
			s == commandpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	case commandpb.StageType_STAGE_TYPE_SINK:
		return s == commandpb.ServiceType_SERVICE_TYPE_SINK || s == commandpb.ServiceType_SERVICE_TYPE_UNSPECIFIED
	}
	return true
}

// serviceType is the type that stands in for a stage's name, and false for
// stages without one.
func serviceType(st commandpb.StageType) (commandpb.ServiceType, bool) {
	switch st {
	case commandpb.StageType_STAGE_TYPE_SOURCE:
		return commandpb.ServiceType_SERVICE_TYPE_SOURCE, true
	case commandpb.StageType_STAGE_TYPE_TRANSFORM:
		return commandpb.ServiceType_SERVICE_TYPE_TRANSFORM, true
	case commandpb.StageType_STAGE_TYPE_SINK:
		return commandpb.ServiceType_SERVICE_TYPE_SINK, true
	}
	return 0, false
}

// want is what a stage asks for.
type want struct {
	stage  *commandpb.Stage
	name   string // normalised selector name, "" = any
	labels map[string]string
	group  string
	// rivals are the names other stages of the pipeline ask for: a service
	// named like one of them is that one and stands in for no other.
	rivals map[string]bool
	// byType is true when no known sidecar offers the name, so that the type
	// decides.
	byType bool
}

// wantOf derives what stage st asks for; names holds the normalised selector
// names of all stages of its pipeline.
func (f *fleet) wantOf(st *commandpb.Stage, names []string) want {
	sel := st.GetSelector()
	w := want{stage: st, name: router.NormalizeName(sel.GetServiceName()), labels: sel.GetLabels(), group: sel.GetGroupId()}
	w.byType = true
	for _, i := range f.named[w.name] {
		for _, o := range f.hosts[i].offers {
			if o.name == w.name && fits(st.GetType(), o.typ) {
				w.byType = false
			}
		}
	}
	if w.name == "" {
		w.byType = true
	}
	for _, n := range names {
		if n != "" && n != w.name {
			if w.rivals == nil {
				w.rivals = make(map[string]bool)
			}
			w.rivals[n] = true
		}
	}
	return w
}

// fitness says what an offer is good for.
type fitness int

const (
	unfit   fitness = iota
	keeping         // may keep the stage, gets it no more: suspect or unhealthy
	fresh           // may be given the stage
)

// match finds the endpoint with which host i runs w.
func (f *fleet) match(w *want, i int) (endpoint string, fit fitness) {
	h := &f.hosts[i]
	if h.gone() {
		return "", unfit
	}
	o := f.named1(w, h)
	if o == nil && w.byType {
		o = f.typed1(w, h)
	}
	if o == nil {
		return "", unfit
	}
	fit = o.fitness(w)
	if fit == fresh && h.State == commandpb.SidecarState_SIDECAR_STATE_SUSPECT {
		fit = keeping
	}
	if fit == unfit {
		return "", unfit
	}
	return o.endpoint, fit
}

// named1 finds the offer of h that bears the name w asks for, the one spelled
// the same way first.
func (f *fleet) named1(w *want, h *host) *offer {
	if w.name == "" {
		return nil
	}
	var best *offer
	for i := range h.offers {
		o := &h.offers[i]
		if o.name != w.name || !fits(w.stage.GetType(), o.typ) {
			continue
		}
		if o.raw == w.stage.GetSelector().GetServiceName() {
			return o
		}
		if best == nil {
			best = o
		}
	}
	return best
}

// typed1 finds the only offer of h that has the type of w's stage. With labels
// or a group given, only offers that have them count.
func (f *fleet) typed1(w *want, h *host) *offer {
	t, ok := serviceType(w.stage.GetType())
	if !ok {
		return nil
	}
	var found *offer
	for i := range h.offers {
		o := &h.offers[i]
		if o.typ != t || (w.qualified() && o.fitness(w) == unfit) {
			continue
		}
		if found != nil {
			return nil
		}
		found = o
	}
	if found == nil || w.rivals[found.name] {
		return nil
	}
	return found
}

// qualified is true when w asks for more than a name.
func (w *want) qualified() bool { return len(w.labels) > 0 || w.group != "" }

// fitness judges o by its registrations: labels and group are known only
// there, and a service that expired or reports ill health there is not used
// because its pod is well.
func (o *offer) fitness(w *want) fitness {
	if len(o.regs) == 0 {
		if w.qualified() {
			return unfit
		}
		return fresh
	}
	best := unfit
	for _, r := range o.regs {
		if r.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED || !w.qualifies(r) {
			continue
		}
		if r.GetHealth().GetStatus() == commandpb.HealthStatus_HEALTH_STATUS_UNHEALTHY {
			best = max(best, keeping)
		} else {
			best = fresh
		}
	}
	return best
}

func (w *want) qualifies(r *commandpb.Service) bool {
	if w.group != "" && r.GroupId != w.group {
		return false
	}
	for k, v := range w.labels {
		if got, ok := r.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// candidates returns the hosts that may be given w, by id.
func (f *fleet) candidates(w *want) []int {
	among := f.named[w.name]
	if w.byType {
		t, ok := serviceType(w.stage.GetType())
		switch {
		case !ok:
			return nil
		case w.qualified():
			among = nil
			for i := range f.hosts {
				among = append(among, i)
			}
		default:
			among = f.typed[t]
		}
	}
	var out []int
	for _, i := range among {
		if _, fit := f.match(w, i); fit == fresh {
			out = append(out, i)
		}
	}
	return out
}

// missing explains why candidates is empty, for people.
func (f *fleet) missing(w *want) string {
	what := describe(w)
	var expired, suspect, unqualified, unwell []string
	for i := range f.hosts {
		h := &f.hosts[i]
		o := f.named1(w, h)
		if o == nil && w.byType {
			o = f.typed1(&want{stage: w.stage, name: w.name, rivals: w.rivals}, h)
		}
		switch {
		case o == nil:
		case h.gone():
			expired = append(expired, h.SidecarId)
		case o.fitness(w) == unfit && w.qualified():
			unqualified = append(unqualified, h.SidecarId)
		case o.fitness(w) != fresh:
			unwell = append(unwell, h.SidecarId)
		case h.State == commandpb.SidecarState_SIDECAR_STATE_SUSPECT:
			suspect = append(suspect, h.SidecarId)
		}
	}
	switch {
	case len(suspect) > 0:
		return fmt.Sprintf("only sidecars that miss heartbeats offer %s: %s", what, few(suspect))
	case len(unwell) > 0:
		return fmt.Sprintf("%s is expired or unhealthy on %s", what, few(unwell))
	case len(unqualified) > 0:
		return fmt.Sprintf("no registered service has the labels and group asked for; %s runs without them on %s", what, few(unqualified))
	case len(expired) > 0:
		return fmt.Sprintf("every sidecar that offers %s has expired: %s", what, few(expired))
	}
	return "no sidecar offers " + what
}

func describe(w *want) string {
	t := strings.ToLower(strings.TrimPrefix(w.stage.GetType().String(), "STAGE_TYPE_"))
	if n := w.stage.GetSelector().GetServiceName(); n != "" {
		return fmt.Sprintf("%s service %q", t, n)
	}
	return "exactly one " + t + " service"
}

// few lists at most five ids.
func few(ids []string) string {
	if len(ids) > 5 {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:5], ", "), len(ids)-5)
	}
	return strings.Join(ids, ", ")
}
