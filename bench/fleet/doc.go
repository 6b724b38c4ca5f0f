// Package fleet puts a fleet of simulated sidecars on a running cluster and
// measures how the cluster bears it.
//
// Every simulated sidecar speaks the RPCs of a real one: it registers, sends
// heartbeats, and learns what to run either from the answers to them, as the
// sidecars in the field do, or by a watch. What it was told is kept and compared
// with what the cluster holds in the end, so that speed is never bought with a
// lost change.
//
// # Cost of a sidecar
//
// A sidecar that only sends heartbeats is an entry of a timer wheel and a few
// words of state; some workers make the calls of all of them. Only one that
// watches has goroutines, for its stream. So 100,000 fit one process.
//
// # What a latency is
//
// From commit to receipt: from the time with which the deciding node stamped the
// change, before it went into the log, to the time the watcher held it. Both
// clocks are that of this machine when the cluster runs on it; across machines
// the figure is as good as their clocks agree.
package fleet
