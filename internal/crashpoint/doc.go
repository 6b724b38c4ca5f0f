// Package crashpoint ends the process at chosen steps of its work on disk, so
// that tests of the whole binary can die exactly between two of them.
//
// It does so only in binaries built with the tag "crashpoints". In all others
// every function is empty and CONVEYOR_CRASH_AT is not looked at: a production
// binary that can be told to kill itself would be one more way to lose a node.
//
// CONVEYOR_CRASH_AT=<point> or <point>:<n> kills the process at the n-th
// passing of the point (default the first) with SIGKILL: no deferred call runs,
// no buffer is written, just as when somebody else kills it. Returning an error
// at the point would be simpler and would test the error paths instead.
//
// CONVEYOR_DIVERGE_AT=<index> makes this replica apply one entry, the first at or
// after the index, other than all the others do.
package crashpoint
