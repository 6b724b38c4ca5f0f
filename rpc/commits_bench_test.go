package rpc

import (
	"context"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// instant answers every command at once, from one goroutine, encoding it as a
// real one would: what is left is the cost of the stream itself.
type instant struct {
	*oneNode
	calls chan func()
}

func (s *instant) SubmitFunc(cmd *commandpb.Command, done func(*commandpb.Result, uint64, error)) {
	if _, err := cmd.MarshalVT(); err != nil {
		done(nil, 0, err)
		return
	}
	s.calls <- func() { done(&commandpb.Result{Revision: 7}, 7, nil) }
}

// BenchmarkCommitStream measures one stream with 64 commits in flight, one a
// message, over loopback TCP.
func BenchmarkCommitStream(b *testing.B) {
	for _, batch := range []int{1, 16} {
		b.Run("batch="+formatUint(uint64(batch)), func(b *testing.B) { benchmarkCommitStream(b, batch) })
	}
}

func benchmarkCommitStream(b *testing.B, batch int) {
	node := newOneNode(b)
	sub := &instant{node, make(chan func(), 1024)}
	go func() {
		for f := range sub.calls {
			f()
		}
	}()
	defer close(sub.calls)
	srv, err := NewServer(ServerConfig{Node: node, State: node.fsm, Submitter: sub, Beats: &beatLog{}, NodeID: 1})
	if err != nil {
		b.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = srv.Serve(lis) }()
	defer srv.Shutdown(context.Background())
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	stream, err := clusterpb.NewCommitsClient(conn).Commit(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	const inFlight = 64
	slots := make(chan struct{}, inFlight)
	answered := make(chan error, 1)
	go func() {
		for n := 0; n < b.N; {
			resp, err := stream.Recv()
			if err != nil {
				answered <- err
				return
			}
			n += len(resp.Results)
			for range resp.Results {
				<-slots
			}
		}
		answered <- nil
	}()
	req := &clusterpb.CommitRequest{}
	for range batch {
		req.Ops = append(req.Ops, offsetOp("source-0123456789", 3, 1))
	}
	b.ReportAllocs()
	for i := range b.N {
		slots <- struct{}{}
		req.Id = uint64(i)
		if err := stream.Send(req); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-answered; err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "commits/s")
}
