package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serveOnce starts the node's process with more arguments and environment, and
// waits until it ends by itself; it returns its exit code and what it printed.
func serveOnce(t *testing.T, n *Node, env []string, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binaryOf(n), append(slices.Clone(n.args), args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%v %v: it did not end by itself: %v\n%s", env, args, err, out)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// mustRefuse expects a start to end with code and to say all of texts.
func mustRefuse(t *testing.T, n *Node, code int, texts []string, env []string, args ...string) {
	t.Helper()
	got, out := serveOnce(t, n, env, args...)
	if got != code {
		t.Errorf("%v %v: exit code %d, want %d:\n%s", env, args, got, code, out)
	}
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("%v %v: the answer does not say %q:\n%s", env, args, text, out)
		}
	}
	if strings.Contains(out, "goroutine ") {
		t.Errorf("%v %v: a stack trace is no answer:\n%s", env, args, out)
	}
}

// TestRefusedStarts starts the binary on what it must not start on. Goal: each
// time an exit code and a text that says what to do, and the data are as before.
// Method: one node with data; after all refusals it starts and still has them.
func TestRefusedStarts(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 1})
	n := c.Nodes[0]
	writeOffset(t, n, "kept", 7)

	elsewhere := []string{"--listen-addr", "127.0.0.1:0", "--raft-addr", "127.0.0.1:0"}
	mustRefuse(t, n, 1, []string{"is locked by another router (process ", "give this one its own --data-dir"}, nil, elsewhere...)
	mustRefuse(t, n, 1, []string{"--raft-addr", n.Raft, "in use"}, nil, "--data-dir", t.TempDir())
	n.Stop()

	mustRefuse(t, n, 1, []string{`cluster "conveyor"`, `"other"`, "correct --cluster-name or --data-dir"}, nil, "--cluster-name", "other")
	mustRefuse(t, n, 1, []string{"data of node 1", "started as 2", "correct --node-id or --data-dir"}, nil, "--node-id", "2", "--peers", "2:127.0.0.1:1")
	mustRefuse(t, n, 2, []string{"peers", "1-127.0.0.1"}, nil, "--peers", "1-127.0.0.1")
	mustRefuse(t, n, 2, []string{"CONVEYOR_ROUTER_DATA_DRI", "CONVEYOR_ROUTER_DATA_DIR"}, []string{"CONVEYOR_ROUTER_DATA_DRI=/x"})

	config := filepath.Join(t.TempDir(), "router.yaml")
	edit(t, config, func([]byte) []byte { return []byte("raft:\n  tial_bytes: 1MiB\nlog:\n  level: loud\n") })
	mustRefuse(t, n, 2, []string{config + ":2", "raft.tial_bytes", "raft.tail_bytes", "loud"}, nil, "--config", config)

	identity := filepath.Join(n.DataDir, "IDENTITY")
	restore := edit(t, identity, func(b []byte) []byte {
		return bytes.Replace(b, []byte(`"format_version": 2`), []byte(`"format_version": 9`), 1)
	})
	mustRefuse(t, n, 1, []string{"has format 9", "start the newer binary"}, nil)
	edit(t, identity, func(b []byte) []byte { return b[:len(b)/2] })
	mustRefuse(t, n, 1, []string{identity, "restore the file"}, nil)
	restore()

	log := filepath.Join(n.DataDir, "wal")
	if err := os.Rename(log, log+".away"); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, n, 1, []string{log + " is gone", "restore it, or remove node 1 from the cluster"}, nil)
	if err := os.Rename(log+".away", log); err != nil {
		t.Fatal(err)
	}

	n.Start()
	c.WaitServing(n)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if out, known := readOffset(ctx, n, "kept", 0); known != Done || out.(OffsetOut).Current != 7 {
		t.Fatalf("after the refused starts the node reads %+v", out)
	}
}

// TestDamagedLogIsRefusedAndATornOneMended: a flipped byte in an old segment is
// damage to what was acknowledged, so the node refuses, naming file and place;
// a write that was cut short at the end is what a crash leaves, so it starts.
func TestDamagedLogIsRefusedAndATornOneMended(t *testing.T) {
	c := NewCluster(t, Options{Nodes: 1, Args: []string{"--raft-segment-bytes", "1MiB"}})
	n := c.Nodes[0]
	f := NewFiller(t, "log", 128<<10)
	f.Fill(3<<20, 4, n)
	n.Stop()

	segments, err := filepath.Glob(filepath.Join(n.DataDir, "wal", "*.wal"))
	if err != nil || len(segments) < 3 {
		t.Fatalf("segments %v, %v", segments, err)
	}
	slices.Sort(segments)
	old := segments[1]
	restore := edit(t, old, func(b []byte) []byte {
		b[400<<10] ^= 1
		return b
	})
	mustRefuse(t, n, 1, []string{"the log is damaged in " + old + " at byte ", "keep a copy of its data directory", "rejoin with an empty data directory"}, nil)
	verify := exec.Command(binaryOf(n), "wal", "verify", n.DataDir)
	out, _ := verify.CombinedOutput()
	if code := verify.ProcessState.ExitCode(); code != 8 || !strings.Contains(string(out), old) {
		t.Errorf("wal verify of a damaged log: exit code %d\n%s", code, out)
	}
	restore()

	tearLog(t, n)
	n.Start()
	c.WaitServing(n)
	if !strings.Contains(n.Log(), "cut an unfinished write off the end of the log") {
		t.Error("the node started from a torn log without a word about it")
	}
	f.Check(n)
}

// edit rewrites a file and returns what puts the old content back.
func edit(t *testing.T, name string, f func([]byte) []byte) (restore func()) {
	t.Helper()
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	write := func(b []byte) {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(f(bytes.Clone(old)))
	return func() { write(old) }
}
