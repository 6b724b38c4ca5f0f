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

// run keeps a stream busy until ctx is done. When it breaks, what was under way on it
// has failed, and after a pause there is another one.
func (l *streamLoad) run(ctx context.Context, p *phases, r *recorder) {
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		before := r.calls
		open, err := l.stream(ctx, p, r)
		if ctx.Err() != nil {
			for _, at := range open {
				r.left = append(r.left, time.Since(at))
			}
			return
		}
		if p.measured.Load() {
			for range max(1, len(open)) {
				r.record(0, 0, err)
			}
		}
		if r.calls > before {
			pause = minPause
		}
		if !rest(ctx, pause) {
			return
		}
	}
}

// stream sends until ctx is done or the stream breaks, and records what is answered
// while measured. It returns since when what was not answered is under way.
func (l *streamLoad) stream(ctx context.Context, p *phases, r *recorder) (open map[uint64]time.Time, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := l.client.Commit(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	sent := make(map[uint64]time.Time, l.inFlight)
	free := make(chan struct{}, l.inFlight)
	for range l.inFlight {
		free <- struct{}{}
	}
	failed := make(chan error, 1)
	go func() {
		failed <- l.receive(stream, p, r, func(id uint64) (time.Time, bool) {
			mu.Lock()
			defer mu.Unlock()
			at, ok := sent[id]
			delete(sent, id)
			return at, ok
		}, free)
	}()
	for id := uint64(1); ; id++ {
		select {
		case <-free:
		case err := <-failed: // as it does when ctx ends, too
			return sent, err
		}
		req := &clusterpb.CommitRequest{Id: id, Ops: make([]*clusterpb.CommitOp, l.batch)}
		for i := range req.Ops {
			req.Ops[i] = l.op(l.rng)
		}
		mu.Lock()
		sent[id] = time.Now()
		mu.Unlock()
		if err := stream.Send(req); err != nil {
			if err != io.EOF { // otherwise the receiver learns why
				cancel()
				<-failed
				return sent, err
			}
			return sent, <-failed
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
	return measure(ctx, len(loads), c, func(ctx context.Context, i int, p *phases, _ *schedule, r *recorder) {
		loads[i].run(ctx, p, r)
	})
}
