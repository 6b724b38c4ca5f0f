package unary

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// cancelled is the code of a stream that the other side has given up.
const cancelled = http2.ErrCodeCancel

const (
	// What the server may send in one reply, and in all of them before it is told
	// that they were read. The former is never raised, so it is the bound of a reply.
	maxReply   = 4<<20 + prefix
	connWindow = 8 << 20
	// What a server is allowed by default (RFC 9113, sections 6.5.2 and 6.9.2).
	defaultWindow = 65_535
	maxFrame      = 16_384
	// Stream identifiers are odd and have 31 bits; a link whose last one was used
	// is replaced.
	lastStream = 1<<31 - 1
	// What waits for the socket at most before whoever wants to send more has to
	// wait, too.
	maxUnsent = 1 << 20
	// dense is how many bytes are worth a system call without a look at whether
	// others are about to add to them.
	dense = 2 << 10
)

// link is one HTTP/2 connection. Callers append frames to what is unsent; one
// goroutine writes it, another reads.
type link struct {
	conn      net.Conn
	authority string

	mu      sync.Mutex
	err     error // why it takes no call any more
	dead    bool  // it takes none and no reply will come
	unsent  *bytes.Buffer
	frames  *http2.Framer // writes to unsent
	headers *hpack.Encoder
	block   bytes.Buffer // what headers writes to
	calls   map[uint32]*call
	next    uint32 // the next call's stream
	window  int64  // bytes of all streams that may still be sent
	each    int64  // the window of a new stream
	most    int    // streams at a time that the server allows
	// sendable says that unsent is not empty, room that windows, streams or unsent
	// have some again.
	sendable, room *sync.Cond

	// Of the reading goroutine alone.
	decoder *hpack.Decoder
	reading *callStatus // what decoded headers are of; nil = an unknown call
	read    uint32      // bytes of data not acknowledged yet
}

// callStatus is what the headers of a reply say.
type callStatus struct {
	http    string
	code    string
	message string
}

// newLink shakes hands on nc and takes it over, with two goroutines that running
// counts; nc stays the caller's if that fails.
func newLink(nc net.Conn, authority string, running *sync.WaitGroup) (*link, error) {
	l := &link{
		conn: nc, authority: authority, calls: make(map[uint32]*call), unsent: new(bytes.Buffer),
		next: 1, window: defaultWindow, each: defaultWindow, most: 1 << 30,
	}
	l.sendable, l.room = sync.NewCond(&l.mu), sync.NewCond(&l.mu)
	l.headers = hpack.NewEncoder(&l.block)
	l.decoder = hpack.NewDecoder(4096, l.field)
	l.frames = http2.NewFramer(writerFunc(func(p []byte) (int, error) { return l.unsent.Write(p) }), nil)
	l.unsent.WriteString(http2.ClientPreface)
	if err := l.frames.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: maxReply + 1},
	); err != nil {
		return nil, err
	}
	if err := l.frames.WriteWindowUpdate(0, connWindow-defaultWindow); err != nil {
		return nil, err
	}
	running.Go(l.send)
	running.Go(l.receive)
	return l, nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (l *link) usable() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err == nil
}

// ended reports whether no call is under way and none will be.
func (l *link) ended() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// begin sends call. It waits while the server allows no more, and returns once
// all of the call is about to be written; then call.ended follows, whatever
// happens, unless abandon takes the call away.
func (l *link) begin(ctx context.Context, call *call, method string, sent metadata.MD) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.await(ctx, func() bool { return len(l.calls) < l.most && l.unsent.Len() < maxUnsent }); err != nil {
		return err
	}
	call.stream, call.window = l.next, l.each
	l.calls[call.stream] = call
	if l.next += 2; l.next > lastStream {
		l.err = status.Error(codes.Unavailable, "unary: the connection has used all of its streams")
	}
	l.encode(ctx, method, sent)
	err := l.frames.WriteHeaders(http2.HeadersFrameParam{StreamID: call.stream, BlockFragment: l.block.Bytes(), EndHeaders: true})
	for out := call.out; err == nil; {
		n := min(int64(len(out)), maxFrame, l.window, call.window)
		if n > 0 {
			last := n == int64(len(out))
			err = l.frames.WriteData(call.stream, last, out[:n])
			l.window -= n
			call.window -= n
			if out = out[n:]; last {
				break
			}
			continue
		}
		l.sendable.Signal()
		err = l.await(ctx, func() bool {
			// An answer before the request was read ends the call.
			return l.window > 0 && call.window > 0 && l.unsent.Len() < maxUnsent || l.calls[call.stream] != call
		})
		if err == nil && l.calls[call.stream] != call {
			_ = l.frames.WriteRSTStream(call.stream, http2.ErrCodeCancel) // unsent takes every write
			break
		}
	}
	l.sendable.Signal()
	if err != nil && l.calls[call.stream] == call {
		l.reset(call)
		return err
	}
	return nil
}

