package bench

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// streamLoad keeps a number of commits in flight on one Commits stream.
type streamLoad struct {
	client   clusterpb.CommitsClient
	inFlight int // requests
	batch    int // commits a request
	op       func(rng *source) *clusterpb.CommitOp
	rng      *source
}

// run sends until ctx is done and records what is answered while measured.
func (l *streamLoad) run(ctx context.Context, p *phases, r *recorder) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := l.client.Commit(ctx)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	sent := make(map[uint64]time.Time, l.inFlight)
	free := make(chan struct{}, l.inFlight)
	for range l.inFlight {
		free <- struct{}{}
	}
	failed := make(chan error, 1)
	var receiver sync.WaitGroup
	defer receiver.Wait()
	defer cancel()
	receiver.Go(func() {
		failed <- l.receive(stream, p, r, func(id uint64) (time.Time, bool) {
			mu.Lock()
			defer mu.Unlock()
			at, ok := sent[id]
			delete(sent, id)
			return at, ok
		}, free)
	})
	for id := uint64(1); ; id++ {
		select {
		case <-free:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return nil
		}
		req := &clusterpb.CommitRequest{Id: id, Ops: make([]*clusterpb.CommitOp, l.batch)}
		for i := range req.Ops {
			req.Ops[i] = l.op(l.rng)
		}
		mu.Lock()
		sent[id] = time.Now()
		mu.Unlock()
		if err := stream.Send(req); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if err == io.EOF { // the receiver learns why
				return <-failed
			}
			return err
		}
	}
}

func (l *streamLoad) receive(stream clusterpb.Commits_CommitClient, p *phases, r *recorder,
	sentAt func(uint64) (time.Time, bool), free chan<- struct{}) error {
	for {
		reply, err := stream.Recv()
		if err != nil {
			return err
		}
		now, measured := time.Now(), p.measured.Load()
		for _, res := range reply.GetResults() {
			at, ok := sentAt(res.GetId())
			if !ok {
				return fmt.Errorf("bench: answer to request %d, which was not sent or was answered before", res.GetId())
			}
			free <- struct{}{}
			if !measured {
				continue
			}
			var failure error
			if res.GetOutcome() != clusterpb.Outcome_OUTCOME_DONE {
				failure = fmt.Errorf("%v: %v: %s", res.GetOutcome(), codes.Code(res.GetCode()), res.GetMessage())
			}
			r.record(now.Sub(at), l.batch, failure)
		}
	}
}

// driveStreams is Drive for streams.
func driveStreams(ctx context.Context, loads []*streamLoad, c DriveConfig) (*Measurement, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var p phases
	recorders := make([]*recorder, len(loads))
	failed := make(chan error, len(loads))
	var running sync.WaitGroup
	for i, l := range loads {
		r := &recorder{latency: NewHistogram()}
		recorders[i] = r
		running.Go(func() {
			if err := l.run(ctx, &p, r); err != nil && ctx.Err() == nil {
				failed <- err
			}
		})
	}
	wait := func(d time.Duration) error {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case err := <-failed:
			return fmt.Errorf("bench: a stream broke: %w", err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := wait(c.Warmup)
	var took time.Duration
	if err == nil {
		if c.Started != nil {
			c.Started()
		}
		begin := time.Now()
		p.measured.Store(true)
		err = wait(c.Duration)
		p.measured.Store(false)
		took = time.Since(begin)
		if c.Ended != nil {
			c.Ended()
		}
	}
	cancel()
	running.Wait()
	if err != nil {
		return nil, err
	}
	m := merge(recorders)
	m.Took = took
	return m, nil
}
