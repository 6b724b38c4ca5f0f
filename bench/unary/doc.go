// Package unary makes unary gRPC calls over plaintext HTTP/2 at a small cost to
// the caller.
//
// A load generator on the machine of the servers takes from them what it uses
// itself. gRPC's own client needs as much processor time for a small call as the
// server that answers it, so half of what is measured would be the generator, and
// two servers of which one needs half of what the other does would look nearly
// alike. A [Conn] takes a fraction of that, because it does without what a load
// has no use for: name resolution, balancing, interceptors, retries, compression,
// statistics, streams and TLS.
//
// It is not less of a client to the server: the frames are those that gRPC's
// client sends, with the same headers, HPACK-compressed against the same dynamic
// table, one stream a call, flow control kept in both directions (RFC 9113; the
// protocol of gRPC over HTTP/2). Generated stubs work on it unchanged.
package unary