// reset takes back a call that has begun. The mutex is held.
func (l *link) reset(call *call) {
	_ = l.frames.WriteRSTStream(call.stream, http2.ErrCodeCancel) // unsent takes every write
	l.sendable.Signal()
	l.forget(call)
}

// await waits until done says so, ctx ends or the link does. The mutex is held
// except while it waits.
func (l *link) await(ctx context.Context, done func() bool) error {
	if l.err == nil && done() {
		return nil
	}
	stop := context.AfterFunc(ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.room.Broadcast()
	})
	defer stop()
	for {
		switch {
		case l.err != nil:
			return l.err
		case ctx.Err() != nil:
			return status.FromContextError(ctx.Err()).Err()
		case done():
			return nil
		}
		l.room.Wait()
	}
}

// encode leaves the header block of a call in block.
func (l *link) encode(ctx context.Context, method string, sent metadata.MD) {
	l.block.Reset()
	field := func(name, value string) {
		_ = l.headers.WriteField(hpack.HeaderField{Name: name, Value: value}) // a buffer takes every write
	}
	field(":method", "POST")
	field(":scheme", "http")
	field(":path", method)
	field(":authority", l.authority)
	field("content-type", "application/grpc")
	field("user-agent", "conveyor-bench")
	field("te", "trailers")
	if deadline, ok := ctx.Deadline(); ok {
		left := max(0, time.Until(deadline).Microseconds())
		unit := "u"
		for _, larger := range []string{"m", "S"} { // at most eight digits
			if left > 99_999_999 {
				left, unit = left/1000, larger
			}
		}
		// Another value each time would only push the others out of the table.
		_ = l.headers.WriteField(hpack.HeaderField{Name: "grpc-timeout", Value: strconv.FormatInt(left, 10) + unit, Sensitive: true})
	}
	for name, values := range sent {
		for _, v := range values {
			field(name, v)
		}
	}
}

// abandon ends a call whose caller has gone, and reports whether it was still
// under way.
func (l *link) abandon(call *call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls[call.stream] != call {
		return false
	}
	l.reset(call)
	return true
}

// fail ends the link and every call under way.
func (l *link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return
	}
	if l.err == nil {
		l.err = err
	}
	for _, call := range l.calls {
		l.end(call, err)
	}
	l.close()
}

// close ends what reads and writes. The mutex is held.
func (l *link) close() {
	l.dead = true
	_ = l.conn.Close() // nothing is owed to it
	l.sendable.Broadcast()
	l.room.Broadcast()
}

// end hands call back to its caller; err nil is a reply. The mutex is held.
func (l *link) end(call *call, err error) {
	call.err = err
	l.forget(call) // first, for the next line gives the call away
	call.ended <- struct{}{}
}

// forget makes room for another call. A link that takes none and has none goes.
func (l *link) forget(call *call) {
	delete(l.calls, call.stream)
	if l.err != nil && len(l.calls) == 0 {
		l.close()
		return
	}
	l.room.Broadcast()
}

// send writes what is unsent until the link ends.
func (l *link) send() {
	spare := new(bytes.Buffer)
	for {
		l.mu.Lock()
		for l.unsent.Len() == 0 && !l.dead {
			l.sendable.Wait()
		}
		if l.unsent.Len() < dense && !l.dead {
			// Others whose replies came in the same read are about to send as well:
			// one system call for all of them instead of one each.
			l.mu.Unlock()
			runtime.Gosched()
			l.mu.Lock()
		}
		if l.dead {
			l.mu.Unlock()
			return
		}
		l.unsent, spare = spare, l.unsent
		l.room.Broadcast()
		l.mu.Unlock()
		if _, err := l.conn.Write(spare.Bytes()); err != nil {
			l.fail(status.Error(codes.Unavailable, "unary: the connection broke: "+err.Error()))
			return
		}
		spare.Reset()
	}
}

// receive reads frames until the link ends.
func (l *link) receive() {
	frames := http2.NewFramer(nil, bufio.NewReaderSize(l.conn, 64<<10))
	frames.SetReuseFrames()
	for {
		f, err := frames.ReadFrame()
		if err == nil {
			err = l.take(f)
		}
		if err != nil {
			l.fail(status.Error(codes.Unavailable, "unary: the connection broke: "+err.Error()))
			return
		}
	}
}

