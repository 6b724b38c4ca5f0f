package client

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// node is one node on a loopback port that answers as the test says.
type node struct {
	checkpointpb.UnimplementedCheckpointServiceServer
	clusterpb.UnimplementedClusterServer
	addr string
	srv  *grpc.Server

	mu     sync.Mutex
	answer func(n int) error // what call number n, from 0, is answered
	ids    []string          // request ids received
	calls  int
}

func startNode(t *testing.T, answer func(n int) error) *node {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{addr: lis.Addr().String(), srv: grpc.NewServer(), answer: answer}
	checkpointpb.RegisterCheckpointServiceServer(n.srv, n)
	clusterpb.RegisterClusterServer(n.srv, n)
	done := make(chan struct{})
	go func() { defer close(done); _ = n.srv.Serve(lis) }()
	t.Cleanup(func() { n.srv.Stop(); <-done })
	return n
}

func (n *node) take(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	md, _ := metadata.FromIncomingContext(ctx)
	n.ids = append(n.ids, md.Get(metadataRequestID)...)
	n.calls++
	if n.answer == nil {
		return nil
	}
	return n.answer(n.calls - 1)
}

func (n *node) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.calls
}

func (n *node) CommitOffset(ctx context.Context, req *checkpointpb.CommitOffsetRequest) (*checkpointpb.CommitOffsetResponse, error) {
	if err := n.take(ctx); err != nil {
		return nil, err
	}
	_ = grpc.SetHeader(ctx, metadata.Pairs(metadataRevision, "42", metadataClusterID, "00000000000000ff"))
	return &checkpointpb.CommitOffsetResponse{Success: true, CurrentOffset: req.Offset}, nil
}

func (n *node) GetSourceOffset(ctx context.Context, _ *checkpointpb.GetOffsetRequest) (*checkpointpb.GetOffsetResponse, error) {
	return &checkpointpb.GetOffsetResponse{}, n.take(ctx)
}

func (n *node) TransferLeader(ctx context.Context, _ *clusterpb.TransferLeaderRequest) (*clusterpb.TransferLeaderResponse, error) {
	return &clusterpb.TransferLeaderResponse{}, n.take(ctx)
}

func (n *node) WatchChanges(_ *clusterpb.WatchChangesRequest, s clusterpb.Cluster_WatchChangesServer) error {
	if err := n.take(s.Context()); err != nil {
		return err
	}
	return s.Send(&clusterpb.ChangeEvent{Summary: n.addr})
}

// failure is an error as the cluster makes them.
func failure(code codes.Code, outcome Outcome, retry time.Duration) error {
	st, _ := status.New(code, "scripted").WithDetails(&errdetails.ErrorInfo{
		Reason: "TEST", Domain: errorDomain, Metadata: map[string]string{"outcome": string(outcome)},
	})
	if retry > 0 {
		st, _ = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	return st.Err()
}

// once fails the first call with err.
func once(err error) func(int) error {
	return func(n int) error {
		if n == 0 {
			return err
		}
		return nil
	}
}

func dial(t *testing.T, o Options, endpoints ...string) *Client {
	t.Helper()
	c, err := Dial(endpoints, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func checkLeaks(t *testing.T) {
	t.Helper()
	opt := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, opt) })
}

func commit(c *Client) error {
	_, err := c.Checkpoints().CommitOffset(context.Background(), &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
	return err
}

// Goal: what may be repeated is, with one request id, and what may not is not.
func TestRepetition(t *testing.T) {
	checkLeaks(t)
	read := func(c *Client) error {
		_, err := c.Checkpoints().GetSourceOffset(context.Background(), &checkpointpb.GetOffsetRequest{SourceId: "s"})
		return err
	}
	act := func(c *Client) error {
		_, err := c.Cluster().TransferLeader(context.Background(), &clusterpb.TransferLeaderRequest{})
		return err
	}
	for _, c := range []struct {
		name  string
		call  func(*Client) error
		err   error
		calls int
	}{
		{"mutation, no leader", commit, failure(codes.Unavailable, NotDone, time.Millisecond), 2},
		{"mutation, ambiguous", commit, failure(codes.Unknown, Unknown, 0), 2},
		{"mutation, busy", commit, failure(codes.ResourceExhausted, NotDone, time.Millisecond), 2},
		{"mutation, the node's deadline", commit, failure(codes.DeadlineExceeded, Unknown, 0), 2},
		{"mutation, broken off", commit, status.Error(codes.Unavailable, "connection reset"), 2},
		{"mutation, disk full", commit, failure(codes.ResourceExhausted, NotDone, 0), 1},
		{"mutation, refused", commit, failure(codes.Aborted, Refused, 0), 1},
		{"mutation, invalid", commit, failure(codes.InvalidArgument, NotDone, 0), 1},
		{"mutation, a bug", commit, failure(codes.Internal, Unknown, 0), 1},
		{"read, no leader", read, failure(codes.Unavailable, NotDone, 0), 2},
		{"action, not done", act, failure(codes.Unavailable, NotDone, 0), 2},
		{"action, broken off", act, status.Error(codes.Unavailable, "connection reset"), 1},
		{"action, ambiguous", act, failure(codes.Unknown, Unknown, 0), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := startNode(t, once(c.err))
			err := c.call(dial(t, Options{}, n.addr))
			if n.calls != c.calls || (err == nil) != (c.calls == 2) {
				t.Fatalf("%d calls, %v", n.calls, err)
			}
			if err != nil && status.Code(err) != status.Code(c.err) {
				t.Fatal(err)
			}
			for _, id := range n.ids {
				if id == "" || id != n.ids[0] {
					t.Fatalf("request ids %q", n.ids)
				}
			}
		})
	}
}

