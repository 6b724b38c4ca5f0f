// Package server assembles one node: it opens the data directory, wires the
// log, the state, the images, raft and the listeners together, and starts and
// stops them in order. It is a package of its own, and not part of the serve
// command, so that the demo cluster and the tests run the very same node.
//
// Package datadir describes the data directory.
//
// # Start and stop
//
// A node starts from the disk outwards: lock, identity, log, state, images,
// peers, raft, clients. It stops in the reverse order, each step bounded:
// health turns to NOT_SERVING, leadership moves to another node, client streams
// end, raft stops, the log and the state are closed, the lock is released.
package server
