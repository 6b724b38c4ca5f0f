package config

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// load runs Load with args, environ and the text of a YAML file (none when
// empty), which is named router.yaml in faults and sources.
func load(t *testing.T, args []string, environ []string, file string) (*Loaded, error) {
	t.Helper()
	in := Input{Environ: environ, Hostname: "box"}
	if file != "" {
		name := filepath.Join(t.TempDir(), "router.yaml")
		if err := os.WriteFile(name, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		in.Search = []string{filepath.Join(filepath.Dir(name), "absent.yaml"), name}
	}
	in.Flags = pflag.NewFlagSet("test", pflag.ContinueOnError)
	AddFlags(in.Flags)
	if err := in.Flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return Load(in)
}

func find(t *testing.T, l *Loaded, key string) Value {
	t.Helper()
	for _, v := range l.Values() {
		if v.Key == key {
			v.Source = base(v.Source)
			return v
		}
	}
	t.Fatalf("no value for %s", key)
	return Value{}
}

// base drops the folder of a file name in a place.
func base(where string) string { return where[strings.LastIndexByte(where, '/')+1:] }

func TestDefaults(t *testing.T) {
	l, err := load(t, []string{"-n", "3"}, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		NodeID: 3, ClusterName: "conveyor", DataDir: "data",
		Peers:      []Peer{{3, "127.0.0.1:50052"}},
		ListenAddr: "127.0.0.1:50051", RaftAddr: "127.0.0.1:50052",
		AdvertiseAddr: "127.0.0.1:50051", AdvertiseRaftAddr: "127.0.0.1:50052",
		LogLevel: slog.LevelInfo, LogFormat: "text", AutoPromote: true,
	}
	got := l.Config
	if got.Raft.ElectionTimeout != 150*time.Millisecond || got.Raft.HeartbeatInterval != 50*time.Millisecond {
		t.Errorf("raft timing %s and %s, want the original's 150 ms and 50 ms", got.Raft.ElectionTimeout, got.Raft.HeartbeatInterval)
	}
	if p := got.Placement; p.HandoverTimeout != 0 || p.MovesPerMinute != 600 || p.BalanceInterval != 30*time.Second || p.FlapGrace != time.Minute {
		t.Errorf("placement %+v", p)
	}
	got.Raft, got.Store, got.Liveness, got.Placement, got.Backup, got.Check, got.ShutdownTimeout = Raft{}, Store{}, Liveness{}, Placement{}, Backup{}, Check{}, 0
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Every source gives one setting a value; taking away the strongest leaves the
// next one.
func TestPrecedence(t *testing.T) {
	args := []string{"--node-id=1", "--heartbeat-interval-ms=10"}
	ours := "CONVEYOR_ROUTER_CLUSTER_HEARTBEAT_INTERVAL_MS=20"
	original := "ETL_ROUTER__CLUSTER__HEARTBEAT_INTERVAL_MS=30"
	file := "cluster:\n  heartbeat_interval_ms: 40\n"
	for _, c := range []struct {
		name   string
		args   []string
		env    []string
		file   string
		want   time.Duration
		source string
	}{
		{"flag", args, []string{ours, original}, file, 10, "flag --heartbeat-interval-ms"},
		{"our variable", args[:1], []string{original, ours}, file, 20, "env CONVEYOR_ROUTER_CLUSTER_HEARTBEAT_INTERVAL_MS"},
		{"the original's variable", args[:1], []string{original}, file, 30, "env ETL_ROUTER__CLUSTER__HEARTBEAT_INTERVAL_MS"},
		{"file", args[:1], nil, file, 40, "router.yaml:2"},
		{"default", args[:1], nil, "", 50, "default"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := load(t, c.args, c.env, c.file)
			if err != nil {
				t.Fatal(err)
			}
			if got := l.Config.Raft.HeartbeatInterval; got != c.want*time.Millisecond {
				t.Errorf("got %s, want %d ms", got, c.want)
			}
			if v := find(t, l, "cluster.heartbeat_interval_ms"); v.Source != c.source {
				t.Errorf("source %q, want %q", v.Source, c.source)
			}
		})
	}
}

// A weaker source must not leak into a list a stronger one gives.
func TestPeersAreReplacedNotMerged(t *testing.T) {
	l, err := load(t, []string{"-n", "1", "--peers", "2:b:7", "--peers", "1:a:7"}, []string{"CONVEYOR_ROUTER_PEERS=8:x:1"}, "peers: [\"9:y:1\"]\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Peer{{1, "a:7"}, {2, "b:7"}}, l.Config.Peers); diff != "" {
		t.Error(diff)
	}
}

func TestPeersWithAndWithoutSelf(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want []Peer
	}{
		{"with itself", []string{"--peers", "1:a:1", "--peers", "2:b:1", "--peers", "3:c:1"}, []Peer{{1, "a:1"}, {2, "b:1"}, {3, "c:1"}}},
		{"without itself", []string{"--raft-addr", "10.0.0.1:9", "--peers", "3:c:1", "--peers", "2:b:1"}, []Peer{{1, "10.0.0.1:9"}, {2, "b:1"}, {3, "c:1"}}},
		{"on all interfaces", []string{"--raft-addr", "0.0.0.0:9", "--peers", "2:b:1"}, []Peer{{1, "box:9"}, {2, "b:1"}}},
		{"advertised", []string{"--raft-addr", ":9", "--advertise-raft-addr", "me:5", "--peers", "2:b:1"}, []Peer{{1, "me:5"}, {2, "b:1"}}},
		{"commas", []string{"--peers", "1:a:1,2:b:1, 3:[::1]:1"}, []Peer{{1, "a:1"}, {2, "b:1"}, {3, "[::1]:1"}}},
		{"alone", nil, []Peer{{1, "127.0.0.1:50052"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := load(t, append([]string{"-n", "1"}, c.args...), nil, "")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, l.Config.Peers); diff != "" {
				t.Error(diff)
			}
			if l.Config.AdvertiseRaftAddr != c.want[0].Addr {
				t.Errorf("advertised %s, want %s", l.Config.AdvertiseRaftAddr, c.want[0].Addr)
			}
		})
	}
}

