package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/snap"
)

// patience bounds the waiting for a condition; reaching it is a failure.
const patience = 20 * time.Second

// event wakes everybody who waits for a condition to change.
type event struct {
	mu sync.Mutex
	ch chan struct{}
}

func (e *event) wait() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ch == nil {
		e.ch = make(chan struct{})
	}
	return e.ch
}

func (e *event) fire() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ch != nil {
		close(e.ch)
		e.ch = nil
	}
}

// until waits for cond, which it evaluates at every event of e.
func until(t testing.TB, e *event, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		ch := e.wait()
		if cond() {
			return
		}
		select {
		case <-ch:
		case <-ctx.Done():
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// fakeNode stands for a raft node: it records what it is given and does what
// the test says.
type fakeNode struct {
	id     uint64
	fs     vfs.FS
	images *snap.Store
	event  event

	mu          sync.Mutex
	stepped     []*raftpb.Message
	unreachable map[uint64]int
	lead        raftnode.Leadership
	changed     chan struct{}
	beats       []beatKey
	// discard: messages are not recorded.
	discard bool
	// step, when set, runs before messages are recorded.
	step func(context.Context, []*raftpb.Message) error
	// propose answers commands while the node leads.
	propose func(cmd []byte, done func(raftnode.Result, error))
}

func newFakeNode(t testing.TB, id uint64) *fakeNode {
	fs := vfs.NewMem()
	store, err := snap.OpenStore(fs, "images", snap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &fakeNode{id: id, fs: fs, images: store, unreachable: map[uint64]int{}, changed: make(chan struct{})}
}

func (n *fakeNode) Step(ctx context.Context, msgs []*raftpb.Message) error {
	n.mu.Lock()
	step := n.step
	n.mu.Unlock()
	if step != nil {
		if err := step(ctx, msgs); err != nil {
			return err
		}
	}
	n.mu.Lock()
	if !n.discard {
		n.stepped = append(n.stepped, msgs...)
	}
	n.mu.Unlock()
	n.event.fire()
	return nil
}

func (n *fakeNode) Images() *snap.Store { return n.images }

func (n *fakeNode) ReportUnreachable(id uint64) {
	n.mu.Lock()
	n.unreachable[id]++
	n.mu.Unlock()
	n.event.fire()
}

func (n *fakeNode) Leadership() raftnode.Leadership {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lead
}

func (n *fakeNode) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

// follow makes the node believe that leader leads term.
func (n *fakeNode) follow(leader, term uint64) {
	n.mu.Lock()
	n.lead = raftnode.Leadership{Leader: leader, Term: term, Leading: leader == n.id}
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
}

func (n *fakeNode) ProposeFunc(cmd []byte, done func(raftnode.Result, error)) {
	n.mu.Lock()
	lead, propose := n.lead, n.propose
	n.mu.Unlock()
	switch {
	case lead.Leading:
		propose(cmd, done)
	case lead.Leader != 0:
		done(raftnode.Result{}, &raftnode.NotLeaderError{Leader: lead.Leader, Term: lead.Term})
	default:
		done(raftnode.Result{}, raftnode.ErrNoLeader)
	}
}

func (n *fakeNode) ReadIndex(context.Context) (uint64, error) { return 0, raftnode.ErrNoLeader }

func (n *fakeNode) WaitApplied(context.Context, uint64) error { return nil }

func (n *fakeNode) beat(sidecar, service string) {
	n.mu.Lock()
	n.beats = append(n.beats, beatKey{sidecar, service})
	n.mu.Unlock()
	n.event.fire()
}

// received returns what was stepped of one type.
func (n *fakeNode) beatAll(sidecars, services [][]byte) {
	for _, id := range sidecars {
		n.beat(string(id), "")
	}
	for _, id := range services {
		n.beat("", string(id))
	}
}

func (n *fakeNode) received(typ raftpb.MessageType) []*raftpb.Message {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []*raftpb.Message
	for _, m := range n.stepped {
		if m.GetType() == typ {
			out = append(out, m)
		}
	}
	return out
}

func (n *fakeNode) reports(id uint64) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.unreachable[id]
}

// network is a dialer whose connections can be cut.
type network struct {
	mu    sync.Mutex
	conns map[*cuttable]struct{}
	down  map[string]bool // addresses that refuse
	dials atomic.Int64
	// budget, when positive, is how many bytes a connection carries outwards
	// before it breaks.
	budget atomic.Int64
	sent   atomic.Int64
}

func newNetwork() *network {
	return &network{conns: map[*cuttable]struct{}{}, down: map[string]bool{}}
}

func (w *network) dial(ctx context.Context, addr string) (net.Conn, error) {
	w.dials.Add(1)
	w.mu.Lock()
	down := w.down[addr]
	w.mu.Unlock()
	if down {
		return nil, errors.New("the network to " + addr + " is down")
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	cc := &cuttable{Conn: c, w: w, addr: addr, budget: w.budget.Load()}
	w.mu.Lock()
	w.conns[cc] = struct{}{}
	w.mu.Unlock()
	return cc, nil
}

// cut breaks all connections to addr, or all when addr is "".
func (w *network) cut(addr string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		if addr == "" || c.addr == addr {
			c.Conn.Close()
		}
	}
}

func (w *network) setDown(addr string, down bool) {
	w.mu.Lock()
	w.down[addr] = down
	w.mu.Unlock()
	if down {
		w.cut(addr)
	}
}

type cuttable struct {
	net.Conn
	w      *network
	addr   string
	budget int64
	mu     sync.Mutex
	used   int64
}

func (c *cuttable) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.budget > 0 && c.used+int64(len(p)) > c.budget {
		n, _ := c.Conn.Write(p[:c.budget-c.used])
		c.used = c.budget
		c.w.sent.Add(int64(n))
		c.Conn.Close()
		return n, errors.New("the connection broke")
	}
	n, err := c.Conn.Write(p)
	c.used += int64(n)
	c.w.sent.Add(int64(n))
	return n, err
}

func (c *cuttable) Close() error {
	c.w.mu.Lock()
	delete(c.w.conns, c)
	c.w.mu.Unlock()
	return c.Conn.Close()
}

// station is one node as far as this package goes: a fake raft node behind a
// real transport and a real server on a real socket.
type station struct {
	t         testing.TB
	id        Identity
	node      *fakeNode
	transport *PeerTransport
	net       *network
	config    func(*PeerServerConfig)
	server    *grpc.Server
	peers     *PeerServer
	served    chan struct{}
	log       *logRecorder
}

const testCluster = 0xc0ffee

// newStation starts a node; configure may be nil.
func newStation(t testing.TB, id uint64, configure func(*TransportOptions)) *station {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &station{t: t, node: newFakeNode(t, id), net: newNetwork(), log: &logRecorder{}}
	s.id = Identity{ClusterID: testCluster, NodeID: id, PeerAddr: l.Addr().String(),
		ClientAddr: fmt.Sprintf("client-%d:1", id), Version: "test"}
	o := TransportOptions{Identity: s.id, Dial: s.net.dial, Logger: slog.New(s.log),
		BackoffMin: time.Millisecond, BackoffMax: 20 * time.Millisecond, ReportInterval: time.Millisecond,
		DialTimeout: 5 * time.Second}
	if configure != nil {
		configure(&o)
	}
	s.id = o.Identity
	if s.transport, err = NewPeerTransport(o); err != nil {
		t.Fatal(err)
	}
	s.transport.Attach(s.node)
	s.listen(l)
	t.Cleanup(func() {
		s.transport.Close()
		s.stopServer()
	})
	return s
}

func (s *station) listen(l net.Listener) {
	c := PeerServerConfig{Node: s.node, Transport: s.transport, Beats: s.node.beatAll, Logger: slog.New(s.log), Transfers: s.transport.o.Transfers,
		Image: func(_ context.Context, min uint64) (*snap.Reader, error) {
			for _, i := range s.node.images.List() {
				if i.Index >= min {
					return s.node.images.Open(i.ID)
				}
			}
			return nil, ErrBehind
		}}
	if s.config != nil {
		s.config(&c)
	}
	ps, err := NewPeerServer(c)
	if err != nil {
		s.t.Fatal(err)
	}
	server, served := grpc.NewServer(PeerServerOptions()...), make(chan struct{})
	peerpb.RegisterPeerServer(server, ps)
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	s.server, s.peers, s.served = server, ps, served
}

// stopServer kills the server side, as a crash would.
func (s *station) stopServer() {
	if s.server == nil {
		return
	}
	s.server.Stop()
	<-s.served
	s.server = nil
}

// restartServer brings it back at the same address.
func (s *station) restartServer() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.id.PeerAddr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.listen(l)
}

