package raftnode

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// peerStatus returns what the leader's status says of a peer.
func (h *harness) peerStatus(id uint64) PeerStatus {
	h.t.Helper()
	st := h.Status()
	i := slices.IndexFunc(st.Peers, func(p PeerStatus) bool { return p.ID == id })
	if i < 0 {
		h.t.Fatalf("the status does not mention node %d: %v", id, st.Peers)
	}
	return st.Peers[i]
}

// phases runs a story with every offset between the loop's publishing and raft's
// own counting of heartbeats and election timeouts: what goes wrong when raft has
// just forgotten who is active goes wrong in some of them only.
func phases(t *testing.T, story func(t *testing.T, g *group, leader *harness)) {
	ticks := (&Config{ID: 1}).EnsureDefaults().ElectionTicks
	for phase := range ticks {
		t.Run(fmt.Sprint(phase), func(t *testing.T) {
			g := newGroup(t, nil, 1, 2, 3)
			for range phase {
				for _, id := range g.ids() {
					g.nodes[id].turn(true)
				}
			}
			h := g.elect(1)
			g.settle()
			story(t, g, h)
		})
	}
}

// Goal: on an idle group in good health, no look at the status finds a peer
// silent, and the log is kept for the followers at any moment. Method: ticks, with
// every answer in time, and a look after each.
func TestStatusOfLivePeers(t *testing.T) {
	phases(t, func(t *testing.T, g *group, h *harness) {
		for i := range 200 {
			g.tick()
			for _, p := range h.Status().Peers {
				if p.Silent || p.Silence > 100*time.Millisecond || !p.Answered && i > h.Node.cfg.HeartbeatTicks {
					t.Fatalf("after %d ticks: %+v", i, p)
				}
			}
			if i > h.Node.cfg.HeartbeatTicks && h.loop.followerFloor.Load() == math.MaxUint64 {
				t.Fatalf("after %d ticks: the log is kept for nobody", i)
			}
		}
	})
}

// Goal: a peer that is gone is reported within two seconds, with how long it has
// not answered, also when it still talks itself; one that comes back is well at
// once.
func TestStatusOfSilentPeer(t *testing.T) {
	from3 := func(m *raftpb.Message) bool { return m.GetFrom() == 3 }
	to3 := func(m *raftpb.Message) bool { return m.GetTo() == 3 }
	down := func(m *raftpb.Message) bool { return from3(m) || to3(m) }
	for _, c := range []struct {
		name  string
		drop  func(*raftpb.Message) bool
		heard bool // it answers before
	}{
		{"down", down, true},
		{"cannot be reached", to3, true},
		{"cannot answer", from3, true},
		{"down before this leadership", down, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGroup(t, nil, 1, 2, 3)
			if !c.heard {
				g.drop = c.drop
			}
			h := g.elect(1)
			for range 50 {
				g.tick()
			}
			g.drop = c.drop
			for range 60 {
				g.tick()
			}
			if p := h.peerStatus(3); c.heard && p.Silent {
				t.Fatalf("taken for silent too soon: %+v", p)
			}
			for range 140 {
				g.tick()
			}
			p := h.peerStatus(3)
			if !p.Silent || p.Answered != c.heard || p.Silence < 1900*time.Millisecond {
				t.Fatalf("after two seconds: %+v", p)
			}
			if q := h.peerStatus(2); q.Silent {
				t.Fatalf("the other one: %+v", q)
			}
			g.drop = nil
			for range 3 * h.Node.cfg.ElectionTicks {
				g.tick()
			}
			// It may have asked for votes with a higher term meanwhile.
			if p := g.elect(1).peerStatus(3); p.Silent || p.Silence > 200*time.Millisecond {
				t.Fatalf("back again: %+v", p)
			}
		})
	}
}

// Goal: what a leader decides by who is alive does not depend on whether raft has
// looked, and forgotten, a moment ago: a change of members is accepted, a
// successor is found, at any tick and before the answers to its heartbeats.
func TestLivePeersBetweenHeartbeats(t *testing.T) {
	phases(t, func(t *testing.T, g *group, h *harness) {
		for range 2 * h.Node.cfg.HeartbeatTicks {
			g.tick()
		}
		for i := range 2 * h.Node.cfg.ElectionTicks {
			h.turn(true)
			refused := h.loop.checkQuorum(Change{Kind: Remove, ID: 3}, func(format string, args ...any) error {
				return fmt.Errorf(format, args...)
			})
			if refused != nil {
				t.Fatalf("tick %d: %v", i, refused)
			}
			if h.loop.bestTransferee() == 0 {
				t.Fatalf("tick %d: nobody to hand over to", i)
			}
			g.settle()
		}
	})
}

// Goal: a follower that lags keeps its part of the log at any moment of the
// leader's bookkeeping.
func TestTruncateSparesLaggingFollower(t *testing.T) {
	for phase := range 15 {
		g := newGroup(t, func(c *Config) {
			c.TailBytes, c.TrailingBytes, c.FollowerTailBytes, c.PinnedTailBytes = 2000, 500, 1<<20, 1<<20
		}, 1, 2, 3)
		h := g.elect(1)
		for range phase {
			h.turn(true)
			h.settle()
		}
		g.settle()
		// Heartbeats come and go; entries for node 3 are stuck.
		g.drop = func(m *raftpb.Message) bool { return m.GetTo() == 3 && m.GetType() == raftpb.MsgApp }
		has := g.nodes[3].Status().LastIndex
		for i := range 60 {
			h.propose(fmt.Sprintf("%0200d", i))
			g.tick()
			if first := h.truncate(); first > has+1 {
				t.Fatalf("phase %d, tick %d: the log begins at %d, the follower needs %d", phase, i, first, has+1)
			}
		}
	}
}
