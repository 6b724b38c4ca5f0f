package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// recoverPoints are the steps of `cluster recover`; see crashpoint_test.go.
var recoverPoints = []string{
	"recover/begin", "recover/state", "recover/log", "recover/identity", "recover/decide",
	"recover/decided", "recover/move-out", "recover/move-in", "recover/moved", "recover/done",
}

// router runs a command of the binary n runs, to its end, and returns its exit
// code and what it printed to standard output; what it printed to standard
// error goes to the log of the test.
func router(t *testing.T, n *Node, env []string, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binaryOf(n), args...)
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%v: %v\n%s", args, err, stderr.String())
	}
	if stderr.Len() > 0 {
		t.Logf("%v: %s", args, stderr.String())
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// mustRun is router for a command that must succeed.
func mustRun(t *testing.T, n *Node, args ...string) string {
	t.Helper()
	code, out := router(t, n, nil, args...)
	if code != 0 {
		t.Fatalf("%v: exit code %d\n%s", args, code, out)
	}
	return out
}

// acknowledge commits offset after offset of source at n until a call fails, and
// returns the last one that was acknowledged.
func acknowledge(t *testing.T, n *Node, source string, progress chan<- uint64) uint64 {
	last := uint64(0)
	for offset := uint64(1); ; offset++ {
		res, known := writeOffset(t, n, source, offset)
		if known != Done || !res.GetSuccess() {
			return last
		}
		last = offset
		select {
		case progress <- offset:
		default:
		}
	}
}

func offsetOf(t *testing.T, n *Node, source string) uint64 {
	t.Helper()
	var offset uint64
	eventually(t, 30*time.Second, fmt.Sprintf("node %d says where %s is", n.ID, source), func(ctx context.Context) error {
		res, err := n.Checkpoints().GetSourceOffset(ctx, &checkpointpb.GetOffsetRequest{SourceId: source})
		offset = res.GetOffsets()[0]
		return err
	})
	return offset
}

// TestRecoverWithoutAMajority kills the two followers of three nodes for good
// under load, then the leader, and recovers the leader's directory. Goal: what
// the leader acknowledged is there, the node serves alone, and the two old
// members, which together are a majority of the old cluster, can neither reach
// it nor be reached. A recovery that is killed at any step leaves the old or the
// new directory, and a repetition or the node itself ends it. Method: a binary
// that kills itself at each step in turn, on a copy of the directory each.
func TestRecoverWithoutAMajority(t *testing.T) {
	c := NewCluster(t, Options{Binary: crashBinary(t)})
	leader := c.Leader()
	lost := c.Followers(leader)
	fill := NewFiller(t, "kept", 64<<10)
	fill.Fill(2<<20, 8, leader)

	progress := make(chan uint64, 1)
	acked := make(chan uint64, 1)
	go func() { acked <- acknowledge(t, leader, "acked", progress) }()
	for at := range progress {
		if at >= 200 {
			break
		}
	}
	for _, n := range lost {
		n.Kill()
	}
	last := <-acked
	t.Logf("%d writes were acknowledged", last)
	if code, _ := router(t, leader, nil, "cluster", "recover", "--data-dir", leader.DataDir, "--plan"); code != 4 {
		t.Errorf("planning beside a running node: exit code %d", code)
	}
	leader.Kill()

	var plan struct {
		OldClusterID string `json:"old_cluster_id"`
		Lost         []uint64
		Complete     bool
	}
	out := mustRun(t, leader, "cluster", "recover", "--data-dir", leader.DataDir, "--plan", "-o", "json")
	if err := json.Unmarshal([]byte(out), &plan); err != nil || plan.Complete || len(plan.Lost) != 2 {
		t.Fatalf("the plan: %v\n%s", err, out)
	}
	if code, _ := router(t, leader, nil, "cluster", "recover", "--data-dir", leader.DataDir); code != 1 {
		t.Errorf("without an answer to its question: exit code %d", code)
	}

	original := leader.DataDir
	for i, point := range recoverPoints {
		dir := fmt.Sprintf("%s-%d", original, i)
		if err := os.CopyFS(dir, os.DirFS(original)); err != nil {
			t.Fatal(err)
		}
		leader.setDataDir(dir)
		code, _ := router(t, leader, []string{"CONVEYOR_CRASH_AT=" + point}, "cluster", "recover", "--data-dir", dir, "--yes")
		if code != -1 {
			t.Errorf("%s: the recovery was not killed: exit code %d", point, code)
		}
		decided := i > slices.Index(recoverPoints, "recover/decide")
		if !decided || i%2 == 0 {
			// Repeated by somebody; else the node itself finishes it.
			if code, out := router(t, leader, nil, "cluster", "recover", "--data-dir", dir, "--yes"); code != 0 && point != "recover/done" {
				t.Fatalf("%s: repeated: exit code %d\n%s", point, code, out)
			}
		}
		leader.Start()
		c.WaitServing(leader)
		if got := offsetOf(t, leader, "acked"); got < last {
			t.Errorf("%s: %d writes are there, %d were acknowledged", point, got, last)
		}
		fill.Check(leader)
		if id := statusOf(t, leader).GetClusterId(); id == plan.OldClusterID {
			t.Errorf("%s: the node is still of the old cluster", point)
		}
		if i < len(recoverPoints)-1 {
			leader.Stop()
		}
	}

	// The lost come back, in their old directories.
	before := offsetOf(t, leader, "acked")
	for _, n := range lost {
		n.Start()
	}
	c.WaitServing(lost...)
	if id := statusOf(t, lost[0]).GetClusterId(); id != plan.OldClusterID {
		t.Errorf("an old member is of cluster %s", id)
	}
	if _, known := writeOffset(t, lost[0], "acked", before+1000); known != Done {
		t.Errorf("the old members do not serve: %v", known)
	}
	eventually(t, 30*time.Second, "an old member is refused", func(context.Context) error {
		if strings.Contains(lost[0].Log()+lost[1].Log(), "it belongs to cluster "+plan.OldClusterID) {
			return nil
		}
		return errors.New("not yet")
	})
	if res, known := writeOffset(t, leader, "acked", before+1); known != Done || !res.GetSuccess() {
		t.Errorf("the recovered node no longer takes writes: %v", known)
	}
	if got := offsetOf(t, leader, "acked"); got != before+1 {
		t.Errorf("the recovered node is at %d, want %d", got, before+1)
	}
	if st, err := leader.Admin().GetClusterStatus(t.Context(), &adminpb.GetClusterStatusRequest{}); err != nil || len(st.GetNodes()) != 1 {
		t.Errorf("members of the new cluster: %v, %v", st.GetNodes(), err)
	}
	leader.Stop()
	mustRun(t, leader, "cluster", "recover", "--data-dir", leader.DataDir, "--purge")
	leader.Start()
	c.WaitServing(leader)
	if got := offsetOf(t, leader, "acked"); got != before+1 {
		t.Errorf("after the purge the node is at %d, want %d", got, before+1)
	}
}

// setDataDir lets n run on another directory from its next start on.
func (n *Node) setDataDir(dir string) {
	n.DataDir = dir
	for i := range n.args {
		if n.args[i] == "--data-dir" {
			n.args[i+1] = dir
		}
	}
}

// TestClusterFromAStoppedNode saves a backup of one node of a stopped cluster and
// makes a cluster of three from it. Goal: all three serve what was acknowledged,
// agree on one state, and are of a new cluster. Method: the binary, from the
// archive to reads on every node.
func TestClusterFromAStoppedNode(t *testing.T) {
	c := NewCluster(t, Options{})
	fill := NewFiller(t, "kept", 64<<10)
	fill.Fill(2<<20, 8, c.Nodes...)
	source := c.Leader()
	for _, n := range c.Followers(source) {
		n.Stop()
	}
	oldID := statusOf(t, source).GetClusterId()
	source.Stop()
	archive := source.DataDir + ".tar.zst"
	mustRun(t, source, "snapshot", "save", "--data-dir", source.DataDir, archive)

	// LayOut again: other ports, other directories.
	next := LayOut(t, Options{})
	type outcome struct {
		ClusterID string `json:"cluster_id"`
		StateHash string `json:"state_hash"`
		Index     uint64
		From      struct {
			StateHash string `json:"state_hash"`
		}
	}
	made := make([]outcome, len(next.Nodes))
	for i, n := range next.Nodes {
		args := []string{"snapshot", "restore", "-o", "json", "--data-dir", n.DataDir, "--node-id", fmt.Sprint(n.ID)}
		for _, p := range next.Nodes {
			args = append(args, "--peers", fmt.Sprintf("%d:%s", p.ID, p.Raft))
		}
		out := mustRun(t, n, append(args, archive)...)
		if err := json.Unmarshal([]byte(out), &made[i]); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if m := made[i]; m.ClusterID == oldID || m.ClusterID != made[0].ClusterID || m.Index != made[0].Index ||
			m.StateHash != made[0].StateHash || m.StateHash != m.From.StateHash {
			t.Fatalf("member %d: %+v, member 1: %+v", n.ID, m, made[0])
		}
	}
	for _, n := range next.Nodes {
		n.Start()
	}
	next.WaitServing(next.Nodes...)
	fill.Check(next.Nodes...)
	for _, n := range next.Nodes {
		if id := statusOf(t, n).GetClusterId(); id != made[0].ClusterID {
			t.Errorf("node %d is of cluster %s, made was %s", n.ID, id, made[0].ClusterID)
		}
	}
	if res, known := writeOffset(t, next.Leader(), "new", 1); known != Done || !res.GetSuccess() {
		t.Errorf("the new cluster takes no writes: %v", known)
	}
	next.WaitSameState()
}
