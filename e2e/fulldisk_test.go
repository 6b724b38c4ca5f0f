package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const inNamespace = "CONVEYOR_E2E_OWN_MOUNTS"

// TestFullDisk fills the disks of all nodes and frees them again. Goal: before
// anything breaks, commands that add data are refused with RESOURCE_EXHAUSTED
// and words that help; reads and deletes go on; with space it goes on by
// itself; no process ends. Method: each node's data lie on a small tmpfs, which
// a ballast file fills. The test runs itself again in a user and mount
// namespace of its own: that needs no root, and leaves no mount behind however
// it ends.
func TestFullDisk(t *testing.T) {
	if os.Getenv(inNamespace) == "" {
		runInNamespace(t)
		return
	}
	const (
		diskBytes    = 400 << 20
		ballastBytes = 160 << 20 // leaves less than the reserve of 256 MiB
	)
	base := t.TempDir()
	disk := func(id uint64) string { return filepath.Join(base, fmt.Sprintf("disk-%d", id)) }
	for id := uint64(1); id <= 3; id++ {
		if err := os.Mkdir(disk(id), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", disk(id), "tmpfs", 0, fmt.Sprintf("size=%d", diskBytes)); err != nil {
			t.Fatalf("mount a small disk: %v", err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(disk(id), syscall.MNT_DETACH) })
	}
	c := NewCluster(t, Options{
		DataDir: func(id uint64) string { return filepath.Join(disk(id), "data") },
		Args:    []string{"--raft-segment-bytes", "4MiB"},
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for i, n := range c.Nodes {
		if r, err := n.Admin().CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: testPipeline(fmt.Sprintf("disk/p%d", i), "x")}); err != nil || !r.Success {
			t.Fatalf("create: %v %v", r, err)
		}
		writeOffset(t, n, "disk", uint64(i+1))
	}
	pids := map[int]bool{}
	for _, n := range c.Nodes {
		pids[n.PID()] = true
		ballast, err := os.Create(filepath.Join(disk(n.ID), "ballast"))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(syscall.Fallocate(int(ballast.Fd()), 0, 0, ballastBytes), ballast.Close()); err != nil {
			t.Fatal(err)
		}
	}
	offset := uint64(10)
	commit := func(ctx context.Context, n *Node) error {
		offset++
		_, err := n.Checkpoints().CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: "disk", Offset: offset})
		return err
	}
	for i, n := range c.Nodes {
		eventually(t, 20*time.Second, fmt.Sprintf("node %d refuses writes", n.ID), func(ctx context.Context) error {
			err := commit(ctx, n)
			if err == nil {
				return errors.New("accepted")
			}
			if s := status.Convert(err); s.Code() != codes.ResourceExhausted || outcome(err) != NotDone ||
				!strings.Contains(s.Message(), "disk is nearly full") || !strings.Contains(s.Message(), "until space is freed") {
				t.Fatalf("refused with %v", err)
			}
			return nil
		})
		if _, known := readOffset(ctx, n, "disk", 0); known != Done {
			t.Errorf("node %d: no linearizable read on a full disk", n.ID)
		}
		d, err := n.Admin().DeletePipeline(ctx, &adminpb.DeletePipelineRequest{PipelineId: fmt.Sprintf("disk/p%d", i)})
		if err := ok(err, d.GetSuccess(), d.GetError()); err != nil || !d.Existed {
			t.Errorf("node %d: no delete on a full disk: %v %v", n.ID, err, d)
		}
		// It was the leader's disk that refused; this node may look at its own a
		// moment later.
		eventually(t, 20*time.Second, fmt.Sprintf("node %d raises an alarm for its disk", n.ID), func(context.Context) error {
			alarms := strings.Join(statusOf(t, n).Alarms, "; ")
			if !strings.Contains(alarms, n.DataDir) || !strings.Contains(alarms, "free space or delete data") {
				return fmt.Errorf("it raises %q", alarms)
			}
			return nil
		})
	}
	// A node that leads next refuses too, and a change of leaders needs no space.
	old := c.Leader()
	if _, err := old.Cluster().TransferLeader(ctx, &clusterpb.TransferLeaderRequest{}); err != nil {
		t.Errorf("no hand-over on full disks: %v", err)
	}
	if err := commit(ctx, c.Leader()); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the next leader answers %v", err)
	}

	for _, n := range c.Nodes {
		if err := os.Remove(filepath.Join(disk(n.ID), "ballast")); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.Nodes {
		eventually(t, 20*time.Second, fmt.Sprintf("node %d takes writes again", n.ID), func(ctx context.Context) error { return commit(ctx, n) })
		if n.exitedItself() || !pids[n.PID()] {
			t.Errorf("the process of node %d ended", n.ID)
		}
	}
	for _, n := range c.Nodes {
		if out, known := readOffset(ctx, n, "disk", 0); known != Done || out.(OffsetOut).Current != offset {
			t.Errorf("node %d reads %+v, %d was acknowledged last", n.ID, out, offset)
		}
	}
	c.WaitSameState()
}

// runInNamespace runs the calling test in a process that may mount.
func runInNamespace(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), inNamespace+"=1", "CONVEYOR_E2E_BIN="+binary(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) && os.Getuid() == 0 {
		// Some systems forbid user namespaces; root can do without.
		cmd = exec.Command(os.Args[0], cmd.Args[1:]...)
		cmd.Env = append(os.Environ(), inNamespace+"=1", "CONVEYOR_E2E_BIN="+binary(t))
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		out, err = cmd.CombinedOutput()
	}
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EINVAL) {
		t.Skipf("this system allows neither user namespaces nor mounts (%v); "+
			"the guard itself is tested in package rpc; run this one where 'unshare -Urm true' works", err)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("the test did not run in its namespace\n%s", out)
	}
}