// Goal: every mutation has an id of its own; one the caller chose is kept.
func TestRequestIDs(t *testing.T) {
	checkLeaks(t)
	n := startNode(t, nil)
	c := dial(t, Options{}, n.addr)
	for range 3 {
		if err := commit(c); err != nil {
			t.Fatal(err)
		}
	}
	ctx := WithRequestID(context.Background(), "mine")
	if _, err := c.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: "s"}); err != nil {
		t.Fatal(err)
	}
	if len(n.ids) != 4 || n.ids[0] == n.ids[1] || n.ids[1] == n.ids[2] || n.ids[3] != "mine" || len(n.ids[0]) > 128 {
		t.Fatal(n.ids)
	}
	other := dial(t, Options{}, n.addr)
	if other.NewRequestID() == c.NewRequestID() || other.prefix == c.prefix {
		t.Fatal("two clients share ids")
	}
}

// Goal: a node that is down, or says that it stops, is left for the next, and
// the client stays there.
func TestFailOver(t *testing.T) {
	checkLeaks(t)
	stopping := startNode(t, func(int) error { return failure(codes.Unavailable, NotDone, 0) })
	alive := startNode(t, nil)
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	down := gone.Addr().String()
	gone.Close()
	c := dial(t, Options{}, down, stopping.addr, alive.addr)
	for range 5 {
		if err := commit(c); err != nil {
			t.Fatal(err)
		}
	}
	if alive.count() != 5 || stopping.count() > 1 || c.Endpoint() != alive.addr {
		t.Fatalf("%d calls on the node that lives, %d on the one that stops", alive.count(), stopping.count())
	}
	// And on again when that one dies.
	alive.srv.Stop()
	stopping.mu.Lock()
	stopping.answer = nil
	stopping.mu.Unlock()
	if err := commit(c); err != nil {
		t.Fatal(err)
	}
}

// Goal: a node that never answers costs an attempt, not the call.
func TestHangingNode(t *testing.T) {
	checkLeaks(t)
	release := make(chan struct{})
	hanging := startNode(t, func(int) error { <-release; return nil })
	alive := startNode(t, nil)
	c := dial(t, Options{AttemptTimeout: 20 * time.Millisecond, Timeout: time.Minute}, hanging.addr, alive.addr)
	err := commit(c)
	close(release)
	if err != nil {
		t.Fatal(err)
	}
}

// Goal: a call without a deadline ends with the client's timeout, with an error
// that says what is known.
func TestTimeout(t *testing.T) {
	checkLeaks(t)
	n := startNode(t, func(int) error { return failure(codes.Unavailable, NotDone, time.Millisecond) })
	// As much as a busy machine needs to make a second attempt.
	for timeout := 50 * time.Millisecond; ; timeout *= 2 {
		c := dial(t, Options{Timeout: timeout, BackoffMin: time.Millisecond, BackoffMax: time.Millisecond}, n.addr)
		before := n.count()
		err := commit(c)
		if err == nil || status.Code(err) == codes.Unavailable && OutcomeOf(err) != NotDone {
			t.Fatal(err)
		}
		if n.count()-before >= 2 {
			break
		}
		if timeout > 10*time.Second {
			t.Fatal(n.count()-before, err)
		}
	}
}

