// Package offline is what is done to a data directory while no node runs on it:
// looking at the state, checking everything, saving a backup, making a new
// cluster from one, and going on without the members that are lost.
//
// # Rules
//
//  1. A directory on which a node runs is refused. The lock of the directory
//     decides, and is held for as long as the directory is used. Images may be
//     checked beside a running node: they never change.
//  2. What only looks changes nothing: it takes a shared lock that leaves no
//     trace and reads through a file system that refuses every change.
//  3. What changes a directory makes the new content beside the old and puts it
//     in force by one rename (datadir.Replacement). After a crash either the
//     old or the new is in force.
//  4. A directory made here belongs to a new cluster: nodes of the old one and
//     of the new refuse to talk to each other.
//
// Nothing here is for a running node, and nothing here starts goroutines that
// outlive a call.
package offline
