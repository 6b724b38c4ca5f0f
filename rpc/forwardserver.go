package rpc

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/grpc"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/peerpb"
)

// resultsPerFrame bounds the results in one frame. A result is small except
// for that of a large join; this keeps a frame far under the message limit.
const resultsPerFrame = 4096

// Forward implements peerpb.PeerServer: it proposes the commands of another
// node here, and only here. A command is passed on once: were this node to
// forward it in turn, two nodes with different ideas of who leads would send it
// back and forth.
func (s *PeerServer) Forward(stream peerpb.Peer_ForwardServer) error {
	var in commandsIn
	if err := stream.RecvMsg(&in); err != nil {
		return err
	}
	from := in.hello.GetNodeId()
	done, err := s.greet(in.hello, false)
	if err != nil {
		return err
	}
	defer done()
	if err := stream.Send(&peerpb.ForwardResponse{Hello: s.c.Transport.identity().hello(from)}); err != nil {
		return err
	}

	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	out := &outbox{wake: make(chan struct{}, 1), sent: s.answered}
	s.mu.Lock()
	s.outboxes[out] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.outboxes, out)
		s.mu.Unlock()
		s.signalAnswered()
	}()
	var wg sync.WaitGroup
	wg.Go(func() { cancel(out.run(ctx, stream)) })
	for {
		for _, c := range in.commands {
			s.propose(out, c)
		}
		for _, b := range in.beats {
			if s.c.Beat != nil && (b.GetSidecarId() != "" || b.GetServiceId() != "") {
				s.c.Beat(b.GetSidecarId(), b.GetServiceId())
			}
		}
		if err = stream.RecvMsg(&in); err != nil {
			break
		}
	}
	if endOfStream(err) == nil {
		// The other node sends nothing more, but still waits for results.
		out.close()
	} else {
		cancel(err)
	}
	wg.Wait()
	err = context.Cause(ctx)
	switch {
	case errors.Is(err, errAnswered):
		return nil
	case errors.Is(err, ErrMalformed):
		return Status(err).Err()
	}
	return err
}

// Drain blocks until every command that other nodes have forwarded is answered,
// or ctx is done. It is for a node that has handed leadership over and is about
// to stop: what it still owes an answer is decided a moment after the new leader
// has taken over, and without the answer the others could only call it unknown.
//
// It refuses nothing. Once another node leads the others end their streams, so it
// waits for that as well: until they have heard of the new leader they send on.
// While this node leads there may be no moment without an open command.
func (s *PeerServer) Drain(ctx context.Context) error {
	for {
		if !s.owes() {
			return nil
		}
		select {
		case <-s.answered:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// owes reports whether any forwarded command waits for its answer to be sent, or
// one may still come although this node does not lead any more.
func (s *PeerServer) owes() bool {
	leading := s.c.Node.Leadership().Leading
	s.mu.Lock()
	defer s.mu.Unlock()
	if !leading {
		return len(s.outboxes) > 0
	}
	for out := range s.outboxes {
		if out.owes() {
			return true
		}
	}
	return false
}

func (s *PeerServer) signalAnswered() {
	select {
	case s.answered <- struct{}{}:
	default:
	}
}

// propose proposes one forwarded command.
func (s *PeerServer) propose(out *outbox, c forwardedCommand) {
	size := int64(len(c.command))
	if !out.admit(size, s.c.MaxInFlight, s.c.MaxInFlightBytes) {
		out.add(failureOf(c.id, raftnode.ErrBusy), -1)
		return
	}
	// Once in the log, what cannot be decoded would stop every replica that
	// comes to it. The other node's word is not enough: it may be of another
	// release, or have a fault.
	if err := router.CheckEncoded(c.command); err != nil {
		out.add(failureOf(c.id, fmt.Errorf("%w: %w", ErrInvalidCommand, err)), size)
		return
	}
	if err := s.c.Gate.Err(); err != nil {
		out.add(failureOf(c.id, err), size)
		return
	}
	if err := s.c.Guard.AdmitBytes(c.command); err != nil {
		out.add(failureOf(c.id, err), size)
		return
	}
	id := c.id
	s.c.Node.ProposeFunc(c.command, func(r raftnode.Result, err error) {
		if err = s.c.Gate.result(err); err != nil {
			out.add(failureOf(id, err), size)
			return
		}
		result, ok := r.Value.(*commandpb.Result)
		if !ok {
			out.add(failureOf(id, fmt.Errorf("the state machine answered a %T", r.Value)), size)
			return
		}
		out.add(forwardedResult{id: id, result: result, index: r.Index}, size)
	})
}

// errAnswered ends a stream whose client closed its side and has all results.
var errAnswered = errors.New("rpc: all commands are answered")

// outbox collects results for one stream. add is called from the goroutine that
// applies commands, so it only takes a lock; encoding and sending, as many at
// once as there are, are the stream's own affair.
type outbox struct {
	wake chan struct{}
	// sent is PeerServer.answered.
	sent chan struct{}

	mu      sync.Mutex
	results []forwardedResult
	spare   []forwardedResult
	// inFlight and inFlightBytes count admitted commands without a result.
	inFlight      int
	inFlightBytes int64
	// sending: results were taken and are not handed to the network yet.
	sending bool
	closed  bool
}

func (o *outbox) owes() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.inFlight > 0 || len(o.results) > 0 || o.sending
}

// admit counts a command of size bytes as in flight, unless that would exceed a
// limit.
func (o *outbox) admit(size int64, limit int, limitBytes int64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.inFlight >= limit || o.inFlight > 0 && o.inFlightBytes+size > limitBytes {
		return false
	}
	o.inFlight++
	o.inFlightBytes += size
	return true
}

// add queues a result; size is that of its command, negative when that was not
// admitted.
func (o *outbox) add(r forwardedResult, size int64) {
	o.mu.Lock()
	if size >= 0 {
		o.inFlight--
		o.inFlightBytes -= size
	}
	o.results = append(o.results, r)
	first := len(o.results) == 1
	o.mu.Unlock()
	if first {
		o.poke()
	}
}

func (o *outbox) poke() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// close lets run end once everything in flight has been answered.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.poke()
}

// take returns the results that wait, and whether there will be no more.
func (o *outbox) take() (results []forwardedResult, last bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	results = o.results
	o.results, o.spare = o.spare[:0], results
	o.sending = len(results) > 0
	return results, o.closed && o.inFlight == 0
}

// run sends results until ctx is done, the stream breaks, or all are sent after
// close.
func (o *outbox) run(ctx context.Context, stream grpc.ServerStream) error {
	var frame resultsOut
	for {
		results, last := o.take()
		for rest := results; len(rest) > 0; {
			n := min(len(rest), resultsPerFrame)
			frame.results = rest[:n]
			if err := stream.SendMsg(&frame); err != nil {
				return err
			}
			clear(rest[:n]) // the results are not ours to keep
			rest = rest[n:]
		}
		if len(results) > 0 {
			o.mu.Lock()
			o.sending = false
			o.mu.Unlock()
			select {
			case o.sent <- struct{}{}:
			default:
			}
		}
		if last {
			return errAnswered
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-o.wake:
		}
	}
}