// The files existing installations have start a node.
func TestOriginalFile(t *testing.T) {
	l, err := load(t, []string{"-n", "1"}, nil, `cluster:
  election_timeout_min_ms: 200
  election_timeout_max_ms: 400
  heartbeat_interval_ms: 60
  snapshot_interval: 5000
  max_entries_per_append: 100
buffer:
  max_total_records: 1000000
  max_per_source: 100000
  max_per_stage: 100000
  backpressure_threshold: 0.8
  backpressure_resume_threshold: 0.6
grpc:
  max_message_size: 67108864
  keepalive_interval_secs: 10
  keepalive_timeout_secs: 5
metrics:
  enabled: true
  listen_addr: "0.0.0.0:9090"
`)
	if err != nil {
		t.Fatal(err)
	}
	if l.Config.Raft.ElectionTimeout != 200*time.Millisecond || l.Config.Raft.HeartbeatInterval != 60*time.Millisecond {
		t.Errorf("values of the file are not in force: %+v", l.Config)
	}
	if v := find(t, l, "buffer.max_per_stage"); v.Note == "" || v.Source != "router.yaml:10" {
		t.Errorf("an unused key is not explained: %+v", v)
	}
}

// What the operator mounts and sets is enough to start, without arguments.
func TestOperatorPod(t *testing.T) {
	env := []string{"POD_NAME=orders-router-2", "REPLICAS=3", "HEADLESS_SERVICE=orders-router-headless",
		"NAMESPACE=prod", "CLUSTER_NAME=orders-router"}
	file := "election_timeout_ms: 1000\nheartbeat_interval_ms: 100\nsnapshot_interval: 10000\n"
	l, err := load(t, nil, env, file)
	if err != nil {
		t.Fatal(err)
	}
	c := l.Config
	if c.NodeID != 3 || c.ListenAddr != "0.0.0.0:50051" || c.RaftAddr != "0.0.0.0:50052" || c.DataDir != "/data" || c.ClusterName != "prod/orders-router" {
		t.Errorf("derived %+v", c)
	}
	want := []Peer{
		{1, "orders-router-0.orders-router-headless.prod.svc:50052"},
		{2, "orders-router-1.orders-router-headless.prod.svc:50052"},
		{3, "orders-router-2.orders-router-headless.prod.svc:50052"},
	}
	if diff := cmp.Diff(want, c.Peers); diff != "" {
		t.Error(diff)
	}
	if c.AdvertiseAddr != "orders-router-2.orders-router-headless.prod.svc:50051" {
		t.Errorf("advertised %s", c.AdvertiseAddr)
	}
	if c.Raft.ElectionTimeout != time.Second || c.Raft.HeartbeatInterval != 100*time.Millisecond {
		t.Errorf("the operator's keys are not in force: %+v", c.Raft)
	}
	if v := find(t, l, "node_id"); v.Source != "pod orders-router-2" {
		t.Errorf("source of the node id: %q", v.Source)
	}

	// An explicit id means an explicit cluster.
	l, err = load(t, []string{"--node-id", "7"}, env, "")
	if err != nil {
		t.Fatal(err)
	}
	if l.Config.NodeID != 7 || l.Config.DataDir != "data" || len(l.Config.Peers) != 1 {
		t.Errorf("the pod's name outweighs --node-id: %+v", l.Config)
	}

	// What is explicit besides the id stays.
	l, err = load(t, []string{"--data-dir", "/elsewhere"}, env, "")
	if err != nil {
		t.Fatal(err)
	}
	if l.Config.NodeID != 3 || l.Config.DataDir != "/elsewhere" {
		t.Errorf("a flag lost against the pod: %+v", l.Config)
	}
}

