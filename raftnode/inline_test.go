package raftnode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// manualClock moves only when told.
type manualClock struct {
	mu  sync.Mutex
	now time.Time
}

func newManualClock() *manualClock { return &manualClock{now: time.Unix(1_000_000, 0)} }

func (c *manualClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *manualClock) Ticker(time.Duration) (<-chan time.Time, func()) {
	return nil, func() {}
}

func (c *manualClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// outTransport keeps what a node sends until a test delivers it.
type outTransport struct {
	mu      sync.Mutex
	out     []*raftpb.Message
	members []Member
	// image, when set, replaces SendImage.
	image func(ctx context.Context, m *raftpb.Message, image *snap.Reader) error
}

func (t *outTransport) Send(msgs []*raftpb.Message) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range msgs {
		// What crosses the network is a copy.
		t.out = append(t.out, proto.CloneOf(m))
	}
}

func (t *outTransport) SendImage(ctx context.Context, m *raftpb.Message, image *snap.Reader) error {
	if t.image == nil {
		return errors.New("no image transport")
	}
	return t.image(ctx, m, image)
}

func (t *outTransport) SetMembers(members []Member) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.members = members
}

func (t *outTransport) take() []*raftpb.Message {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := t.out
	t.out = nil
	return out
}

// copyImage stores image in dst, as the transport does over the network.
func copyImage(image *snap.Reader, dst *snap.Store) error {
	r, err := dst.Receive(image.Info().ID, image.Size())
	if errors.Is(err, snap.ErrExists) {
		return nil
	}
	if err != nil {
		return err
	}
	for off := r.Offset(); ; {
		c, err := image.ReadChunk(off, 64*kib)
		if err != nil {
			return err
		}
		if err := r.Write(c); err != nil {
			return err
		}
		off += int64(len(c.Data))
		if c.Last {
			break
		}
	}
	_, err = r.Commit()
	return err
}

// harness is one node in inline mode: nothing happens unless a test says so.
type harness struct {
	t     testing.TB
	id    uint64
	fs    vfs.FS
	clock *manualClock
	cfg   Config

	*Node
	log *memLog
	sm  *memMachine
	tr  *outTransport
}

func bootPosition(ids ...uint64) Position {
	pos := Position{Index: 1, Term: 1, ConfState: &raftpb.ConfState{Voters: ids}}
	for _, id := range ids {
		pos.Members = append(pos.Members, Member{ID: id, Addr: fmt.Sprintf("node-%d:1", id)})
	}
	return pos
}

// newHarness starts a new node of a group with the given voters.
func newHarness(t testing.TB, id uint64, tune func(*Config), voters ...uint64) *harness {
	t.Helper()
	h := &harness{t: t, id: id, fs: vfs.NewMem(), clock: newManualClock()}
	h.cfg = Config{ID: id, Clock: h.clock, Incarnation: id << 48}
	if tune != nil {
		tune(&h.cfg)
	}
	pos := Position{ConfState: &raftpb.ConfState{}}
	if len(voters) > 0 {
		pos = bootPosition(voters...)
	}
	h.log = newMemLog(pos)
	h.sm = newMemMachine(h.fs, pos)
	h.open()
	return h
}

