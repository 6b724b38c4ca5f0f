package offline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/config"
	"conveyor.etl/router/internal/freeport"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bound ends a test that waits for something that never comes.
const bound = 30 * time.Second

// segment is the size of a log segment of all nodes of this process.
const segment = 1 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	t.Cleanup(cancel)
	return ctx
}

func testSettings() Settings { return Settings{SegmentBytes: segment} }

func freeAddr(t testing.TB) string {
	t.Helper()
	addr, err := freeport.Addr()
	must(t, err)
	return addr
}

// cluster returns the settings of n nodes with data directories below dir.
func cluster(t testing.TB, dir string, n int) []config.Config {
	t.Helper()
	var peers []config.Peer
	for id := 1; id <= n; id++ {
		peers = append(peers, config.Peer{ID: uint64(id), Addr: freeAddr(t)})
	}
	all := make([]config.Config, n)
	for i := range all {
		loaded, err := config.Load(config.Input{Environ: []string{
			fmt.Sprintf("CONVEYOR_ROUTER_NODE_ID=%d", i+1),
			"CONVEYOR_ROUTER_DATA_DIR=" + filepath.Join(dir, fmt.Sprintf("node-%d", i+1)),
			"CONVEYOR_ROUTER_LISTEN_ADDR=" + freeAddr(t),
			"CONVEYOR_ROUTER_RAFT_ADDR=" + peers[i].Addr,
			fmt.Sprintf("CONVEYOR_ROUTER_RAFT_SEGMENT_BYTES=%d", segment),
		}})
		must(t, err)
		all[i] = loaded.Config
		all[i].Peers = peers
	}
	return all
}

func start(t testing.TB, c config.Config) *server.Server {
	t.Helper()
	s := server.New(c, server.Options{Logger: slog.New(slog.DiscardHandler)})
	must(t, s.Start(within(t)))
	return s
}

func stop(t testing.TB, nodes ...*server.Server) {
	t.Helper()
	for _, s := range nodes {
		if err := s.Stop(within(t)); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
}

func dial(t testing.TB, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// commit commits offsets of the partitions from to to, one call each.
func commit(t testing.TB, s *server.Server, from, to uint32) {
	t.Helper()
	client := checkpointpb.NewCheckpointServiceClient(dial(t, s.Addr()))
	for p := from; p <= to; p++ {
		reply, err := client.CommitOffset(within(t),
			&checkpointpb.CommitOffsetRequest{SourceId: "s", Partition: p, Offset: uint64(p) * 10}, grpc.WaitForReady(true))
		if err != nil || !reply.GetSuccess() {
			t.Fatalf("commit: %v %v", reply, err)
		}
	}
}

// expect demands the offsets commit stored for the partitions 1 to n, and none
// besides.
func expect(t testing.TB, s *server.Server, n uint32) {
	t.Helper()
	reply, err := checkpointpb.NewCheckpointServiceClient(dial(t, s.Addr())).GetSourceOffset(within(t),
		&checkpointpb.GetOffsetRequest{SourceId: "s"}, grpc.WaitForReady(true))
	must(t, err)
	got := reply.GetOffsets()
	if len(got) != int(n) {
		t.Fatalf("%d offsets, want %d", len(got), n)
	}
	for p := uint32(1); p <= n; p++ {
		if got[p] != uint64(p)*10 {
			t.Fatalf("partition %d is at %d", p, got[p])
		}
	}
}

func clusterID(t testing.TB, s *server.Server) string {
	t.Helper()
	st, err := adminpb.NewRouterAdminClient(dial(t, s.Addr())).GetClusterStatus(within(t), &adminpb.GetClusterStatusRequest{}, grpc.WaitForReady(true))
	must(t, err)
	return st.GetClusterId()
}

// crashed returns a copy of the data directory dir to which nobody writes: what is on
// its disk, without what is held in memory. A replaced database may be on its way out
// meanwhile: what is gone when its turn comes was removed before the crash.
func crashed(t testing.TB, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), filepath.Base(dir))
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		rel, rerr := filepath.Rel(dir, path)
		if err = errors.Join(err, rerr); err == nil && e.IsDir() {
			err = os.MkdirAll(filepath.Join(to, rel), 0o755)
		} else if err == nil {
			var b []byte
			if b, err = os.ReadFile(path); err == nil {
				err = os.WriteFile(filepath.Join(to, rel), b, 0o644)
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}))
	return to
}

// at returns c with another data directory.
func at(c config.Config, dir string) config.Config {
	c.DataDir = dir
	return c
}
