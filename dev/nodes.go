package dev

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// Nodes are the nodes of a cluster on this machine, each a child process that
// dies with this one. Its methods are safe for concurrent use.
type Nodes struct {
	o      *Options
	nodes  []*node
	start  *starter
	unlock func()
	end    context.CancelFunc
	failed chan error
	// serving counts the nodes that have not ended for good.
	serving sync.WaitGroup
	stopped sync.Once
}

// Start starts the nodes that o asks for, and nothing else of the demonstration:
// no pipelines, no sidecars, no picture. It returns before they serve; the caller
// ends them with Stop.
func Start(o Options) (*Nodes, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	return startNodes(&o, newEvents(nil))
}

func startNodes(o *Options, ev *events) (*Nodes, error) {
	unlock, err := prepare(o)
	if err != nil {
		return nil, err
	}
	ctx, end := context.WithCancel(context.Background())
	ns := &Nodes{o: o, start: newStarter(), unlock: unlock, end: end, failed: make(chan error, 1)}
	for i := 1; i <= o.Nodes; i++ {
		n := &node{id: i, o: o, start: ns.start, events: ev, log: filepath.Join(o.DataDir, fmt.Sprintf("node-%d.log", i))}
		ns.nodes = append(ns.nodes, n)
		ns.serving.Go(func() {
			if err := n.run(ctx); err != nil {
				select {
				case ns.failed <- err:
				default: // the first says why
				}
			}
		})
	}
	return ns, nil
}

// Failed delivers why a node could not be started, once.
func (ns *Nodes) Failed() <-chan error { return ns.failed }

// Endpoints returns the client addresses, in the order of the nodes' ids.
func (ns *Nodes) Endpoints() []string { return ns.o.endpoints() }

// Pids returns the process ids in the order of the nodes' ids, 0 for one that is
// down.
func (ns *Nodes) Pids() []int {
	var out []int
	for _, n := range ns.nodes {
		pid, _ := n.status()
		out = append(out, pid)
	}
	return out
}

// pid returns the process id of a node, 0 when it is down.
func (ns *Nodes) pid(id int) int {
	pid, _ := ns.nodes[id-1].status()
	return pid
}

// Kill ends a node's process as kill -9 does; Options.Respawn says when it comes
// back.
func (ns *Nodes) Kill(id int) error {
	if id < 1 || id > len(ns.nodes) {
		return fmt.Errorf("there is no node %d", id)
	}
	pid, _ := ns.nodes[id-1].status()
	if pid == 0 {
		return fmt.Errorf("node %d is down already", id)
	}
	return syscall.Kill(pid, syscall.SIGKILL)
}

// Stop ends the nodes in order and returns when all processes have ended; their
// data stays.
func (ns *Nodes) Stop() {
	ns.stopped.Do(func() {
		ns.end()
		ns.serving.Wait()
		ns.start.close()
		ns.unlock()
	})
}

// prepare makes the data directory and takes it for this process alone.
func prepare(o *Options) (unlock func(), err error) {
	dir, err := filepath.Abs(o.DataDir)
	if err != nil {
		return nil, err
	}
	o.DataDir = dir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("another `router dev` uses %s; choose another directory with --data-dir, and other ports with --base-port", dir)
	}
	unlock = func() { _ = lock.Close() }
	if !o.Fresh {
		return unlock, nil
	}
	// Only what this command makes is removed: the directory may have been
	// given by mistake.
	made, err := filepath.Glob(filepath.Join(dir, "node-*"))
	if err != nil {
		unlock()
		return nil, err
	}
	for _, path := range made {
		if err := os.RemoveAll(path); err != nil {
			unlock()
			return nil, fmt.Errorf("remove what an earlier run left: %w", err)
		}
	}
	return unlock, nil
}
