package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
)

const (
	// forwardFrameBytes is the size up to which waiting commands go into one
	// frame.
	forwardFrameBytes = 1 << 20
	// maxBeatsQueued bounds the heartbeats that wait for a stream; those beyond
	// are reported as not taken.
	maxBeatsQueued = 1 << 16
	// beatsPerFrame bounds those in one frame, about 1 MiB of the longest ids.
	beatsPerFrame = 2048
)

// forwardStream carries commands to one leader and the results back. It lives
// until it breaks or the leader changes.
type forwardStream struct {
	f      *Forwarder
	to     uint64
	ctx    context.Context
	cancel context.CancelCauseFunc
	wake   chan struct{}

	mu sync.Mutex
	// retired takes no more operations; broken has ended.
	retired, broken bool
	queue           []*operation
	queueBytes      int64
	beats           []*peerpb.Beat
	// flight holds what was handed to the network, by id, until it is
	// answered. Invariant: an operation is in queue, or in flight, or not of
	// this stream; whoever removes it resolves it.
	flight map[uint64]*operation
	nextID uint64
	// draining: nothing more will be sent. drained is closed when, then,
	// nothing is in flight any more.
	draining bool
	drained  chan struct{}
	// grace ends a retired stream.
	grace *time.Timer
}

func newForwardStream(f *Forwarder, leader uint64) *forwardStream {
	ctx, cancel := context.WithCancelCause(f.ctx)
	return &forwardStream{
		f:       f,
		to:      leader,
		ctx:     ctx,
		cancel:  cancel,
		wake:    make(chan struct{}, 1),
		flight:  map[uint64]*operation{},
		drained: make(chan struct{}),
	}
}

// open reports whether the stream still takes operations.
func (s *forwardStream) open() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.retired && !s.broken
}

// push queues op; when the stream cannot take it, op is resolved or waits for
// another.
func (s *forwardStream) push(op *operation) {
	s.mu.Lock()
	switch {
	case s.retired || s.broken:
		s.mu.Unlock()
		s.f.park(op, ErrUnreachable)
		return
	case len(s.queue) >= s.f.c.MaxWaiting ||
		len(s.queue) > 0 && s.queueBytes+int64(op.size) > s.f.c.MaxWaitingBytes:
		s.mu.Unlock()
		s.f.finish(op, nil, 0, op.truthful(raftnode.ErrBusy))
		return
	}
	s.queue = append(s.queue, op)
	s.queueBytes += int64(op.size)
	first := len(s.queue) == 1
	s.mu.Unlock()
	if first {
		s.poke()
	}
}

// pushBeats queues heartbeats; false when the stream cannot take them.
func (s *forwardStream) pushBeats(beats []*peerpb.Beat) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired || s.broken || len(s.beats)+len(beats) > maxBeatsQueued {
		return false
	}
	s.beats = append(s.beats, beats...)
	s.poke()
	return true
}

func (s *forwardStream) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// retire ends the stream once what is in flight is answered, or after a while.
// It does not block.
func (s *forwardStream) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired || s.broken {
		return
	}
	s.retired = true
	// A timer, because the sender may be stuck in the network.
	s.grace = time.AfterFunc(s.f.c.RetireGrace, func() { s.cancel(errRetired) })
	s.poke()
}

// run connects and sends until the stream breaks or is retired, and resolves
// everything it was given.
func (s *forwardStream) run() {
	err := s.serve()
	s.cancel(err)
	s.mu.Lock()
	s.broken = true
	queue, flight, retired := s.queue, s.flight, s.retired
	s.queue, s.flight, s.beats = nil, nil, nil
	if s.grace != nil {
		s.grace.Stop()
	}
	s.mu.Unlock()
	if !retired {
		s.f.failed(s)
		if s.f.ctx.Err() == nil {
			s.f.c.Logger.Warn("the stream of commands to the leader broke", "leader", s.to, "err", err,
				"not_sent", len(queue), "outcome_unknown", len(flight))
		}
	}
	for _, op := range queue {
		s.f.park(op, fmt.Errorf("%w: %w", ErrUnreachable, err))
	}
	for _, op := range flight {
		// It was handed to the network: it may be in the leader's log.
		s.f.answered(op, nil, 0, fmt.Errorf("%w: the connection to the leader (node %d) broke: %w",
			raftnode.ErrAmbiguous, s.to, err))
	}
}

// serve returns why the stream ended, never nil.
func (s *forwardStream) serve() error {
	conn, err := s.f.c.Transport.connect(s.to)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := s.greet(conn)
	if err != nil {
		return cause(s.ctx, err)
	}
	s.f.connected()
	s.f.c.Logger.Debug("commands go to the leader", "leader", s.to)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.cancel(s.receiveLoop(stream)) })
	err = s.sendLoop(stream)
	s.cancel(err)
	return context.Cause(s.ctx)
}

