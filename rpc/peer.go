package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/peerpb"
)

// peer is one other node as a target of messages.
type peer struct {
	t      *PeerTransport
	id     uint64
	addr   string
	cancel context.CancelFunc
	// at is the address of the present, or the newest, attempt to connect: addr,
	// or one of the others the member may be reached at.
	at atomic.Pointer[string]
	// said is where the peer itself said that it is, nil before it did: it may have
	// moved while this node lagged, and must be answered to end that.
	said atomic.Pointer[string]
	// entries and control are the two classes of messages. Order holds within
	// a class; raft needs none between them.
	entries *peerQueue
	control *peerQueue
	// kick ends a pause between attempts to connect.
	kick chan struct{}

	// member and guests (open streams from the peer) are guarded by
	// PeerTransport.mu.
	member bool
	guests int

	// disk is the data directory the newest connection has led to, 0 = not known.
	disk      atomic.Uint64
	connected atomic.Bool
	sent      atomic.Uint64

	mu      sync.Mutex
	lastErr string
}

// queueFor returns the queue of m's class.
func (p *peer) queueFor(m *raftpb.Message) *peerQueue {
	switch m.GetType() {
	case raftpb.MsgApp, raftpb.MsgAppResp, raftpb.MsgSnap:
		return p.entries
	}
	return p.control
}

// elsewhere reports whether the connection leads to another data directory than
// disk, as far as both are known.
func (p *peer) elsewhere(disk uint64) bool {
	have := p.disk.Load()
	return disk != 0 && have != 0 && have != disk
}

// run keeps a session with the peer until ctx is done.
func (p *peer) run(ctx context.Context) {
	pause := p.t.o.BackoffMin
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for failures := 0; ; {
		begun := time.Now()
		// The address that worked last is the best guess.
		if addrs := p.addrs(); failures > 0 {
			p.at.Store(&addrs[failures%len(addrs)])
		}
		err := p.session(ctx)
		if !p.connected.Load() {
			failures++
		}
		p.connected.Store(false)
		// What waited was for the raft state of back then; raft makes new
		// messages once it knows that these are lost.
		lost := p.entries.drop() + p.control.drop()
		if ctx.Err() != nil {
			return
		}
		p.t.report.unreachable(p.id)
		p.failed(err, lost)
		if time.Since(begun) > p.t.o.BackoffMax {
			pause = p.t.o.BackoffMin
		}
		// Jitter: the peers of a node that comes back do not all come at once.
		timer.Reset(pause/2 + rand.N(pause/2+1))
		pause = min(2*pause, p.t.o.BackoffMax)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			continue
		case <-p.kick:
		}
		// Not at once: two nodes that fail each other right after the greeting
		// would spin.
		timer.Reset(p.t.o.BackoffMin)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
	}
}

// addrs returns where the peer may be reached, the configured address first.
func (p *peer) addrs() []string {
	addrs := append([]string{p.addr}, p.t.o.Also(p.id)...)
	if said := p.said.Load(); said != nil && !slices.Contains(addrs, *said) {
		addrs = append(addrs, *said)
	}
	return addrs
}

// failed logs why a session ended, but not again while the reason stays.
func (p *peer) failed(err error, lost int) {
	p.t.refused(err)
	text := err.Error()
	p.mu.Lock()
	again := p.lastErr == text
	p.lastErr = text
	p.mu.Unlock()
	if again {
		return
	}
	log := p.t.o.Logger.With("peer", p.id, "addr", *p.at.Load())
	if errors.Is(err, ErrRefused) {
		log.Error("the peer does not talk to this node; trying again, without repeating this message", "err", err)
		return
	}
	log.Warn("the connection to the peer is down; trying again", "err", err, "dropped", lost)
}

