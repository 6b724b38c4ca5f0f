package rpc

import (
	"context"
	"errors"
	"io"
	"sync"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// commitsAPI implements Commits.
type commitsAPI struct {
	clusterpb.UnimplementedCommitsServer
	*Server
}

// Commit proposes batches in the order received and answers each once.
//
// One goroutine receives and proposes, one answers; a batch costs neither a
// goroutine nor, once the stream is warm, memory for its command. What a stream
// has in flight is bounded in batches and bytes, counted until the answer is
// handed to gRPC: beyond that it is not read, so that a client that does not
// read its answers is held up by flow control and costs nothing.
//
// A stream opened with the metadata conveyor-epoch takes it for that of its
// batches, and a batch may name another: what is of an epoch that has passed is
// refused one by one, the stream goes on.
//
// When the client closes its side every batch still gets its answer. When the
// node stops, batches in flight are answered and the stream ends with
// UNAVAILABLE: what was not answered by then is unknown to the client.
func (a *commitsAPI) Commit(stream clusterpb.Commits_CommitServer) error {
	epoch, err := requestEpoch(stream.Context())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	s := &commitStream{
		api:    a,
		stream: stream,
		epoch:  epoch,
		wake:   make(chan struct{}, 1),
		free:   make(chan struct{}, 1),
	}
	sent, received := make(chan error, 1), make(chan error, 1)
	go func() { sent <- s.answer(ctx) }()
	// The receiver has a goroutine of its own because nothing but the end of
	// the call makes Recv return, and the call shall end when the node stops.
	go func() { received <- s.receive(ctx) }()
	var end error
	select {
	case err := <-received:
		if err != nil {
			return err
		}
	case err := <-sent:
		return err
	case <-a.run.Done():
		end = errStoppingStream()
	}
	s.finish()
	if err := <-sent; err != nil {
		return err
	}
	return end
}

// commitStream is one Commit call.
type commitStream struct {
	api    *commitsAPI
	stream clusterpb.Commits_CommitServer
	epoch  *uint64       // fences the batches that name none; nil = any
	wake   chan struct{} // to answer: there is something to send, or it is over
	free   chan struct{} // to receive: something was sent

	mu       sync.Mutex
	batches  int // in flight: received and not yet answered
	bytes    int
	ready    []*commitCall // answered by the state machine, not yet sent
	finished bool          // nothing more will be received
}

// commitCall is one batch on its way; calls are pooled, and done is made once
// for each.
type commitCall struct {
	stream *commitStream
	req    clusterpb.CommitRequest
	buffer commandBuffer
	size   int
	result clusterpb.CommitResult
	done   func(*commandpb.Result, uint64, error)
}

// newCommitCall makes a call whose done reports to whatever stream it serves at
// the time.
func newCommitCall() *commitCall {
	c := new(commitCall)
	c.done = c.complete
	return c
}

func (s *Server) getCommitCall(stream *commitStream) *commitCall {
	c, ok := s.calls.Get().(*commitCall)
	if !ok {
		c = newCommitCall()
	}
	c.stream = stream
	return c
}

// maxPooledOps bounds the batch whose memory is kept for the next one.
const maxPooledOps = 256

func (s *Server) putCommitCall(c *commitCall) {
	if len(c.buffer.slots) > maxPooledOps {
		return
	}
	// Nothing of the request may live on in the pool but the bare slices.
	ops := c.req.Ops
	clear(ops)
	c.req.Reset()
	c.req.Ops = ops[:0]
	c.result.Reset()
	c.stream = nil
	s.calls.Put(c)
}

// receive reads and proposes until the client closes its side or the call ends.
func (s *commitStream) receive(ctx context.Context) error {
	for {
		c := s.api.getCommitCall(s)
		if err := s.stream.RecvMsg(&c.req); err != nil {
			s.api.putCommitCall(c)
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		c.size = c.req.SizeVT()
		if err := s.admit(ctx, c.size); err != nil {
			return err
		}
		c.result.Id = c.req.Id
		if !s.check(c) {
			s.deliver(c)
			continue
		}
		cmd := c.buffer.fill(c.req.Ops, c.req.RequestId, uint64(s.api.cfg.Now().UnixMilli()))
		if cmd.ExpectedEpoch = c.req.ExpectedEpoch; cmd.ExpectedEpoch == nil {
			cmd.ExpectedEpoch = s.epoch
		}
		s.api.cfg.Submitter.SubmitFunc(cmd, c.done)
	}
}

// admit waits until the stream may have another batch of this size in flight. It
// refuses once the stream is finished: the batch was not proposed.
func (s *commitStream) admit(ctx context.Context, size int) error {
	for {
		s.mu.Lock()
		if s.finished {
			s.mu.Unlock()
			return errStoppingStream()
		}
		// A batch larger than what is left may go alone.
		if s.batches == 0 || (s.batches < s.api.cfg.MaxInflightBatches && s.bytes+size <= s.api.cfg.MaxInflightBytes) {
			s.batches++
			s.bytes += size
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		select {
		case <-s.free:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// check refuses a malformed batch without proposing it.
func (s *commitStream) check(c *commitCall) bool {
	err := checkRequestID(c.req.RequestId)
	failed := 0
	if err == nil && c.size > MaxBatchBytes {
		err = invalid("ops", "the batch has %d bytes, the limit is %d", c.size, MaxBatchBytes)
	}
	if err == nil {
		failed, err = checkCommitOps(c.req.Ops)
	}
	if err == nil {
		return true
	}
	st := Status(err)
	c.result.Outcome = clusterpb.Outcome_OUTCOME_NOT_DONE
	c.result.Code, c.result.Message = uint32(st.Code()), st.Message()
	c.result.FailedOp = uint32(failed)
	return false
}

// complete takes the outcome of one batch. It runs on the goroutine that applies
// commands and does not block.
func (c *commitCall) complete(res *commandpb.Result, _ uint64, err error) {
	r := &c.result
	switch {
	case err != nil:
		st := Status(err)
		r.Code, r.Message = uint32(st.Code()), st.Message()
		r.Outcome = clusterpb.Outcome_OUTCOME_UNKNOWN
		if OutcomeOf(st) == NotDone {
			r.Outcome = clusterpb.Outcome_OUTCOME_NOT_DONE
		}
	case res.GetRejection() != nil:
		st := FromRejection(res.Rejection)
		r.Outcome = clusterpb.Outcome_OUTCOME_REFUSED
		r.Code, r.Message = uint32(st.Code()), st.Message()
		r.Revision, r.Epoch, r.FailedOp = res.Revision, res.Epoch, res.FailedOp
	default:
		r.Outcome = clusterpb.Outcome_OUTCOME_DONE
		r.Revision, r.Epoch = res.GetRevision(), res.GetEpoch()
		c.stream.api.commits.Add(uint64(len(c.req.Ops)))
	}
	c.stream.deliver(c)
}

func (s *commitStream) deliver(c *commitCall) {
	s.mu.Lock()
	s.ready = append(s.ready, c)
	first := len(s.ready) == 1
	s.mu.Unlock()
	if first {
		s.signal()
	}
}

func (s *commitStream) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// finish lets answer return once everything in flight is answered.
func (s *commitStream) finish() {
	s.mu.Lock()
	s.finished = true
	s.mu.Unlock()
	s.signal()
}

// maxResultsPerMessage keeps an answer far below the size clients accept.
const maxResultsPerMessage = 4096

// answer sends what has been decided, everything there is in one message, until
// the stream is finished and nothing is in flight.
func (s *commitStream) answer(ctx context.Context) error {
	var calls []*commitCall
	var resp clusterpb.CommitResponse
	for {
		s.mu.Lock()
		calls, s.ready = s.ready, calls[:0]
		over := s.finished && s.batches == len(calls)
		s.mu.Unlock()
		if err := s.send(&resp, calls); err != nil {
			return err
		}
		clear(calls)
		if over {
			return nil
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// send sends the results of calls and gives their memory back.
func (s *commitStream) send(resp *clusterpb.CommitResponse, calls []*commitCall) error {
	for len(calls) > 0 {
		n := min(len(calls), maxResultsPerMessage)
		size := 0
		resp.Results = resp.Results[:0]
		for _, c := range calls[:n] {
			resp.Results = append(resp.Results, &c.result)
			size += c.size
		}
		if err := s.stream.Send(resp); err != nil {
			return err
		}
		for _, c := range calls[:n] {
			s.api.putCommitCall(c)
		}
		calls = calls[n:]
		s.mu.Lock()
		s.batches -= n
		s.bytes -= size
		s.mu.Unlock()
		select {
		case s.free <- struct{}{}:
		default:
		}
	}
	return nil
}