func (h *harness) open() {
	h.t.Helper()
	if err := h.tryOpen(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) tryOpen() error {
	images, err := snap.OpenStore(h.fs, "images", snap.Options{})
	if err != nil {
		return err
	}
	h.tr = &outTransport{}
	h.cfg.Incarnation++
	n, err := New(h.cfg, h.sm, h.log, wal.Recovered{}, images, h.tr)
	if err != nil {
		return err
	}
	h.Node = n
	return nil
}

// crash drops the node and starts it again from what its disk holds, with keep
// of the unsynced log writes.
func (h *harness) crash(keep int) {
	h.t.Helper()
	h.kill(keep)
	h.open()
}

// kill drops the node, leaving what its disk holds.
func (h *harness) kill(keep int) {
	if h.Node != nil {
		h.Node.resolve()
	}
	h.log, h.sm = h.log.crash(keep), h.sm.crash()
}

func (h *harness) turn(tick bool) {
	h.t.Helper()
	if tick {
		h.clock.advance(h.Node.cfg.TickInterval)
	}
	if err := h.loop.turn(tick); err != nil {
		h.t.Fatalf("node %d: turn: %v", h.id, err)
	}
}

func (h *harness) appendStep() bool {
	h.t.Helper()
	more, err := h.appender.step()
	if err != nil {
		h.t.Fatalf("node %d: append: %v", h.id, err)
	}
	return more
}

func (h *harness) applyStep() bool {
	h.t.Helper()
	more, err := h.applier.step()
	if err != nil {
		h.t.Fatalf("node %d: apply: %v", h.id, err)
	}
	return more
}

func (h *harness) inboxWaits() bool {
	h.inbox.mu.Lock()
	defer h.inbox.mu.Unlock()
	in := &h.inbox.in
	return len(in.local)+len(in.ctl)+len(in.peers)+len(in.reads) > 0 || h.inbox.signalled
}

// settle runs everything until the node has nothing left to do by itself.
func (h *harness) settle() {
	h.t.Helper()
	for {
		more := false
		if h.inboxWaits() {
			h.turn(false)
			more = true
		}
		more = h.appendStep() || more
		more = h.applyStep() || more
		if !more {
			return
		}
	}
}

// campaign makes the node ask for votes now.
func (h *harness) campaign() {
	h.inbox.pushControl(nil, func(l *loop) { _ = l.rn.Campaign() })
}

// step gives the node messages of peers.
func (h *harness) step(msgs ...*raftpb.Message) {
	h.t.Helper()
	if err := h.Node.Step(context.Background(), msgs); err != nil {
		h.t.Fatalf("node %d: step: %v", h.id, err)
	}
}

// asked is a proposal or read whose outcome a test looks at.
type asked struct {
	res  Result
	err  error
	done int
}

func (h *harness) propose(cmd string) *asked {
	a := &asked{}
	h.ProposeFunc([]byte(cmd), func(r Result, err error) { a.res, a.err, a.done = r, err, a.done+1 })
	return a
}

func (a *asked) mustBe(t testing.TB, done bool, err error) {
	t.Helper()
	if a.done > 1 {
		t.Fatalf("the outcome was told %d times", a.done)
	}
	if (a.done == 1) != done {
		t.Fatalf("outcome told: %v (%v), want %v", a.done == 1, a.err, done)
	}
	if done && !errors.Is(a.err, err) {
		t.Fatalf("outcome %v, want %v", a.err, err)
	}
}

// readCall is an outstanding ReadIndex without a goroutine.
func (h *harness) read() *call {
	c := &call{ch: make(chan outcome, 1)}
	if err := h.inbox.pushRead(c); err != nil {
		c.ch <- outcome{err: err}
	}
	return c
}

func (c *call) poll() (outcome, bool) {
	select {
	case o := <-c.ch:
		return o, true
	default:
		return outcome{}, false
	}
}

// group is several harnesses and the network between them.
type group struct {
	t     testing.TB
	nodes map[uint64]*harness
	// drop, when set, loses messages.
	drop func(*raftpb.Message) bool
}

func newGroup(t testing.TB, tune func(*Config), ids ...uint64) *group {
	t.Helper()
	g := &group{t: t, nodes: map[uint64]*harness{}}
	for _, id := range ids {
		g.nodes[id] = newHarness(t, id, tune, ids...)
	}
	return g
}

func (g *group) ids() []uint64 {
	var ids []uint64
	for id := range g.nodes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// deliver moves all messages between the nodes; false when there were none.
func (g *group) deliver() bool {
	g.t.Helper()
	any := false
	for _, id := range g.ids() {
		for _, m := range g.nodes[id].tr.take() {
			any = true
			if to := g.nodes[m.GetTo()]; to != nil && (g.drop == nil || !g.drop(m)) {
				to.step(m)
			}
		}
	}
	return any
}

// settle runs nodes and network until nothing moves. Images are built and sent.
func (g *group) settle() {
	g.t.Helper()
	for {
		for _, id := range g.ids() {
			g.nodes[id].settle()
		}
		if !g.deliver() {
			return
		}
	}
}

// tick gives every node one tick and settles.
func (g *group) tick() {
	g.t.Helper()
	for _, id := range g.ids() {
		g.nodes[id].turn(true)
	}
	g.settle()
}

// images lets every node build and send the images asked of it.
func (g *group) images() {
	g.t.Helper()
	for _, id := range g.ids() {
		h := g.nodes[id]
		h.tr.image = func(_ context.Context, m *raftpb.Message, image *snap.Reader) error {
			to := g.nodes[m.GetTo()]
			if to == nil || g.drop != nil && g.drop(m) {
				return errors.New("unreachable")
			}
			if err := copyImage(image, to.images); err != nil {
				return err
			}
			return to.Node.Step(context.Background(), []*raftpb.Message{proto.CloneOf(m)})
		}
		for h.snaps.step(context.Background()) {
		}
		for h.snaps.sendStep(context.Background()) {
		}
	}
	g.settle()
}

// elect makes id leader.
func (g *group) elect(id uint64) *harness {
	g.t.Helper()
	for range 40 {
		if g.nodes[id].loop.leading() {
			return g.nodes[id]
		}
		// Let the others forget the leader they have heard of.
		g.nodes[id].campaign()
		g.settle()
		if g.nodes[id].loop.leading() {
			return g.nodes[id]
		}
		saved := g.drop
		g.drop = func(m *raftpb.Message) bool { return true }
		for range g.nodes[id].Node.cfg.ElectionTicks / 2 {
			for _, o := range g.ids() {
				g.nodes[o].turn(true)
				g.nodes[o].settle()
				g.nodes[o].tr.take()
			}
		}
		g.drop = saved
	}
	g.t.Fatalf("node %d does not become leader", id)
	return nil
}