// session connects, greets and sends until something fails. It always returns
// an error.
func (p *peer) session(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	addr := *p.at.Load()
	conn, err := p.t.dialer.conn(addr)
	if err != nil {
		return err
	}
	defer conn.Close()

	limit := 2 * p.t.o.DialTimeout
	late := fmt.Errorf("rpc: no greeting from node %d at %s within %v", p.id, addr, limit)
	// Greater than the last also after a restart of this process, which a
	// counter would not be.
	session := uint64(time.Now().UnixNano())
	var control, entries grpc.ClientStream
	if err := within(ctx, limit, cancel, late, func() (err error) {
		if control, err = p.open(ctx, conn, session); err == nil {
			entries, err = p.open(ctx, conn, session)
		}
		return err
	}); err != nil {
		return err
	}
	p.connected.Store(true)
	p.mu.Lock()
	p.lastErr = ""
	p.mu.Unlock()
	p.t.o.Logger.Info("connected to the peer", "peer", p.id, "addr", addr)

	var wg sync.WaitGroup
	for _, s := range []struct {
		stream grpc.ClientStream
		queue  *peerQueue
	}{{control, p.control}, {entries, p.entries}} {
		wg.Go(func() { cancel(p.sendLoop(ctx, s.stream, s.queue)) })
		// Nothing more is to be received: what comes is the end of the stream.
		wg.Go(func() {
			err := s.stream.RecvMsg(&peerpb.Hello{})
			if err == nil {
				err = fmt.Errorf("%w: a second greeting", ErrMalformed)
			}
			cancel(fromPeer(p.id, err))
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// within runs greet, and cancels ctx with late when it takes longer than limit. ctx
// outlives the greeting: the streams that it opens are of ctx.
func within(ctx context.Context, limit time.Duration, cancel context.CancelCauseFunc, late error, greet func() error) error {
	timeout := time.AfterFunc(limit, func() { cancel(late) })
	defer timeout.Stop()
	if err := greet(); err != nil {
		return cause(ctx, err)
	}
	if !timeout.Stop() {
		// The time is up, though the function of the timer may have yet to run.
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return nil
}

// cause prefers the reason ctx was cancelled for over err, which then only says
// that it was.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil {
		return c
	}
	return err
}

// open starts a Messages stream and exchanges greetings on it.
func (p *peer) open(ctx context.Context, conn *grpc.ClientConn, session uint64) (grpc.ClientStream, error) {
	stream, err := peerpb.NewPeerClient(conn).Messages(ctx)
	if err != nil {
		return nil, fromPeer(p.id, err)
	}
	hello := p.t.identity().hello(p.id)
	hello.Session = session
	err = stream.Send(&peerpb.MessageFrame{Hello: hello})
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the reason is in Recv
		return nil, fromPeer(p.id, err)
	}
	h, err := stream.Recv()
	if err != nil {
		return nil, fromPeer(p.id, err)
	}
	if err := p.t.checkAnswer(h, p.id); err != nil {
		return nil, err
	}
	p.disk.Store(h.GetDiskId())
	p.t.learn(h)
	return stream, nil
}

// sendLoop sends what queue holds until the stream breaks.
func (p *peer) sendLoop(ctx context.Context, stream grpc.ClientStream, queue *peerQueue) error {
	var frame messagesOut
	for {
		batch := queue.take()
		if batch == nil {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-queue.wake:
			}
			continue
		}
		for len(batch) > 0 {
			n := cut(batch, p.t.o.FrameBytes)
			frame.msgs = batch[:n]
			err := stream.SendMsg(&frame)
			queue.release(batch[:n], err == nil)
			batch = batch[n:]
			if err != nil {
				queue.release(batch, false)
				if errors.Is(err, io.EOF) {
					// The goroutine in RecvMsg learns why; it cancels ctx.
					<-ctx.Done()
					return context.Cause(ctx)
				}
				return fromPeer(p.id, err)
			}
			p.sent.Add(uint64(n))
		}
	}
}

// cut returns how many of msgs go into one frame of about limit bytes; at least
// one, however large it is.
func cut(msgs []*raftpb.Message, limit int64) int {
	size := messageBytes(msgs[0])
	n := 1
	for n < len(msgs) {
		size += messageBytes(msgs[n])
		if size > limit {
			break
		}
		n++
	}
	return n
}

func (p *peer) stats() PeerStats {
	s := PeerStats{ID: p.id, Addr: p.addr, Connected: p.connected.Load(), Sent: p.sent.Load()}
	for _, q := range []*peerQueue{p.entries, p.control} {
		bytes, dropped := q.stats()
		s.QueuedBytes += bytes
		s.Dropped += dropped
	}
	p.mu.Lock()
	s.LastError = p.lastErr
	p.mu.Unlock()
	return s
}
