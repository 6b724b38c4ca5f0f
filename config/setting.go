package config

import (
	"strings"
	"time"
)

// setting is one row of the table of everything that can be set: the one place
// that ties a YAML key to its flag, its variables, its default and its field.
type setting struct {
	key   string // path in the YAML file, sections separated by dots
	flag  string
	short string
	usage string
	def   string
	// original marks a key of the original router: ETL_ROUTER__... is read too.
	original bool
	// unused is non-empty for a key that is accepted for the sake of existing
	// files and has no effect; it says why.
	unused string
	isBool bool // the flag alone means true
	list   bool // a repeatable flag, a YAML list, comma-separated in a variable
	bind   func(*Config) value
}

// env returns the name of the setting's environment variable.
func (s *setting) env() string {
	return "CONVEYOR_ROUTER_" + strings.ToUpper(strings.ReplaceAll(s.key, ".", "_"))
}

// originalEnv returns the variable the original read for this key.
func (s *setting) originalEnv() string {
	return "ETL_ROUTER__" + strings.ToUpper(strings.ReplaceAll(s.key, ".", "__"))
}

// alias maps the flat keys the Kubernetes operator writes to their settings.
var aliases = map[string]string{
	"election_timeout_ms":   "cluster.election_timeout_min_ms",
	"heartbeat_interval_ms": "cluster.heartbeat_interval_ms",
	"snapshot_interval":     "cluster.snapshot_interval",
}

const (
	notBuffered    = "records never pass through the router, so it has no buffers"
	notMessageSize = "a request is at most 4 MiB, and no record passes through the router"
	notKeepalive   = "connections are probed after 30 s of silence, with 10 s to answer"
	notMetrics     = "this version has no metrics listener"
)

