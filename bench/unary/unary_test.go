package unary

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// handler answers the bytes of a request.
type handler func(ctx context.Context, in []byte) ([]byte, error)

// serve starts gRPC's own server with one method, on address ("" = any).
func serve(t *testing.T, address string, h handler, opts ...grpc.ServerOption) (*grpc.Server, string) {
	t.Helper()
	if address == "" {
		address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(opts...)
	s.RegisterService(&grpc.ServiceDesc{ServiceName: "test.Echo", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{
		MethodName: "Call",
		Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.BytesValue)
			if err := decode(in); err != nil {
				return nil, err
			}
			out, err := h(ctx, in.Value)
			return wrapperspb.Bytes(out), err
		},
	}}}, nil)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-ended })
	return s, l.Addr().String()
}

func connect(t *testing.T, address string) *Conn {
	t.Helper()
	c := NewConn(address)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func invoke(ctx context.Context, c *Conn, in []byte) ([]byte, error) {
	out := new(wrapperspb.BytesValue)
	err := c.Invoke(ctx, "/test.Echo/Call", wrapperspb.Bytes(in), out, grpc.StaticMethod())
	return out.Value, err
}

func echo(_ context.Context, in []byte) ([]byte, error) { return in, nil }

// wantCode fails unless err has the code and says text.
func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("%v; want %v with %q", err, code, text)
	}
}

// TestEachCallGetsItsReply: callers that share a connection never get each
// other's replies, whatever the sizes.
func TestEachCallGetsItsReply(t *testing.T) {
	_, address := serve(t, "", echo)
	c := connect(t, address)
	var callers sync.WaitGroup
	for i := range 32 {
		callers.Go(func() {
			for j := range 200 {
				in := bytes.Repeat([]byte{byte(i), byte(j)}, 1+(i*j)%3000)
				if out, err := invoke(t.Context(), c, in); err != nil || !bytes.Equal(in, out) {
					t.Errorf("caller %d, call %d: %d bytes came back of %d: %v", i, j, len(out), len(in), err)
					return
				}
			}
		})
	}
	callers.Wait()
	if len(c.links) != 1 {
		t.Errorf("%d connections were made", len(c.links))
	}
}

// TestServerSeesWhatIsSent: metadata and deadline travel.
func TestServerSeesWhatIsSent(t *testing.T) {
	_, address := serve(t, "", func(ctx context.Context, in []byte) ([]byte, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		deadline, ok := ctx.Deadline()
		return fmt.Appendf(nil, "%v %v %v", md.Get("conveyor-test"), ok, ok && time.Until(deadline) > 30*time.Second), nil
	})
	c := connect(t, address)
	out, err := invoke(metadata.AppendToOutgoingContext(t.Context(), "conveyor-test", "one", "conveyor-test", "two"), c, nil)
	if err != nil || string(out) != "[one two] false false" {
		t.Errorf("%s: %v", out, err)
	}
	for _, limit := range []time.Duration{time.Minute, 1000 * time.Hour} { // these need different units
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		if out, err := invoke(ctx, c, nil); err != nil || string(out) != "[] true true" {
			t.Errorf("with a deadline in %v: %s: %v", limit, out, err)
		}
	}
}

// TestStatus: the server's error arrives as it was, and harms no later call.
func TestStatus(t *testing.T) {
	texts := []string{"", "plain", "100 % of ünïcode, and\na line", "a lone %"}
	_, address := serve(t, "", func(_ context.Context, in []byte) ([]byte, error) {
		if len(in) == 0 {
			return nil, nil
		}
		return nil, status.Error(codes.Code(in[0]), texts[in[1]])
	})
	c := connect(t, address)
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		for i, text := range texts {
			_, err := invoke(t.Context(), c, []byte{byte(code), byte(i)})
			if s := status.Convert(err); s.Code() != code || s.Message() != text {
				t.Errorf("%v %q arrived as %v", code, text, err)
			}
		}
	}
	if _, err := invoke(t.Context(), c, nil); err != nil {
		t.Error(err)
	}
	err := c.Invoke(t.Context(), "/test.Echo/Nothing", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue))
	wantCode(t, err, codes.Unimplemented, "Nothing")
}

