package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/bench"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
)

// etcdSystem is etcd with its defaults, or with the router's timing.
type etcdSystem struct {
	base  int
	tuned bool
}

func newEtcd(o *options, tuned bool) *etcdSystem {
	s := &etcdSystem{base: o.basePort, tuned: tuned}
	if tuned {
		s.base += 40
	}
	return s
}

func (s *etcdSystem) name() string {
	if s.tuned {
		return "etcd 50/300"
	}
	return "etcd"
}

func (s *etcdSystem) endpoint(_ *options, i int) string {
	return fmt.Sprintf("127.0.0.1:%d", s.base+i+1)
}

func (s *etcdSystem) peer(i int) string { return fmt.Sprintf("http://127.0.0.1:%d", s.base+10+i) }

// initial lists the members a cluster begins with.
func (s *etcdSystem) initial() []string {
	var out []string
	for i := range members {
		out = append(out, fmt.Sprintf("m%d=%s", i+1, s.peer(i)))
	}
	return out
}

func (s *etcdSystem) command(o *options, dir string, i int) *exec.Cmd {
	initial := s.initial()
	state := "new"
	if i == joiner {
		initial, state = append(initial, fmt.Sprintf("m%d=%s", i+1, s.peer(i))), "existing"
	}
	client := "http://" + s.endpoint(o, i)
	args := []string{
		"--name", fmt.Sprintf("m%d", i+1), "--data-dir", dir,
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", s.peer(i), "--initial-advertise-peer-urls", s.peer(i),
		"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-state", state, "--initial-cluster-token", "bench",
		"--log-level", "warn", "--quota-backend-bytes", "8589934592",
	}
	if s.tuned {
		args = append(args, "--heartbeat-interval", "50", "--election-timeout", "300")
	}
	return exec.Command(o.etcd, args...)
}

func (s *etcdSystem) leader(ctx context.Context, c *cluster) (int, error) {
	return findLeader(ctx, c, func(ctx context.Context, conn *grpc.ClientConn) (bool, error) {
		st, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
		return err == nil && st.GetLeader() != 0 && st.GetLeader() == st.GetHeader().GetMemberId(), err
	})
}

func (s *etcdSystem) put(ctx context.Context, conn grpc.ClientConnInterface, key string, value []byte) error {
	_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: value})
	return err
}

func (s *etcdSystem) get(ctx context.Context, conn grpc.ClientConnInterface, key string) error {
	_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	return err
}

func (s *etcdSystem) streams() bool { return false }

// fill puts every key once, in transactions of 64: etcd's way to put many.
func (s *etcdSystem) fill(ctx context.Context, c *cluster, keys int) error {
	const clients, batch = 16, 64
	leader, err := s.leader(ctx, c)
	if err != nil {
		return err
	}
	conns, closeAll, err := bench.Dial([]string{s.endpoint(c.o, leader)}, 4)
	if err != nil {
		return err
	}
	defer closeAll()
	var next atomic.Int64
	errs := make(chan error, clients)
	for i := range clients {
		kv, rng := pb.NewKVClient(conns[i%len(conns)]), newValues(i)
		go func() {
			for {
				from := int(next.Add(batch)) - batch
				if from >= keys {
					errs <- nil
					return
				}
				txn := &pb.TxnRequest{}
				for k := from; k < min(keys, from+batch); k++ {
					txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
						RequestPut: &pb.PutRequest{Key: []byte(bench.Key(k)), Value: rng.value()},
					}})
				}
				if _, err := kv.Txn(ctx, txn); err != nil {
					errs <- fmt.Errorf("fill: %w", err)
					return
				}
			}
		}()
	}
	var failed error
	for range clients {
		failed = errors.Join(failed, <-errs)
	}
	return failed
}

func (s *etcdSystem) drive(ctx context.Context, c *cluster, leader int, l *load, o *options) (*run1, error) {
	conns, closeAll := bench.DialUnary(l.targets(c, leader), l.conns)
	defer closeAll()
	var calls []bench.Call
	for i := range l.clients {
		kv, rng := pb.NewKVClient(conns[i%len(conns)]), newValues(i)
		calls = append(calls, func(ctx context.Context) (int, error) {
			key := []byte(bench.Key(rng.IntN(o.keys)))
			switch {
			case l.read:
				_, err := kv.Range(ctx, &pb.RangeRequest{Key: key, Serializable: l.stale})
				return 1, err
			case l.txn > 0:
				txn := &pb.TxnRequest{}
				for range l.txn {
					txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
						RequestPut: &pb.PutRequest{Key: []byte(bench.Key(rng.IntN(o.keys))), Value: rng.value()},
					}})
				}
				_, err := kv.Txn(ctx, txn)
				return l.txn, err
			}
			_, err := kv.Put(ctx, &pb.PutRequest{Key: key, Value: rng.value()})
			return 1, err
		})
	}
	return driveCalls(ctx, c, calls, o)
}

// driveCalls measures calls together with what the members use meanwhile.
func driveCalls(ctx context.Context, c *cluster, calls []bench.Call, o *options) (*run1, error) {
	var before, after time.Duration
	var usageErr error
	m, err := bench.Drive(ctx, bench.DriveConfig{
		Callers: calls, Warmup: o.warmup, Duration: o.duration,
		Started: func() { before, _, usageErr = c.usage() },
		Ended: func() {
			var err error
			after, _, err = c.usage()
			usageErr = errors.Join(usageErr, err)
		},
	})
	if err = errors.Join(err, usageErr); err != nil {
		return nil, err
	}
	return &run1{
		Rate: m.Throughput(), P50: bench.Millis(m.Percentile(50)), P95: bench.Millis(m.Percentile(95)),
		P99: bench.Millis(m.Percentile(99)), Max: bench.Millis(m.Max()),
		CPU: float64((after - before).Microseconds()) / float64(max(1, m.Commands)), Errors: m.Errors, LastError: m.LastError,
	}, nil
}

