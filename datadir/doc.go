// Package datadir is what everybody who touches the data directory of a node
// has to agree on: its layout, the lock that says who may, the file that says
// whose it is, and how its content is replaced as a whole.
//
//	IDENTITY         whose data this is; written once, checked at every start
//	LOCK             held by the one process that uses the directory
//	JOINING          only while the node joins: what it remembers meanwhile
//	PEERS            which data directory every other node came with first
//	wal/             the replicated log
//	state/           the replicated state
//	images/          images of the state, received or to be sent
//	QUARANTINE       only while the state must not be used, and why
//	state.diverged-* the last state that was wrong, for a post-mortem
//	backups/         snapshots kept for users
//	.next/           content being made that will replace the present one
//	.decided/        the same, from the moment it is in force
//	.before-recover/ what a recovery replaced, until somebody removes it
//
// It knows nothing of what is in the log, the state and the images. It is a
// package of its own, and not part of server, because the tools that work on
// the directory of a node that does not run must follow the same rules.
package datadir
