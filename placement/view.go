package placement

// StageType is what a stage does; the numbers are those of the API.
type StageType uint8

// The types of stages.
const (
	AnyStage StageType = iota
	SourceStage
	TransformStage
	SinkStage
)

// ServiceType is what a service does; the numbers are those of the API.
type ServiceType uint8

// The types of services.
const (
	AnyService ServiceType = iota
	SourceService
	TransformService
	SinkService
	LookupService
)

// Strategy decides which of several equally near instances of a downstream
// stage a sidecar hands over to. All of them are functions of the view: equal
// views choose equally.
type Strategy uint8

// The strategies; the numbers are those of the API.
const (
	// AnyStrategy is RoundRobin.
	AnyStrategy Strategy = iota
	// RoundRobin gives every instance equally many upstream sidecars.
	RoundRobin
	// LeastConnections prefers the sidecar that the fewest hand over to, over
	// all pipelines, by capacity.
	LeastConnections
	// WeightedRandom spreads by a hash, in proportion to capacity.
	WeightedRandom
	// ConsistentHash spreads by a hash, so that an instance that comes or goes
	// changes only the hand-overs to itself.
	ConsistentHash
)

// Condition is what is known of a sidecar's life.
type Condition uint8

// The conditions of a sidecar.
const (
	// Alive sidecars may be given stages.
	Alive Condition = iota
	// Suspect ones keep what they have and are given nothing.
	Suspect
	// Expired ones have lost what they had.
	Expired
)

// View is everything a plan depends on, as of one revision. Order does not
// matter. What it holds is shared with the planner and must not be changed
// afterwards.
type View struct {
	Pipelines   []*Pipeline
	Sidecars    []*Sidecar
	Assignments []*Assignment
}

// Sidecar is one that is registered.
type Sidecar struct {
	ID       string
	Endpoint string
	// Generation is what a change for this sidecar is checked against.
	Generation uint64
	Condition  Condition
	// Draining sidecars lose what others can run.
	Draining bool
	// Grace: it comes and goes. It keeps what it has, expired or not, and is
	// given nothing.
	Grace bool
	// Zone and Node tell where it runs; empty when unknown, which is near to
	// nobody.
	Zone, Node string
	// Capacity is how much it can take in relation to others; 0 is 1.
	Capacity uint32
	Offers   []Offer
}

// Offer is one service a sidecar can run a stage with.
type Offer struct {
	Name     string // normalised: equal names mean the same service
	Raw      string // as registered; the spelling decides between equal names
	Type     ServiceType
	Endpoint string
	// Registrations of the service; empty when the sidecar alone reported it.
	Registrations []Registration
}

// Registration is what the service registry knows of an offer.
type Registration struct {
	Group     string
	Labels    map[string]string
	Expired   bool
	Unhealthy bool
	// Draining: it is about to leave. It loses what others can run.
	Draining bool
}

// Pipeline is a graph of stages.
type Pipeline struct {
	ID      string
	Version uint64
	Enabled bool
	Stages  []Stage
	Edges   []Edge
}

// Stage is one step of a pipeline and what it asks for.
type Stage struct {
	ID          string
	Type        StageType
	Name        string // of the service, normalised; empty = any of the type
	Raw         string // of the service, as written
	Group       string
	Labels      map[string]string
	Strategy    Strategy
	Parallelism uint32 // 0 is 1
}

// Edge leads records from one stage to another.
type Edge struct{ From, To string }

// Assignment is what a sidecar has been told of a pipeline.
type Assignment struct {
	Sidecar, Pipeline string
	// Revoked: it was told to let go. Where it used to run decides between
	// otherwise equal sidecars.
	Revoked       bool
	LocalComplete bool
	// Changed grows with every change of any assignment; those that are changed
	// together may have the same. Of several places where a pipeline used to run, the
	// newest is preferred.
	Changed uint64
	// MovedTo is set for what was revoked for the sake of balance: these stages, Moved,
	// go to that sidecar as soon as this one has let go of them, and do not come back
	// because they used to run here.
	MovedTo string
	Moved   []string
	Stages  []Assigned
}

// Assigned is one entry of an Assignment.
type Assigned struct {
	Stage          string
	Endpoint       string // of the service, for a stage that runs here
	Remote         string // sidecar that runs it, for a direct downstream stage elsewhere
	RemoteEndpoint string
}

// fits says whether a service of type s can run a stage of type t. Lookups
// have no stage type of their own: they run as transforms.
func (t StageType) fits(s ServiceType) bool {
	switch t {
	case SourceStage:
		return s == SourceService || s == AnyService
	case TransformStage:
		return s == TransformService || s == LookupService || s == AnyService
	case SinkStage:
		return s == SinkService || s == AnyService
	}
	return true
}

// service is the type of service that stands in for a stage's name, and false
// for stages without one.
func (t StageType) service() (ServiceType, bool) {
	switch t {
	case SourceStage:
		return SourceService, true
	case TransformStage:
		return TransformService, true
	case SinkStage:
		return SinkService, true
	}
	return 0, false
}

// String returns the name of t.
func (t StageType) String() string {
	switch t {
	case SourceStage:
		return "source"
	case TransformStage:
		return "transform"
	case SinkStage:
		return "sink"
	}
	return "unspecified"
}

func (s *Sidecar) capacity() int64 { return int64(max(1, s.Capacity)) }

// lost is true for a sidecar that has lost what it had.
func (s *Sidecar) lost() bool { return s.Condition == Expired && !s.Grace }

// takes is true for one that may be given stages.
func (s *Sidecar) takes() bool { return s.Condition == Alive && !s.Grace && !s.Draining }