// Goal: after a stream was ended by its node, the next one goes elsewhere.
func TestStreamsFailOver(t *testing.T) {
	checkLeaks(t)
	stopping := startNode(t, func(int) error { return failure(codes.Unavailable, NotDone, 0) })
	alive := startNode(t, nil)
	c := dial(t, Options{}, stopping.addr, alive.addr)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := c.Cluster().WatchChanges(ctx, &clusterpb.WatchChangesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = s.Recv(); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	s, err = c.Cluster().WatchChanges(ctx, &clusterpb.WatchChangesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if ev, err := s.Recv(); err != nil || ev.Summary != alive.addr {
		t.Fatal(ev, err)
	}
	if _, err := s.Recv(); err == nil {
		t.Fatal("the stream goes on")
	}
}

func TestHeaders(t *testing.T) {
	checkLeaks(t)
	n := startNode(t, nil)
	c := dial(t, Options{}, n.addr)
	var md metadata.MD
	_, err := c.Checkpoints().CommitOffset(context.Background(), &checkpointpb.CommitOffsetRequest{SourceId: "s"}, grpc.Header(&md))
	if err != nil || Revision(md) != 42 || ClusterID(md) != "00000000000000ff" {
		t.Fatal(md, err)
	}
	if Revision(nil) != 0 || Revision(metadata.Pairs(metadataRevision, "x")) != 0 || ClusterID(nil) != "" {
		t.Fatal("made up")
	}
	out, _ := metadata.FromOutgoingContext(AtLeast(Stale(context.Background()), 7))
	if out.Get(metadataConsistency)[0] != "stale" || out.Get(metadataMinRevision)[0] != "7" {
		t.Fatal(out)
	}
}

func TestDialRefuses(t *testing.T) {
	for _, endpoints := range [][]string{nil, {"host"}, {"ok:1", "bad"}} {
		if c, err := Dial(endpoints, Options{}); err == nil {
			c.Close()
			t.Errorf("%q was taken", endpoints)
		}
	}
	if _, err := Dial([]string{"a:1"}, Options{BackoffMax: time.Millisecond}); err == nil {
		t.Error("BackoffMax below BackoffMin was taken")
	}
	c, err := Dial([]string{"a:1"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := commit(c); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

func TestOutcomeOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Outcome
	}{
		{nil, ""},
		{errors.New("x"), Unknown},
		{status.Error(codes.Unavailable, "x"), Unknown},
		// A connection that broke may have carried the call; one that was never made did not.
		{status.Error(codes.Unavailable, "error reading from server: EOF"), Unknown},
		{status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`), NotDone},
		{failure(codes.Unavailable, NotDone, 0), NotDone},
		{failure(codes.Aborted, Refused, 0), Refused},
	} {
		if got := OutcomeOf(c.err); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

// Goal: every unary method of the API is known, so that none is treated as an
// action by oversight.
func TestKindsAreComplete(t *testing.T) {
	actions := []string{
		"TransferLeader", "AddMember", "PromoteMember", "RemoveMember", "UpdateMember", "ReplaceMember",
		"UndoRestore", "CreateSnapshot", "DeleteSnapshot", "RestoreSnapshot",
	}
	for _, d := range []grpc.ServiceDesc{
		adminpb.RouterAdmin_ServiceDesc, registrypb.ServiceRegistry_ServiceDesc, sidecarpb.SidecarCoordinator_ServiceDesc,
		checkpointpb.CheckpointService_ServiceDesc, clusterpb.Cluster_ServiceDesc, backuppb.BackupService_ServiceDesc,
	} {
		for _, m := range d.Methods {
			name := "/" + d.ServiceName + "/" + m.MethodName
			if kindOf(name) == action && !slices.Contains(actions, m.MethodName) {
				t.Errorf("%s is not classified", name)
			}
		}
	}
}

// An attempt whose outcome is unknown stays so for the whole call, whatever is
// certain of the later ones.
func TestUnknownOutcomeStays(t *testing.T) {
	checkLeaks(t)
	lost := failure(codes.Unknown, Unknown, 0)
	for _, last := range []error{
		failure(codes.Unavailable, NotDone, time.Hour), // longer than the call may take
		failure(codes.ResourceExhausted, NotDone, 0),
	} {
		a := startNode(t, func(n int) error {
			if n == 0 {
				return lost
			}
			return last
		})
		c := dial(t, Options{}, a.addr)
		err := commit(c)
		if a.count() != 2 {
			t.Fatalf("%d attempts", a.count())
		}
		if OutcomeOf(err) != Unknown || status.Code(err) != codes.Unknown {
			t.Errorf("after an unknown attempt, %v was passed on as %v", last, err)
		}
	}
	// What is certain of all attempts stays certain.
	b := startNode(t, func(int) error { return failure(codes.Unavailable, NotDone, time.Hour) })
	if err := commit(dial(t, Options{}, b.addr)); OutcomeOf(err) != NotDone {
		t.Error(err)
	}
}
