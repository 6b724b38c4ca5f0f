package unary

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Conn is a connection to one address, for unary calls alone. It is made when it
// is first needed and made anew by the first call after it broke. Its methods may
// be called from any goroutine.
type Conn struct {
	addr string

	running sync.WaitGroup // goroutines of all links

	mu      sync.Mutex
	links   []*link       // those not dead, as far as is known; the last one takes calls
	dialing chan struct{} // closed when the dial that is under way ends; nil = none is
	closed  bool
}

var _ grpc.ClientConnInterface = (*Conn)(nil)

// NewConn returns a connection to addr, a HOST:PORT. It does not dial.
func NewConn(addr string) *Conn { return &Conn{addr: addr} }

// Close ends the connection and the calls under way, which fail with CANCELLED as
// later ones do. It returns once nothing of the connection runs any more.
func (c *Conn) Close() error {
	c.mu.Lock()
	c.closed = true
	links := c.links
	c.mu.Unlock()
	for _, l := range links {
		l.fail(errClosed)
	}
	c.running.Wait()
	return nil
}

var errClosed = status.Error(codes.Canceled, "unary: the connection was closed by its owner")

// established returns a link that works, as far as is known. Of many callers one
// dials, with its own context; the others wait for that, as long as theirs last.
func (c *Conn) established(ctx context.Context) (*link, error) {
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, errClosed
		}
		if n := len(c.links); n > 0 && c.links[n-1].usable() {
			defer c.mu.Unlock()
			return c.links[n-1], nil
		}
		under := c.dialing
		if under == nil {
			ended := make(chan struct{})
			c.dialing = ended
			c.mu.Unlock()
			return c.dial(ctx, ended)
		}
		c.mu.Unlock()
		select {
		case <-under:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// dial makes a new link and closes ended.
func (c *Conn) dial(ctx context.Context, ended chan struct{}) (*link, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", c.addr)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dialing = nil
	close(ended)
	if err != nil {
		return nil, status.Error(codes.Unavailable, "unary: "+err.Error())
	}
	if c.closed {
		_ = nc.Close() // nothing was sent
		return nil, errClosed
	}
	l, err := newLink(nc, c.addr, &c.running)
	if err != nil {
		_ = nc.Close() // the dial has failed already
		return nil, status.Error(codes.Unavailable, "unary: "+err.Error())
	}
	c.links = append(slices.DeleteFunc(c.links, (*link).ended), l)
	return l, nil
}

// Invoke makes one call and waits for its reply. Metadata of ctx is sent, its
// deadline is told the server and kept here. Call options are not supported. The
// error is one of package status: the server's, or UNAVAILABLE when the connection
// broke, CANCELLED and DEADLINE_EXCEEDED when ctx ended first.
func (c *Conn) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	in, inOK := args.(proto.Message)
	out, outOK := reply.(proto.Message)
	if !inOK || !outOK || slices.ContainsFunc(opts, unsupported) {
		return status.Error(codes.Unimplemented, "unary: only protobuf messages and no call options are supported")
	}
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	l, err := c.established(ctx)
	if err != nil {
		return err
	}
	call := calls.Get().(*call)
	defer call.release()
	if call.out, err = appendMessage(call.out[:0], in); err != nil {
		return status.Error(codes.Internal, "unary: "+err.Error())
	}
	sent, _ := metadata.FromOutgoingContext(ctx)
	if err := l.begin(ctx, call, method, sent); err != nil {
		return err
	}
	select {
	case <-call.ended:
	case <-ctx.Done():
		if l.abandon(call) {
			return status.FromContextError(ctx.Err()).Err()
		}
		<-call.ended // it ended at the same time
	}
	if call.err != nil {
		// A server may notice that the call's time is over before this side does.
		if end, ok := ctx.Deadline(); ok && status.Code(call.err) == codes.Canceled && !time.Now().Before(end) {
			return status.FromContextError(context.DeadlineExceeded).Err()
		}
		return call.err
	}
	body, err := messageOf(call.in)
	if err == nil {
		err = proto.Unmarshal(body, out)
	}
	if err != nil {
		return status.Error(codes.Internal, "unary: the reply to "+method+": "+err.Error())
	}
	return nil
}

// unsupported is about all options but the one generated stubs give.
func unsupported(o grpc.CallOption) bool {
	_, fine := o.(grpc.StaticMethodCallOption)
	return !fine
}

// NewStream is not supported.
func (c *Conn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "unary: this connection makes unary calls alone")
}

// call is one call under way. It belongs to the goroutine in Invoke until begin
// and again after ended; in between its link's mutex guards it.
type call struct {
	stream uint32
	window int64 // bytes of this stream that may still be sent
	out    []byte
	in     []byte
	status callStatus
	err    error
	ended  chan struct{} // of capacity one, so that whoever ends the call waits for nobody
}

var calls = sync.Pool{New: func() any { return &call{ended: make(chan struct{}, 1)} }}

// release keeps the call for another one, unless it has grown large.
func (c *call) release() {
	if cap(c.out)+cap(c.in) > 64<<10 {
		return
	}
	*c = call{out: c.out[:0], in: c.in[:0], ended: c.ended}
	calls.Put(c)
}

// prefix is what precedes a message: whether it is compressed, and its length.
const prefix = 5

func appendMessage(to []byte, m proto.Message) ([]byte, error) {
	to = append(to, make([]byte, prefix)...)
	to, err := proto.MarshalOptions{}.MarshalAppend(to, m)
	if err != nil {
		return to, err
	}
	n := len(to) - prefix
	to[1], to[2], to[3], to[4] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	return to, nil
}

// messageOf returns the one message that in consists of.
func messageOf(in []byte) ([]byte, error) {
	if len(in) < prefix {
		return nil, io.ErrUnexpectedEOF
	}
	if in[0] != 0 {
		return nil, errors.New("it is compressed, which was not asked for")
	}
	n := int(in[1])<<24 | int(in[2])<<16 | int(in[3])<<8 | int(in[4])
	if n != len(in)-prefix {
		return nil, fmt.Errorf("a message of %d bytes, of which %d came", n, len(in)-prefix)
	}
	return in[prefix:], nil
}
