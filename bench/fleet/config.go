package fleet

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The scenarios, in the order in which they make sense.
const (
	Steady  = "steady"  // heartbeats, and nothing else happens
	One     = "one"     // changes of one pipeline that one watcher runs
	Wide    = "wide"    // changes of one pipeline that every watcher runs
	Mass    = "mass"    // every pipeline changes at once
	Rolling = "rolling" // all sidecars restart, some at a time
	Zone    = "zone"    // all sidecars of one zone fall silent, and come back
	Expiry  = "expiry"  // a tenth of the sidecars, those that run the most, fall silent together
	Storm   = "storm"   // all watchers reconnect at once
	Leader  = "leader"  // the leading node dies
)

// Scenarios lists what Config.Scenarios may name.
var Scenarios = []string{Steady, One, Wide, Mass, Rolling, Zone, Expiry, Storm, Leader}

// Limits of one process.
const (
	maxSidecars    = 1_000_000
	maxPipelines   = 100_000
	maxConnections = 10_000
	// maxStreams is how many watches share a connection at most; the servers
	// allow some more.
	maxStreams = 4000
	// maxPerStream is how many sidecars the servers take on one heartbeat stream.
	maxPerStream = 4096
)

// Config says what fleet to simulate on which cluster. EnsureDefaults fills
// zeros, Validate reports all faults.
type Config struct {
	// Endpoints are the client addresses of nodes; connections are spread over
	// them, and go to another one when theirs is gone.
	Endpoints []string `json:"endpoints"`
	Sidecars  int      `json:"sidecars"`
	Pipelines int      `json:"pipelines"`
	// Connections are shared by all sidecars.
	Connections int `json:"connections"`
	// Watchers is how many of the sidecars watch their assignments.
	Watchers int `json:"watchers"`
	// Beats is how heartbeats travel: BeatsUnary (the default), BeatsStream or
	// BeatsMixed. PerStream sidecars share a heartbeat stream.
	Beats     string `json:"beats"`
	PerStream int    `json:"per_stream"`
	// Zones is how many zones the sidecars are spread over.
	Zones     int      `json:"zones"`
	Scenarios []string `json:"scenarios"`
	// Heartbeat is the pause between heartbeats of one sidecar; 0 = as the
	// cluster asks for.
	Heartbeat time.Duration `json:"heartbeat_ns"`
	// Duration is how long the steady scenario is measured, and how long leases
	// are watched after the leader's death.
	Duration time.Duration `json:"duration_ns"`
	// Rounds is how often the scenarios of changes repeat theirs.
	Rounds int `json:"rounds"`
	// Settle bounds how long anything may take that has to happen in the end:
	// all watchers synced, all pipelines placed, all sidecars told.
	Settle time.Duration `json:"settle_ns"`
	// InFlight bounds the registrations and changes under way at a time, Workers
	// the heartbeats.
	InFlight int `json:"in_flight"`
	Workers  int `json:"workers"`
	// Pids of server processes on this machine whose CPU time and memory are
	// shown; called whenever they are read, for a process may be replaced. May
	// be nil.
	Pids func() []int `json:"-"`
	// Kill ends the node with this id as kill -9 does, and leaves it to others
	// to bring it back; nil when the nodes are not ours to kill. With it the
	// reconnect storm is that after the leader's death.
	Kill func(node uint64) error `json:"-"`
	Seed uint64                  `json:"seed"`
	// Progress is told what is being done, one line each; may be nil.
	Progress func(line string) `json:"-"`
}

// EnsureDefaults fills what is zero.
func (c *Config) EnsureDefaults() {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&c.Sidecars, 1000)
	set(&c.Pipelines, max(1, c.Sidecars/10))
	set(&c.Connections, max(8, c.Watchers/1000, c.Sidecars/2000))
	set(&c.Zones, 3)
	set(&c.PerStream, 1)
	if c.Beats == "" {
		c.Beats = BeatsUnary
	}
	set(&c.Rounds, 20)
	set(&c.InFlight, 256)
	set(&c.Workers, 128)
	if c.Duration == 0 {
		c.Duration = 30 * time.Second
	}
	if c.Settle == 0 {
		c.Settle = 2 * time.Minute
	}
	if len(c.Scenarios) == 0 {
		c.Scenarios = []string{Steady}
	}
	if c.Pids == nil {
		c.Pids = func() []int { return nil }
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
}

// Validate returns every fault of c, joined.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("fleet: "+format, args...)) }
	within := func(what string, n, low, high int) {
		if n < low || n > high {
			bad("%d %s; from %d to %d are possible", n, what, low, high)
		}
	}
	if len(c.Endpoints) == 0 {
		bad("no endpoint is given")
	}
	within("sidecars", c.Sidecars, 1, maxSidecars)
	within("pipelines", c.Pipelines, 1, maxPipelines)
	within("connections", c.Connections, 1, maxConnections)
	within("watchers", c.Watchers, 0, c.Sidecars)
	within("zones", c.Zones, 1, 1000)
	within("rounds", c.Rounds, 1, 100_000)
	within("calls in flight", c.InFlight, 1, 10_000)
	within("workers", c.Workers, 1, 10_000)
	errs = append(errs, c.checkBeats()...)
	if n := c.Watchers + c.streams(); c.Connections > 0 && n/c.Connections > maxStreams {
		bad("%d watches and heartbeat streams on %d connections are more than %d each; use more connections", n, c.Connections, maxStreams)
	}
	if c.Duration < 0 || c.Settle <= 0 || c.Heartbeat < 0 {
		bad("a duration is negative")
	}
	if c.Heartbeat > wheelSpan {
		bad("a heartbeat every %v; at most %v is possible", c.Heartbeat, wheelSpan)
	}
	for _, s := range c.Scenarios {
		switch {
		case !slices.Contains(Scenarios, s):
			bad("unknown scenario %q, known are %s", s, strings.Join(Scenarios, ", "))
		case c.Watchers == 0 && (s == One || s == Wide || s == Storm):
			bad("the scenario %q needs watchers", s)
		case c.Kill == nil && s == Leader:
			bad("the scenario %q ends a node's process; that needs a cluster of one's own (--nodes)", s)
		}
	}
	return errors.Join(errs...)
}
