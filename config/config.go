package config

import (
	"log/slog"
	"time"
)

// Config holds the settings of one node. It comes out of Load complete and
// checked; change a copy only.
type Config struct {
	// NodeID is the raft id of the node, never zero.
	NodeID uint64
	// ClusterName names the cluster for people; nodes of one cluster agree on it.
	ClusterName string
	// DataDir is the directory of everything the node keeps.
	DataDir string
	// Peers are all members of the cluster at its first start, the node itself
	// included, sorted by id.
	Peers []Peer
	// Join are client addresses of members of a cluster that the node joins when
	// its directory is empty; Peers is then the node itself at most, and NodeID 0
	// lets the cluster choose.
	Join []string
	// ReadReplica: a node that joins stays a learner.
	ReadReplica bool
	// AutoPromote: as the leader, the node makes learners that have caught up
	// voters.
	AutoPromote bool

	// ListenAddr is where clients connect, RaftAddr where other nodes do.
	ListenAddr string
	RaftAddr   string
	// AdvertiseAddr and AdvertiseRaftAddr are what others are told to dial.
	AdvertiseAddr     string
	AdvertiseRaftAddr string

	// DebugAddr serves profiles, only on loopback; empty for none.
	DebugAddr string

	LogLevel  slog.Level
	LogFormat string // "text" or "json"

	Raft     Raft
	Store    Store
	Liveness Liveness
	// Placement is how stages move between sidecars.
	Placement Placement
	Backup    Backup
	Check     Check
	// ShutdownTimeout bounds an orderly stop as a whole.
	ShutdownTimeout time.Duration
}

// Peer is one member of the cluster and the address its peers reach it at.
type Peer struct {
	ID   uint64
	Addr string
}

// Raft holds the settings of the replication.
type Raft struct {
	// ElectionTimeout is the least time without a leader before a node stands
	// for election; each node draws from [ElectionTimeout, 2*ElectionTimeout).
	ElectionTimeout time.Duration
	// HeartbeatInterval is how often a leader shows that it is there.
	HeartbeatInterval time.Duration
	// TickInterval is the grain of both.
	TickInterval time.Duration
	// TailBytes of log start a truncation; half of it stays, so that a follower
	// that was away for a while needs no image.
	TailBytes int64
	// MaxAppendBytes bounds one message of entries to a follower.
	MaxAppendBytes uint64
	// SegmentBytes is the size of one file of the log.
	SegmentBytes int64
}

// Store holds the settings of the state on disk.
type Store struct {
	MemTableBytes int64
	CacheBytes    int64
	// HotBytes bounds records kept decoded because they change all the time.
	HotBytes int64
	// RecordBytes bounds records kept in memory because they are read.
	RecordBytes int64
	// HistoryBytes bounds the changes kept for watches that resume.
	HistoryBytes int64
}

// Placement holds how stages move between sidecars.
type Placement struct {
	// HandoverTimeout is how long a sidecar is waited for that was told to let go of
	// a stage which must not run twice; zero is Liveness.ExpireAfter.
	HandoverTimeout time.Duration
	// MovesPerMinute bounds the moves that nothing forces; 0 = no bound.
	MovesPerMinute uint64
	// BalanceInterval is how often stages are moved for balance alone; 0 = never.
	BalanceInterval time.Duration
	// FlapGrace is how long a sidecar that expires again soon keeps its stages.
	FlapGrace time.Duration
}

// Liveness holds what the leader expects of sidecars and services.
type Liveness struct {
	// HeartbeatInterval is how often they are asked to show that they live.
	HeartbeatInterval time.Duration
	// SuspectAfter is the silence after which a sidecar gets nothing more to do.
	SuspectAfter time.Duration
	// ExpireAfter is the silence after which it counts as gone and its work is
	// moved elsewhere.
	ExpireAfter time.Duration
	// MassExpiryPercent of all that may expire within ExpireAfter; more are held
	// back. 100 = any number.
	MassExpiryPercent uint64
	// MassExpiryHold is for how long; zero is ten times ExpireAfter.
	MassExpiryHold time.Duration
	// ServiceRetention is how long a service that has expired stays registered; zero is
	// 24 h, or ExpireAfter when that is longer.
	ServiceRetention time.Duration
}

// Check holds how the states of the members are compared.
type Check struct {
	// Interval is the time between two comparisons, zero for none.
	Interval time.Duration
}

// Members returns the ids of c.Peers in order.
func (c *Config) Members() []uint64 {
	ids := make([]uint64, len(c.Peers))
	for i, p := range c.Peers {
		ids[i] = p.ID
	}
	return ids
}

// Backup holds what a node does about copies of the state.
type Backup struct {
	// KeepSnapshots is how many snapshots a node keeps, MaxBytes bounds them
	// together.
	KeepSnapshots uint64
	MaxBytes      int64
	// Every is how often the leader makes a backup by itself, to To, where it
	// keeps the newest Keep; zero = never.
	Every time.Duration
	To    string
	Keep  uint64
}
