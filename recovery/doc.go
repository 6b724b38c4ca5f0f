// Package recovery makes copies of the replicated state and puts them back.
//
// A snapshot is made by the node that is asked, of its own state, and lies
// there. A restore goes through the log, so that every replica comes to the same
// state at the same index and nobody is restarted:
//
//  1. verify: everything in the snapshot is read, decoded and compared with its
//     counters and hash, before anything is proposed.
//  2. stage: its records are proposed in chunks, which every replica keeps aside.
//     Reads, writes and watches go on.
//  3. prepare: once all are there, every replica builds the new state out of them
//     and says so.
//  4. swap: one command puts the new state in the place of the old one. The old
//     one stays on every node as the undo point.
//
// The node that holds the snapshot carries the restore out. It is an operation
// in the replicated state: whoever leads sees when its node has stopped for good
// and takes the staged chunks away again; a node that comes back in time goes on
// where it was. Up to the swap, which is one log entry, nothing has happened;
// after it, everything has.
//
// The package runs one goroutine for each restore of this node, and two in Run.
package recovery
