// Package rpc is the edge of a node: the public API for sidecars, services,
// operators and tools, and the traffic between the nodes of a cluster.
//
// It translates and decides nothing. What a command does is up to package
// router, whether and when it is done to package raftnode; this package checks
// the shape and size of requests, stamps into commands what depends on the
// moment (time, ids), brings them to whoever leads, brings local state up to
// what a read may see, and says truthfully what became of a call.
//
// The parts, of which package server makes a node:
//
//	Server         the public API: every service under conveyor_etl.* and
//	               conveyor.*, health, reflection
//	Submitter      brings a command to the leader; Forwarder is one
//	Reader         makes a local read linearizable, or as stale as asked for
//	Beats          brings heartbeats to the leader; they are never commands
//	PeerTransport  raft messages and images to the other nodes
//	PeerServer     the other end of that
//	NewStateMachine  router.FSM as raftnode drives it
//	DiskGuard      refuses growth before the disk is full
//	Status         the one place where an error becomes a gRPC code
//
// Invariants:
//
//  1. UNAVAILABLE means certainly not done. An outcome that is not known is
//     called unknown, never retryable and never failed.
//  2. A call that asks for less than linearizable says so in its metadata;
//     every answer carries the revision it reflects.
//  3. Nothing here grows with time or with slow clients: watches hold at most
//     one outstanding state each, Commit streams are not read beyond their
//     bound, queues to peers are bounded in bytes.
//  4. A watch never has a gap. What it cannot tell one by one it announces as
//     RESYNC (or OUT_OF_RANGE) and the whole state follows.
//  5. Heartbeats, and calls that would change nothing, never reach the log.
//
// Goroutines: a Server has one that follows the change feed for all watchers and
// one for health; a Commit stream has two beside its handler's; a transport has a
// few per peer. Shutdown and Close end them and wait.
package rpc
