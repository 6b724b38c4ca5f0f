package rpc

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/peerpb"
)

// field appends a length-delimited field.
func field(b []byte, num protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, num, protowire.BytesType), value)
}

// forwardRaw opens a Forward stream from one station to another, past the
// Forwarder: it carries whatever bytes it is given.
func forwardRaw(t *testing.T, from, to *station) grpc.ClientStream {
	t.Helper()
	conn, err := from.transport.connect(to.id.NodeID)
	noError(t, err)
	t.Cleanup(func() { conn.Close() })
	stream, err := peerpb.NewPeerClient(conn).Forward(t.Context())
	noError(t, err)
	noError(t, stream.Send(&peerpb.ForwardRequest{Hello: from.id.hello(to.id.NodeID)}))
	_, err = stream.Recv()
	noError(t, err)
	return stream
}

// unknownCommands are commands no node of this release can apply.
func unknownCommands(t *testing.T) map[string][]byte {
	t.Helper()
	good, err := repeatableCommand("s").MarshalVT()
	noError(t, err)
	return map[string][]byte{
		"noise":                   {0xff, 0xff, 0xff},
		"cut short":               good[:len(good)-1],
		"operation of the future": field(nil, 60, []byte("x")),
		"one more field":          field(good[:len(good):len(good)], 60, []byte("x")),
		"field of an operation":   field(nil, 12, field(nil, 9, []byte("x"))),
		"operation of a batch":    field(nil, 34, field(nil, 1, field(nil, 9, []byte("x")))),
		"another wire type":       protowire.AppendVarint(protowire.AppendTag(nil, 12, protowire.VarintType), 1),
	}
}

// Goal: what a peer forwards and this node could not apply never gets into the
// log, where it would stop every replica for good; the peer is told that nothing
// was done. Commands before and after it are none the worse.
func TestForwardServerRefusesUnknownCommands(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	var proposed atomic.Int64
	x.two.node.propose = func(_ []byte, done func(raftnode.Result, error)) {
		proposed.Add(1)
		done(raftnode.Result{Index: 1, Value: &commandpb.Result{Revision: 1}}, nil)
	}
	x.lead(x.two, 1)
	stream := forwardRaw(t, x.station, x.two)
	good, err := repeatableCommand("s").MarshalVT()
	noError(t, err)
	for name, raw := range unknownCommands(t) {
		proposed.Store(0)
		noError(t, stream.SendMsg(&peerpb.ForwardRequest{Commands: []*peerpb.ForwardedCommand{
			{Id: 1, Command: good}, {Id: 2, Command: raw}, {Id: 3, Command: good}}}))
		failures := map[uint64]error{}
		for len(failures) < 3 {
			var in resultsIn
			noError(t, stream.RecvMsg(&in))
			for _, r := range in.results {
				failures[r.id] = nil
				if r.failure != 0 || r.result == nil {
					failures[r.id] = errorOf(&r, 2)
				}
			}
		}
		if n := proposed.Load(); n != 2 {
			t.Errorf("%s: %d commands were proposed, want 2", name, n)
		}
		if failures[1] != nil || failures[3] != nil {
			t.Errorf("%s: those beside it: %v, %v", name, failures[1], failures[3])
		}
		s := Status(failures[2])
		if s.Code() != codes.InvalidArgument || OutcomeOf(s) != NotDone || !strings.Contains(s.Message(), "node 2") {
			t.Errorf("%s: %v", name, failures[2])
		}
	}
}

// Goal: nor does this node propose, or forward, a command of its own that it
// could not apply.
func TestForwarderRefusesUnknownCommands(t *testing.T) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	var proposed atomic.Int64
	count := func(_ []byte, done func(raftnode.Result, error)) {
		proposed.Add(1)
		done(raftnode.Result{Index: 1, Value: &commandpb.Result{Revision: 1}}, nil)
	}
	x.node.propose, x.two.node.propose = count, count
	future := repeatableCommand("s")
	future.ProtoReflect().SetUnknown(field(nil, 60, []byte("x")))
	for _, leader := range []*station{x.station, x.two} {
		x.lead(leader, 1)
		a := get(t, x.submit(future))
		if !errors.Is(a.err, ErrInvalidCommand) || OutcomeOf(Status(a.err)) != NotDone {
			t.Errorf("led by node %d: %+v", leader.id.NodeID, a)
		}
		if _, err := x.f.Submit(t.Context(), future); !errors.Is(err, ErrInvalidCommand) {
			t.Errorf("led by node %d: %v", leader.id.NodeID, err)
		}
	}
	if n := proposed.Load(); n != 0 {
		t.Errorf("%d were proposed", n)
	}
}
