package raftnode

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
)

// lagging returns a group in which node 3 was cut off while the others went on
// and truncated their logs, so that it needs an image.
func lagging(t *testing.T) (*group, *harness) {
	t.Helper()
	g := newGroup(t, func(c *Config) {
		c.TailBytes, c.TrailingBytes = 2000, 1000
		c.FollowerTailBytes, c.PinnedTailBytes = 2000, 2000
	}, 1, 2, 3)
	h := g.elect(1)
	g.drop = func(m *raftpb.Message) bool { return m.GetTo() == 3 || m.GetFrom() == 3 }
	for i := range 40 {
		a := h.propose(fmt.Sprintf("%0100d", i))
		g.settle()
		a.mustBe(t, true, nil)
	}
	for _, id := range []uint64{1, 2} {
		if ok, err := g.nodes[id].truncator.step(g.nodes[id].clock.Now()); err != nil || !ok {
			t.Fatalf("node %d: truncated %v, %v", id, ok, err)
		}
	}
	if first, _ := h.log.FirstIndex(); first < 10 {
		t.Fatalf("log of the leader begins at %d", first)
	}
	g.drop = nil
	return g, h
}

func (g *group) catchUp(id uint64) {
	g.t.Helper()
	for range 400 {
		g.tick()
		g.images()
		if lead := g.leader(); lead != nil && len(g.nodes[id].sm.commands()) == len(lead.sm.commands()) {
			return
		}
	}
	g.t.Fatalf("node %d does not catch up", id)
}

func (g *group) leader() *harness {
	for _, id := range g.ids() {
		if g.nodes[id].Node != nil && g.nodes[id].loop.leading() {
			return g.nodes[id]
		}
	}
	return nil
}

// A follower too far behind is brought up by an image, and goes on from the log.
func TestLaggingFollowerGetsImage(t *testing.T) {
	g, _ := lagging(t)
	installed := 0
	g.nodes[3].Node.cfg.Events.ImageInstalled = func(_ time.Duration, _ uint64) { installed++ }
	g.catchUp(3)
	if installed != 1 {
		t.Fatalf("%d images installed", installed)
	}
	h := g.leader()
	if h == nil {
		t.Fatal("no leader")
	}
	a := h.propose("after")
	g.settle()
	a.mustBe(t, true, nil)
	g.tick()
	for range 10 {
		g.tick()
	}
	if got, want := fmt.Sprint(g.nodes[3].sm.commands()), fmt.Sprint(h.sm.commands()); got != want {
		t.Fatalf("node 3 applied %s\nwant %s", got, want)
	}
	for _, p := range h.Status().Peers {
		if p.ID == 3 && p.State != "replicate" {
			t.Fatalf("peer 3 is in state %s", p.State)
		}
	}
	if _, ok := h.snaps.pinned(h.clock.Now().Add(time.Hour)); ok {
		t.Fatal("the log stays pinned after the image was sent")
	}
}

// A crash between any two durable steps of an installation is found at the next
// start and leaves the node able to go on.
func TestCrashDuringInstall(t *testing.T) {
	boom := errors.New("power loss")
	for _, tc := range []struct {
		name string
		arm  func(h *harness)
	}{
		{"before the state is replaced", func(h *harness) {
			h.sm.fail = failOn("install", boom)
		}},
		{"between state and log", func(h *harness) {
			h.log.fail = failOn("install", boom)
		}},
		{"after the log, before the answer", func(h *harness) {
			h.Node.appender.tr = panicTransport{}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g, _ := lagging(t)
			f := g.nodes[3]
			tc.arm(f)
			before := len(f.sm.commands())
			died := false
			// Node 3 alone is stepped by hand, since its step fails.
			func() {
				defer func() {
					if r := recover(); r != nil {
						died = true
					}
				}()
				for range 400 {
					for _, id := range []uint64{1, 2} {
						g.nodes[id].turn(true)
						g.nodes[id].settle()
					}
					for range 5 {
						g.deliver()
						for _, id := range []uint64{1, 2} {
							g.nodes[id].settle()
						}
						g.sendImagesTo(3)
						f.turn(false)
						if _, err := f.appender.step(); err != nil {
							if !errors.Is(err, boom) {
								t.Fatal(err)
							}
							died = true
							return
						}
						if _, err := f.applier.step(); err != nil {
							t.Fatal(err)
						}
					}
				}
			}()
			if !died {
				t.Fatal("the crash point was not reached")
			}
			f.crash(0)
			if n := len(f.sm.commands()); n != before && n < 30 {
				t.Fatalf("%d commands after the crash, %d before", n, before)
			}
			g.catchUp(3)
			if lead := g.leader(); fmt.Sprint(f.sm.commands()) != fmt.Sprint(lead.sm.commands()) {
				t.Fatal("states differ")
			}
			// And once more from disk.
			f.crash(0)
			g.catchUp(3)
		})
	}
}

func failOn(op string, err error) func(string) error {
	return func(o string) error {
		if o == op {
			return err
		}
		return nil
	}
}

// panicTransport dies where the first answer of an installation would leave.
type panicTransport struct{ Transport }

func (panicTransport) Send(msgs []*raftpb.Message) {
	for _, m := range msgs {
		if m.GetType() == raftpb.MsgAppResp && m.GetIndex() > 20 {
			panic("power loss")
		}
	}
}

