package rpc

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/snap"
)

// makeImage puts an image of about size bytes into the node's store.
func (n *fakeNode) makeImage(t testing.TB, index uint64, size int) *snap.Reader {
	t.Helper()
	rng := rand.New(rand.NewPCG(index, 1))
	info, err := n.images.Create(t.Context(), func(dir string) (snap.Meta, error) {
		if err := n.fs.MkdirAll(dir, 0o755); err != nil {
			return snap.Meta{}, err
		}
		for i, part := range []int{size / 2, size / 3, 0, size / 6} {
			f, err := n.fs.Create(n.fs.PathJoin(dir, fmt.Sprintf("file-%d", i)), vfs.WriteCategoryUnspecified)
			if err != nil {
				return snap.Meta{}, err
			}
			data := make([]byte, part)
			for j := range data {
				data[j] = byte(rng.Uint32())
			}
			if _, err := f.Write(data); err != nil {
				return snap.Meta{}, err
			}
			if err := f.Close(); err != nil {
				return snap.Meta{}, err
			}
		}
		return snap.Meta{Index: index, Term: 3, ConfState: &raftpb.ConfState{Voters: []uint64{1, 2}}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := n.images.Open(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func snapshotMessage(from, to uint64, image *snap.Reader) *raftpb.Message {
	m := message(raftpb.MsgSnap, from, to, 0)
	i := image.Info()
	m.Snapshot = &raftpb.Snapshot{Data: []byte(i.ID), Metadata: &raftpb.SnapshotMetadata{
		Index: &i.Index, Term: &i.Term, ConfState: i.ConfState}}
	return m
}

// checkReceived asserts that node holds the image whole and stepped its message
// exactly once, after it was stored.
func checkReceived(t *testing.T, node *fakeNode, image *snap.Reader) {
	t.Helper()
	if err := node.images.Verify(image.Info().ID); err != nil {
		t.Fatalf("the received image: %v", err)
	}
	got := node.received(raftpb.MsgSnap)
	if len(got) != 1 || string(got[0].Snapshot.Data) != image.Info().ID {
		t.Fatalf("stepped %v", got)
	}
}

// Wherever the connection breaks, the transfer goes on from there: connections
// carry a little more than a chunk each, then break.
func TestImageResumesAtEveryBreak(t *testing.T) {
	const size, chunk = 300 << 10, 8 << 10
	for _, budget := range []int64{chunk + 4<<10, 2*chunk + 1000, 5 * chunk, 40 * chunk, 0} {
		t.Run(fmt.Sprintf("budget %d", budget), func(t *testing.T) {
			checkLeaks(t)
			a := newStation(t, 1, func(o *TransportOptions) {
				o.ImageChunkBytes = chunk
				o.ImageAttempts = 50
			})
			b := newStation(t, 2, nil)
			held := errors.New("not on disk yet")
			b.node.step = func(_ context.Context, msgs []*raftpb.Message) error {
				if msgs[0].GetType() == raftpb.MsgSnap {
					if b.node.images.Verify(string(msgs[0].Snapshot.Data)) != nil {
						return held
					}
				}
				return nil
			}
			introduce(a, b)
			image := a.node.makeImage(t, 100, size)
			a.net.budget.Store(budget)
			before := a.net.sent.Load()
			if err := a.transport.SendImage(t.Context(), snapshotMessage(1, 2, image), image); err != nil {
				t.Fatal(err)
			}
			checkReceived(t, b.node, image)
			// Resumed, not started again: what was sent twice is at most what was
			// on its way at a break. (Starting again would cost the square.)
			if sent := a.net.sent.Load() - before; sent > 4*image.Size() {
				t.Errorf("%d bytes were sent for an image of %d", sent, image.Size())
			}
		})
	}
}

// The image is there already: only the message is sent.
func TestImageAlreadyThere(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	introduce(a, b)
	image := a.node.makeImage(t, 100, 100<<10)
	for range 2 {
		if err := a.transport.SendImage(t.Context(), snapshotMessage(1, 2, image), image); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(b.node.received(raftpb.MsgSnap)); n != 2 {
		t.Errorf("%d snapshot messages were stepped, 2 were sent", n)
	}
}

func TestImageEnds(t *testing.T) {
	t.Run("unreachable", func(t *testing.T) {
		checkLeaks(t)
		a, b := newStation(t, 1, nil), newStation(t, 2, nil)
		introduce(a, b)
		a.net.setDown(b.id.PeerAddr, true)
		image := a.node.makeImage(t, 100, 1000)
		if err := a.transport.SendImage(t.Context(), snapshotMessage(1, 2, image), image); err == nil {
			t.Fatal("sent through a network that is down")
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		checkLeaks(t)
		a := newStation(t, 1, func(o *TransportOptions) { o.ImageLimit = snap.NewRateLimit(1, 1) })
		b := newStation(t, 2, nil)
		introduce(a, b)
		image := a.node.makeImage(t, 100, 1000)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.transport.SendImage(ctx, snapshotMessage(1, 2, image), image) }()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatalf("%v", err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		checkLeaks(t)
		a := newStation(t, 1, func(o *TransportOptions) { o.ImageLimit = snap.NewRateLimit(1, 1) })
		b := newStation(t, 2, nil)
		introduce(a, b)
		image := a.node.makeImage(t, 100, 1000)
		done := make(chan error)
		go func() { done <- a.transport.SendImage(context.Background(), snapshotMessage(1, 2, image), image) }()
		a.transport.Close()
		if err := <-done; !errors.Is(err, ErrClosed) {
			t.Fatalf("%v", err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		checkLeaks(t)
		a, b := newStation(t, 1, nil), newStation(t, 2, nil)
		a.transport.SetMembers([]raftnode.Member{{ID: 7, Addr: b.id.PeerAddr}})
		image := a.node.makeImage(t, 100, 1000)
		err := a.transport.SendImage(t.Context(), snapshotMessage(1, 7, image), image)
		if !errors.Is(err, ErrRefused) {
			t.Fatalf("%v", err)
		}
		if len(b.node.images.List()) != 0 || len(b.node.received(raftpb.MsgSnap)) != 0 {
			t.Error("a refused image left traces")
		}
	})
}

// A node without state gets it from the first peer that has it, over
// connections that break, and goes on where it stopped, also in a new process.
func TestFetchStateResumes(t *testing.T) {
	checkLeaks(t)
	const size = 3 << 20
	a, empty, b := newStation(t, 1, nil), newStation(t, 3, nil), newStation(t, 2, nil)
	image := a.node.makeImage(t, 500, size)
	b.node.makeImage(t, 300, 1000) // too old

	// The answers come from the servers, so it is the reading that must break.
	network := newNetwork()
	reads := &readLimiter{network: network, limit: 1 << 20}
	o := FetchOptions{
		Identity: Identity{ClusterID: testCluster, NodeID: 9},
		Peers:    []raftnode.Member{empty.member(), b.member(), {ID: 9, Addr: "itself"}, a.member()},
		MinIndex: 400,
		Store:    newFakeNode(t, 9).images,
		Dial:     reads.dial,
	}
	o.BackoffMin, o.BackoffMax = 1, 1
	id, err := FetchState(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if id != image.Info().ID {
		t.Fatalf("fetched %s, want %s", id, image.Info().ID)
	}
	if err := o.Store.Verify(id); err != nil {
		t.Fatal(err)
	}
	if got := reads.total.Load(); got > 3*size {
		t.Errorf("%d bytes were read for an image of %d", got, size)
	}
	if reads.broken.Load() == 0 {
		t.Error("no connection broke: the test tests nothing")
	}
	// Again: it is here.
	if again, err := FetchState(t.Context(), o); err != nil || again != id {
		t.Errorf("again: %s, %v", again, err)
	}
}

func TestFetchStateGivesUp(t *testing.T) {
	checkLeaks(t)
	a := newStation(t, 1, nil)
	ctx, cancel := context.WithCancel(t.Context())
	o := FetchOptions{
		Identity:   Identity{ClusterID: testCluster, NodeID: 9},
		Peers:      []raftnode.Member{a.member()},
		MinIndex:   400,
		Store:      newFakeNode(t, 9).images,
		Dial:       a.net.dial,
		BackoffMin: 1, BackoffMax: 1,
	}
	done := make(chan error)
	go func() {
		_, err := FetchState(ctx, o)
		done <- err
	}()
	until(t, &a.node.event, "some attempts", func() bool {
		a.node.event.fire()
		return a.net.dials.Load() > 3
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("%v", err)
	}
	if _, err := FetchState(t.Context(), FetchOptions{Identity: o.Identity, Peers: []raftnode.Member{{ID: 9, Addr: "x"}}}); err == nil {
		t.Error("fetched from itself")
	}
}
