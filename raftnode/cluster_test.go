package raftnode

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// network carries messages between running nodes in this process.
type network struct {
	mu    sync.Mutex
	nodes map[uint64]*Node
	cut   map[[2]uint64]bool
}

func newNetwork() *network {
	return &network{nodes: map[uint64]*Node{}, cut: map[[2]uint64]bool{}}
}

func (nw *network) node(from, to uint64) *Node {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.cut[[2]uint64{from, to}] || nw.cut[[2]uint64{to, from}] {
		return nil
	}
	return nw.nodes[to]
}

func (nw *network) isolate(id uint64, cut bool) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	for other := range nw.nodes {
		if other != id {
			nw.cut[[2]uint64{id, other}] = cut
		}
	}
}

// link is the Transport of one node: a queue and a goroutine per node, so that
// messages keep their order and Send does not block.
type link struct {
	id   uint64
	nw   *network
	ch   chan []*raftpb.Message
	stop chan struct{}
	done chan struct{}
}

func newLink(id uint64, nw *network) *link {
	l := &link{id: id, nw: nw, ch: make(chan []*raftpb.Message, 4096), stop: make(chan struct{}), done: make(chan struct{})}
	go l.run()
	return l
}

func (l *link) run() {
	defer close(l.done)
	for {
		select {
		case <-l.stop:
			return
		case msgs := <-l.ch:
			for _, m := range msgs {
				if n := l.nw.node(l.id, m.GetTo()); n != nil {
					_ = n.Step(context.Background(), []*raftpb.Message{proto.CloneOf(m)})
				}
			}
		}
	}
}

func (l *link) Send(msgs []*raftpb.Message) {
	select {
	case l.ch <- msgs:
	default:
	}
}

func (l *link) SendImage(ctx context.Context, m *raftpb.Message, image *snap.Reader) error {
	to := l.nw.node(l.id, m.GetTo())
	if to == nil {
		return errors.New("unreachable")
	}
	if err := copyImage(image, to.Images()); err != nil {
		return err
	}
	return to.Step(ctx, []*raftpb.Message{proto.CloneOf(m)})
}

func (l *link) SetMembers([]Member) {}

// process is one running node with its files.
type process struct {
	t    testing.TB
	id   uint64
	dir  string
	nw   *network
	tune func(*Config)
	boot Position

	n      *Node
	sm     StateMachine
	log    *wal.Log
	link   *link
	cancel context.CancelFunc
	done   chan error
}

func newProcess(t testing.TB, id uint64, nw *network, boot Position, tune func(*Config)) *process {
	p := &process{t: t, id: id, dir: t.TempDir(), nw: nw, tune: tune, boot: boot}
	p.sm = newMemMachine(vfs.Default, boot)
	t.Cleanup(p.stop)
	p.start()
	return p
}

func (p *process) mem() *memMachine { return p.sm.(*memMachine) }

func (p *process) start() {
	p.t.Helper()
	log, rec, err := wal.Open(filepath.Join(p.dir, "wal"), wal.Identity{ClusterID: 7, NodeID: p.id},
		wal.Start{Index: p.boot.Index, Term: p.boot.Term, ConfState: p.boot.ConfState}, wal.Options{})
	if err != nil {
		p.t.Fatal(err)
	}
	images, err := snap.OpenStore(vfs.Default, filepath.Join(p.dir, "images"), snap.Options{})
	if err != nil {
		p.t.Fatal(err)
	}
	cfg := Config{ID: p.id}
	if p.tune != nil {
		p.tune(&cfg)
	}
	p.log, p.link = log, newLink(p.id, p.nw)
	p.n, err = New(cfg, p.sm, log, rec, images, p.link)
	if err != nil {
		p.t.Fatal(err)
	}
	p.nw.mu.Lock()
	p.nw.nodes[p.id] = p.n
	p.nw.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel, p.done = cancel, make(chan error, 1)
	go func(n *Node, done chan error) { done <- n.Run(ctx) }(p.n, p.done)
}

