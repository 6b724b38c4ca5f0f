package main

import (
	"context"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
)

const (
	// noticeAfter is how long a command waits without a word.
	noticeAfter = 1500 * time.Millisecond
	// noticeAgain is how often it says that it still waits.
	noticeAgain = 10 * time.Second
	// passthrough is what the address of a connection begins with.
	passthrough = "passthrough:///"
)

// waiter says on stderr what a command waits for when its calls do not get
// through. The client underneath repeats them without a word; somebody who looks
// at a silent terminal cannot tell that from a command that hangs.
type waiter struct {
	a *app

	mu sync.Mutex
	// timer runs while nothing gets through; last is why.
	timer  *time.Timer
	last   string
	ctx    context.Context
	method string
	node   string
	conn   *grpc.ClientConn // of the call that runs; nil in tests
	closed bool
}

// lookTime bounds the question whether a node knows a leader.
const lookTime = time.Second

// looking marks the calls of the waiter itself.
type looking struct{}

// leaderless says that the node which does not answer waits for a leader itself, ""
// when it knows one or is not heard of.
func (w *waiter) leaderless(ctx context.Context, conn *grpc.ClientConn, node string) string {
	if conn == nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, looking{}, true), lookTime)
	defer cancel()
	st, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
	if err != nil || st.GetLeaderId() != 0 {
		return ""
	}
	return "waiting for a leader: " + node + " knows none; a majority of the voters must be up and reach each other"
}

// patient are the calls that take long by their nature: while one of them runs,
// there is nothing wrong.
func patient(method string) bool {
	switch method[strings.LastIndexByte(method, '/')+1:] {
	case "WaitOperation", "RestoreSnapshot", "CreateSnapshot", "CheckState", "ReplaceMember", "UndoRestore":
		return true
	}
	return false
}

func (w *waiter) begin(ctx context.Context, method, target string, conn *grpc.ClientConn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ctx, w.method, w.node, w.conn = ctx, method, strings.TrimPrefix(target, passthrough), conn
	if w.timer == nil && !w.closed {
		w.timer = time.AfterFunc(noticeAfter, w.fire)
	}
}

func (w *waiter) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted:
		w.last = plain(err)
		return // another attempt may follow; close ends the waiting otherwise
	}
	w.quietLocked()
}

func (w *waiter) quietLocked() {
	if w.timer != nil {
		w.timer.Stop()
	}
	w.timer, w.last = nil, ""
}

// close ends the notices.
func (w *waiter) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.quietLocked()
}

func (w *waiter) fire() {
	w.mu.Lock()
	ctx, last, method, node, conn, on := w.ctx, w.last, w.method, w.node, w.conn, w.timer != nil && w.ctx.Err() == nil
	if on {
		w.timer.Reset(noticeAgain)
	}
	w.mu.Unlock()
	if !on {
		return
	}
	// Asked also while a call runs that takes long by its nature: without a leader it
	// does not even begin.
	why := ""
	if last == "" {
		why = w.leaderless(ctx, conn, node)
	}
	switch {
	case ctx.Err() != nil:
	case why != "":
		w.a.notice("%s%s", why, remaining(ctx))
	case last != "":
		w.a.notice("trying again: %s%s", last, remaining(ctx))
	case !patient(method):
		w.a.notice("waiting for %s to answer%s", node, remaining(ctx))
	}
}

func (w *waiter) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if ctx.Value(looking{}) != nil {
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	w.begin(ctx, method, cc.Target(), cc)
	err := invoke(ctx, method, req, reply, cc, opts...)
	w.end(err)
	return err
}

func (w *waiter) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	w.begin(ctx, method, cc.Target(), cc)
	s, err := open(ctx, desc, cc, method, opts...)
	w.end(err)
	return s, err
}
