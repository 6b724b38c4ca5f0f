// Package bench puts load on a running cluster through its public API and
// measures what comes of it.
//
// It is not a simulator and knows no shortcut: every operation is a call of an
// ordinary gRPC stub on a connection of its own, of package unary for single
// calls and of gRPC's client for streams. Drive is the measuring loop and
// knows nothing of Conveyor, so that another system can be driven in exactly
// the same way; Run drives a router cluster.
//
// # What a latency is
//
// In the closed loop (the default) every client sends its next call when the
// last one was answered, and a latency is the time of the call. While the
// cluster stalls, such clients wait with it and send nothing, so a stall counts
// once per client however long it lasts. With a rate given (open loop) calls
// are due at fixed times, and a latency runs from the time a call was due, not
// from when a client got round to sending it: nothing is omitted. Compare
// systems in the closed loop, promise latencies from the open one.
package bench