func TestFaults(t *testing.T) {
	pod := []string{"REPLICAS=3", "HEADLESS_SERVICE=h", "NAMESPACE=n"}
	one := []string{"-n", "1"}
	for _, c := range []struct {
		name string
		args []string
		env  []string
		file string
		want []string // each fault, as "where: ... text"
	}{
		{"no id", nil, nil, "", []string{"flag --node-id: node_id: is missing"}},
		{"id zero", []string{"-n", "0"}, nil, "", []string{"flag --node-id: node_id: is missing"}},
		{"id no number", []string{"-n", "one"}, nil, "", []string{`flag --node-id: node_id: "one" is not a whole number`}},
		{"peer without id", append(one, "--peers", "host:50052"), nil, "", []string{`flag --peers: peers: "host:50052" is not ID:HOST:PORT: the id "host"`}},
		{"peer without port", append(one, "--peers", "2:host"), nil, "", []string{`flag --peers: peers: "2:host" is not ID:HOST:PORT: "host" is not HOST:PORT`}},
		{"peer zero", append(one, "--peers", "0:h:1"), nil, "", []string{`0 is no node id`}},
		{"peer port", append(one, "--peers", "2:h:70000"), nil, "", []string{`the port "70000" is not a number from 0 to 65535`}},
		{"peer port 0", append(one, "--peers", "2:h:0"), nil, "", []string{`nobody can connect to port 0`}},
		{"peer unspecified", append(one, "--peers", "2:0.0.0.0:1"), nil, "", []string{`nobody can connect to the host "0.0.0.0"`}},
		{"peer twice", append(one, "--peers", "2:a:1", "--peers", "2:b:1"), nil, "", []string{"node 2 is listed twice"}},
		{"peer address twice", append(one, "--peers", "2:a:1", "--peers", "3:a:1"), nil, "", []string{"node 2 has the same address"}},
		{"peer is me", append(one, "--raft-addr", "a:1", "--peers", "2:a:1"), nil, "", []string{"node 2 has the address of this node"}},
		{"not among the peers", []string{"-n", "4", "--peers", "1:a:1,2:b:1,3:c:1"}, nil, "",
			[]string{"flag --peers: peers: node 4, as which this node is started (flag --node-id), is not among them (1, 2, 3): list every voter, this node too"}},
		{"all peers of a list at once", append(one, "--peers", "x,2:h,3:h:1"), nil, "", []string{`"x" is not`, `"2:h" is not`}},
		{"peers in a variable", one, []string{"CONVEYOR_ROUTER_PEERS=2=h:1"}, "", []string{`env CONVEYOR_ROUTER_PEERS: peers: "2=h:1" is not ID:HOST:PORT`}},
		{"peers in a file", one, nil, "data_dir: /x\npeers:\n  - 2:h:1\n  - 3:h\n", []string{`router.yaml:4: peers: "3:h" is not`}},
		{"peers no list", one, nil, "peers: {a: b}\n", []string{"router.yaml:1: peers: must be a list"}},
		{"listen without port", append(one, "-l", "localhost"), nil, "", []string{`flag --listen-addr: listen_addr: "localhost" is not HOST:PORT`}},
		{"profiles for everybody", append(one, "--debug-addr", "0.0.0.0:6060"), nil, "", []string{`flag --debug-addr: debug_addr: "0.0.0.0:6060" is not an address of this machine alone`}},
		{"same address", append(one, "-l", "a:1", "--raft-addr", "a:1"), nil, "", []string{"raft_addr: is the same address as listen_addr"}},
		{"advertise nothing", append(one, "--advertise-addr", ":1"), nil, "", []string{"flag --advertise-addr: advertise_addr:"}},
		{"level", append(one, "--log-level", "loud"), nil, "", []string{`flag --log-level: log.level: "loud" is not one of`}},
		{"format", one, []string{"CONVEYOR_ROUTER_LOG_FORMAT=xml"}, "", []string{`env CONVEYOR_ROUTER_LOG_FORMAT: log.format: "xml" is not one of text, json`}},
		{"size", one, nil, "store:\n  cache_bytes: lots\n", []string{`router.yaml:2: store.cache_bytes: "lots" is not a size`}},
		{"size range", one, nil, "store:\n  cache_bytes: 1\n", []string{"router.yaml:2: store.cache_bytes: 1 is out of range: 1MiB to 64GiB"}},
		{"duration", one, nil, "liveness:\n  suspect_after: 10\n", []string{`router.yaml:2: liveness.suspect_after: "10" is not a duration`}},
		{"duration negative", append(one, "--election-timeout-ms", "-5"), nil, "", []string{"out of range"}},
		{"duration huge", append(one, "--election-timeout-ms", "9223372036854775807"), nil, "", []string{"out of range"}},
		{"heartbeat too slow", append(one, "--heartbeat-interval-ms", "100"), nil, "", []string{"flag --heartbeat-interval-ms: cluster.heartbeat_interval_ms: 100ms is more than half of the election timeout of 150ms (default)"}},
		{"tick too slow", append(one, "--raft-tick-interval", "60ms"), nil, "", []string{"flag --raft-tick-interval: raft.tick_interval: 60ms is longer"}},
		{"suspicion before a heartbeat is due", one, nil, "liveness:\n  suspect_after: 5s\n", []string{"router.yaml:2: liveness.suspect_after: 5s is not longer"}},
		{"expiry before suspicion", one, nil, "liveness:\n  expire_after: 1s\n", []string{"router.yaml:2: liveness.expire_after: 1s is not longer"}},
		{"retention before expiry", one, nil, "liveness:\n  service_retention: 30s\n", []string{"router.yaml:2: liveness.service_retention: 30s is shorter than liveness.expire_after, 45s"}},
		{"retention out of range", append(one, "--liveness-service-retention", "9000h"), nil, "", []string{"liveness.service_retention: 9000h0m0s is out of range"}},
		{"unused key, bad value", one, nil, "buffer:\n  max_per_stage: many\nmetrics:\n  enabled: perhaps\n", []string{
			`router.yaml:2: buffer.max_per_stage: "many" is not a whole number`, `router.yaml:4: metrics.enabled: "perhaps" is not true or false`}},
		{"unknown key", one, nil, "# a comment\nnode_di: 1\n", []string{"router.yaml:2: node_di: unknown key; did you mean node_id?"}},
		{"unknown key in a section", one, nil, "cluster:\n  heartbeat_interval: 5\n", []string{"router.yaml:2: cluster.heartbeat_interval: unknown key; did you mean cluster.heartbeat_interval_ms?"}},
		{"key in the wrong section", one, nil, "raft:\n  cache_bytes: 64MiB\n", []string{"router.yaml:2: raft.cache_bytes: unknown key; did you mean store.cache_bytes?"}},
		{"unknown section", one, nil, "nonsense:\n  x: 1\n", []string{"router.yaml:1: nonsense: unknown key"}},
		{"key twice", one, nil, "data_dir: a\ndata_dir: b\n", []string{"router.yaml:2: data_dir: is set twice; first at"}},
		{"key and its flat form", one, nil, "heartbeat_interval_ms: 5\ncluster:\n  heartbeat_interval_ms: 6\n", []string{"router.yaml:3: cluster.heartbeat_interval_ms: is set twice"}},
		{"section twice", one, nil, "log: {level: info}\nlog: {format: json}\n", []string{"router.yaml:2: log: the section stands twice"}},
		{"section as a value", one, nil, "log: info\n", []string{"router.yaml:1: section log must hold keys and values"}},
		{"value as a section", one, nil, "data_dir:\n  x: 1\n", []string{"router.yaml:2: data_dir: must be one value"}},
		{"no mapping", one, nil, "- a\n", []string{"router.yaml:1: the file must hold keys and values"}},
		{"no YAML", one, nil, "a: b\n  c: [\n", []string{"not valid YAML"}},
		{"two documents", one, nil, "data_dir: a\n---\ndata_dir: b\n", []string{"router.yaml:2: a second document"}},
		{"missing file", append(one, "--config", "absent.yaml"), nil, "", []string{`flag --config: the file "absent.yaml" cannot be read: no such file or directory`}},
		{"missing file in a variable", one, []string{"CONVEYOR_ROUTER_CONFIG=absent.yaml"}, "", []string{`env CONVEYOR_ROUTER_CONFIG: the file "absent.yaml"`}},
		{"unknown variable", one, []string{"CONVEYOR_ROUTER_DATADIR=x"}, "", []string{"env CONVEYOR_ROUTER_DATADIR: unknown variable; did you mean CONVEYOR_ROUTER_DATA_DIR?"}},
		{"unknown variable of the original", one, []string{"ETL_ROUTER__CLUSTER__HEARTBEAT=5"}, "", []string{"env ETL_ROUTER__CLUSTER__HEARTBEAT: unknown variable"}},
		{"pod without ordinal", nil, append(pod, "POD_NAME=router"), "", []string{`env POD_NAME: node_id: "router" does not end in the ordinal`}},
		{"pod beyond the replicas", nil, append(pod, "POD_NAME=router-3"), "", []string{`env POD_NAME: node_id: pod "router-3" is beyond the 3 replicas`}},
		{"bad replicas", nil, []string{"POD_NAME=r-0", "REPLICAS=three", "HEADLESS_SERVICE=h"}, "", []string{`env REPLICAS: node_id: "three" is not a number`}},
		{"no headless service", nil, []string{"POD_NAME=r-0", "REPLICAS=3"}, "", []string{"env HEADLESS_SERVICE: node_id: is missing"}},
		{"everything at once", []string{"--peers", "nobody"}, []string{"CONVEYOR_ROUTER_LOG_LEVEL=x", "ETL_ROUTER__A__B=1"},
			"nope: 1\nstore:\n  cache_bytes: x\n", []string{
				"env ETL_ROUTER__A__B: unknown variable", "router.yaml:1: nope: unknown key", `flag --peers: peers: "nobody"`,
				"env CONVEYOR_ROUTER_LOG_LEVEL: log.level:", "router.yaml:3: store.cache_bytes:", "flag --node-id: node_id: is missing"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := load(t, c.args, c.env, c.file)
			var faults Faults
			if !errors.As(err, &faults) || l != nil {
				t.Fatalf("got %v, %v, want faults", l, err)
			}
			for _, want := range c.want {
				found := false
				for _, f := range faults {
					f.Where = base(f.Where)
					found = found || strings.Contains(f.String(), want)
				}
				if !found {
					t.Errorf("no fault says %q", want)
				}
			}
			if len(faults) != len(c.want) {
				t.Errorf("%d faults, want %d", len(faults), len(c.want))
			}
			if t.Failed() {
				t.Log(err)
			}
		})
	}
}

