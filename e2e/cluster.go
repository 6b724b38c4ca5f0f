package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// Options choose the shape of a Cluster; the zero value is three nodes that
// reach each other directly.
type Options struct {
	// Nodes is the number of nodes, 3 when zero.
	Nodes int
	// Proxied puts a Link between every ordered pair of nodes.
	Proxied bool
	// Args are passed to every node after the generated ones.
	Args []string
	// Binary is the router to run; the one of this checkout when empty.
	Binary string
	// DataDir gives the data directory of a node; a folder of the test's own
	// temporary directory when nil.
	DataDir func(id uint64) string
}

// Cluster is a group of real router processes on loopback.
type Cluster struct {
	t     testing.TB
	Nodes []*Node
	links map[[2]uint64]*Link
}

// Node is one process of the cluster; it outlives the process, which can be
// killed and started again on the same data directory.
type Node struct {
	t        testing.TB
	ID       uint64
	DataDir  string
	Client   string // host:port of the client listener
	Raft     string // host:port of the peer listener
	bin      string
	args     []string
	conn     *grpc.ClientConn
	mu       sync.Mutex
	cmd      *exec.Cmd
	exited   chan struct{}
	exitErr  error
	log      *logBuffer
	restarts int
}

// NewCluster starts a cluster and waits until a linearizable read succeeds. It
// is stopped when the test ends; the nodes' logs are shown if the test failed.
func NewCluster(t testing.TB, o Options) *Cluster {
	t.Helper()
	c := LayOut(t, o)
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitServing(c.Nodes...)
	return c
}

// LayOut chooses ports and directories without starting a process.
func LayOut(t testing.TB, o Options) *Cluster {
	t.Helper()
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	c := &Cluster{t: t, links: map[[2]uint64]*Link{}}
	base := t.TempDir()
	// The links take ports as well, and must not be given those of the nodes.
	ports, release := reservePorts(t, 2*o.Nodes)
	defer release()
	for i := range o.Nodes {
		id := uint64(i + 1)
		dir := filepath.Join(base, fmt.Sprintf("node-%d", id))
		if o.DataDir != nil {
			dir = o.DataDir(id)
		}
		c.Nodes = append(c.Nodes, &Node{
			t: t, ID: id, DataDir: dir, bin: o.Binary,
			Client: "127.0.0.1:" + strconv.Itoa(ports[2*i]),
			Raft:   "127.0.0.1:" + strconv.Itoa(ports[2*i+1]),
			log:    &logBuffer{limit: 1 << 20},
		})
	}
	for _, n := range c.Nodes {
		n.args = []string{
			"serve",
			"--node-id", strconv.FormatUint(n.ID, 10),
			"--listen-addr", n.Client,
			"--raft-addr", n.Raft,
			"--data-dir", n.DataDir,
		}
		for _, p := range c.Nodes {
			addr := p.Raft
			if o.Proxied && p != n {
				l := newLink(t, p.Raft)
				c.links[[2]uint64{n.ID, p.ID}] = l
				addr = l.Addr()
			}
			n.args = append(n.args, "--peers", fmt.Sprintf("%d:%s", p.ID, addr))
		}
		n.args = append(n.args, o.Args...)
	}
	t.Cleanup(func() {
		for _, n := range c.Nodes {
			n.Kill()
			if n.conn != nil {
				n.conn.Close()
			}
		}
		for _, l := range c.links {
			l.Close()
		}
		if t.Failed() {
			for _, n := range c.Nodes {
				t.Logf("--- log of node %d (pid gone) ---\n%s", n.ID, n.log)
			}
		}
	})
	return c
}

// Join lays out a further node that joins the cluster through its running nodes;
// id 0 lets the cluster choose (and ID stays 0). It does not start it.
func (c *Cluster) Join(id uint64, args ...string) *Node {
	c.t.Helper()
	ports := freePorts(c.t, 2)
	n := &Node{
		t: c.t, ID: id, DataDir: filepath.Join(c.t.TempDir(), fmt.Sprintf("joining-%d", len(c.Nodes)+1)),
		Client: "127.0.0.1:" + strconv.Itoa(ports[0]), Raft: "127.0.0.1:" + strconv.Itoa(ports[1]),
		log: &logBuffer{limit: 1 << 20},
	}
	n.args = []string{"serve", "--listen-addr", n.Client, "--raft-addr", n.Raft, "--data-dir", n.DataDir}
	if id != 0 {
		n.args = append(n.args, "--node-id", strconv.FormatUint(id, 10))
	}
	for _, p := range c.running() {
		n.args = append(n.args, "--join", p.Client)
	}
	n.args = append(n.args, args...)
	c.Nodes = append(c.Nodes, n)
	return n
}