// settings returns the table, in the order help and explain show it.
func settings() []*setting {
	return []*setting{
		{key: "node_id", flag: "node-id", short: "n", usage: "id of this node, 1 or more, unique in the cluster",
			bind: func(c *Config) value { return unsigned{&c.NodeID, 0, maxUint} }},
		{key: "cluster_name", flag: "cluster-name", def: "conveyor", usage: "name of the cluster; two clusters need two names",
			bind: func(c *Config) value { return name{&c.ClusterName} }},
		{key: "listen_addr", flag: "listen-addr", short: "l", def: "127.0.0.1:50051", usage: "host:port to serve clients on",
			bind: func(c *Config) value { return listen{&c.ListenAddr} }},
		{key: "raft_addr", flag: "raft-addr", def: "127.0.0.1:50052", usage: "host:port to serve other nodes on",
			bind: func(c *Config) value { return listen{&c.RaftAddr} }},
		{key: "advertise_addr", flag: "advertise-addr", usage: "host:port clients are told to use; default: derived from --listen-addr",
			bind: func(c *Config) value { return dial{&c.AdvertiseAddr} }},
		{key: "advertise_raft_addr", flag: "advertise-raft-addr", usage: "host:port other nodes are told to use; default: this node's entry in --peers, else --raft-addr",
			bind: func(c *Config) value { return dial{&c.AdvertiseRaftAddr} }},
		{key: "peers", flag: "peers", list: true, usage: "ID:HOST:PORT of a voter the cluster is founded with; repeat for each, this node too",
			bind: func(c *Config) value { return peers{&c.Peers} }},
		{key: "join", flag: "join", list: true, usage: "host:port of the client listener of a member; the node joins its cluster instead of founding one; repeat for more; of no meaning once it has joined",
			bind: func(c *Config) value { return dials{&c.Join} }},
		{key: "read_replica", flag: "read-replica", def: "false", isBool: true, usage: "with --join: stay a learner, which serves reads and does not vote",
			bind: func(c *Config) value { return boolean{&c.ReadReplica} }},
		{key: "auto_promote", flag: "auto-promote", def: "true", isBool: true, usage: "the leader makes learners that have caught up voters, except read replicas",
			bind: func(c *Config) value { return boolean{&c.AutoPromote} }},
		{key: "data_dir", flag: "data-dir", def: "./data", usage: "directory of everything this node keeps",
			bind: func(c *Config) value { return path{&c.DataDir} }},
		{key: "shutdown_timeout", flag: "shutdown-timeout", def: "20s", usage: "bound of an orderly stop",
			bind: func(c *Config) value { return span{&c.ShutdownTimeout, time.Nanosecond, time.Second, time.Hour} }},

		{key: "log.level", flag: "log-level", def: "info", usage: "debug, info, warn or error",
			bind: func(c *Config) value { return level{&c.LogLevel} }},
		{key: "log.format", flag: "log-format", def: "text", usage: "text or json",
			bind: func(c *Config) value { return choice{&c.LogFormat, []string{"text", "json"}} }},

		{key: "debug_addr", flag: "debug-addr", usage: "host:port on loopback that serves profiles (/debug/pprof); default: none",
			bind: func(c *Config) value { return loopback{&c.DebugAddr} }},

		{key: "cluster.election_timeout_min_ms", flag: "election-timeout-ms", def: "150", original: true,
			usage: "milliseconds without a leader before an election; each node draws from one to two times this",
			bind: func(c *Config) value {
				return span{&c.Raft.ElectionTimeout, time.Millisecond, 20 * time.Millisecond, time.Minute}
			}},
		{key: "cluster.election_timeout_max_ms", def: "300", original: true,
			unused: "the timeout is drawn from one to two times election_timeout_min_ms",
			usage:  "accepted for existing files",
			bind:   func(*Config) value { return ignoredInteger() }},
		{key: "cluster.heartbeat_interval_ms", flag: "heartbeat-interval-ms", def: "50", original: true,
			usage: "milliseconds between heartbeats of the leader",
			bind: func(c *Config) value {
				return span{&c.Raft.HeartbeatInterval, time.Millisecond, time.Millisecond, 30 * time.Second}
			}},
		{key: "cluster.snapshot_interval", def: "10000", original: true,
			unused: "the state is on disk at all times, so no periodic snapshot is needed; raft.tail_bytes bounds the log",
			usage:  "accepted for existing files",
			bind:   func(*Config) value { return ignoredInteger() }},
		{key: "cluster.max_entries_per_append", def: "100", original: true,
			unused: "messages to followers are bounded in bytes: raft.max_append_bytes",
			usage:  "accepted for existing files",
			bind:   func(*Config) value { return ignoredInteger() }},

		{key: "raft.tick_interval", flag: "raft-tick-interval", def: "10ms", usage: "grain of the election timeout and of the heartbeat",
			bind: func(c *Config) value {
				return span{&c.Raft.TickInterval, time.Nanosecond, time.Millisecond, time.Second}
			}},
		{key: "raft.tail_bytes", flag: "raft-tail-bytes", def: "32MiB", usage: "size at which the log is cut; half of it is kept for followers that were away",
			bind: func(c *Config) value { return bytesI{&c.Raft.TailBytes, 1 << 20, 1 << 34} }},
		{key: "raft.max_append_bytes", flag: "raft-max-append-bytes", def: "1MiB", usage: "bound of one message of entries to a follower",
			bind: func(c *Config) value { return bytesU{&c.Raft.MaxAppendBytes, 64 << 10, 64 << 20} }},
		{key: "raft.segment_bytes", flag: "raft-segment-bytes", def: "16MiB", usage: "size of one file of the log",
			bind: func(c *Config) value { return bytesI{&c.Raft.SegmentBytes, 1 << 20, 1 << 30} }},

		{key: "store.memtable_bytes", flag: "store-memtable-bytes", def: "32MiB", usage: "memory that gathers changes before they become a file",
			bind: func(c *Config) value { return bytesI{&c.Store.MemTableBytes, 1 << 20, 1 << 30} }},
		{key: "store.cache_bytes", flag: "store-cache-bytes", def: "64MiB", usage: "memory that caches the state on disk",
			bind: func(c *Config) value { return bytesI{&c.Store.CacheBytes, 1 << 20, 1 << 36} }},
		{key: "store.hot_bytes", flag: "store-hot-bytes", def: "16MiB", usage: "memory for offsets and watermarks that are written again and again",
			bind: func(c *Config) value { return bytesI{&c.Store.HotBytes, 64 << 10, 1 << 34} }},
		{key: "store.record_bytes", flag: "store-record-bytes", def: "64MiB", usage: "memory for records that are read again and again",
			bind: func(c *Config) value { return bytesI{&c.Store.RecordBytes, 64 << 10, 1 << 36} }},
		{key: "store.history_bytes", flag: "store-history-bytes", def: "32MiB", usage: "recent changes kept for watches that resume",
			bind: func(c *Config) value { return bytesI{&c.Store.HistoryBytes, 64 << 10, 1 << 34} }},

		{key: "liveness.heartbeat_interval", flag: "liveness-heartbeat-interval", def: "10s", usage: "how often sidecars and services are asked to show that they live",
			bind: func(c *Config) value {
				return span{&c.Liveness.HeartbeatInterval, time.Nanosecond, 100 * time.Millisecond, time.Hour}
			}},
		{key: "liveness.suspect_after", flag: "liveness-suspect-after", def: "30s", usage: "silence after which a sidecar gets nothing more to do",
			bind: func(c *Config) value {
				return span{&c.Liveness.SuspectAfter, time.Nanosecond, 100 * time.Millisecond, time.Hour}
			}},
		{key: "liveness.expire_after", flag: "liveness-expire-after", def: "45s", usage: "silence after which a sidecar or service counts as gone and its work is moved",
			bind: func(c *Config) value {
				return span{&c.Liveness.ExpireAfter, time.Nanosecond, 100 * time.Millisecond, 240 * time.Hour}
			}},
		{key: "liveness.mass_expiry_percent", flag: "liveness-mass-expiry-percent", def: "50", usage: "share of all sidecars that may be given up within expire_after; if more fall silent at once all of them keep their work for a while; 100 = no limit",
			bind: func(c *Config) value { return unsigned{&c.Liveness.MassExpiryPercent, 1, 100} }},
		{key: "liveness.mass_expiry_hold", flag: "liveness-mass-expiry-hold", def: "0s", usage: "how long they keep it; after that a hundredth of the fleet is given up every second; 0s = ten times expire_after",
			bind: func(c *Config) value {
				return span{&c.Liveness.MassExpiryHold, time.Nanosecond, 0, 240 * time.Hour}
			}},
		{key: "liveness.service_retention", flag: "liveness-service-retention", def: "0s", usage: "how long a service that has expired stays registered, so that its next heartbeat brings it back; after that it has to register again; not shorter than expire_after; 0s = 24h, or expire_after when that is longer",
			bind: func(c *Config) value {
				return span{&c.Liveness.ServiceRetention, time.Nanosecond, 0, 8760 * time.Hour}
			}},

		{key: "placement.handover_timeout", flag: "placement-handover-timeout", def: "0s", usage: "how long a sidecar that drains or loses a source has to confirm that it let go of it, before another one is given it; 0s = liveness.expire_after, at most 1h",
			bind: func(c *Config) value {
				return span{&c.Placement.HandoverTimeout, time.Nanosecond, 0, time.Hour}
			}},
		{key: "placement.moves_per_minute", flag: "placement-moves-per-minute", def: "600", usage: "stages that may be moved in a minute although nothing forces it; what is lost or drained is not held back; 0 = no limit",
			bind: func(c *Config) value { return unsigned{&c.Placement.MovesPerMinute, 0, 1_000_000} }},
		{key: "placement.balance_interval", flag: "placement-balance-interval", def: "30s", usage: "how often stages that run well are moved to less loaded sidecars, such as ones that have joined, within moves_per_minute; 0s = never",
			bind: func(c *Config) value {
				return span{&c.Placement.BalanceInterval, time.Nanosecond, 0, 24 * time.Hour}
			}},
		{key: "placement.flap_grace", flag: "placement-flap-grace", def: "1m", usage: "how long a sidecar keeps its stages that expires again within ten times this of the last time",
			bind: func(c *Config) value {
				return span{&c.Placement.FlapGrace, time.Nanosecond, time.Second, time.Hour}
			}},

		{key: "backup.keep_snapshots", flag: "backup-keep-snapshots", def: "16", usage: "snapshots of the state a node keeps; the oldest goes when one more is made",
			bind: func(c *Config) value { return unsigned{&c.Backup.KeepSnapshots, 1, 10_000} }},
		{key: "backup.max_bytes", flag: "backup-max-bytes", def: "64GiB", usage: "bound of all snapshots of a node together; one more is refused",
			bind: func(c *Config) value { return bytesI{&c.Backup.MaxBytes, 1 << 20, 1 << 44} }},
		{key: "backup.every", flag: "backup-every", def: "0s", usage: "how often the leader backs the state up to --backup-to; 0s = never",
			bind: func(c *Config) value { return span{&c.Backup.Every, time.Nanosecond, 0, 8760 * time.Hour} }},
		{key: "backup.to", flag: "backup-to", usage: "where to: a directory, file://, s3://, gs:// or azblob:// address",
			bind: func(c *Config) value { return destination{&c.Backup.To} }},
		{key: "backup.keep", flag: "backup-keep", def: "10", usage: "how many of these backups are kept there; 0 = all",
			bind: func(c *Config) value { return unsigned{&c.Backup.Keep, 0, 10_000} }},
		{key: "check.interval", flag: "check-interval", def: "5s", usage: "how often the leader compares the states of the members; 0 only when asked to",
			bind: func(c *Config) value {
				return span{&c.Check.Interval, time.Nanosecond, 0, time.Hour}
			}},

		{key: "grpc.max_message_size", def: "4194304", original: true, unused: notMessageSize, usage: "accepted for existing files",
			bind: func(*Config) value { return ignoredInteger() }},
		{key: "grpc.keepalive_interval_secs", def: "30", original: true, unused: notKeepalive, usage: "accepted for existing files",
			bind: func(*Config) value { return ignoredInteger() }},
		{key: "grpc.keepalive_timeout_secs", def: "10", original: true, unused: notKeepalive, usage: "accepted for existing files",
			bind: func(*Config) value { return ignoredInteger() }},
		{key: "buffer.max_total_records", def: "1000000", original: true, unused: notBuffered, usage: "accepted for existing files",
			bind: func(*Config) value { return ignoredInteger() }},
		{key: "buffer.max_per_source", def: "100000", original: true, unused: notBuffered, usage: "accepted for existing files",
			bind: func(*Config) value { return ignoredInteger() }},
		{key: "buffer.max_per_stage", def: "100000", original: true, unused: notBuffered, usage: "accepted for existing files",
			bind: func(*Config) value { return ignoredInteger() }},
		{key: "buffer.backpressure_threshold", def: "0.8", original: true, unused: notBuffered, usage: "accepted for existing files",
			bind: func(*Config) value { return &ignored{check: isFloat} }},
		{key: "buffer.backpressure_resume_threshold", def: "0.6", original: true, unused: notBuffered, usage: "accepted for existing files",
			bind: func(*Config) value { return &ignored{check: isFloat} }},
		{key: "metrics.enabled", def: "false", original: true, unused: notMetrics, usage: "accepted for existing files",
			bind: func(*Config) value { return &ignored{check: isBool} }},
		{key: "metrics.listen_addr", def: "0.0.0.0:9090", original: true, unused: notMetrics, usage: "accepted for existing files",
			bind: func(*Config) value { return &ignored{check: isListen} }},
	}
}