// take does what one frame says. An error ends the link.
func (l *link) take(f http2.Frame) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	stream := f.Header().StreamID
	call := l.calls[stream]
	switch f := f.(type) {
	case *http2.HeadersFrame:
		l.reading = nil
		if call != nil {
			l.reading = &call.status
		}
		return l.fields(call, f.HeaderBlockFragment(), f.HeadersEnded(), f.StreamEnded())
	case *http2.ContinuationFrame:
		return fmt.Errorf("headers of more than %d bytes", maxFrame)
	case *http2.DataFrame:
		if call != nil {
			call.in = append(call.in, f.Data()...)
			if f.StreamEnded() {
				l.end(call, call.status.err()) // which there is none of yet
			} else if len(call.in) > maxReply {
				_ = l.frames.WriteRSTStream(stream, http2.ErrCodeCancel) // unsent takes every write
				l.end(call, status.Errorf(codes.ResourceExhausted, "unary: the reply has more than %d bytes", maxReply-prefix))
			}
		}
		if l.read += f.Length; l.read >= connWindow/2 {
			_ = l.frames.WriteWindowUpdate(0, l.read) // unsent takes every write
			l.read = 0
			l.sendable.Signal()
		}
	case *http2.RSTStreamFrame:
		if call != nil {
			code, reason := codes.Unavailable, f.ErrCode
			if reason == cancelled {
				code = codes.Canceled // as gRPC has it
			}
			l.end(call, status.Error(code, "unary: the server ended the call: "+f.ErrCode.String()))
		}
	case *http2.SettingsFrame:
		return l.settings(f)
	case *http2.PingFrame:
		if !f.IsAck() {
			_ = l.frames.WritePing(true, f.Data) // unsent takes every write
			l.sendable.Signal()
		}
	case *http2.WindowUpdateFrame:
		if stream == 0 {
			l.window += int64(f.Increment)
		} else if call != nil {
			call.window += int64(f.Increment)
		}
		l.room.Broadcast()
	case *http2.GoAwayFrame:
		l.goAway(f)
	}
	return nil
}

func (l *link) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	err := f.ForeachSetting(func(s http2.Setting) error {
		switch s.ID {
		case http2.SettingInitialWindowSize:
			for _, call := range l.calls {
				call.window += int64(s.Val) - l.each
			}
			l.each = int64(s.Val)
		case http2.SettingMaxConcurrentStreams:
			l.most = int(s.Val)
		case http2.SettingHeaderTableSize:
			l.headers.SetMaxDynamicTableSizeLimit(s.Val)
		}
		return s.Valid()
	})
	_ = l.frames.WriteSettingsAck() // unsent takes every write
	l.sendable.Signal()
	l.room.Broadcast()
	return err
}

// goAway begins no more calls; those that the server has not taken fail.
func (l *link) goAway(f *http2.GoAwayFrame) {
	why := status.Error(codes.Unavailable, "unary: the server is going away: "+f.ErrCode.String())
	if l.err == nil {
		l.err = why
	}
	for _, call := range l.calls {
		if call.stream > f.LastStreamID {
			l.end(call, why)
		}
	}
	if len(l.calls) == 0 {
		l.close()
		return
	}
	l.room.Broadcast() // who waits to begin a call learns it now
}

// fields decodes headers of call, which may be nil: the table has to be kept up
// to date all the same.
func (l *link) fields(call *call, block []byte, whole, last bool) error {
	if !whole {
		return fmt.Errorf("headers of more than %d bytes", maxFrame)
	}
	if _, err := l.decoder.Write(block); err != nil {
		return err
	}
	if err := l.decoder.Close(); err != nil {
		return err
	}
	if call != nil && last {
		l.end(call, call.status.err())
	}
	return nil
}

// field is called with every header field.
func (l *link) field(f hpack.HeaderField) {
	if l.reading == nil {
		return
	}
	switch f.Name {
	case ":status":
		l.reading.http = f.Value
	case "grpc-status":
		l.reading.code = f.Value
	case "grpc-message":
		l.reading.message = f.Value
	}
}

// err is nil for the status OK.
func (s *callStatus) err() error {
	switch s.code {
	case "0":
		return nil
	case "":
		return status.Errorf(codes.Unknown, "unary: this is no answer of a gRPC server: it has no status, HTTP's is %s", s.http)
	}
	n, err := strconv.ParseUint(s.code, 10, 32)
	if err != nil {
		return status.Errorf(codes.Unknown, "unary: the status %q is no number", s.code)
	}
	return status.Error(codes.Code(n), unescape(s.message))
}

// unescape undoes the percent encoding of a status message; what is no encoding
// stays as it is.
func unescape(s string) string {
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if b, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				out, i = append(out, byte(b)), i+2
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}
