package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/config"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/internal/crashpoint"
	"conveyor.etl/router/internal/freeport"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bound ends a test that waits for something that never comes.
const bound = 30 * time.Second

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	t.Cleanup(cancel)
	return ctx
}

// settings returns those of node id of n nodes in dir, on free ports.
func settings(t *testing.T, dir string, n int) []config.Config {
	t.Helper()
	var peers []config.Peer
	var clients []string
	for id := 1; id <= n; id++ {
		peers = append(peers, config.Peer{ID: uint64(id), Addr: freeAddr(t)})
		clients = append(clients, freeAddr(t))
	}
	all := make([]config.Config, n)
	for i := range all {
		loaded, err := config.Load(config.Input{Environ: []string{
			fmt.Sprintf("CONVEYOR_ROUTER_NODE_ID=%d", i+1),
			"CONVEYOR_ROUTER_DATA_DIR=" + filepath.Join(dir, fmt.Sprintf("node-%d", i+1)),
			"CONVEYOR_ROUTER_LISTEN_ADDR=" + clients[i],
			"CONVEYOR_ROUTER_RAFT_ADDR=" + peers[i].Addr,
			// Of all nodes of this process: see wal.Options.
			"CONVEYOR_ROUTER_RAFT_SEGMENT_BYTES=4MiB",
		}})
		if err != nil {
			t.Fatal(err)
		}
		all[i] = loaded.Config
		all[i].Peers = peers
	}
	return all
}

func freeAddr(t *testing.T) string {
	t.Helper()
	addr, err := freeport.Addr()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// logTo shows the log of a node when its test failed.
func logTo(t *testing.T) *slog.Logger {
	var buf lockedBuffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(buf.String())
		}
	})
	return slog.New(slog.NewTextHandler(&buf, nil))
}

// start starts a node that is stopped with the test.
func start(t *testing.T, c config.Config) *Server {
	t.Helper()
	s := New(c, Options{Logger: logTo(t)})
	if err := s.Start(within(t)); err != nil {
		t.Fatal(err)
	}
	return s
}

