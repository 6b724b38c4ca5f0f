package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/snap"
)

// maxGuests bounds the peers that are known by their own greeting only.
const maxGuests = 16

// TransportOptions configures a PeerTransport; EnsureDefaults fills zero
// values.
type TransportOptions struct {
	// Identity is this node; required.
	Identity Identity
	// Disks refuses nodes that come with another data directory; nil trusts all.
	Disks Disks
	// OnRefused is told when another node refuses this one for a reason to act
	// on. It must not block.
	OnRefused func(*RefusedError)
	// Position returns how far this node has applied the log, and the membership
	// there. It must not block. Default: nothing is applied.
	Position func() raftnode.Position
	// Also returns further addresses of a member, tried in turn when that of its
	// membership fails. It must not block. Default: none.
	Also func(member uint64) []string
	// Dial opens connections to peers. Default: TCP.
	Dial Dialer
	// Credentials secure them. Default: none.
	Credentials credentials.TransportCredentials
	// Logger receives connects, breaks and refusals, each once. Default:
	// discarded.
	Logger *slog.Logger

	// QueueBytes bounds the log messages that wait for one peer. Default 64
	// MiB: a second of a saturated gigabit link, above raft's MaxInflightBytes.
	QueueBytes int64
	// ControlBytes bounds the heartbeats and votes that wait for one peer.
	// Default 1 MiB, some ten thousand.
	ControlBytes int64
	// FrameBytes is the size up to which waiting messages go into one frame.
	// Default 1 MiB.
	FrameBytes int64
	// DialTimeout bounds one attempt to connect and to greet. Default 1 s.
	DialTimeout time.Duration
	// BackoffMin and BackoffMax bound the pause between attempts. Defaults 10
	// ms and 500 ms: after a leader's death, an election must not wait for a
	// connection.
	BackoffMin time.Duration
	BackoffMax time.Duration
	// ReportInterval is the least time between two reports that the same peer
	// is unreachable. Default 100 ms.
	ReportInterval time.Duration

	// Transfers is told of outgoing images; nil = nobody is.
	Transfers ImageTransfers
	// ImageLimit paces outgoing images together. Default: no limit.
	ImageLimit *snap.RateLimit
	// ImageChunkBytes is the size of the chunks of an image. Default 256 KiB.
	ImageChunkBytes int
	// ImageAttempts is how many attempts in a row may fail without the receiver
	// having got any further before SendImage gives up. Default 16, some five seconds:
	// longer than the receiver takes to notice that an earlier connection died.
	ImageAttempts int
}

