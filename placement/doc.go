// Package placement decides which sidecar runs which stage of which pipeline. It
// is arithmetic and nothing else: it knows neither clock nor randomness, neither
// the state machine nor the network, and imports nothing of this module.
//
// Compute plans a whole View; an Engine keeps the indexes of one and plans only
// what an event concerns. Both solve one pipeline at a time with the same code,
// so whatever holds for one holds for the other. What plans leave uneven Balance
// evens, now and then and so many moves at a time:
//
//	e := placement.NewEngine(view)
//	e.PutSidecar(s)          // an event
//	plan := e.Plan()         // what to change, the most urgent first
//	e.PutAssignment(a)       // what became of it
//	e.Balance(limits)         // what gives a share to who has joined
//
// # What a plan aims at, in this order
//
//  1. Every stage of every enabled pipeline runs somewhere if any candidate is
//     left, as far as no batch could come back to a sidecar it has passed.
//  2. The edges of a pipeline stay within one pod, else one node, else one zone,
//     on sidecars that have not yet had their share (see shares).
//  3. Load by capacity is even.
//  4. Nothing moves that need not.
//
// # Invariants of a plan
//
//  1. A sidecar is given its own stages and the direct downstream stages that
//     run elsewhere, nothing else.
//  2. Within a pipeline the graph "sidecar A has a remote entry at sidecar B" has
//     no cycle: a sidecar runs its whole table again on a batch that was
//     forwarded to it, so a cycle would pass one batch round for ever.
//  3. A stage stays where it is while its sidecar is alive, suspect or in grace and
//     still offers the service, unless another stage could then be placed nowhere
//     at all, or its sidecar drains and somebody else can take it. No plan moves what
//     runs well for balance alone: it looks after balance where something has to be
//     placed anyway, and Balance does the rest.
//  4. A source stage is handed out only when every stage downstream of it has a
//     sidecar: a sidecar acknowledges a batch when the stages of its own table are
//     done, so a gap further down would lose records in silence. Without an
//     assignment it holds its source back instead.
//  5. Planning again after a plan was carried out changes nothing.
//  6. Equal views, in any order, give equal plans, byte for byte.
//
// # How it is fast
//
// Ids and names are interned, everything points by position. Sidecars that offer
// the same to all pipelines share a profile, as the pods of one deployment do; a
// profile keeps its members by zone and node under a tournament tree over their
// load, so that "the least loaded in that zone" is a few comparisons. A pipeline
// then looks at profiles, not at sidecars.
//
// An Engine belongs to one goroutine at a time.
package placement
