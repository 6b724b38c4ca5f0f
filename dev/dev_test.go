package dev_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"conveyor.etl/router/internal/freeport"
)

// binary is the router that the tests run.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "router-dev-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "router")
		if out, err := exec.Command("go", "build", "-o", binary, "conveyor.etl/router/cmd/router").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the router: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// run is one `router dev` whose output is read line by line.
type run struct {
	t    *testing.T
	cmd  *exec.Cmd
	exit chan error

	mu    sync.Mutex
	more  *sync.Cond
	lines []string
	ended bool
}

// freePorts finds a base port with room for n nodes.
func freePorts(t *testing.T, n int) int {
	t.Helper()
	for range 1000 {
		base := freeport.Any()
		var ports []int
		for i := 1; i <= n; i++ {
			ports = append(ports, base+i, base+100+i)
		}
		if freeport.Claim(ports...) {
			return base
		}
	}
	t.Fatal("no free ports")
	return 0
}

func start(t *testing.T, base int, args ...string) *run {
	t.Helper()
	r := &run{t: t, exit: make(chan error, 1)}
	r.more = sync.NewCond(&r.mu)
	r.cmd = exec.Command(binary, append([]string{"dev", "--base-port", strconv.Itoa(base)}, args...)...)
	r.cmd.Stderr = os.Stderr
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			r.mu.Lock()
			r.lines = append(r.lines, s.Text())
			r.more.Broadcast()
			r.mu.Unlock()
		}
		r.mu.Lock()
		r.ended = true
		r.more.Broadcast()
		r.mu.Unlock()
		r.exit <- r.cmd.Wait()
	}()
	t.Cleanup(func() { _ = r.cmd.Process.Kill() })
	return r
}

// expect waits for a line after the first skip lines that matches and returns
// its submatches and the number of lines up to and with it.
func (r *run) expect(skip int, pattern string) ([]string, int) {
	r.t.Helper()
	re := regexp.MustCompile(pattern)
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := skip; ; i++ {
		for i >= len(r.lines) {
			if r.ended {
				r.t.Fatalf("no line matches %q:\n%s", pattern, strings.Join(r.lines, "\n"))
			}
			r.more.Wait()
		}
		if m := re.FindStringSubmatch(r.lines[i]); m != nil {
			return m, i + 1
		}
	}
}

// pids returns the process ids of the nodes as announced.
func (r *run) pids(nodes int) []int {
	r.t.Helper()
	var out []int
	for i := 1; i <= nodes; i++ {
		m, _ := r.expect(0, fmt.Sprintf(`node %d runs, pid (\d+)`, i))
		pid, err := strconv.Atoi(m[1])
		if err != nil {
			r.t.Fatal(err)
		}
		out = append(out, pid)
	}
	return out
}

// gone waits until a process that is not our child no longer exists, using a
// handle on the process itself, so that a reused pid cannot mislead it.
func gone(t *testing.T, p *os.Process) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := p.Signal(syscall.Signal(0)); errors.Is(err, os.ErrProcessDone) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still there", p.Pid)
		}
		<-tick.C
	}
}