// EnsureDefaults fills every zero value and returns o.
func (o *TransportOptions) EnsureDefaults() *TransportOptions {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Position == nil {
		o.Position = func() raftnode.Position { return raftnode.Position{} }
	}
	if o.Also == nil {
		o.Also = func(uint64) []string { return nil }
	}
	setDefault(&o.QueueBytes, 64<<20)
	setDefault(&o.ControlBytes, 1<<20)
	setDefault(&o.FrameBytes, 1<<20)
	setDefault(&o.DialTimeout, time.Second)
	setDefault(&o.BackoffMin, 10*time.Millisecond)
	setDefault(&o.BackoffMax, 500*time.Millisecond)
	setDefault(&o.ReportInterval, 100*time.Millisecond)
	setDefault(&o.ImageChunkBytes, 256<<10)
	setDefault(&o.ImageAttempts, 16)
	return o
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Validate reports every fault of o at once. It expects defaults to be filled.
func (o *TransportOptions) Validate() error {
	errs := []error{o.Identity.Validate()}
	positive := func(name string, v int64) {
		if v <= 0 {
			errs = append(errs, fmt.Errorf("rpc: transport option %s is %d, must be positive", name, v))
		}
	}
	positive("QueueBytes", o.QueueBytes)
	positive("ControlBytes", o.ControlBytes)
	positive("FrameBytes", o.FrameBytes)
	positive("DialTimeout", int64(o.DialTimeout))
	positive("BackoffMin", int64(o.BackoffMin))
	positive("ReportInterval", int64(o.ReportInterval))
	positive("ImageChunkBytes", int64(o.ImageChunkBytes))
	positive("ImageAttempts", int64(o.ImageAttempts))
	if o.BackoffMax < o.BackoffMin {
		errs = append(errs, fmt.Errorf("rpc: transport option BackoffMax is %v, must be at least BackoffMin (%v)",
			o.BackoffMax, o.BackoffMin))
	}
	if o.FrameBytes > maxPeerMessage/2 {
		errs = append(errs, fmt.Errorf("rpc: transport option FrameBytes is %d, must be at most %d",
			o.FrameBytes, maxPeerMessage/2))
	}
	return errors.Join(errs...)
}

// UnreachableReporter is told about peers that messages do not get to.
// raftnode.Node implements it.
type UnreachableReporter interface{ ReportUnreachable(id uint64) }

// PeerTransport sends raft messages to the other nodes, best effort: Send never
// blocks and may drop, and raft repeats what matters. It implements
// raftnode.Transport. Its methods are safe for concurrent use.
//
// Every peer has one goroutine that keeps a connection to it, and two streams
// on that connection: one for log entries and one for everything that decides
// who leads, so that a heartbeat never waits behind megabytes of entries and
// causes an election.
type PeerTransport struct {
	o      TransportOptions
	dialer peerDialer
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	report *reporter

	mu     sync.RWMutex
	closed bool
	// peers are the members except this node, and the guests: nodes of this
	// cluster that greeted us before we learned of their membership.
	peers map[uint64]*peer
	// removed are nodes that were members and are no more. Ids are never
	// reused, so they have no business here.
	removed map[uint64]bool
	// listed are the disks of the members, as far as they joined with one.
	listed map[uint64]uint64
	// claims are what nodes say of themselves that this node has not applied yet.
	claims map[uint64]claim
	// clients holds what the nodes said in their greetings.
	clients map[uint64]string
}

var _ raftnode.Transport = (*PeerTransport)(nil)

// NewPeerTransport returns a transport without members. Close releases it.
func NewPeerTransport(o TransportOptions) (*PeerTransport, error) {
	if err := o.EnsureDefaults().Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	t := &PeerTransport{
		o:       o,
		dialer:  newPeerDialer(o.Dial, o.Credentials, o.DialTimeout),
		ctx:     ctx,
		cancel:  cancel,
		report:  newReporter(o.ReportInterval),
		peers:   map[uint64]*peer{},
		removed: map[uint64]bool{},
		listed:  map[uint64]uint64{},
		claims:  map[uint64]claim{},
		clients: map[uint64]string{},
	}
	t.wg.Go(func() { t.report.run(ctx) })
	return t, nil
}

// Attach names who is told about unreachable peers; until then such reports are
// kept. The transport is made before the node, which needs it.
func (t *PeerTransport) Attach(node UnreachableReporter) { t.report.attach(node) }

// Close ends all connections and waits for the goroutines. Messages that still
// wait are dropped, images being sent fail.
func (t *PeerTransport) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
	return nil
}

// Send implements raftnode.Transport.
func (t *PeerTransport) Send(msgs []*raftpb.Message) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, m := range msgs {
		p := t.peers[m.GetTo()]
		if p == nil || !p.queueFor(m).push(m) {
			t.report.unreachable(m.GetTo())
		}
	}
}

// SetMembers implements raftnode.Transport.
func (t *PeerTransport) SetMembers(members []raftnode.Member) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	keep := make(map[uint64]bool, len(members))
	clear(t.listed)
	for _, m := range members {
		if m.Removed {
			t.removed[m.ID] = true
			if p := t.peers[m.ID]; p != nil {
				p.cancel()
				delete(t.peers, m.ID)
				delete(t.clients, m.ID)
			}
			continue
		}
		delete(t.removed, m.ID)
		if m.Disk != 0 {
			t.listed[m.ID] = m.Disk
		}
		if m.ID == t.o.Identity.NodeID || m.Addr == "" {
			continue
		}
		keep[m.ID] = true
		p := t.peers[m.ID]
		switch {
		case p == nil:
			p = t.startLocked(m.ID, m.Addr)
		case p.addr != m.Addr || p.elsewhere(m.Disk):
			// One name may lead to another machine by now, while the old one still
			// holds the connection.
			p = t.restartLocked(p, m.Addr)
		}
		p.member = true
	}
	for id, p := range t.peers {
		if p.member && !keep[id] {
			p.cancel()
			delete(t.peers, id)
			delete(t.clients, id)
			t.removed[id] = true
		}
	}
}

// startLocked makes the peer and its goroutine.
func (t *PeerTransport) startLocked(id uint64, addr string) *peer {
	ctx, cancel := context.WithCancel(t.ctx)
	p := &peer{
		t:       t,
		id:      id,
		addr:    addr,
		cancel:  cancel,
		entries: newPeerQueue(t.o.QueueBytes),
		control: newPeerQueue(t.o.ControlBytes),
		kick:    make(chan struct{}, 1),
	}
	p.at.Store(&addr)
	t.peers[id] = p
	t.wg.Go(func() { p.run(ctx) })
	return p
}