func (s *station) member() raftnode.Member {
	return raftnode.Member{ID: s.id.NodeID, Addr: s.id.PeerAddr}
}

// introduce makes the stations members of one group.
func introduce(ss ...*station) {
	var members []raftnode.Member
	for _, s := range ss {
		members = append(members, s.member())
	}
	for _, s := range ss {
		s.transport.SetMembers(members)
	}
}

// logRecorder keeps log lines.
type logRecorder struct {
	mu    sync.Mutex
	event event
	lines []slog.Record
}

func (l *logRecorder) Enabled(context.Context, slog.Level) bool { return true }
func (l *logRecorder) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *logRecorder) WithGroup(string) slog.Handler            { return l }
func (l *logRecorder) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	l.lines = append(l.lines, r)
	l.mu.Unlock()
	l.event.fire()
	return nil
}

// count returns how many lines of level there are.
func (l *logRecorder) count(level slog.Level) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, r := range l.lines {
		if r.Level == level {
			n++
		}
	}
	return n
}

// checkLeaks fails t when goroutines are left after its cleanups.
func checkLeaks(t testing.TB) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		if err := goleak.Find(ignore); err != nil {
			t.Error(err)
		}
	})
}

func message(typ raftpb.MessageType, from, to, index uint64, data ...byte) *raftpb.Message {
	m := &raftpb.Message{Type: typ.Enum(), From: new(from), To: new(to), Term: new(uint64(1)), Index: new(index)}
	if len(data) > 0 {
		m.Entries = []*raftpb.Entry{{Index: new(index), Term: new(uint64(1)), Data: data}}
	}
	return m
}

// readLimiter is a dialer whose connections break after limit bytes read.
type readLimiter struct {
	network *network
	limit   int64
	total   atomic.Int64
	broken  atomic.Int64
}

func (l *readLimiter) dial(ctx context.Context, addr string) (net.Conn, error) {
	c, err := l.network.dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return &limitedConn{Conn: c, l: l}, nil
}

type limitedConn struct {
	net.Conn
	l    *readLimiter
	read int64 // of the one goroutine that reads
}

func (c *limitedConn) Read(p []byte) (int, error) {
	if c.read >= c.l.limit {
		c.l.broken.Add(1)
		c.Conn.Close()
		return 0, errors.New("the connection broke")
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.l.limit-c.read)])
	c.read += int64(n)
	c.l.total.Add(int64(n))
	return n, err
}
