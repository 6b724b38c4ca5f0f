package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// moveTo gives n, which does not run, other ports.
func (n *Node) moveTo(ports []int) {
	for i, port := range ports {
		old := []string{n.Client, n.Raft}[i]
		next := "127.0.0.1:" + strconv.Itoa(port)
		for j, arg := range n.args {
			if arg == old || arg == fmt.Sprintf("%d:%s", n.ID, old) {
				n.args[j] = strings.ReplaceAll(arg, old, next)
			}
		}
		*[]*string{&n.Client, &n.Raft}[i] = next
	}
	if n.conn != nil {
		n.conn.Close()
		n.conn = nil
	}
}

// rejoins starts n, whose data directory is gone, and waits until it votes again.
func (c *Cluster) rejoins(n, seenBy *Node) {
	c.t.Helper()
	before := strings.Count(n.Log(), "event=joined")
	n.Start()
	eventually(c.t, 60*time.Second, "it joins again", func(context.Context) error {
		if strings.Count(n.Log(), "event=joined") <= before {
			return errors.New("not yet")
		}
		return nil
	})
	c.WaitServing(n)
	c.role(seenBy, n.ID, "voter")
}

// TestOldDirectoryReturns: of five nodes, A is down while C loses its data
// directory and comes back on a second one, and then on a third, on another
// machine. Then the second one comes back, at the address at which A still looks
// for C, and votes for all it knows. Goal: it counts for nothing, neither with A,
// which knows none of this, nor with B, which does, and makes no majority with them;
// and it does not keep A from C, with which there is one.
func TestOldDirectoryReturns(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 5})
	leader := c.Leader()
	rest := c.Followers(leader)
	a, b, lost, more := rest[0], rest[1], rest[2], rest[3]
	a.Kill()
	lost.Kill()
	if err := os.RemoveAll(lost.DataDir); err != nil {
		t.Fatal(err)
	}
	c.rejoins(lost, b)
	if _, known := writeOffset(t, leader, "early", 7); known != Done {
		t.Fatal("not written")
	}
	c.WaitServing(lost) // what it knows when it goes holds its own return
	lost.Kill()
	second := lost.DataDir + "-second"
	if err := os.Rename(lost.DataDir, second); err != nil {
		t.Fatal(err)
	}
	ghost := &Node{
		t: t, ID: lost.ID, DataDir: second, Client: lost.Client, Raft: lost.Raft, args: slices.Clone(lost.args),
		log: &logBuffer{limit: 1 << 20},
	}
	for i, arg := range ghost.args {
		if arg == lost.DataDir {
			ghost.args[i] = second
		}
	}
	t.Cleanup(func() {
		ghost.Kill()
		if t.Failed() {
			t.Logf("--- log of the old directory ---\n%s", ghost.log)
		}
	})
	lost.moveTo(freePorts(t, 2))
	c.rejoins(lost, b)
	if _, known := writeOffset(t, leader, "precious", 41); known != Done {
		t.Fatal("not written")
	}
	c.WaitServing(b)
	// Left are A, which lags, B, which knows all, and C on its old directory.
	leader.Kill()
	more.Kill()
	lost.Kill()
	ghost.Start()
	a.Start()
	// Long enough for many elections.
	pause(t, 5*time.Second)
	for _, n := range []*Node{a, b, ghost} {
		if !n.Running() {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if out, known := readOffset(ctx, n, "precious", 0); known == Done {
			t.Errorf("node %d leads or follows somebody, by the vote of an old directory: it reads %+v", n.ID, out)
		}
		cancel()
	}
	if strings.Contains(ghost.Log(), "leading=true") {
		t.Error("the old directory led")
	}
	if t.Failed() {
		return
	}
	// With C on its new directory there is a majority, and A is needed for it.
	lost.Start()
	c.WaitServing(a, b, lost)
	for i, n := range []*Node{a, b, lost} {
		eventually(t, 30*time.Second, "the three go on", func(ctx context.Context) error {
			if out, known := readOffset(ctx, n, "precious", 0); known != Done || out.(OffsetOut).Current != 41 {
				return fmt.Errorf("node %d reads %+v", n.ID, out)
			}
			if _, known := writeOffset(t, n, "after", uint64(i+1)); known != Done {
				return errors.New("not written")
			}
			return nil
		})
	}
	if strings.Contains(ghost.Log(), "leading=true") {
		t.Error("the old directory led")
	}
	leader.Start()
	more.Start()
	c.WaitServing(c.Nodes...)
	c.WaitSameState()
}