func stop(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Stop(within(t)); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func dial(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func commit(t *testing.T, s *Server, partition uint32, offset uint64) {
	t.Helper()
	reply, err := checkpointpb.NewCheckpointServiceClient(dial(t, s.Addr())).CommitOffset(within(t),
		&checkpointpb.CommitOffsetRequest{SourceId: "s", Partition: partition, Offset: offset}, grpc.WaitForReady(true))
	if err != nil || !reply.GetSuccess() {
		t.Fatalf("commit: %v %v", reply, err)
	}
}

func offsets(t *testing.T, s *Server) map[uint32]uint64 {
	t.Helper()
	reply, err := checkpointpb.NewCheckpointServiceClient(dial(t, s.Addr())).GetSourceOffset(within(t),
		&checkpointpb.GetOffsetRequest{SourceId: "s"}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return reply.GetOffsets()
}

// leader waits until one of nodes leads and has committed in its term.
func leader(t *testing.T, nodes ...*Server) *Server {
	t.Helper()
	ctx := within(t)
	for {
		changed := nodes[0].Node().Changed()
		for _, s := range nodes {
			if s.Node().Leadership().Leading {
				if _, err := s.Node().ReadIndex(ctx); err == nil {
					return s
				}
			}
		}
		// One node sees every change of leader; the pause covers the moment
		// between its seeing and the others'.
		pause := time.NewTimer(20 * time.Millisecond)
		select {
		case <-changed:
		case <-pause.C:
		case <-ctx.Done():
			t.Fatal("no leader")
		}
		pause.Stop()
	}
}

// What was acknowledged is there after a stop and a start, and the node is the
// same node.
func TestStopAndStart(t *testing.T) {
	c := settings(t, t.TempDir(), 1)[0]
	s := start(t, c)
	commit(t, s, 3, 42)
	stop(t, s)
	s = start(t, c)
	defer stop(t, s)
	if got := offsets(t, s); len(got) != 1 || got[3] != 42 {
		t.Errorf("offsets after the restart: %v", got)
	}
	st, err := adminpb.NewRouterAdminClient(dial(t, s.Addr())).GetClusterStatus(within(t), &adminpb.GetClusterStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if st.GetNodeId() != 1 || st.GetLeaderId() != 1 || st.GetNodes()[0].GetAddress() != c.RaftAddr || st.GetNodes()[0].GetClientAddress() != c.ListenAddr {
		t.Errorf("status %v", st)
	}
}

func TestDataDirectoryRefusals(t *testing.T) {
	dir := t.TempDir()
	c := settings(t, dir, 1)[0]
	s := start(t, c)
	commit(t, s, 0, 1)

	refuse := func(t *testing.T, c config.Config, want error, text ...string) {
		t.Helper()
		err := New(c, Options{}).Start(within(t))
		if !errors.Is(err, want) {
			t.Fatalf("got %v, want %v", err, want)
		}
		for _, part := range text {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q does not say %q", err, part)
			}
		}
	}
	t.Run("a second process", func(t *testing.T) {
		second := c
		second.ListenAddr, second.RaftAddr = freeAddr(t), freeAddr(t)
		refuse(t, second, ErrInUse, c.DataDir, fmt.Sprint(os.Getpid()), "--data-dir")
	})
	stop(t, s)
	t.Run("another cluster", func(t *testing.T) {
		other := c
		other.ClusterName = "elsewhere"
		refuse(t, other, ErrForeign, `"conveyor"`, `"elsewhere"`, "--cluster-name")
	})
	t.Run("another node", func(t *testing.T) {
		other := c
		other.NodeID = 2
		refuse(t, other, ErrForeign, "node 1", "as 2", "--node-id")
	})
	name := filepath.Join(c.DataDir, datadir.IdentityName)
	intact, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	write := func(t *testing.T, raw []byte) {
		t.Helper()
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(name, intact, 0o600); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("a newer format", func(t *testing.T) {
		write(t, bytes.Replace(intact, []byte(`"format_version": 2`), []byte(`"format_version": 9, "unheard_of": 1`), 1))
		refuse(t, c, ErrNewer, "format 9", "newer binary")
	})
	t.Run("another cluster's log", func(t *testing.T) {
		id, _, err := openIdentity(c.DataDir, &crashpoint.Points{}, datadir.Identity{ClusterName: c.ClusterName, NodeID: 1})
		if err != nil {
			t.Fatal(err)
		}
		write(t, bytes.Replace(intact, fmt.Append(nil, id.ClusterID), fmt.Append(nil, id.ClusterID+1), 1))
		refuse(t, c, ErrForeign)
	})
	t.Run("a damaged identity", func(t *testing.T) {
		write(t, intact[:len(intact)/2])
		refuse(t, c, ErrIncomplete, datadir.IdentityName)
	})
	t.Run("an empty identity", func(t *testing.T) {
		write(t, nil)
		refuse(t, c, ErrIncomplete, datadir.IdentityName)
	})
	t.Run("no identity", func(t *testing.T) {
		write(t, intact) // restores it afterwards
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		refuse(t, c, ErrIncomplete, datadir.IdentityName)
	})
	t.Run("no log", func(t *testing.T) {
		log := filepath.Join(c.DataDir, "wal")
		if err := os.Rename(log, log+".away"); err != nil {
			t.Fatal(err)
		}
		refuse(t, c, ErrIncomplete, log, "another id")
		if err := os.Mkdir(log, 0o700); err != nil {
			t.Fatal(err)
		}
		refuse(t, c, ErrIncomplete, log, "another id") // its files removed
		if err := os.Remove(log); err != nil {
			t.Fatalf("the refused start left something in the log's directory: %v", err)
		}
		if err := os.Rename(log+".away", log); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("somebody else's folder", func(t *testing.T) {
		other := c
		other.DataDir = t.TempDir()
		if err := os.WriteFile(filepath.Join(other.DataDir, "photo.jpg"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refuse(t, other, ErrIncomplete, "photo.jpg")
	})
	// None of it has harmed the data, or left the directory locked.
	s = start(t, c)
	defer stop(t, s)
	if got := offsets(t, s); got[0] != 1 {
		t.Errorf("offsets after all refusals: %v", got)
	}
}

// A crash between any two steps of the very first start must not make the next
// one refuse.
func TestInterruptedFirstStart(t *testing.T) {
	for _, left := range []struct {
		name string
		make func(dir string) error
	}{
		{"the lock only", func(dir string) error { return os.WriteFile(filepath.Join(dir, datadir.LockName), nil, 0o600) }},
		{"half an identity", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, datadir.IdentityName+".tmp"), []byte(`{"format_`), 0o600)
		}},
		{"the identity only", func(dir string) error {
			return createIdentity(dir, datadir.Identity{FormatVersion: 1, ClusterID: datadir.ClusterID("conveyor", []uint64{1}), ClusterName: "conveyor", NodeID: 1, Members: []uint64{1}})
		}},
		{"everything but the last word", func(dir string) error {
			c := settings(t, t.TempDir(), 1)[0]
			c.DataDir = dir
			s, err := openStorage(&c, slog.New(slog.DiscardHandler), time.Now)
			if err != nil {
				return err
			}
			s.id.Initialized = false
			return errors.Join(datadir.WriteIdentity(dir, s.id), s.close())
		}},
	} {
		t.Run(left.name, func(t *testing.T) {
			c := settings(t, t.TempDir(), 1)[0]
			if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := left.make(c.DataDir); err != nil {
				t.Fatal(err)
			}
			s := start(t, c)
			defer stop(t, s)
			commit(t, s, 0, 1)
		})
	}
}

// A failed start says why and leaves nothing behind.
func TestAddressInUse(t *testing.T) {
	for _, which := range []string{"--listen-addr", "--raft-addr"} {
		t.Run(which, func(t *testing.T) {
			c := settings(t, t.TempDir(), 1)[0]
			taken := c
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if which == "--raft-addr" {
				taken.RaftAddr = l.Addr().String()
			} else {
				taken.ListenAddr = l.Addr().String()
			}
			err = New(taken, Options{}).Start(within(t))
			if err == nil || !strings.Contains(err.Error(), which) {
				t.Fatalf("got %v, want an error about %s", err, which)
			}
			stop(t, start(t, c))
		})
	}
}

// steady makes leaders keep their place on a machine that is busy with other things,
// which may keep a node from its heartbeats for longer than the usual 150 ms.
func steady(c *config.Config) { c.Raft.ElectionTimeout = 2 * time.Second }

func startCluster(t *testing.T, n int, change func(*config.Config)) ([]config.Config, []*Server) {
	t.Helper()
	all := settings(t, t.TempDir(), n)
	var nodes []*Server
	for i := range all {
		if change != nil {
			change(&all[i])
		}
		nodes = append(nodes, start(t, all[i]))
	}
	return all, nodes
}

// A leader that is stopped hands over before it ends, so that clients of the
// others hardly notice; its own callers get their answers.
func TestStoppingTheLeaderHandsOver(t *testing.T) {
	_, nodes := startCluster(t, 3, steady)
	first := leader(t, nodes...)
	term := first.Node().Leadership().Term
	var rest []*Server
	for _, s := range nodes {
		if s != first {
			rest = append(rest, s)
		}
	}
	stop(t, first)
	second := leader(t, rest...)
	// Handed over: the next term. An election would have had to wait for a
	// timeout, and may have taken more than one round.
	if got := second.Node().Leadership().Term; got != term+1 {
		t.Errorf("term %d after the stop, %d before", got, term)
	}
	commit(t, rest[0], 1, 1)
	commit(t, rest[1], 2, 2)
	for _, s := range rest {
		stop(t, s)
	}
}

// The address a node has for a peer is its own business.
func TestNodesMayKnowEachOtherByDifferentAddresses(t *testing.T) {
	all := settings(t, t.TempDir(), 3)
	var nodes []*Server
	for i, c := range all {
		c.Peers = append([]config.Peer(nil), c.Peers...)
		for j := range c.Peers {
			if j != i {
				c.Peers[j].Addr = strings.Replace(c.Peers[j].Addr, "127.0.0.1", "localhost", 1)
			}
		}
		nodes = append(nodes, start(t, c))
	}
	leader(t, nodes...)
	commit(t, nodes[0], 0, 1)
	compareHashes(t, nodes)
	for _, s := range nodes {
		stop(t, s)
	}
}

// compareHashes waits until all nodes have applied what the first has, and
// demands the same state.
func compareHashes(t *testing.T, nodes []*Server) {
	t.Helper()
	ctx := within(t)
	index, err := nodes[0].Node().ReadIndex(ctx)
	if err != nil {
		t.Fatal(err)
	}
	hashes := map[uint64][]byte{}
	for _, s := range nodes {
		if err := s.Node().WaitApplied(ctx, index); err != nil {
			t.Fatal(err)
		}
		reply, err := clusterpb.NewClusterClient(dial(t, s.Addr())).GetStateHash(ctx, &clusterpb.GetStateHashRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := hashes[reply.GetAppliedIndex()]; ok && !bytes.Equal(other, reply.GetHash()) {
			t.Errorf("node %d differs at index %d", reply.GetNodeId(), reply.GetAppliedIndex())
		}
		hashes[reply.GetAppliedIndex()] = reply.GetHash()
	}
	if len(hashes) > 1 {
		t.Logf("the state moved on between the nodes: %d indexes", len(hashes))
	}
}

// A node whose state is gone, and whose log no longer reaches back to the
// beginning, fetches the state from a peer while the others serve.
func TestLostStateIsFetched(t *testing.T) {
	all, nodes := startCluster(t, 3, func(c *config.Config) { steady(c); c.Raft.TailBytes = 1 << 20 })
	ctx := within(t)
	leader(t, nodes...)
	last := nodes[2]
	client := checkpointpb.NewCheckpointServiceClient(dial(t, nodes[0].Addr()))
	data := bytes.Repeat([]byte("x"), 128<<10)
	for i := 0; last.Node().Status().FirstIndex <= 2; i++ {
		if i == 2000 {
			t.Fatal("the log is never truncated")
		}
		_, err := client.SaveCheckpoint(ctx, &checkpointpb.SaveCheckpointRequest{ServiceId: fmt.Sprint(i % 10), CheckpointId: fmt.Sprint(i), Data: data})
		if err != nil {
			t.Fatal(err)
		}
	}
	stop(t, last)
	if err := os.RemoveAll(filepath.Join(all[2].DataDir, "state")); err != nil {
		t.Fatal(err)
	}
	commit(t, nodes[0], 7, 7)
	nodes[2] = start(t, all[2])
	if got := offsets(t, nodes[2]); got[7] != 7 {
		t.Errorf("offsets of the rebuilt node: %v", got)
	}
	compareHashes(t, nodes)
	for _, s := range nodes {
		stop(t, s)
	}
}

// Stop is bounded: what it cannot finish in time it reports.
func TestStopIsBounded(t *testing.T) {
	s := start(t, settings(t, t.TempDir(), 1)[0])
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Stop(ctx); err != nil {
		t.Errorf("a node with nothing to do should stop all the same: %v", err)
	}
}