// sendImagesTo builds and sends images without settling the receiver.
func (g *group) sendImagesTo(id uint64) {
	for _, from := range g.ids() {
		h := g.nodes[from]
		if from == id {
			continue
		}
		h.tr.image = func(_ context.Context, m *raftpb.Message, image *snap.Reader) error {
			if err := copyImage(image, g.nodes[id].images); err != nil {
				return err
			}
			return g.nodes[id].Node.Step(context.Background(), []*raftpb.Message{proto.CloneOf(m)})
		}
		for h.snaps.step(context.Background()) {
		}
		for h.snaps.sendStep(context.Background()) {
		}
	}
}

// The ways a crash can leave state and log, one by one.
func TestReconcile(t *testing.T) {
	cs := &raftpb.ConfState{Voters: []uint64{1, 2, 3}}
	at := func(index, term uint64) Position { return Position{Index: index, Term: term, ConfState: cs} }
	ents := func(terms ...uint64) (out []*raftpb.Entry) {
		for i, term := range terms {
			out = append(out, entry(uint64(i)+2, term, ""))
		}
		return out
	}
	for _, tc := range []struct {
		name  string
		log   []*raftpb.Entry // from index 2
		hs    *raftpb.HardState
		state Position
		want  *raftpb.HardState
		last  uint64
		err   error
	}{
		{"new node", nil, &raftpb.HardState{}, at(1, 1), hard(1, 0, 1), 1, nil},
		{"normal", ents(2, 2, 2), hard(2, 3, 4), at(3, 2), hard(2, 3, 4), 4, nil},
		{"commit index was not synced", ents(2, 2, 2), hard(2, 3, 2), at(4, 2), hard(2, 3, 4), 4, nil},
		{"state ahead of the log", ents(2, 2), hard(2, 3, 3), at(9, 2), hard(2, 3, 9), 9, nil},
		{"state ahead, of a newer term", ents(2, 2), hard(2, 3, 3), at(9, 5), hard(5, 0, 9), 9, nil},
		{"log holds an overwritten tail", ents(2, 2, 2, 2), hard(4, 1, 2), at(4, 3), hard(4, 1, 4), 4, nil},
		{"committed histories differ", ents(2, 2, 2), hard(2, 3, 4), at(4, 3), nil, 0, ErrDiverged},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log := newMemLog(bootPosition(1, 2, 3))
			if len(tc.log) > 0 {
				if err := log.Append(tc.hs, tc.log, true); err != nil {
					t.Fatal(err)
				}
			}
			cfg := (&Config{ID: 1}).EnsureDefaults()
			got, err := reconcile(cfg, newMemMachine(vfs.NewMem(), tc.state), log, nil)
			if !errors.Is(err, tc.err) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if err != nil {
				return
			}
			if !proto.Equal(got, tc.want) {
				t.Fatalf("hard state %v, want %v", got, tc.want)
			}
			if log.last() != tc.last {
				t.Fatalf("log ends at %d, want %d", log.last(), tc.last)
			}
			if again, err := reconcile(cfg, newMemMachine(vfs.NewMem(), tc.state), log.crash(0), nil); err != nil || !proto.Equal(again, tc.want) {
				t.Fatalf("a second start finds %v, %v", again, err)
			}
		})
	}
}

// A state older than the log is rebuilt from an image that connects to the log;
// without one the node refuses to start.
func TestStateBehindLog(t *testing.T) {
	g, _ := lagging(t)
	h := g.nodes[1]
	h.kill(0)
	h.sm = newMemMachine(h.fs, bootPosition(1, 2, 3))
	if err := h.tryOpen(); !errors.Is(err, ErrStateBehindLog) {
		t.Fatalf("got %v", err)
	}

	g, _ = lagging(t)
	g.catchUp(3) // leaves an image at the leader
	h = g.leader()
	want := len(h.sm.commands())
	h.kill(0)
	h.sm = newMemMachine(h.fs, bootPosition(1, 2, 3))
	h.open()
	g.catchUp(h.id)
	if n := len(h.sm.commands()); n != want {
		t.Fatalf("%d commands after the rebuild, want %d", n, want)
	}
}

// A snapshot the follower has no use for (its log reaches as far) is answered
// and its image removed.
func TestUnusedImageIsRemoved(t *testing.T) {
	g := newGroup(t, nil, 1, 2, 3)
	h := g.elect(1)
	a := h.propose("x")
	g.settle()
	a.mustBe(t, true, nil)
	g.tick()
	for range 10 {
		g.tick()
	}
	h.snaps.mu.Lock()
	h.snaps.wantBuild = true
	h.snaps.mu.Unlock()
	h.snaps.step(context.Background())
	info := h.images.List()[0]
	r, err := h.images.Open(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	f := g.nodes[2]
	if err := copyImage(r, f.images); err != nil {
		t.Fatal(err)
	}
	r.Close()
	f.step(&raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(uint64(1)), To: new(uint64(2)), Term: new(h.loop.term),
		Snapshot: &raftpb.Snapshot{Data: []byte(info.ID), Metadata: &raftpb.SnapshotMetadata{
			Index: new(info.Index), Term: new(info.Term), ConfState: info.ConfState}}})
	f.settle()
	if !f.snaps.step(context.Background()) || len(f.images.List()) != 0 {
		t.Fatalf("the image stays: %v", f.images.List())
	}
	// A message whose image is not there is refused before raft hears of it.
	err = f.Node.Step(context.Background(), []*raftpb.Message{{Type: raftpb.MsgSnap.Enum(), From: new(uint64(1)), To: new(uint64(2)), Term: new(h.loop.term),
		Snapshot: &raftpb.Snapshot{Data: []byte(info.ID), Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(1000)), Term: new(uint64(9))}}}})
	if !errors.Is(err, snap.ErrNotFound) {
		t.Fatalf("got %v", err)
	}
}
