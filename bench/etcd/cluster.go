package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/bench"
)

const (
	members = 3
	joiner  = members // position of a fourth process, which joins the others
)

// cluster is three server processes of one system, and a fourth while one joins.
type cluster struct {
	s     system
	o     *options
	dir   string
	procs [members + 1]*exec.Cmd
	ended [members + 1]chan struct{}
}

// system is what differs between the two.
type system interface {
	name() string
	// port offset, so that ports of one run are not in TIME_WAIT of the next
	command(o *options, dir string, i int) *exec.Cmd
	endpoint(o *options, i int) string
	// leader returns the position of the leader among the members.
	leader(ctx context.Context, c *cluster) (int, error)
	// put commits one object, get reads one linearizably, over conn.
	put(ctx context.Context, conn grpc.ClientConnInterface, key string, value []byte) error
	get(ctx context.Context, conn grpc.ClientConnInterface, key string) error
	fill(ctx context.Context, c *cluster, keys int) error
	streams() bool
	drive(ctx context.Context, c *cluster, leader int, l *load, o *options) (*run1, error)
}

// startCluster starts a fresh cluster and waits until every member serves.
func startCluster(ctx context.Context, o *options, s system) (*cluster, error) {
	c := &cluster{s: s, o: o, dir: filepath.Join(o.data, s.name())}
	if err := os.RemoveAll(c.dir); err != nil {
		return nil, err
	}
	for i := range members {
		if err := c.start(i); err != nil {
			c.stop()
			return nil, err
		}
	}
	for i := range members {
		if _, err := c.serves(ctx, i, time.Now(), "x"); err != nil {
			c.stop()
			return nil, err
		}
	}
	return c, nil
}

func (c *cluster) start(i int) error {
	dir := filepath.Join(c.dir, fmt.Sprint(i+1))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(c.dir, fmt.Sprintf("%d.log", i+1)), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own handle
	cmd := c.s.command(c.o, dir, i)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	ended := make(chan struct{})
	started := make(chan error)
	// The kernel kills the child when the thread that started it ends; this
	// one stays until the child has ended by itself.
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	c.procs[i], c.ended[i] = cmd, ended
	return nil
}

// kill ends member i at once and waits until it is gone.
func (c *cluster) kill(i int) {
	_ = c.procs[i].Process.Kill()
	<-c.ended[i]
}

// end ends all members and keeps their data.
func (c *cluster) end() {
	for i, p := range c.procs {
		if p != nil {
			c.kill(i)
			c.procs[i] = nil
		}
	}
}

// stop ends all members and removes their data.
func (c *cluster) stop() {
	c.end()
	if !c.o.keep {
		_ = os.RemoveAll(c.dir)
	}
}

// pids returns the process ids of the members.
func (c *cluster) pids() []int {
	var out []int
	for _, p := range c.procs[:members] {
		out = append(out, p.Process.Pid)
	}
	return out
}

func (c *cluster) endpoints() []string {
	var out []string
	for i := range members {
		out = append(out, c.s.endpoint(c.o, i))
	}
	return out
}

// usage is what the members have used.
func (c *cluster) usage() (cpu time.Duration, resident []int64, err error) {
	for _, pid := range c.pids() {
		p, err := bench.ReadProcess(pid)
		if err != nil {
			return 0, nil, err
		}
		cpu += p.CPU
		resident = append(resident, p.Resident)
	}
	return cpu, resident, nil
}

// dialFast connects with a backoff short enough to time a start by.
func dialFast(endpoint string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))
}

// serves waits for the first linearizable read through member i and returns how
// long after from it was answered.
func (c *cluster) serves(ctx context.Context, i int, from time.Time, key string) (time.Duration, error) {
	conn, err := dialFast(c.s.endpoint(c.o, i))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		try, done := context.WithTimeout(ctx, 2*time.Second)
		err := c.s.get(try, conn, key)
		done()
		if err == nil {
			return time.Since(from), nil
		}
		select {
		case <-c.ended[i]:
			raw, _ := os.ReadFile(filepath.Join(c.dir, fmt.Sprintf("%d.log", i+1)))
			return 0, fmt.Errorf("member %d ended: %s", i+1, raw[max(0, len(raw)-2000):])
		case <-ctx.Done():
			return 0, errors.Join(ctx.Err(), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