// Start runs the process, with env added to its environment. It does not wait
// for it to serve.
func (n *Node) Start(env ...string) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd != nil {
		n.t.Fatalf("node %d runs already", n.ID)
	}
	cmd := exec.Command(binaryOf(n), n.args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	// A test binary that is killed must not leave routers behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		n.t.Fatalf("node %d: %v", n.ID, err)
	}
	n.cmd, n.exited = cmd, make(chan struct{})
	n.restarts++
	go func(cmd *exec.Cmd, exited chan struct{}) {
		n.exitErr = cmd.Wait()
		close(exited)
	}(cmd, n.exited)
}

// Kill ends the process at once, as a power cut ends it, and waits until it is
// gone. It does nothing when no process runs.
func (n *Node) Kill() { _ = n.end(syscall.SIGKILL, 30*time.Second) }

// Stop asks the process to end and fails the test unless it exits with 0.
func (n *Node) Stop() {
	n.t.Helper()
	if err := n.end(syscall.SIGTERM, 30*time.Second); err != nil {
		n.t.Fatalf("node %d did not stop cleanly: %v\n%s", n.ID, err, n.log)
	}
}

func (n *Node) end(sig syscall.Signal, bound time.Duration) error {
	n.mu.Lock()
	cmd, exited := n.cmd, n.exited
	n.cmd = nil
	n.mu.Unlock()
	if cmd == nil {
		return nil
	}
	_ = cmd.Process.Signal(syscall.SIGCONT) // a paused process cannot end itself
	_ = cmd.Process.Signal(sig)
	select {
	case <-exited:
		return n.exitErr
	case <-time.After(bound):
		_ = cmd.Process.Kill()
		<-exited
		return errors.New("still alive after the bound; killed")
	}
}

// WaitExit waits until the process ends by itself and returns its exit error
// (nil for status 0).
func (n *Node) WaitExit(ctx context.Context) error {
	n.t.Helper()
	n.mu.Lock()
	exited := n.exited
	n.mu.Unlock()
	select {
	case <-exited:
		n.mu.Lock()
		n.cmd = nil
		n.mu.Unlock()
		return n.exitErr
	case <-ctx.Done():
		n.t.Fatalf("node %d has not exited: %v\n%s", n.ID, ctx.Err(), n.log)
		return nil
	}
}

// exitsWithin waits until the process ends by itself; false when ctx ends first.
func (n *Node) exitsWithin(ctx context.Context) bool {
	n.mu.Lock()
	exited := n.exited
	n.mu.Unlock()
	select {
	case <-exited:
		n.mu.Lock()
		n.cmd = nil
		n.mu.Unlock()
		return true
	case <-ctx.Done():
		return false
	}
}

// Pause stops the process without its noticing, until Resume.
func (n *Node) Pause() { n.signal(syscall.SIGSTOP) }

// Resume lets a paused process go on.
func (n *Node) Resume() { n.signal(syscall.SIGCONT) }

func (n *Node) signal(s syscall.Signal) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd != nil {
		_ = n.cmd.Process.Signal(s)
	}
}

// Running tells whether a process was started and not ended by the test.
func (n *Node) Running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cmd != nil
}

// exitedItself tells whether the process ended without being told to.
func (n *Node) exitedItself() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.exited:
		return true
	default:
		return false
	}
}

// PID returns the process id of a running node.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cmd.Process.Pid
}

// Log returns what the node's processes have printed so far.
func (n *Node) Log() string { return n.log.String() }

// Conn returns the one connection of the test to this node; it reconnects by
// itself when the node restarts.
func (n *Node) Conn() *grpc.ClientConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn == nil {
		conn, err := grpc.NewClient("passthrough:///"+n.Client,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(quickReconnect))
		if err != nil {
			n.t.Fatalf("node %d: %v", n.ID, err)
		}
		n.conn = conn
	}
	return n.conn
}

// Admin, Sidecars, Registry, Checkpoints, Cluster and Commits return stubs on
// the node's connection.
func (n *Node) Admin() adminpb.RouterAdminClient { return adminpb.NewRouterAdminClient(n.Conn()) }

// Sidecars returns the sidecar stub.
func (n *Node) Sidecars() sidecarpb.SidecarCoordinatorClient {
	return sidecarpb.NewSidecarCoordinatorClient(n.Conn())
}

// Registry returns the service registry stub.
func (n *Node) Registry() registrypb.ServiceRegistryClient {
	return registrypb.NewServiceRegistryClient(n.Conn())
}

// Checkpoints returns the checkpoint stub.
func (n *Node) Checkpoints() checkpointpb.CheckpointServiceClient {
	return checkpointpb.NewCheckpointServiceClient(n.Conn())
}

// Cluster returns the cluster stub.
func (n *Node) Cluster() clusterpb.ClusterClient { return clusterpb.NewClusterClient(n.Conn()) }

// Commits returns the commit-stream stub.
func (n *Node) Commits() clusterpb.CommitsClient { return clusterpb.NewCommitsClient(n.Conn()) }

