// Package wal is the raft log of one node: durable on disk, readable in memory.
//
// It keeps entries, the hard state and the positions the log may be started
// from in etcd's write-ahead log format, and serves the tail that raft still
// needs from memory. It is not a state machine, takes no snapshots and knows
// nothing about the content of an entry.
//
//	l, rec, err := wal.Open(dir, id, start, wal.Options{Logger: lg})
//	...
//	err = l.Append(hs, ents, true) // one write, at most one fsync
//
// # Invariants
//
//  1. What Append(sync=true), InstallSnapshot and Compact returned nil for is
//     found again by the next Open, whenever the process or the machine stops.
//  2. Entries are readable only after they were written, and before the caller
//     can step the responses that wait for them.
//  3. The log is contiguous: an Append that would leave a gap, rewrite a
//     committed entry or let terms go down is refused before the first byte.
//  4. Commit never goes back on disk and never points past the last entry.
//     The entries of an Append precede its hard state on disk.
//  5. Every Append that carries entries ends with a hard state record and one
//     fsync. So an entry found behind "entry, hard state" proves that
//     everything before was synced once; Open uses that to tell a write that
//     was cut short by a power loss (cut off, once) from rot (refused). The
//     limit of it: rot that looks like missing sectors or a broken length in the
//     last two appends has no such proof behind it and is cut off. A commit or
//     an applied index past the end of the log then still tells.
//  6. A start record (etcd calls it a snapshot record) counts only when it was
//     complete: either the log held that very entry, committed, or the hard
//     state that commits it follows at once. A crash between the two records
//     of InstallSnapshot therefore leaves the old log in force.
//  7. A start record past the commit, whose entry the log does not hold, empties
//     the log. Entries written before it do not come back at the next Open. One
//     up to the commit is that of a Compact; in the oldest segment its entry may
//     be gone with the segments before, and a later start record is in force.
//  8. A segment is deleted only when a newer start record is durable, oldest
//     first. Deletion never touches a file Append may write.
//  9. After a failed write or fsync the Log is failed for good: the kernel may
//     have dropped the dirty pages, so a second fsync that succeeds proves
//     nothing. Every later call returns the first error.
//  10. A segment to come holds nothing but zeros, written ones if it can be (see
//     spares); what a crash left of one that had begun is removed by Open.
//
// # Goroutines
//
// Append and InstallSnapshot belong to one goroutine (the appender), Compact to
// another (the truncator); a mutex orders their writes, and Compact holds it
// for at most one fsync. The readers of raft.Storage may run anywhere; they take
// only the lock of the tail, which is never held across IO. Each Log has two
// further goroutines: one of etcd's package, that preallocates the next segment,
// and one that has written the one after it before.
//
// # Metadata
//
// Every segment begins with the identity of its owner as JSON with a format
// number. A log of another node or cluster, or of a newer format, is refused.
package wal
