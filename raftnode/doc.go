// Package raftnode turns "replicate these bytes" into "applied at index i, with
// result r" on every node of a group.
//
// It drives go.etcd.io/raft over a durable Log, a StateMachine, a store of images
// and a Transport. It knows nothing of what commands mean, of sockets, or of how
// the state is stored.
//
//	n, err := raftnode.New(cfg, machine, log, recovered, images, transport)
//	go func() { failed <- n.Run(ctx) }()
//	res, err := n.Propose(ctx, command)   // replicated and applied here
//	index, err := n.ReadIndex(ctx)        // a read of the state is now linearizable
//
// # Invariants
//
//  1. An answer raft attached to a write leaves only after that write, and all
//     before it, are durable (as far as the answer rests on them).
//  2. Entries are applied in order, each once, only when committed and locally
//     durable. The state's position moves with its effects.
//  3. Every caller gets exactly one outcome, and it is true: a result means
//     applied, an error for which NotDone holds means never, any other unknown.
//  4. The log is truncated only up to what the state machine holds durably.
//  5. A received image replaces the state before it replaces the log; every crash
//     in between is found and finished by New.
//  6. Whatever fails in log or state machine ends the node. Nothing is retried
//     that raft believes done.
//
// # Goroutines
//
//	loop       owns the RawNode; does no IO and waits for nobody
//	appender   owns the write side of the log; may wait for the applier (images)
//	applier    owns the write side of the state machine; may wait for the loop
//	truncator  shortens the log
//	images     builds images and clears them away; senders, a few, stream them
//
// Nobody waits in a circle: loop <- applier <- appender.
//
// The steps these goroutines take are plain functions. Tests call them one by one
// and decide the order of everything; see DESIGN.md.
package raftnode
