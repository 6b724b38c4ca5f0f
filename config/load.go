package config

import (
	"cmp"
	"errors"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// SearchPath lists the files Load tries, in order, when none is named: the one
// the original router looked for and the one the Kubernetes operator mounts.
func SearchPath() []string {
	return []string{"config/router.yaml", "/etc/etl-router/config.yaml"}
}

// Input is everything settings can come from.
type Input struct {
	// Flags are the parsed flags, as registered by AddFlags; nil for none.
	Flags *pflag.FlagSet
	// Environ holds NAME=VALUE pairs, as os.Environ returns them.
	Environ []string
	// Search lists the files to try when neither flag nor environment names
	// one; the first that exists is read.
	Search []string
	// Hostname is used in the advertised address of a node that listens on all
	// interfaces; empty leaves it out.
	Hostname string
}

// Value is one setting with its origin.
type Value struct {
	Key    string
	Value  string
	Source string
	// Note says why a value that was given has no effect.
	Note string
	// Fault says why the value cannot be used; Value is then what was given.
	Fault string
}

// Loaded is the outcome of Load.
type Loaded struct {
	Config Config
	// File is the YAML file that was read, empty for none.
	File   string
	values []Value
}

// Values returns every setting in the order of the documentation.
func (l *Loaded) Values() []Value { return slices.Clone(l.values) }

// AddFlags registers a flag for every setting that has one, and --config.
func AddFlags(fs *pflag.FlagSet) {
	fs.StringP("config", "c", "", "YAML file; env CONVEYOR_ROUTER_CONFIG; default: the first of "+
		strings.Join(SearchPath(), ", ")+" that exists")
	for _, s := range settings() {
		if s.flag == "" {
			continue
		}
		usage := s.usage
		if s.def != "" {
			usage += " (default " + s.def + ")"
		}
		// Flags are kept as text: the same parser then serves flag, variable
		// and file, and their faults are reported together.
		if s.list {
			fs.StringArrayP(s.flag, s.short, nil, usage)
		} else {
			fs.StringP(s.flag, s.short, "", usage)
			if s.isBool {
				fs.Lookup(s.flag).NoOptDefVal = "true"
			}
		}
	}
}

// Load collects the settings of one node and checks them. Its error is of type
// Faults and lists everything that is wrong; the result is then nil.
func Load(in Input) (*Loaded, error) {
	l, faults := collect(in)
	if len(faults) > 0 {
		return nil, faults
	}
	return l, nil
}

// Explain returns every setting with its origin, also when Load would refuse
// them: whoever looks for a fault needs to see what was found where.
func Explain(in Input) ([]Value, Faults) {
	l, faults := collect(in)
	for _, f := range faults {
		for i := range l.values {
			if v := &l.values[i]; v.Key == f.Key && v.Fault == "" {
				v.Fault = f.Text
			}
		}
	}
	return l.values, faults
}

func collect(in Input) (*Loaded, Faults) {
	var faults Faults
	list := settings()
	table := make(map[string]*setting, len(list))
	for _, s := range list {
		table[s.key] = s
	}
	env := environment(in.Environ)
	env.check(table, &faults)

	l := &Loaded{}
	file := map[string]entry{}
	if l.File = configFile(in, env, &faults); l.File != "" {
		file = readFile(l.File, table, &faults)
	}
	pod := derive(env, func(key string) bool {
		_, ok := lookup(table[key], in.Flags, env, file)
		return ok
	}, &faults)

	for _, s := range list {
		e, given := lookup(s, in.Flags, env, file)
		if !given {
			e, given = pod[s.key]
		}
		if !given {
			e = entry{where: "default"}
			if s.def != "" {
				e.texts = []string{s.def}
			}
		}
		v := s.bind(&l.Config)
		shown := ""
		for i, text := range e.texts {
			if err := v.parse(text); err != nil {
				// Not what is bound: that may still be a default.
				shown = strings.Join(e.texts, ",")
				where := e.where
				if i < len(e.at) {
					where = e.at[i]
				}
				faults.add(where, s.key, "%v", err)
			}
		}
		// A default without effect is not worth a line.
		if given || s.unused == "" {
			l.values = append(l.values, Value{Key: s.key, Value: cmp.Or(shown, v.show()), Source: e.where, Note: s.unused})
		}
	}
	l.complete(in, &faults)
	return l, faults
}

// lookup finds the strongest source that gives s a value, defaults aside.
func lookup(s *setting, flags *pflag.FlagSet, env variables, file map[string]entry) (entry, bool) {
	if flags != nil && s.flag != "" {
		if f := flags.Lookup(s.flag); f != nil && f.Changed {
			e := entry{where: "flag --" + s.flag, texts: []string{f.Value.String()}}
			if list, ok := f.Value.(pflag.SliceValue); ok {
				e.texts = nil
				for _, text := range list.GetSlice() {
					e.texts = append(e.texts, splitList(text)...)
				}
			}
			return e, true
		}
	}
	names := []string{s.env()}
	if s.original {
		names = append(names, s.originalEnv())
	}
	for _, name := range names {
		if text, ok := env[name]; ok {
			e := entry{where: "env " + name, texts: []string{text}}
			if s.list {
				e.texts = splitList(text)
			}
			return e, true
		}
	}
	e, ok := file[s.key]
	return e, ok
}

func splitList(text string) []string {
	var parts []string
	for _, part := range strings.Split(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}

func configFile(in Input, env variables, faults *Faults) string {
	if in.Flags != nil {
		if f := in.Flags.Lookup("config"); f != nil && f.Changed {
			return existing(f.Value.String(), "flag --config", faults)
		}
	}
	if name, ok := env["CONVEYOR_ROUTER_CONFIG"]; ok {
		return existing(name, "env CONVEYOR_ROUTER_CONFIG", faults)
	}
	for _, name := range in.Search {
		if _, err := os.Stat(name); err == nil {
			return name
		}
	}
	return ""
}

// existing refuses a file that was named and is not there: going on with the
// defaults would start a node nobody described.
func existing(name, where string, faults *Faults) string {
	if _, err := os.Stat(name); err != nil {
		reason := err
		var pathErr *os.PathError
		if errors.As(err, &pathErr) {
			reason = pathErr.Err
		}
		faults.add(where, "", "the file %q cannot be read: %v", name, reason)
		return ""
	}
	return name
}

type variables map[string]string

func environment(environ []string) variables {
	env := variables{}
	for _, pair := range environ {
		if name, text, ok := strings.Cut(pair, "="); ok {
			env[name] = text
		}
	}
	return env
}

// serviceLink matches what Kubernetes puts into the environment of every pod
// for a Service that happens to be called conveyor-router.
var serviceLink = regexp.MustCompile(`_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// check refuses variables with our prefixes that mean nothing: a misspelt name
// would otherwise leave a default in force unnoticed.
func (env variables) check(table map[string]*setting, faults *Faults) {
	known := map[string]bool{
		"CONVEYOR_ROUTER_CONFIG": true,
		"CONVEYOR_ROUTER_SERVER": true, // of the client commands
	}
	var names []string
	for _, s := range table {
		known[s.env()] = true
		names = append(names, s.env())
		if s.original {
			known[s.originalEnv()] = true
			names = append(names, s.originalEnv())
		}
	}
	slices.Sort(names)
	var unknown []string
	for name := range env {
		ours := strings.HasPrefix(name, "CONVEYOR_ROUTER_") && !serviceLink.MatchString(name)
		if (ours || strings.HasPrefix(name, "ETL_ROUTER__")) && !known[name] {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	for _, name := range unknown {
		faults.add("env "+name, "", "unknown variable%s", nearest(name, names))
	}
}

// complete fills what follows from other settings and checks what only shows
// when they are seen together.
func (l *Loaded) complete(in Input, faults *Faults) {
	c := &l.Config
	joins := len(c.Join) > 0
	if joins && !faults.about("peers", "join") && slices.ContainsFunc(c.Peers, func(p Peer) bool { return p.ID != c.NodeID }) {
		faults.add(l.source("join", ""), "join", "and peers are both given: a node that joins learns its peers from the cluster, "+
			"a node that founds one has nothing to join")
	}
	if c.ReadReplica && !joins && !faults.about("read_replica", "join") {
		faults.add(l.source("read_replica", ""), "read_replica", "needs --join: a node that founds a cluster votes")
	}
	if c.NodeID == 0 && !joins && !faults.about("node_id", "join") {
		faults.add(l.source("node_id", "flag --node-id"), "node_id",
			"is missing: give every node its own id, 1 or more (in a StatefulSet it follows from POD_NAME and REPLICAS); "+
				"a node whose id the cluster chose is always started with --join")
	}
	if c.Raft.HeartbeatInterval*2 > c.Raft.ElectionTimeout && !faults.about("cluster.heartbeat_interval_ms", "cluster.election_timeout_min_ms") {
		faults.add(l.source("cluster.heartbeat_interval_ms", ""), "cluster.heartbeat_interval_ms",
			"%s is more than half of the election timeout of %s (%s): one late heartbeat would start an election",
			c.Raft.HeartbeatInterval, c.Raft.ElectionTimeout, l.source("cluster.election_timeout_min_ms", ""))
	}
	if c.Raft.TickInterval > c.Raft.HeartbeatInterval && !faults.about("raft.tick_interval", "cluster.heartbeat_interval_ms") {
		faults.add(l.source("raft.tick_interval", ""), "raft.tick_interval",
			"%s is longer than the heartbeat interval of %s", c.Raft.TickInterval, c.Raft.HeartbeatInterval)
	}
	if c.Liveness.SuspectAfter <= c.Liveness.HeartbeatInterval && !faults.about("liveness.suspect_after", "liveness.heartbeat_interval") {
		faults.add(l.source("liveness.suspect_after", ""), "liveness.suspect_after",
			"%s is not longer than liveness.heartbeat_interval, %s: everything would be suspect all the time",
			c.Liveness.SuspectAfter, c.Liveness.HeartbeatInterval)
	}
	if r := c.Liveness.ServiceRetention; r > 0 && r < c.Liveness.ExpireAfter && !faults.about("liveness.service_retention", "liveness.expire_after") {
		faults.add(l.source("liveness.service_retention", ""), "liveness.service_retention",
			"%s is shorter than liveness.expire_after, %s", c.Liveness.ServiceRetention, c.Liveness.ExpireAfter)
	}
	if c.Liveness.ExpireAfter <= c.Liveness.SuspectAfter && !faults.about("liveness.expire_after", "liveness.suspect_after") {
		faults.add(l.source("liveness.expire_after", ""), "liveness.expire_after",
			"%s is not longer than liveness.suspect_after, %s", c.Liveness.ExpireAfter, c.Liveness.SuspectAfter)
	}
	if d := c.Placement.BalanceInterval; d > 0 && d < time.Second && !faults.about("placement.balance_interval") {
		faults.add(l.source("placement.balance_interval", ""), "placement.balance_interval", "%s is shorter than a second; 0s turns it off", d)
	}
	if every := c.Backup.Every; every > 0 && !faults.about("backup.every", "backup.to") {
		switch {
		case every < time.Minute:
			faults.add(l.source("backup.every", ""), "backup.every", "%s is shorter than a minute", every)
		case c.Backup.To == "":
			faults.add(l.source("backup.every", ""), "backup.every", "is set without backup.to: it is not known where to")
		}
	}
	if c.ListenAddr == c.RaftAddr && !strings.HasSuffix(c.ListenAddr, ":0") && !faults.about("listen_addr", "raft_addr") {
		faults.add(l.source("raft_addr", ""), "raft_addr", "is the same address as listen_addr, %s", c.ListenAddr)
	}
	if c.NodeID == 0 && !joins || faults.about("peers", "listen_addr", "raft_addr", "advertise_addr", "advertise_raft_addr") {
		return
	}
	// Lists without the node itself are what the original took, so self may be
	// missing; but an odd number of others is a whole cluster, and to found one of
	// an even number is what a wrong id looks like.
	if n := len(c.Peers); !joins && n >= 3 && n%2 == 1 && !slices.Contains(c.Members(), c.NodeID) {
		faults.add(l.source("peers", ""), "peers", "node %d, as which this node is started (%s), is not among them (%s): list every voter, this node too; "+
			"a node that is added to a running cluster is started with --join in place of --peers",
			c.NodeID, l.source("node_id", "flag --node-id"), ids(c.Members()))
		return
	}
	l.addresses(in)
	slices.SortFunc(c.Peers, func(a, b Peer) int { return cmp.Compare(a.ID, b.ID) })
	for _, p := range c.Peers {
		if p.ID != c.NodeID && p.Addr == c.AdvertiseRaftAddr {
			faults.add(l.source("peers", ""), "peers", "node %d has the address of this node, %s", p.ID, p.Addr)
		}
	}
	l.refresh("peers", "advertise_addr", "advertise_raft_addr")
}

// ids lists node ids for people.
func ids(list []uint64) string {
	parts := make([]string, len(list))
	for i, id := range list {
		parts[i] = strconv.FormatUint(id, 10)
	}
	return strings.Join(parts, ", ")
}

// addresses settles what this node is reached at and makes it its own peer.
func (l *Loaded) addresses(in Input) {
	c := &l.Config
	self := slices.IndexFunc(c.Peers, func(p Peer) bool { return p.ID == c.NodeID })
	switch {
	case c.AdvertiseRaftAddr != "" && self >= 0:
		c.Peers[self].Addr = c.AdvertiseRaftAddr
	case c.AdvertiseRaftAddr == "" && self >= 0:
		c.AdvertiseRaftAddr = c.Peers[self].Addr
	case c.AdvertiseRaftAddr == "":
		c.AdvertiseRaftAddr = reachable(c.RaftAddr, in.Hostname)
	}
	if self < 0 && c.NodeID != 0 {
		c.Peers = append(c.Peers, Peer{ID: c.NodeID, Addr: c.AdvertiseRaftAddr})
	}
	if c.AdvertiseAddr == "" {
		// The name peers know the machine by is the best guess for clients too.
		host, _, _ := net.SplitHostPort(c.AdvertiseRaftAddr)
		if unspecified(host) {
			host = in.Hostname
		}
		c.AdvertiseAddr = reachable(c.ListenAddr, host)
	}
}

// reachable replaces the host of an address that listens on all interfaces.
func reachable(listen, host string) string {
	h, port, _ := net.SplitHostPort(listen)
	if unspecified(h) && host != "" {
		return net.JoinHostPort(host, port)
	}
	return listen
}

func (l *Loaded) source(key, missing string) string {
	for _, v := range l.values {
		if v.Key == key {
			if v.Source == "default" && missing != "" {
				return missing
			}
			return v.Source
		}
	}
	return missing
}

// refresh shows the completed values; what was not given says it was derived.
func (l *Loaded) refresh(keys ...string) {
	for _, s := range settings() {
		if !slices.Contains(keys, s.key) {
			continue
		}
		i := slices.IndexFunc(l.values, func(v Value) bool { return v.Key == s.key })
		if text := s.bind(&l.Config).show(); text != l.values[i].Value && l.values[i].Source == "default" {
			l.values[i].Source = "derived"
			l.values[i].Value = text
		} else {
			l.values[i].Value = text
		}
	}
}

// about tells whether one of the keys already has a fault; a second one that
// only follows from it would hide what to do.
func (f Faults) about(keys ...string) bool {
	return slices.ContainsFunc(f, func(fault Fault) bool {
		return slices.ContainsFunc(keys, func(key string) bool {
			return fault.Key == key || aliases[fault.Key] == key
		})
	})
}

func number(text string) (uint64, bool) {
	n, err := strconv.ParseUint(text, 10, 32)
	return n, err == nil
}