// greet opens the stream and exchanges greetings.
func (s *forwardStream) greet(conn *grpc.ClientConn) (grpc.ClientStream, error) {
	t := s.f.c.Transport
	timeout := time.AfterFunc(2*t.o.DialTimeout, func() {
		s.cancel(fmt.Errorf("rpc: no greeting from node %d within %v", s.to, 2*t.o.DialTimeout))
	})
	defer timeout.Stop()
	stream, err := peerpb.NewPeerClient(conn).Forward(s.ctx)
	if err != nil {
		return nil, fromPeer(s.to, err)
	}
	err = stream.Send(&peerpb.ForwardRequest{Hello: t.identity().hello(s.to)})
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fromPeer(s.to, err)
	}
	var in resultsIn
	if err := stream.RecvMsg(&in); err != nil {
		return nil, fromPeer(s.to, err)
	}
	if err := t.checkAnswer(in.hello, s.to); err != nil {
		return nil, err
	}
	t.learn(in.hello)
	return stream, nil
}

// errRetired ends a stream whose leader is none any more.
var errRetired = errors.New("rpc: the leader changed")

func (s *forwardStream) sendLoop(stream grpc.ClientStream) error {
	var frame commandsOut
	for {
		queue, beats, retired := s.take()
		if retired {
			// What was not sent goes to the new leader at once.
			for _, op := range queue {
				s.f.park(op, raftnode.ErrNoLeader)
			}
			if len(queue) > 0 {
				s.f.poke()
			}
			return s.drain(stream)
		}
		for len(queue) > 0 || len(beats) > 0 {
			frame.ops, queue = s.board(queue)
			n := min(len(beats), beatsPerFrame)
			frame.beats, beats = beats[:n], beats[n:]
			if len(frame.ops) == 0 && n == 0 {
				continue // all were given up
			}
			if err := stream.SendMsg(&frame); err != nil {
				s.putBack(queue)
				if errors.Is(err, io.EOF) {
					// receiveLoop learns the reason.
					<-s.ctx.Done()
					return context.Cause(s.ctx)
				}
				return fromPeer(s.to, err)
			}
		}
		select {
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		case <-s.wake:
		}
	}
}

// take returns everything that waits.
func (s *forwardStream) take() (queue []*operation, beats []*peerpb.Beat, retired bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	queue, beats = s.queue, s.beats
	s.queue, s.queueBytes, s.beats = nil, 0, nil
	return queue, beats, s.retired
}

// putBack returns what was taken and not sent, for run to resolve.
func (s *forwardStream) putBack(queue []*operation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = append(queue, s.queue...)
}

// board moves operations for one frame from queue into flight, and returns them
// and the rest. From here on their outcome is unknown until they are answered,
// whatever becomes of the frame.
func (s *forwardStream) board(queue []*operation) (frame, rest []*operation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size := 0
	// frame grows within the memory of queue: it never overtakes what is read.
	frame = queue[:0]
	for i, op := range queue {
		if size > 0 && size+op.size > forwardFrameBytes {
			return frame, queue[i:]
		}
		if !op.begin() {
			continue
		}
		size += op.size + 16
		s.nextID++
		op.id = s.nextID
		s.flight[op.id] = op
		frame = append(frame, op)
	}
	return frame, nil
}

// drain waits for the answers to what is in flight, until grace ends the
// stream.
func (s *forwardStream) drain(stream grpc.ClientStream) error {
	if err := stream.CloseSend(); err != nil {
		return err
	}
	s.mu.Lock()
	s.draining = true
	if len(s.flight) == 0 {
		close(s.drained)
	}
	s.mu.Unlock()
	select {
	case <-s.drained:
		return errRetired
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func (s *forwardStream) receiveLoop(stream grpc.ClientStream) error {
	var in resultsIn
	for {
		if err := stream.RecvMsg(&in); err != nil {
			return fromPeer(s.to, err)
		}
		for i := range in.results {
			r := &in.results[i]
			op := s.land(r.id)
			if op == nil {
				return fmt.Errorf("%w: a result of command %d, which is not in flight", ErrMalformed, r.id)
			}
			if r.failure == 0 && r.result != nil {
				s.f.answered(op, r.result, r.index, nil)
			} else {
				s.f.answered(op, nil, 0, errorOf(r, s.to))
			}
			*r = forwardedResult{}
		}
	}
}

// land takes the operation id out of flight.
func (s *forwardStream) land(id uint64) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	op := s.flight[id]
	delete(s.flight, id)
	if s.draining && len(s.flight) == 0 && op != nil {
		close(s.drained)
	}
	return op
}