// stop ends the node; its files stay.
func (p *process) stop() {
	if p.cancel == nil {
		return
	}
	p.nw.mu.Lock()
	delete(p.nw.nodes, p.id)
	p.nw.mu.Unlock()
	p.cancel()
	p.cancel = nil
	if err := <-p.done; err != nil {
		p.t.Errorf("node %d: %v", p.id, err)
	}
	close(p.link.stop)
	<-p.link.done
	if err := p.log.Close(); err != nil {
		p.t.Errorf("node %d: close the log: %v", p.id, err)
	}
}

// restart is a crash of the process: the state machine keeps what it flushed.
func (p *process) restart() {
	p.stop()
	p.sm = p.mem().crash()
	p.start()
}

// waitLeader returns the process that leads.
func waitLeader(t testing.TB, ps ...*process) *process {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		for _, p := range ps {
			changed := p.n.Changed()
			if p.n.Leadership().Leading {
				return p
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatal("no leader")
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
}

func startCluster(t testing.TB, tune func(*Config), ids ...uint64) (*network, []*process) {
	nw := newNetwork()
	var ps []*process
	for _, id := range ids {
		ps = append(ps, newProcess(t, id, nw, bootPosition(ids...), tune))
	}
	return nw, ps
}

func TestSingleNodeRuns(t *testing.T) {
	_, ps := startCluster(t, nil, 1)
	p := waitLeader(t, ps...)
	ctx := context.Background()
	var wg sync.WaitGroup
	for c := range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 50 {
				if _, err := p.n.Propose(ctx, fmt.Appendf(nil, "%d-%d", c, i)); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
	if _, err := p.n.ReadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(p.mem().commands()); n != 800 {
		t.Fatalf("%d commands applied, want 800", n)
	}
	p.restart()
	if _, err := p.n.ReadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(p.mem().commands()); n != 800 {
		t.Fatalf("%d commands after a restart, want 800", n)
	}
}

// Three nodes under load, the leader is restarted in the middle; nothing
// acknowledged is lost, nothing is applied in different orders.
func TestThreeNodesRun(t *testing.T) {
	_, ps := startCluster(t, nil, 1, 2, 3)
	leader := waitLeader(t, ps...)
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()

	var mu sync.Mutex
	acked := map[string]bool{}
	propose := func(name string) {
		for ctx.Err() == nil {
			p := waitLeader(t, ps...)
			if _, err := p.n.Propose(ctx, []byte(name)); err == nil {
				mu.Lock()
				acked[name] = true
				mu.Unlock()
				return
			} else if !NotDone(err) {
				return
			}
		}
	}
	run := func(round int) {
		var wg sync.WaitGroup
		for c := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for i := range 30 {
					propose(fmt.Sprintf("%d-%d-%d", round, c, i))
				}
			}()
		}
		wg.Wait()
	}
	run(1)
	for err := errors.New("not tried"); err != nil; {
		leader = waitLeader(t, ps...) // on a busy machine it may be another one by now
		if err = leader.n.TransferLeader(ctx, 0); err != nil && (ctx.Err() != nil || !NotDone(err) && !errors.Is(err, ErrTransferFailed)) {
			t.Fatal(err)
		}
	}
	leader.restart()
	run(2)
	index := uint64(0)
	for _, p := range ps {
		i, err := p.n.ReadIndex(ctx)
		if err != nil {
			t.Fatal(err)
		}
		index = max(index, i)
	}
	var want []string
	for _, p := range ps {
		if err := p.n.WaitApplied(ctx, index); err != nil {
			t.Fatal(err)
		}
		got := p.mem().commands()
		if want == nil {
			want = got
		}
		n := min(len(got), len(want))
		for i := range n {
			if got[i] != want[i] {
				t.Fatalf("node %d applied %q as command %d, another %q", p.id, got[i], i, want[i])
			}
		}
		seen := map[string]bool{}
		for _, c := range got {
			seen[c] = true
		}
		for c := range acked {
			if !seen[c] {
				t.Fatalf("node %d lacks the acknowledged command %s", p.id, c)
			}
		}
	}
}

// A transfer asked for when nobody has answered yet, as of a leader that has only
// just taken over, is not refused for that. That raft forgets who is alive once
// per election timeout makes no difference.
func TestTransferBeforeAnswers(t *testing.T) {
	_, ps := startCluster(t, nil, 1, 2, 3)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for tried := false; !tried; {
		n := waitLeader(t, ps...).n
		if _, err := n.Propose(ctx, []byte("x")); err != nil {
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			continue // it leads no more
		}
		// Both in one turn: the messages of the others come after.
		begun, release := make(chan struct{}), make(chan struct{})
		n.inbox.pushControl(nil, func(*loop) { close(begun); <-release })
		<-begun
		led := make(chan bool, 1)
		n.inbox.pushControl(nil, func(l *loop) {
			led <- l.leading()
			if !l.leading() {
				return
			}
			active := 0
			for _, p := range l.rn.Status().Progress {
				if p.RecentActive {
					active++
				}
			}
			// Where raft has checked, and forgotten, only just before the turn, one
			// check more would end the leadership.
			if active > 1 {
				err := l.rn.Step(&raftpb.Message{Type: raftpb.MsgCheckQuorum.Enum(), From: new(uint64(raft.LocalAppendThread))})
				if err != nil || !l.leading() {
					t.Errorf("a check of the quorum ended the leadership: %v", err)
				}
			}
			if l.bestTransferee() == 0 {
				t.Error("a check of the quorum made the leader forget who is alive")
			}
			l.contacts.begin()
			if l.bestTransferee() != 0 {
				t.Error("a new leader knows who is alive before anybody has answered")
			}
		})
		done := make(chan error, 1)
		go func() { done <- n.TransferLeader(ctx, 0) }()
		// It does not come when the node has noticed before that it leads no more.
		for waiting := 0; waiting < 2 && len(done) == 0; {
			n.inbox.mu.Lock()
			waiting = len(n.inbox.in.ctl)
			n.inbox.mu.Unlock()
			runtime.Gosched()
		}
		close(release)
		err := <-done
		if tried = <-led && !NotDone(err); tried && err != nil {
			t.Fatal(err)
		}
	}
}

// handTicker is a clock whose tickers tick when a test says so.
type handTicker struct {
	Clock
	ticks chan time.Time
}

func (c *handTicker) Ticker(time.Duration) (<-chan time.Time, func()) { return c.ticks, func() {} }

// However long the answers take: on a busy machine that may be longer than the two
// heartbeats' time which was all that a leader waited for them.
func TestTransferWaitsForAnswers(t *testing.T) {
	clock := &handTicker{ticks: make(chan time.Time)}
	g := newGroup(t, func(c *Config) {
		if c.ID == 1 {
			clock.Clock, c.Clock = c.Clock, clock
			c.TransferTimeout = time.Minute
		}
	}, 1, 2, 3)
	h := g.elect(1)
	h.loop.contacts.begin()
	done := make(chan error, 1)
	go func() { done <- h.TransferLeader(context.Background(), 0) }()
	asked := func() {
		for !h.inboxWaits() && len(done) == 0 {
			runtime.Gosched()
		}
		h.turn(false)
	}
	again := func() {
		select {
		case clock.ticks <- time.Time{}:
		case err := <-done:
			t.Fatalf("it did not wait: %v", err)
		}
	}
	for range 3 {
		asked()
		again()
	}
	asked()
	for range h.Node.cfg.HeartbeatTicks + 1 {
		g.tick()
	}
	again()
	asked()
	g.settle()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// One that has nobody to hand over to says so at once.
	alone := newGroup(t, nil, 1)
	cl := &call{ch: make(chan outcome, 1)}
	n := alone.elect(1)
	n.inbox.pushControl(nil, func(l *loop) { l.transfer(0, cl) })
	alone.settle()
	if o, ok := cl.poll(); !ok || !errors.Is(o.err, errAlone) {
		t.Fatal(ok, o)
	}
}
