package rpc

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
)

// unary gives every call a deadline, turns its error into a status and survives
// its panics.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, s.panicked(info.FullMethod, p)
		}
	}()
	if err := s.gated(info.FullMethod); err != nil {
		return nil, s.statusOf(info.FullMethod, err)
	}
	timeout := s.cfg.CallTimeout
	if longCall(info.FullMethod) {
		timeout = s.cfg.LongCallTimeout
	}
	c := newCallContext(ctx, timeout)
	defer c.end()
	ctx = c
	if longCall(info.FullMethod) {
		// A stop must not wait for what goes on elsewhere, or after a restart.
		bound, cancel := context.WithCancel(c)
		defer cancel()
		defer context.AfterFunc(s.run, cancel)()
		ctx = bound
	}
	resp, err = handler(ctx, req)
	c.sendHeader()
	if err != nil {
		if errors.Is(err, context.Canceled) && s.run.Err() != nil {
			err = fmt.Errorf("%w: this node is stopping; what the call began may go on: 'router operation list' on another node shows it",
				raftnode.ErrAmbiguous)
		}
		return nil, s.statusOf(info.FullMethod, err)
	}
	return resp, nil
}

// longCall reports whether a method does what takes long, such as restoring a
// backup, before it answers. Existing clients set no deadline for these either.
func longCall(method string) bool {
	for _, suffix := range []string{
		".BackupService/CreateSnapshot", ".BackupService/RestoreSnapshot",
		".Cluster/UndoRestore", ".Cluster/WaitOperation", ".Cluster/ReplaceMember", ".Cluster/CheckState",
	} {
		if strings.HasSuffix(method, suffix) {
			return true
		}
	}
	return false
}

// gated refuses a call that would be answered from a state which is in doubt.
// What remains tells how the node itself does, and helps to find out.
func (s *Server) gated(method string) error {
	err := s.cfg.Gate.Err()
	if err == nil || strings.HasPrefix(method, "/grpc.") {
		return nil
	}
	for _, suffix := range []string{
		".RouterAdmin/GetClusterStatus", ".RouterAdmin/GetMetrics",
		".Cluster/GetStateHash", ".Cluster/CheckState", ".Cluster/TransferLeader",
	} {
		if strings.HasSuffix(method, suffix) {
			return nil
		}
	}
	return err
}

// drainingMethod is the one stream that goes on when the server stops, until
// what it has in flight is answered; it watches for the stop itself.
const drainingMethod = ".cluster.Commits/Commit"

// stream is unary for streams; they get no deadline, but their context ends
// when the server stops, so that no handler has to remember it.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(info.FullMethod, p)
		}
	}()
	streams := s.streams.Load() // before the look at the gate, which may shut
	if err := s.gated(info.FullMethod); err != nil {
		return s.statusOf(info.FullMethod, err)
	}
	if strings.HasSuffix(info.FullMethod, drainingMethod) {
		if err := handler(srv, ss); err != nil {
			return s.statusOf(info.FullMethod, err)
		}
		return nil
	}
	var ctx context.Context
	if strings.HasSuffix(info.FullMethod, quietMethod) {
		ctx = &quietContext{ss.Context(), streams.ctx}
	} else {
		end := streams.ctx
		if strings.HasPrefix(info.FullMethod, "/grpc.") {
			end = s.run
		}
		var cancel context.CancelFunc
		ctx, cancel = boundContext(ss.Context(), end)
		defer cancel()
	}
	err = handler(srv, &boundStream{ServerStream: ss, ctx: ctx})
	if err != nil && streams.ctx.Err() != nil && ss.Context().Err() == nil {
		if gate := s.cfg.Gate.Err(); gate != nil {
			err = gate
		} else {
			err = s.reconnectElsewhere()
		}
	}
	if err != nil && s.run.Err() != nil && ss.Context().Err() == nil {
		// Whatever the handler makes of its context's end, the caller is still
		// there and should learn that it can go on elsewhere.
		err = s.reconnectElsewhere()
	}
	if err != nil {
		return s.statusOf(info.FullMethod, err)
	}
	return nil
}

// quietMethod is the stream of which there may be one for each sidecar, and which
// mostly waits. It watches for the stop itself: a context that ends with two others
// is a kilobyte, a quarter of what such a stream keeps apart from its stacks.
const quietMethod = ".SidecarCoordinator/StreamHeartbeats"

// quietContext is the context of a quiet stream with what else ends the stream, of
// which Done knows nothing.
type quietContext struct {
	context.Context
	end context.Context
}

// bound returns a context that ends with either; cancel lets go of it.
func (q *quietContext) bound() (context.Context, context.CancelFunc) {
	return boundContext(q.Context, q.end)
}

// boundContext returns a child of ctx that also ends with end; cancel lets go of it.
func boundContext(ctx, end context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(end, cancel)
	return ctx, func() { stop(); cancel() }
}

// reconnectElsewhere ends a stream because the node is about to stop, and says
// when to come back: all streams of a node end at once, and their clients must not
// reach the others all at once.
func (s *Server) reconnectElsewhere() error {
	return retryAfter{errStoppingStream(), reconnectAfter(s.watches.Load())}
}

// boundStream is a stream with a context of ours.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context returns a context that also ends when the server stops, or says what does;
// see quietMethod.
func (b *boundStream) Context() context.Context { return b.ctx }

// panicked records a panic; the caller learns nothing of what is inside.
func (s *Server) panicked(method string, p any) error {
	s.panics.Add(1)
	s.log.Error("a call panicked", "method", method, "panic", p, "stack", string(debug.Stack()))
	return status.Error(codes.Internal, "internal error; the log of the node has the details")
}

// statusOf is Status, and logs what Status hides.
func (s *Server) statusOf(method string, err error) error {
	st := Status(err)
	if st.Code() == codes.Internal {
		s.log.Error("a call failed", "method", method, "error", err)
	}
	return st.Err()
}