// Kubernetes puts such variables into every pod when a Service is called
// conveyor-router, and other programs have their own.
func TestStrangeVariables(t *testing.T) {
	_, err := load(t, []string{"-n", "1"}, []string{
		"CONVEYOR_ROUTER_SERVICE_HOST=10.0.0.1", "CONVEYOR_ROUTER_SERVICE_PORT=1", "CONVEYOR_ROUTER_SERVICE_PORT_GRPC=1",
		"CONVEYOR_ROUTER_PORT=tcp://10.0.0.1:1", "CONVEYOR_ROUTER_PORT_50051_TCP_ADDR=10.0.0.1", "ETL_ROUTER_PORT=x",
		"CONVEYOR_ROUTER_SERVER=h:1", "PATH=/bin", "POD_NAME=laptop", "nonsense",
	}, "")
	if err != nil {
		t.Error(err)
	}
}

func TestEmptyAndCommentedFiles(t *testing.T) {
	for _, file := range []string{"\n", "# nothing\n", "raft:\n  # tick_interval: 5ms\n", "data_dir:\n", "---\n"} {
		if _, err := load(t, []string{"-n", "1"}, nil, file); err != nil {
			t.Errorf("file %q: %v", file, err)
		}
	}
}

func TestAnchors(t *testing.T) {
	l, err := load(t, []string{"-n", "1"}, nil, "store:\n  cache_bytes: &size 32MiB\n  memtable_bytes: *size\n")
	if err != nil {
		t.Fatal(err)
	}
	if l.Config.Store.MemTableBytes != 32<<20 {
		t.Errorf("got %d", l.Config.Store.MemTableBytes)
	}
}

