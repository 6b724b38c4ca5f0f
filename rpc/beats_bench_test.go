package rpc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// beatFleet is a server with n sidecars that have beaten before.
func beatFleet(b testing.TB, n int) (*Server, []*sidecarpb.SidecarHeartbeatRequest) {
	b.Helper()
	node := newOneNode(b)
	srv, err := NewServer(ServerConfig{Node: node, State: node.fsm, Submitter: node, Beats: &nullBeats{}, NodeID: 1, PlacementWait: time.Nanosecond})
	if err != nil {
		b.Fatal(err)
	}
	api := &sidecarAPI{Server: srv}
	reqs := make([]*sidecarpb.SidecarHeartbeatRequest, n)
	for i := range reqs {
		id := fmt.Sprintf("namespace-%02d/sidecar-%06d", i%100, i)
		reqs[i] = &sidecarpb.SidecarHeartbeatRequest{
			SidecarId: id, Load: &sidecarpb.SidecarLoad{CpuUsage: 0.5, MemoryUsage: 0.5},
			ServiceHealth: []*sidecarpb.LocalServiceHealth{{ServiceName: "clean", Healthy: true}},
		}
		if _, err := api.RegisterSidecar(b.Context(), sidecarRequest(id, "clean")); err != nil {
			b.Fatal(err)
		}
		for range 2 {
			if _, err := api.Heartbeat(b.Context(), reqs[i]); err != nil {
				b.Fatal(err)
			}
		}
	}
	return srv, reqs
}

// nullBeats takes heartbeats and does nothing with them.
type nullBeats struct{ n atomic.Uint64 }

func (b *nullBeats) Touch(_, _ string)          { b.n.Add(1) }
func (b *nullBeats) TouchSidecars(ids []string) { b.n.Add(uint64(len(ids))) }

// BenchmarkHeartbeatHandler measures what a node does itself for one plain
// heartbeat, without gRPC.
func BenchmarkHeartbeatHandler(b *testing.B) {
	srv, reqs := beatFleet(b, 10_000)
	defer srv.Shutdown(context.Background())
	api := &sidecarAPI{Server: srv}
	info := &grpc.UnaryServerInfo{FullMethod: sidecarpb.SidecarCoordinator_Heartbeat_FullMethodName}
	handler := func(ctx context.Context, req any) (any, error) {
		return api.Heartbeat(ctx, req.(*sidecarpb.SidecarHeartbeatRequest))
	}
	ctx := grpc.NewContextWithServerTransportStream(b.Context(), noTransport{})
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		if _, err := srv.unary(ctx, reqs[i], info, handler); err != nil {
			b.Fatal(err)
		}
		i = (i + 1) % len(reqs)
	}
}

// noTransport takes reply headers and drops them.
type noTransport struct{}

func (noTransport) Method() string               { return "" }
func (noTransport) SetHeader(metadata.MD) error  { return nil }
func (noTransport) SendHeader(metadata.MD) error { return nil }
func (noTransport) SetTrailer(metadata.MD) error { return nil }