// values draws keys and values for one client.
type values struct {
	*rand.Rand
	fixed []byte
}

func newValues(i int) *values {
	v := &values{Rand: rand.New(rand.NewPCG(1, uint64(i))), fixed: make([]byte, 256)}
	for j := range v.fixed {
		v.fixed[j] = byte(v.Uint32())
	}
	return v
}

// value returns 256 bytes that differ from call to call.
func (v *values) value() []byte {
	out := append([]byte(nil), v.fixed...)
	for i, n := 0, v.Uint64(); i < 8; i++ {
		out[i] = byte(n >> (8 * i))
	}
	return out
}

// routerSystem is this project.
type routerSystem struct{ base int }

func newRouter(o *options) *routerSystem { return &routerSystem{base: o.basePort + 20} }

func (s *routerSystem) name() string { return "router" }

func (s *routerSystem) endpoint(_ *options, i int) string {
	return fmt.Sprintf("127.0.0.1:%d", s.base+i+1)
}

func (s *routerSystem) command(o *options, dir string, i int) *exec.Cmd {
	args := []string{
		"serve", "--cluster-name", "bench", "--node-id", fmt.Sprint(i + 1), "--data-dir", dir,
		"--listen-addr", s.endpoint(o, i), "--raft-addr", s.peer(i), "--log-level", o.logLevel,
	}
	if o.debug {
		args = append(args, "--debug-addr", fmt.Sprintf("127.0.0.1:%d", s.base+15+i))
	}
	if i == joiner {
		return exec.Command(o.router, append(args, "--join", s.endpoint(o, 0))...)
	}
	return exec.Command(o.router, append(args, s.peers()...)...)
}

func (s *routerSystem) peer(i int) string { return fmt.Sprintf("127.0.0.1:%d", s.base+10+i) }

// peers is the list of members as arguments.
func (s *routerSystem) peers() []string {
	var out []string
	for i := range members {
		out = append(out, "--peers", fmt.Sprintf("%d:%s", i+1, s.peer(i)))
	}
	return out
}

func (s *routerSystem) leader(ctx context.Context, c *cluster) (int, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
	return findLeader(ctx, c, func(ctx context.Context, conn *grpc.ClientConn) (bool, error) {
		st, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
		return err == nil && st.GetLeaderId() != 0 && st.GetLeaderId() == st.GetNodeId(), err
	})
}

func (s *routerSystem) put(ctx context.Context, conn grpc.ClientConnInterface, key string, value []byte) error {
	_, err := checkpointpb.NewCheckpointServiceClient(conn).SaveCheckpoint(ctx,
		&checkpointpb.SaveCheckpointRequest{ServiceId: key, CheckpointId: "b", Data: value})
	return err
}

func (s *routerSystem) get(ctx context.Context, conn grpc.ClientConnInterface, key string) error {
	_, err := checkpointpb.NewCheckpointServiceClient(conn).GetCheckpoint(ctx, &checkpointpb.GetCheckpointRequest{ServiceId: key})
	return err
}

func (s *routerSystem) streams() bool { return true }

func (s *routerSystem) fill(ctx context.Context, c *cluster, keys int) error {
	leader, err := s.leader(ctx, c)
	if err != nil {
		return err
	}
	return bench.Fill(ctx, s.endpoint(c.o, leader), keys, 256)
}

func (s *routerSystem) drive(ctx context.Context, c *cluster, leader int, l *load, o *options) (*run1, error) {
	cfg := bench.Config{
		Endpoints: l.targets(c, leader), Clients: l.clients, Conns: l.conns, Keys: o.keys, ValueBytes: 256,
		Warmup: o.warmup, Duration: o.duration, Pids: c.pids(), Seed: 1,
	}
	op := bench.OpCheckpoint
	switch {
	case l.read && l.stale:
		op = bench.OpStale
	case l.read:
		op = bench.OpRead
	case l.offsets:
		op = bench.OpOffset
	}
	cfg.Mix = []bench.Share{{Op: op, Weight: 1}}
	if l.streams > 0 {
		cfg.Streams, cfg.InFlight, cfg.Batch, cfg.Clients = l.streams, l.inFlight, l.batch, l.streams
	}
	r, err := bench.Run(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if r.UnknownCPU != "" {
		return nil, errors.New(r.UnknownCPU)
	}
	return &run1{
		Rate: r.Throughput, P50: r.P50, P95: r.P95, P99: r.P99, Max: r.Max,
		CPU: r.ServersCPU, CPUEach: r.ServerCPU, Errors: r.Errors, LastError: r.LastError,
	}, nil
}

// findLeader asks the members until one says that it leads.
func findLeader(ctx context.Context, c *cluster, leads func(context.Context, *grpc.ClientConn) (bool, error)) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var conns []*grpc.ClientConn
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	for i := range members {
		conn, err := dialFast(c.s.endpoint(c.o, i))
		if err != nil {
			return 0, err
		}
		conns = append(conns, conn)
	}
	for {
		for i, conn := range conns {
			try, done := context.WithTimeout(ctx, time.Second)
			yes, _ := leads(try, conn) // a member that does not answer does not lead
			done()
			if yes {
				return i, nil
			}
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("nobody leads: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
