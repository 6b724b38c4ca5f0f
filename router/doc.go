// Package router is the replicated state of the cluster: a state machine over
// Pebble that turns committed commands into effects, and the views and change
// feed everybody else reads it through.
//
// It knows nothing of raft, gRPC or clocks. The log hands it commands
// (commandpb.Command) in order; what a command does depends on the state and
// the command alone, so that every replica computes the same.
//
//	f, err := router.Open(vfs.Default, dir, router.Options{Bootstrap: start})
//	results, err := f.Apply(entries)     // one goroutine
//	v := f.View()                        // any goroutine; Close it
//	sub, err := f.Hub().Subscribe(v.Revision())
//	im, err := router.OpenImage(vfs.Default, dir, router.Options{}) // a backup
//
// Invariants:
//
//  1. The effects of an entry and its index are in one Pebble batch: what is
//     found on disk is always the state after some entry, never between two.
//  2. Pebble's own log is off. A crash loses the memtables; the raft log
//     replays them. So nothing may be cut from the raft log that Durable does
//     not cover.
//  3. An error from Apply means this replica must stop. A refusal is a
//     Rejection in the result: state, not an error, and the same everywhere.
//  4. The order of everything that reaches the disk, a result or a subscriber
//     comes from the log or from sorted keys, never from a Go map.
//  5. The state may be replaced by a backup, through the log: the epoch says how
//     often. What was read in another epoch is of another state.
//  6. No collection in memory grows with the state: the hot records, the
//     watermark index and the history of changes are all bounded.
//
// Goroutines: the package starts none of its own. Apply, ApplyMembership and
// Install exclude each other; all else may be called at any time. Prepare works
// long, on the goroutine of its caller.
package router