// WaitServing waits until each node answers a linearizable read.
func (c *Cluster) WaitServing(nodes ...*Node) {
	c.t.Helper()
	for _, n := range nodes {
		eventually(c.t, 60*time.Second, fmt.Sprintf("node %d serves", n.ID), func(ctx context.Context) error {
			if n.exitedItself() {
				c.t.Fatalf("node %d ended by itself: %v\n%s", n.ID, n.exitErr, n.log)
			}
			_, err := n.Admin().ListPipelines(ctx, &adminpb.ListPipelinesRequest{})
			return err
		})
	}
}

// Leader waits for a node that all of nodes (all running ones when none is
// given) hold for the leader, and returns it.
func (c *Cluster) Leader(nodes ...*Node) *Node {
	c.t.Helper()
	if len(nodes) == 0 {
		nodes = c.running()
	}
	var leader *Node
	eventually(c.t, 30*time.Second, "the nodes agree on a leader", func(ctx context.Context) error {
		var id, term uint64
		for i, n := range nodes {
			st, err := n.Admin().GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
			if err != nil {
				return err
			}
			if st.LeaderId == 0 {
				return fmt.Errorf("node %d knows no leader", n.ID)
			}
			if i > 0 && (st.LeaderId != id || st.Term != term) {
				return fmt.Errorf("node %d follows %d in term %d, another %d in term %d", n.ID, st.LeaderId, st.Term, id, term)
			}
			id, term = st.LeaderId, st.Term
		}
		for _, n := range c.Nodes {
			if n.ID == id {
				leader = n
			}
		}
		for _, n := range nodes {
			if n == leader {
				return nil
			}
		}
		return fmt.Errorf("leader %d is not among the nodes asked", id)
	})
	return leader
}

// Followers returns the running nodes other than leader.
func (c *Cluster) Followers(leader *Node) []*Node {
	var out []*Node
	for _, n := range c.running() {
		if n != leader {
			out = append(out, n)
		}
	}
	return out
}

func (c *Cluster) running() []*Node {
	var out []*Node
	for _, n := range c.Nodes {
		if n.Running() {
			out = append(out, n)
		}
	}
	return out
}

// Link returns the link that carries what node from sends to node to.
func (c *Cluster) Link(from, to *Node) *Link { return c.links[[2]uint64{from.ID, to.ID}] }

// Isolate cuts every link from and to n; Heal restores all links.
func (c *Cluster) Isolate(n *Node) {
	for pair, l := range c.links {
		if pair[0] == n.ID || pair[1] == n.ID {
			l.Cut()
		}
	}
}

// Heal restores every link.
func (c *Cluster) Heal() {
	for _, l := range c.links {
		l.Heal()
	}
}

// WaitSameState waits until all nodes report the same state hash at the same
// applied index. It fails the test at once when two hashes differ at equal
// indexes: that is divergence and no amount of waiting mends it.
func (c *Cluster) WaitSameState() {
	c.t.Helper()
	eventually(c.t, 60*time.Second, "all nodes have applied the same index", func(ctx context.Context) error {
		byIndex := map[uint64][]byte{}
		for _, n := range c.Nodes {
			h, err := n.Cluster().GetStateHash(ctx, &clusterpb.GetStateHashRequest{})
			if err != nil {
				return err
			}
			if seen, ok := byIndex[h.AppliedIndex]; ok && !bytes.Equal(seen, h.Hash) {
				c.t.Fatalf("DIVERGENCE: node %d has hash %x at index %d, another node %x", n.ID, h.Hash, h.AppliedIndex, seen)
			}
			byIndex[h.AppliedIndex] = h.Hash
		}
		if len(byIndex) != 1 {
			return fmt.Errorf("%d different applied indexes", len(byIndex))
		}
		return nil
	})
}

// freePorts asks the kernel for n unused ports. Another process may take one
// before the router does; the router then says so and the test fails loudly.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	ports, release := reservePorts(t, n)
	release()
	return ports
}

// reservePorts is freePorts, but nobody gets the ports before release is called.
func reservePorts(t testing.TB, n int) (ports []int, release func()) {
	t.Helper()
	var open []net.Listener
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, l)
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, func() {
		for _, l := range open {
			l.Close()
		}
	}
}

// eventually calls f until it returns nil, with a fresh deadline each time, and
// fails the test when the bound passes first.
func eventually(t testing.TB, bound time.Duration, what string, f func(ctx context.Context) error) {
	t.Helper()
	deadline := time.Now().Add(bound)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		err := f(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not reached within %v: %s: %v", bound, what, err)
		}
		<-tick.C
	}
}

// logBuffer keeps the newest limit bytes written to it.
type logBuffer struct {
	mu    sync.Mutex
	buf   []byte
	limit int
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if over := len(b.buf) - b.limit; over > 0 {
		b.buf = append(b.buf[:0:0], b.buf[over:]...)
	}
	return len(p), nil
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.buf)
}
