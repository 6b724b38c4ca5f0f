// Package e2e holds the tests that treat the router as its users meet it: the
// real binary, real disks, real sockets, and faults that happen to real
// clusters. It imports the wire contract and nothing of the production code.
//
// A [Cluster] runs n processes of the binary. With Options.Proxied every
// connection between two nodes goes through a [Link] of its own, which can be
// cut, silenced or slowed in one direction. A [History] records each call with
// what its caller learned of it (done, refused, unknown) and is checked
// against the sequential [PipelineModel] and [OffsetModel] with porcupine.
//
// [Sidecars] is a fleet of simulated sidecars, of which half are as those in the
// field and half watch. Each judges what it is told as it is told it, and a checker
// compares what each node shows, revision by revision, with what must never be
// (TestFleetUnderFaults).
//
// Crash points: TestCrashPoints runs a binary built with the tag "crashpoints",
// which kills itself at a chosen durable step. CONVEYOR_E2E_BIN and
// CONVEYOR_E2E_CRASH_BIN name binaries to use instead of building them.
//
// Every random choice comes from a seed that the test logs; -seed replays it.
// BUGS.md lists the bugs these tests have found and how to see each again.
package e2e