// BenchmarkHeartbeatCall measures one plain heartbeat over loopback TCP, client
// and server together, beside the least a unary call can cost. cpu/op is the
// processor time of both.
func BenchmarkHeartbeatCall(b *testing.B) {
	srv, reqs := beatFleet(b, 10_000)
	defer srv.Shutdown(context.Background())
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = srv.Serve(lis) }()
	conns := make([]*grpc.ClientConn, 16)
	for i := range conns {
		conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(NewCodec())))
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		conns[i] = conn
	}
	calls := map[string]func(conn *grpc.ClientConn, i int) error{
		"heartbeat": func(conn *grpc.ClientConn, i int) error {
			_, err := sidecarpb.NewSidecarCoordinatorClient(conn).Heartbeat(context.Background(), reqs[i%len(reqs)])
			return err
		},
		"floor": func(conn *grpc.ClientConn, _ int) error {
			_, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
			return err
		},
	}
	for _, name := range []string{"heartbeat", "floor"} {
		b.Run(name, func(b *testing.B) {
			var next atomic.Int64
			var wg sync.WaitGroup
			b.ReportAllocs()
			before := processorTime()
			for w := range 2 * len(conns) {
				wg.Go(func() {
					for {
						i := int(next.Add(1)) - 1
						if i >= b.N {
							return
						}
						if err := calls[name](conns[w%len(conns)], i); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64((processorTime()-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
		})
	}
}

// serveBeats, in the environment, makes TestServeBeats the server of
// BenchmarkHeartbeatServed.
const serveBeats = "CONVEYOR_TEST_SERVE_BEATS"

// TestServeBeats serves a fleet on the address it prints, and answers each line it
// reads with the processor time it has used.
func TestServeBeats(t *testing.T) {
	if os.Getenv(serveBeats) == "" {
		t.Skip("only as a part of BenchmarkHeartbeatServed")
	}
	srv, _ := beatFleet(t, 10_000)
	defer srv.Shutdown(context.Background())
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(lis) }()
	fmt.Println("serving", lis.Addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println("used", processorTime().Nanoseconds())
	}
}

// BenchmarkHeartbeatServed measures the processor time a node spends on one plain
// heartbeat, without that of the client, which is another process here: 1,000
// connections that beat in turn, 32 at a time.
func BenchmarkHeartbeatServed(b *testing.B) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestServeBeats$")
	cmd.Env = append(os.Environ(), serveBeats+"=1")
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		b.Fatal(err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	}()
	lines := bufio.NewScanner(out)
	read := func(word string) string {
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(lines.Text(), word+" "); ok {
				return rest
			}
		}
		b.Fatalf("the server ended before it said %q", word)
		return ""
	}
	addr := read("serving")
	used := func() int64 {
		if _, err := fmt.Fprintln(in); err != nil {
			b.Fatal(err)
		}
		n, err := strconv.ParseInt(read("used"), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		return n
	}
	conns := make([]sidecarpb.SidecarCoordinatorClient, 1000)
	for i := range conns {
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		conns[i] = sidecarpb.NewSidecarCoordinatorClient(conn)
	}
	beats := func(n int) {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				for {
					i := int(next.Add(1)) - 1
					if i >= n {
						return
					}
					id := i % 10_000
					_, err := conns[i%len(conns)].Heartbeat(context.Background(), &sidecarpb.SidecarHeartbeatRequest{
						SidecarId:     fmt.Sprintf("namespace-%02d/sidecar-%06d", id%100, id),
						ServiceHealth: []*sidecarpb.LocalServiceHealth{{ServiceName: "clean", Healthy: true}},
					})
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	beats(len(conns)) // connects
	b.ResetTimer()
	before := used()
	beats(b.N)
	b.ReportMetric(float64(used()-before)/float64(b.N), "server-cpu-ns/op")
}

func processorTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkBeatBatch measures what one heartbeat costs on its way from the
// follower that received it into the leader's hands, gRPC and the leases aside:
// gathered, encoded, decoded, looked up. "numbers" is the same with ids replaced
// by numbers that both ends agreed on, for comparison.
func BenchmarkBeatBatch(b *testing.B) {
	const fleet, batch = 33_000, 660 // a third of 100,000, gathered for 200 ms
	ids := make([]string, fleet)
	known := make(map[string]*int, fleet)
	numbers := make(map[string]uint32, fleet)
	table := make([]*int, fleet)
	for i := range ids {
		ids[i] = fmt.Sprintf("namespace-%02d/sidecar-%06d", i%100, i)
		table[i] = new(int)
		known[ids[i]], numbers[ids[i]] = table[i], uint32(i)
	}
	codec := NewCodec()
	set := newBeatSet()
	gather := func(from int) beatBatch {
		for i := range batch {
			set.add(ids[(from+i)%fleet], "")
		}
		out := beatBatch{sidecars: make([]string, 0, batch)}
		for id := range set.sidecars {
			out.sidecars = append(out.sidecars, id)
		}
		set.clear()
		return out
	}
	b.Run("ids", func(b *testing.B) {
		var in commandsIn
		b.ReportAllocs()
		for n := 0; n < b.N; n += batch {
			data, err := codec.Marshal(&commandsOut{beats: gather(n)})
			if err != nil {
				b.Fatal(err)
			}
			if err := codec.Unmarshal(data, &in); err != nil {
				b.Fatal(err)
			}
			data.Free()
			for _, id := range in.sidecars {
				*known[string(id)]++
			}
		}
	})
	b.Run("numbers", func(b *testing.B) {
		var buf []byte
		b.ReportAllocs()
		for n := 0; n < b.N; n += batch {
			buf = buf[:0]
			for _, id := range gather(n).sidecars {
				buf = protowire.AppendVarint(buf, uint64(numbers[id]))
			}
			for data := buf; len(data) > 0; {
				i, size := protowire.ConsumeVarint(data)
				data = data[size:]
				*table[i]++
			}
		}
	})
}
