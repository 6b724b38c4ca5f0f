package rpc

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// beating is a follower that gathers heartbeats, and how often each node has
// taken one of a sidecar or service.
func beating(t *testing.T) (*forwarding, *Beats, func(s *station, k beatKey) int) {
	checkLeaks(t)
	x := newForwarding(t, nil)
	b := NewBeats(BeatsConfig{Node: x.node, Forwarder: x.f, Sink: x.node.beat, Interval: time.Millisecond, Remember: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); b.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return x, b, func(s *station, k beatKey) int {
		s.node.mu.Lock()
		defer s.node.mu.Unlock()
		n := 0
		for _, have := range s.node.beats {
			if have == k {
				n++
			}
		}
		return n
	}
}

// A leader may die with heartbeats nobody else knows of: the next one is told
// them again, also those it received itself, and also when it is this node. It may
// be told twice: because it is new, and because the stream to the old one broke.
func TestBeatsAreToldToTheNextLeader(t *testing.T) {
	x, b, count := beating(t)
	x.lead(x.two, 1)
	a, s := beatKey{"a", ""}, beatKey{"", "s"}
	b.Touch("a", "s")
	until(t, &x.two.node.event, "the first leader", func() bool { return count(x.two, a) > 0 && count(x.two, s) > 0 })
	x.two.stopServer()
	x.lead(x.tree, 2)
	until(t, &x.tree.node.event, "the second leader", func() bool { return count(x.tree, a) > 0 && count(x.tree, s) > 0 })
	x.lead(x.station, 3)
	until(t, &x.node.event, "this node", func() bool { return count(x.station, a) > 0 && count(x.station, s) > 0 })
	b.Sidecar("mine") // while this node leads
	before := count(x.tree, a)
	x.lead(x.tree, 4)
	until(t, &x.tree.node.event, "what this node heard while it led", func() bool {
		return count(x.tree, a) > before && count(x.tree, beatKey{"mine", ""}) > 0
	})
}

// The connection breaks with heartbeats under way; the leader stays.
func TestBeatsSurviveABrokenStream(t *testing.T) {
	x, b, count := beating(t)
	x.lead(x.two, 1)
	a := beatKey{"a", ""}
	b.Sidecar("a")
	until(t, &x.two.node.event, "the leader", func() bool { return count(x.two, a) == 1 })
	x.net.cut(x.two.id.PeerAddr)
	until(t, &x.two.node.event, "the leader, again", func() bool { return count(x.two, a) == 2 })
}

// Batches larger than a frame, and than what may wait for a stream, arrive whole.
func TestBeatsOfALargeFleet(t *testing.T) {
	x, b, _ := beating(t)
	const n = maxBeatsQueued + 3*beatsPerFrame
	for i := range n {
		b.Sidecar(fmt.Sprint(i))
	}
	x.lead(x.two, 1)
	node := x.two.node
	until(t, &node.event, "all heartbeats", func() bool {
		node.mu.Lock()
		defer node.mu.Unlock()
		if len(node.beats) < n {
			return false
		}
		seen := map[beatKey]bool{}
		for _, k := range node.beats {
			seen[k] = true
		}
		return len(seen) == n
	})
	if lost := b.Lost(); lost != 0 {
		t.Errorf("%d were lost", lost)
	}
}

// What is remembered for the next leader goes after twice its time at most.
func TestRecentBeatsAreForgotten(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	l := recentBeats{keep: 3 * time.Second}
	held := func(at time.Duration) (out string) {
		l.each(now.Add(at), func(sidecar, service string) { out += sidecar + service })
		return out
	}
	l.add(now, "a", "")
	l.add(now.Add(2*time.Second), "", "b")
	l.add(now.Add(4*time.Second), "c", "")
	if got := held(4 * time.Second); got != "abc" {
		t.Errorf("after 4 s it holds %q", got)
	}
	if got := held(7 * time.Second); got != "c" {
		t.Errorf("after 7 s it holds %q", got)
	}
	if got := held(20 * time.Second); got != "" {
		t.Errorf("after 20 s it holds %q", got)
	}
	for range maxBeatsRecent + 10 {
		l.add(now.Add(21*time.Second), "x", "")
	}
	if len(l.young) != maxBeatsRecent {
		t.Errorf("it holds %d, the limit is %d", len(l.young), maxBeatsRecent)
	}
}
