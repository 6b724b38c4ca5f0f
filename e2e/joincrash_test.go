package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var (
	// While a node joins a cluster.
	joinPoints = []string{
		"join:remembered", "join:accepted", "join:fetched", "join:decide", "join:decided",
		"join:move-out", "join:move-in", "join:moved", "join:done",
		// When it first hears of the others.
		"peers:before", "peers:after",
	}
	// When a member on an empty directory is told what it was.
	rejoinPoints = []string{"rejoin:before", "rejoin:after"}
	// When a node learns that it was removed.
	removedPoints = []string{"removed:before", "removed:after"}
)

// TestJoinDiesAtEachStep ends a node at every durable step of its joining, and of
// its removal, and starts it again. Goal: it becomes one member, with one id, and
// votes; and once it was removed it stops for good, wherever it died. Method: a
// binary that kills itself at a given point; a node for each point, removed
// afterwards.
func TestJoinDiesAtEachStep(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 1, Binary: crashBinary(t)})
	first := c.Nodes[0]
	fill := NewFiller(t, "join", 64<<10)
	fill.Fill(1<<20, 4, first)
	for i, point := range joinPoints {
		id := uint64(i + 2)
		n := c.Join(id)
		n.bin = crashBinary(t)
		ct := &crashTest{Cluster: c, t: t, victim: n}
		n.Start("CONVEYOR_CRASH_AT=" + point)
		ct.mustDie(point)
		n.Start()
		c.WaitServing(n)
		c.role(first, id, "voter")
		noTrace(t, n)
		fill.Check(n)
		if i < len(removedPoints) {
			n.Stop()
			n.Start("CONVEYOR_CRASH_AT=" + removedPoints[i])
			c.WaitServing(n)
			c.remove(first, id)
			ct.mustDie(removedPoints[i])
			n.Start()
		} else {
			c.remove(first, id)
		}
		n.exits(exitRemoved)
		c.drop(n)
		c.WaitServing(first)
	}
}

// TestRejoinDiesAtEachStep does the same for a member whose data directory was
// lost, from the moment it is told so.
func TestRejoinDiesAtEachStep(t *testing.T) {
	c := NewCluster(t, Options{Binary: crashBinary(t)})
	rest := c.Followers(c.Leader())
	victim, other := rest[0], rest[1]
	ct := &crashTest{Cluster: c, t: t, victim: victim}
	for i, point := range rejoinPoints {
		// On a busy machine leaders change, and one second may not be enough.
		eventually(t, 30*time.Second, "a write", func(context.Context) error {
			if _, known := writeOffset(t, other, "kept", uint64(i+1)); known != Done {
				return fmt.Errorf("outcome %v", known)
			}
			return nil
		})
		victim.Kill()
		if err := os.RemoveAll(victim.DataDir); err != nil {
			t.Fatal(err)
		}
		victim.Start("CONVEYOR_CRASH_AT=" + point)
		ct.mustDie(point)
		victim.Start()
		c.WaitServing(victim)
		c.role(other, victim.ID, "voter")
		if n := strings.Count(victim.Log(), "event=joined"); n < i+1 {
			t.Fatal(fmt.Errorf("it came back without joining: %d", n))
		}
	}
	c.WaitSameState()
}

// noTrace fails the test when the directory of a node that serves holds anything
// of the way it came about: a next time would find it.
func noTrace(t *testing.T, n *Node) {
	t.Helper()
	for _, name := range []string{"JOINING", ".before-recover", ".next", ".decided"} {
		if _, err := os.Lstat(filepath.Join(n.DataDir, name)); err == nil {
			t.Errorf("node %d serves, and its directory still holds %s", n.ID, name)
		}
	}
}