// The template is a valid file that changes nothing.
func TestTemplate(t *testing.T) {
	var text bytes.Buffer
	if err := WriteTemplate(&text); err != nil {
		t.Fatal(err)
	}
	from, err := load(t, []string{"-n", "1"}, nil, text.String())
	if err != nil {
		t.Fatal(err)
	}
	without, err := load(t, []string{"-n", "1"}, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(without.Config, from.Config); diff != "" {
		t.Error(diff)
	}
}

// Each row of the table ties a key to one flag and one variable of its own.
func TestTable(t *testing.T) {
	seen := map[string]string{}
	for _, s := range settings() {
		for _, name := range []string{s.key, "--" + s.flag, "-" + s.short, s.env()} {
			if strings.Trim(name, "-") == "" {
				continue
			}
			if other, twice := seen[name]; twice {
				t.Errorf("%s and %s share %q", s.key, other, name)
			}
			seen[name] = s.key
		}
		if s.usage == "" {
			t.Errorf("%s has no help", s.key)
		}
	}
	for alias, key := range aliases {
		if seen[key] == "" {
			t.Errorf("alias %s points to the unknown key %s", alias, key)
		}
	}
}

func FuzzFile(f *testing.F) {
	f.Add("node_id: 1\npeers: [\"2:h:1\"]\n")
	f.Add("cluster: {heartbeat_interval_ms: 5}\n")
	f.Add("a: &x {b: *x}\n")
	f.Fuzz(func(t *testing.T, text string) {
		name := filepath.Join(t.TempDir(), "f.yaml")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Load(Input{Search: []string{name}})
		if err == nil && (l.Config.NodeID == 0 || len(l.Config.Peers) == 0) {
			t.Errorf("accepted without an id: %q", text)
		}
	})
}