// restartLocked makes a new peer in the place of p, which ends its connection.
func (t *PeerTransport) restartLocked(p *peer, addr string) *peer {
	p.cancel()
	next := t.startLocked(p.id, addr)
	next.member, next.guests = p.member, p.guests
	next.said.Store(p.said.Load())
	return next
}

// greeted takes note of a node whose greeting passed Identity.check and which
// opened a stream to this one. It refuses a node that was removed. The caller
// calls done when the stream ends.
//
// A node this one does not know is not refused: after a long absence this node
// may be the one whose membership is old, and the unknown one the leader that
// will tell it. To be told, it must be able to answer. raft itself keeps a
// removed node that tries to lead from disturbing (PreVote, CheckQuorum).
//
// answer says that the stream is one of raft messages, whose answers need a
// stream of this node's own.
func (t *PeerTransport) greeted(h *peerpb.Hello, answer bool) (done func(), err error) {
	if err := t.check(h); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	id := h.GetNodeId()
	switch {
	case t.closed:
		return nil, raftnode.ErrStopping
	}
	p := t.peers[id]
	if p == nil && !answer {
		return func() {}, nil
	}
	if p == nil {
		if h.GetPeerAddr() == "" {
			return nil, &RefusedError{Peer: id, Reason: fmt.Sprintf(
				"node %d is no member that node %d knows of, and it does not say where it can be reached",
				id, t.o.Identity.NodeID)}
		}
		guests := 0
		for _, p := range t.peers {
			if !p.member {
				guests++
			}
		}
		if guests >= maxGuests {
			return nil, &RefusedError{Peer: id, Reason: fmt.Sprintf(
				"node %d is no member that node %d knows of, and %d such nodes are here already",
				id, t.o.Identity.NodeID, guests)}
		}
		t.o.Logger.Info("a node of this cluster that is not in the local membership connected; answering it",
			"peer", id, "addr", h.GetPeerAddr())
		p = t.startLocked(id, h.GetPeerAddr())
	}
	t.clients[id] = h.GetClientAddr()
	// Only while this node cannot know better: otherwise whoever sets the addresses
	// of members, a proxy between them for one, would be gone around.
	if said := h.GetPeerAddr(); said != "" && outranks(h, t.o.Position()) {
		p.said.Store(&said)
	}
	p.guests++
	// It is up: a pause between attempts to reach it can end.
	select {
	case p.kick <- struct{}{}:
	default:
	}
	return func() { t.left(id) }, nil
}

// left undoes greeted: a guest goes with its last stream.
func (t *PeerTransport) left(id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[id]
	if p == nil {
		return
	}
	p.guests--
	if p.guests <= 0 && !p.member {
		p.cancel()
		delete(t.peers, id)
		delete(t.clients, id)
	}
}

// learn records what peer id said when it answered.
func (t *PeerTransport) learn(h *peerpb.Hello) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.peers[h.GetNodeId()] != nil {
		t.clients[h.GetNodeId()] = h.GetClientAddr()
	}
}

// ClientAddr returns where node id serves clients, "" when it has not said so
// yet.
func (t *PeerTransport) ClientAddr(id uint64) string {
	if id == t.o.Identity.NodeID {
		return t.o.Identity.ClientAddr
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.clients[id]
}

// peerAddr returns the peer address of node id, "" when it is unknown.
func (t *PeerTransport) peerAddr(id uint64) string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if p := t.peers[id]; p != nil {
		return *p.at.Load()
	}
	return ""
}

// connect returns a new connection to node id; the caller closes it.
func (t *PeerTransport) connect(id uint64, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	addr := t.peerAddr(id)
	if addr == "" {
		return nil, fmt.Errorf("%w: the address of node %d is not known here", ErrUnreachable, id)
	}
	return t.dialer.conn(addr, more...)
}

// PeerStats describes the connection to one peer.
type PeerStats struct {
	ID         uint64
	Addr       string
	ClientAddr string
	// Member is false for a node that is known by its own greeting only.
	Member bool
	// Connected: both streams are open and greeted.
	Connected bool
	// QueuedBytes wait or are being sent.
	QueuedBytes int64
	// Dropped and Sent count messages since the peer was added; Sent ones were
	// handed to the network.
	Dropped uint64
	Sent    uint64
	// LastError is why the last connection ended or failed, "" when none did.
	LastError string
}

// Stats describes all peers, sorted by id.
func (t *PeerTransport) Stats() []PeerStats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	out := make([]PeerStats, 0, len(t.peers))
	for id, p := range t.peers {
		s := p.stats()
		s.ClientAddr, s.Member = t.clients[id], p.member
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b PeerStats) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out
}