func handles(t *testing.T, pids []int) []*os.Process {
	t.Helper()
	var out []*os.Process
	for _, pid := range pids {
		p, err := os.FindProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

// TestDemonstration: the cluster comes up with everything assigned, a killed
// leader is replaced and comes back, Ctrl-C stops all of it in order, and the
// next run finds the data.
func TestDemonstration(t *testing.T) {
	base, dir := freePorts(t, 3), t.TempDir()
	r := start(t, base, "--data-dir", dir, "--respawn", "1s")
	m, at := r.expect(0, `^ready (.*)$`)
	want := fmt.Sprintf("127.0.0.1:%d 127.0.0.1:%d 127.0.0.1:%d", base+1, base+2, base+3)
	if m[1] != want {
		t.Fatalf("endpoints %q, want %q", m[1], want)
	}
	out, err := exec.Command(binary, "-s", fmt.Sprintf("127.0.0.1:%d", base+2), "pipeline", "get", "default/orders").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "demo/") || strings.Contains(string(out), "pending") {
		t.Fatalf("the example pipeline is not placed: %v\n%s", err, out)
	}
	kill, _ := r.expect(at, `try: kill -9 (\d+)`)
	leader, _ := strconv.Atoi(kill[1])
	if err := syscall.Kill(leader, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	down, at := r.expect(at, `node (\d) is down: signal: killed`)
	_, at = r.expect(at, `node (\d) leads`)
	_, at = r.expect(at, fmt.Sprintf(`node %s runs, pid`, down[1]))

	// What a user has tried, and nobody can run, must not keep the next run from coming up.
	mine := filepath.Join(t.TempDir(), "mine.json")
	if err := os.WriteFile(mine, []byte(`{"id": "mine/tried", "name": "tried", "enabled": true, "stages": [
		{"id": "in", "name": "in", "stageType": "STAGE_TYPE_SOURCE", "serviceSelector": {"serviceName": "nobody-has-this"}},
		{"id": "out", "name": "out", "stageType": "STAGE_TYPE_SINK", "serviceSelector": {"serviceName": "nor-this"}}],
		"edges": [{"fromStage": "in", "toStage": "out"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command(binary, "-s", strings.ReplaceAll(want, " ", ","), "pipeline", "apply", "-f", mine).CombinedOutput()
	if err != nil {
		t.Fatalf("apply: %v\n%s", err, out)
	}

	procs := handles(t, r.pids(3))
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	r.expect(at, `all nodes have stopped`)
	if err := <-r.exit; err != nil {
		t.Fatalf("exit after Ctrl-C: %v", err)
	}
	for _, p := range procs {
		gone(t, p)
	}

	again := start(t, base, "--data-dir", dir)
	_, at = again.expect(0, `^ready `)
	again.mu.Lock()
	created := strings.Contains(strings.Join(again.lines[:at], "\n"), "pipeline default/orders created")
	again.mu.Unlock()
	if created {
		t.Fatal("the data of the first run is gone")
	}
	// Two at a time on one directory would be a mess.
	out, err = exec.Command(binary, "dev", "--data-dir", dir, "--base-port", strconv.Itoa(base+300)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--data-dir") {
		t.Fatalf("a second run on the same directory: %v\n%s", err, out)
	}
	out, err = exec.Command(binary, "dev", "--data-dir", t.TempDir(), "--base-port", strconv.Itoa(base)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--base-port") {
		t.Fatalf("a second run on the same ports: %v\n%s", err, out)
	}
	if err := again.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-again.exit; err != nil {
		t.Fatalf("exit after SIGTERM: %v", err)
	}
}

// TestFrozenNode: a node that is stopped is not down, and it is said that it does not
// answer and what lets it go on; the others go on meanwhile, and it is said when it
// answers again.
func TestFrozenNode(t *testing.T) {
	r := start(t, freePorts(t, 3), "--data-dir", t.TempDir())
	_, at := r.expect(0, `^ready `)
	kill, _ := r.expect(at, `try: kill -9 (\d+)`)
	leader, _ := strconv.Atoi(kill[1])
	if err := syscall.Kill(leader, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	_, after := r.expect(at, `node \d leads`)
	node, at := r.expect(at, fmt.Sprintf(`node (\d) does not answer: its process is stopped; kill -CONT %d lets it go on`, leader))
	if err := syscall.Kill(leader, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	r.expect(max(at, after), fmt.Sprintf(`node %s answers again`, node[1]))
	r.mu.Lock()
	for _, l := range r.lines {
		if strings.Contains(l, "is down") {
			t.Errorf("a node that was stopped is said to be down: %s", l)
		}
	}
	r.mu.Unlock()
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := <-r.exit; err != nil {
		t.Fatal(err)
	}
}

// TestNoOrphans: when the parent is killed outright, no node survives it.
func TestNoOrphans(t *testing.T) {
	r := start(t, freePorts(t, 3), "--data-dir", t.TempDir())
	procs := handles(t, r.pids(3))
	r.expect(0, `^ready `)
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-r.exit
	for _, p := range procs {
		gone(t, p)
	}
}
