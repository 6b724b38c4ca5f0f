// Package control holds the loops that only the leader runs: placement, which
// decides what every sidecar runs of every pipeline; liveness, which decides
// which sidecars and services are still there; and the comparison of the members'
// states.
//
// The first two read the replicated state, decide outside of it, and propose commands.
// Neither ever changes the state by itself, so a loop that dies, runs twice or
// runs on a node that wrongly believes it leads can waste proposals but cannot
// do harm: every command carries what it was decided from, and the state
// machine checks it again.
//
// # Placement
//
// Package placement decides, and says what a plan holds to. Placer keeps a mirror of
// the state in front of it while this node leads: the state is read once, then its
// changes are followed, each plan costs what they concern, and the difference is
// proposed. Plan does the same for one Input, as a pure function. Study, which is for
// every node, keeps a mirror while somebody asks, and says why stages are where they
// are and what would come of a change.
//
// What must not run twice is handed over in two steps (handovers.go), the second once
// the state says that the first has taken effect; moves that nothing forces wait for a
// budget (budget.go).
//
// # Liveness
//
// Heartbeats live in the leader's memory and never enter the log; only
// transitions (suspect, expired, alive again) become commands. Invariants:
//
//  1. Nobody is given up by a node that does not lead. A decision waits for a
//     quorum that confirms the leader after the lease ran out, and names the
//     term, so that it does nothing in the log of a later leader.
//  2. Nobody is given up by a leader that could not hear them. One that was
//     stopped, and one that has just been elected, lets everybody beat first.
//  3. A change of leader neither forgets how long somebody has been silent nor
//     shortens a lease, by more than one period. Once a period the leader tells
//     the other nodes who has missed a heartbeat (Digest); what they received
//     and passed on lately they tell the next leader again. Without a recent
//     digest everybody has a full lease.
//  4. Of more than a share of all that fall silent at once nobody is given up
//     for a while, then slowly: what looks like the death of everybody is a cut
//     network, as a rule, and moving all of their work makes it an outage.
//
// # Comparison
//
// Checker compares the sums that the members keep of their states. Judge is a
// pure function of what they report. It acts on a majority only, of sums at one
// index of one epoch and of equally many tables; a difference without a majority
// is looked at twice, then makes everybody stop answering. What is to follow
// from a finding is done by the node that differs, after it has looked itself.
package control
