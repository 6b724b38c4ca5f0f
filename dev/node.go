package dev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stopGrace bounds the orderly stop of a node; then it is killed.
const stopGrace = 15 * time.Second

// exitRemoved is the exit code of a node that was removed from its cluster.
const exitRemoved = 9

// node is one child process, restarted as often as it is allowed to.
type node struct {
	id     int
	o      *Options
	start  *starter
	events *events
	log    string // path

	mu   sync.Mutex
	pid  int       // 0 = not running
	back time.Time // when it is started again; zero = it is not
}

// status returns the pid, 0 when down, and when it will be back, if ever.
func (n *node) status() (pid int, back time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pid, n.back
}

// run keeps the node running until ctx is done and then stops it in order. It
// returns an error only when the node cannot be started at all.
func (n *node) run(ctx context.Context) error {
	for first := true; ; first = false {
		cmd, err := n.launch()
		if err != nil {
			return err
		}
		began := time.Now()
		n.mu.Lock()
		n.pid, n.back = cmd.Process.Pid, time.Time{}
		n.mu.Unlock()
		n.events.add("node %d runs, pid %d, clients %s", n.id, cmd.Process.Pid, n.o.clientAddr(n.id))
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()

		select {
		case err = <-ended:
		case <-ctx.Done():
			return n.stop(cmd, ended)
		}
		var exit *exec.ExitError
		exited := errors.As(err, &exit) && exit.Exited()
		removed := exited && exit.ExitCode() == exitRemoved
		back := time.Time{}
		if n.o.Respawn > 0 && !removed {
			back = time.Now().Add(n.o.Respawn)
		}
		n.mu.Lock()
		n.pid, n.back = 0, back
		n.mu.Unlock()
		if removed {
			// Started again it would only say so again.
			n.events.add("node %d was removed from the cluster, and is not started again; --fresh begins with new nodes", n.id)
			<-ctx.Done()
			return nil
		}
		n.events.add("node %d is down: %s", n.id, exitReason(err))
		// A node that refuses to start says why in its log; starting it again
		// and again would only bury that.
		if exited && time.Since(began) < 5*time.Second && first {
			return fmt.Errorf("node %d did not start (%s):\n%s", n.id, exitReason(err), lastLines(n.log, 5))
		}
		if n.o.Respawn == 0 {
			<-ctx.Done()
			return nil
		}
		wait := time.NewTimer(n.o.Respawn)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil
		}
	}
}

func (n *node) launch() (*exec.Cmd, error) {
	dir := filepath.Join(n.o.DataDir, fmt.Sprintf("node-%d", n.id))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own handle
	args := []string{
		"serve", "--cluster-name", "dev", "--node-id", fmt.Sprint(n.id), "--data-dir", "data",
		"--listen-addr", n.o.clientAddr(n.id), "--raft-addr", n.o.peerAddr(n.id),
		"--liveness-heartbeat-interval", n.o.Leases.HeartbeatEvery.String(),
		"--liveness-suspect-after", n.o.Leases.SuspectAfter.String(), "--liveness-expire-after", n.o.Leases.ExpireAfter.String(),
		"--placement-balance-interval", min(max(n.o.Leases.ExpireAfter, time.Second), time.Hour).String(),
	}
	for i := 1; i <= n.o.Nodes; i++ {
		args = append(args, "--peers", fmt.Sprintf("%d:%s", i, n.o.peerAddr(i)))
	}
	cmd := exec.Command(n.o.Binary, args...)
	// A working directory of its own: a config file lying about in the user's
	// is not meant for these nodes, and neither are settings in the
	// environment.
	cmd.Dir = dir
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "CONVEYOR_ROUTER_") && !strings.HasPrefix(v, "ETL_ROUTER") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Stdout, cmd.Stderr = log, log
	// Its own process group: Ctrl-C is for this process, which stops the nodes
	// in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := n.start.start(cmd); err != nil {
		return nil, fmt.Errorf("start node %d: %w", n.id, err)
	}
	return cmd, nil
}

// stop ends the process in order, or by force when that takes too long.
func (n *node) stop(cmd *exec.Cmd, ended <-chan error) error {
	_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself just now
	limit := time.NewTimer(stopGrace)
	defer limit.Stop()
	select {
	case <-ended:
	case <-limit.C:
		_ = cmd.Process.Kill()
		<-ended
		n.events.add("node %d did not stop within %v and was killed", n.id, stopGrace)
	}
	n.mu.Lock()
	n.pid = 0
	n.mu.Unlock()
	return nil
}

// stopped says whether a process was stopped by a signal, as SIGSTOP does.
func stopped(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false // it has ended, or there is no such file here
	}
	// The state stands behind the command name in parentheses, which may hold anything.
	state := bytes.TrimSpace(raw[bytes.LastIndexByte(raw, ')')+1:])
	return bytes.HasPrefix(state, []byte("T"))
}

func exitReason(err error) string {
	if err == nil {
		return "it exited by itself"
	}
	return err.Error()
}

// lastLines returns the end of a file, for an error message.
func lastLines(path string, n int) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(raw), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