// TestLargeMessages: what is larger than the windows waits for them, what is
// larger than allowed fails alone.
func TestLargeMessages(t *testing.T) {
	_, address := serve(t, "", func(_ context.Context, in []byte) ([]byte, error) {
		if len(in) == 1 {
			return make([]byte, 6<<20), nil
		}
		return in, nil
	})
	c := connect(t, address)
	var callers sync.WaitGroup
	for i := range 4 {
		callers.Go(func() {
			in := bytes.Repeat([]byte{byte(i)}, 3<<20)
			for range 3 {
				if out, err := invoke(t.Context(), c, in); err != nil || !bytes.Equal(in, out) {
					t.Errorf("%d bytes came back of %d: %v", len(out), len(in), err)
				}
			}
			_, err := invoke(t.Context(), c, []byte{0})
			wantCode(t, err, codes.ResourceExhausted, "more than 4194304 bytes")
			_, err = invoke(t.Context(), c, make([]byte, 5<<20)) // the server's limit
			wantCode(t, err, codes.ResourceExhausted, "larger than max")
		})
	}
	callers.Wait()
}

// TestFewStreams: with more callers than the server takes at a time, all get
// their turn.
func TestFewStreams(t *testing.T) {
	var mu sync.Mutex
	open, most := 0, 0
	_, address := serve(t, "", func(_ context.Context, in []byte) ([]byte, error) {
		mu.Lock()
		open++
		most = max(most, open)
		mu.Unlock()
		defer func() { mu.Lock(); open--; mu.Unlock() }()
		return in, nil
	}, grpc.MaxConcurrentStreams(2))
	c := connect(t, address)
	if _, err := invoke(t.Context(), c, nil); err != nil { // the limit is known behind that
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	for range 16 {
		callers.Go(func() {
			for range 50 {
				if _, err := invoke(t.Context(), c, []byte("x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	callers.Wait()
	if most > 2 {
		t.Errorf("%d calls at a time", most)
	}
}

// held is a server whose calls do not return until their context ends or release
// is closed; entered has one value for each.
func held(t *testing.T) (s *grpc.Server, address string, entered chan struct{}, release chan struct{}) {
	entered, release = make(chan struct{}, 16), make(chan struct{})
	s, address = serve(t, "", func(ctx context.Context, in []byte) ([]byte, error) {
		if len(in) > 0 {
			return in, nil
		}
		entered <- struct{}{}
		select {
		case <-ctx.Done():
			entered <- struct{}{}
			return nil, ctx.Err()
		case <-release:
			return []byte("late"), nil
		}
	})
	return s, address, entered, release
}

// TestCallerLeaves: the server is told, and the connection serves others.
func TestCallerLeaves(t *testing.T) {
	_, address, entered, _ := held(t)
	c := connect(t, address)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() { _, err := invoke(ctx, c, nil); failed <- err }()
	<-entered
	cancel()
	wantCode(t, <-failed, codes.Canceled, "")
	<-entered // it has seen the end

	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := invoke(ctx, c, nil)
	wantCode(t, err, codes.DeadlineExceeded, "")
	if _, err := invoke(t.Context(), c, []byte("x")); err != nil {
		t.Error(err)
	}
	if len(c.links) != 1 {
		t.Errorf("%d connections were made", len(c.links))
	}
}

// TestServerStops: what is under way fails at once, and the next call reaches the
// server that came in its place.
func TestServerStops(t *testing.T) {
	s, address, entered, _ := held(t)
	c := connect(t, address)
	failed := make(chan error)
	go func() { _, err := invoke(t.Context(), c, nil); failed <- err }()
	<-entered
	s.Stop()
	wantCode(t, <-failed, codes.Unavailable, "")
	_, err := invoke(t.Context(), c, []byte("x"))
	wantCode(t, err, codes.Unavailable, "")
	serve(t, address, echo)
	if out, err := invoke(t.Context(), c, []byte("x")); err != nil || string(out) != "x" {
		t.Errorf("%s %v", out, err)
	}
}

// TestServerGoesAway: a server that stops gracefully answers what it has taken.
func TestServerGoesAway(t *testing.T) {
	s, address, entered, release := held(t)
	c := connect(t, address)
	type outcome struct {
		out []byte
		err error
	}
	ended := make(chan outcome)
	go func() { out, err := invoke(t.Context(), c, nil); ended <- outcome{out, err} }()
	<-entered
	stopped := make(chan struct{})
	go func() { defer close(stopped); s.GracefulStop() }()
	// It takes no calls any more once the others fail; there is no other sign.
	for {
		if _, err := invoke(t.Context(), c, []byte("x")); err != nil {
			wantCode(t, err, codes.Unavailable, "")
			break
		}
	}
	close(release)
	if o := <-ended; o.err != nil || string(o.out) != "late" {
		t.Errorf("%s %v", o.out, o.err)
	}
	<-stopped
}

// TestClose: nothing is left, and nothing begins any more.
func TestClose(t *testing.T) {
	_, address, entered, _ := held(t)
	c := NewConn(address)
	failed := make(chan error)
	go func() { _, err := invoke(t.Context(), c, nil); failed <- err }()
	<-entered
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, <-failed, codes.Canceled, "closed")
	_, err := invoke(t.Context(), c, []byte("x"))
	wantCode(t, err, codes.Canceled, "closed")
	goleak.VerifyNone(t, goleak.IgnoreCurrent())
}

// TestNoGRPC: whatever else listens there is an error, not a wait.
func TestNoGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	plain := &http.Server{Handler: http.NotFoundHandler(), Protocols: new(http.Protocols)}
	plain.Protocols.SetUnencryptedHTTP2(true)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = plain.Serve(l) }()
	defer func() { _ = plain.Close(); <-ended }()
	_, err = invoke(t.Context(), connect(t, l.Addr().String()), nil)
	wantCode(t, err, codes.Unknown, "HTTP's is 404")

	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	go func() {
		for {
			conn, err := silent.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("220 mail.example.com ESMTP\r\n"))
			_ = conn.Close()
		}
	}()
	_, err = invoke(t.Context(), connect(t, silent.Addr().String()), nil)
	wantCode(t, err, codes.Unavailable, "")

	nobody := silent.Addr().String()
	_ = silent.Close()
	_, err = invoke(t.Context(), connect(t, nobody), nil)
	wantCode(t, err, codes.Unavailable, "refused")
}

// TestWaitForADial: who waits for another's dial waits as long as it has time itself.
func TestWaitForADial(t *testing.T) {
	c := NewConn("127.0.0.1:1")
	c.dialing = make(chan struct{}) // one that does not end
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := invoke(ctx, c, nil)
	wantCode(t, err, codes.DeadlineExceeded, "")
	close(c.dialing)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUnsupported: what a Conn cannot do it says instead of doing half of it.
func TestUnsupported(t *testing.T) {
	_, address := serve(t, "", echo)
	c := connect(t, address)
	_, err := c.NewStream(t.Context(), nil, "/test.Echo/Call")
	wantCode(t, err, codes.Unimplemented, "unary")
	err = c.Invoke(t.Context(), "/test.Echo/Call", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue), grpc.WaitForReady(true))
	wantCode(t, err, codes.Unimplemented, "options")
	err = c.Invoke(t.Context(), "/test.Echo/Call", "text", new(wrapperspb.BytesValue))
	wantCode(t, err, codes.Unimplemented, "protobuf")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("no"))
	_, err = invoke(ctx, c, nil)
	wantCode(t, err, codes.Canceled, "")
}
