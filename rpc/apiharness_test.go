package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// oneNode is a group of one node without a log: a submitted command is encoded,
// applied to a real state machine and answered.
type oneNode struct {
	fs  vfs.FS
	fsm *router.FSM
	id  uint64

	mu      sync.Mutex
	index   uint64
	leader  uint64
	down    error // every submission and read index fails with this
	changed chan struct{}
	held    []func() // submissions held back, while hold is set
	hold    bool
	entries int
	applied chan struct{} // closed at the next applied entry
	readers int           // read indexes served
	behind  uint64        // entries that are decided and not applied here
	peers   []raftnode.PeerStatus
	members []raftnode.Member
	voters  []uint64
	moved   []uint64
}

func newOneNode(t testing.TB) *oneNode {
	t.Helper()
	fs := vfs.NewMem()
	fsm, err := router.Open(fs, "state", router.Options{Bootstrap: router.Position{Index: 1, Term: 1}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fsm.Close(); err != nil {
			t.Error(err)
		}
	})
	return &oneNode{
		fs: fs, fsm: fsm, id: 1, index: 1, leader: 1, changed: make(chan struct{}), applied: make(chan struct{}),
		members: []raftnode.Member{{ID: 1, Addr: "n1:50052"}},
	}
}

func (n *oneNode) SubmitFunc(cmd *commandpb.Command, done func(*commandpb.Result, uint64, error)) {
	n.mu.Lock()
	if n.hold {
		n.held = append(n.held, func() { n.SubmitFunc(cmd, done) })
		n.mu.Unlock()
		return
	}
	if n.down != nil {
		err := n.down
		n.mu.Unlock()
		done(nil, 0, err)
		return
	}
	res, err := n.applyLocked(cmd)
	index := n.index
	n.mu.Unlock()
	done(res, index, err)
}

func (n *oneNode) applyLocked(cmd *commandpb.Command) (*commandpb.Result, error) {
	b, err := cmd.MarshalVT()
	if err != nil {
		return nil, err
	}
	n.index++
	n.entries++
	res, err := n.fsm.Apply([]router.Entry{{Index: n.index, Term: 1, Commands: [][]byte{b}, Local: true}})
	close(n.applied)
	n.applied = make(chan struct{})
	if err != nil {
		return nil, err
	}
	return res[0][0], nil
}

func (n *oneNode) Submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	type outcome struct {
		res *commandpb.Result
		err error
	}
	ch := make(chan outcome, 1)
	n.SubmitFunc(cmd, func(res *commandpb.Result, _ uint64, err error) { ch <- outcome{res, err} })
	select {
	case o := <-ch:
		return o.res, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// must applies a command that has to be accepted.
func (n *oneNode) must(t *testing.T, cmd *commandpb.Command) *commandpb.Result {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	cmd.TimeMs = uint64(time.Now().UnixMilli())
	res, err := n.applyLocked(cmd)
	if err != nil {
		t.Fatal(err)
	}
	if res.Rejection != nil {
		t.Fatalf("refused: %v", res.Rejection)
	}
	return res
}

func (n *oneNode) holdAll() {
	n.mu.Lock()
	n.hold = true
	n.mu.Unlock()
}

func (n *oneNode) release() {
	n.mu.Lock()
	held := n.held
	n.hold, n.held = false, nil
	n.mu.Unlock()
	for _, f := range held {
		f()
	}
}

func (n *oneNode) heldCount() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.held)
}

func (n *oneNode) entryCount() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.entries
}

func (n *oneNode) readCount() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.readers
}

func (n *oneNode) setLeader(id uint64, down error) {
	n.mu.Lock()
	n.leader, n.down = id, down
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
}

// ReadIndex returns, as that of a raft node, once what it returns is applied.
func (n *oneNode) ReadIndex(ctx context.Context) (uint64, error) {
	n.mu.Lock()
	n.readers++
	index, down := n.index+n.behind, n.down
	n.mu.Unlock()
	if down != nil {
		return 0, down
	}
	if err := n.WaitApplied(ctx, index); err != nil {
		return 0, err
	}
	return index, ctx.Err()
}

func (n *oneNode) ReadIndexUntil(ctx context.Context, up <-chan time.Time) (uint64, error) {
	return readUntil(ctx, up, n.ReadIndex)
}

func (n *oneNode) WaitApplied(ctx context.Context, index uint64) error {
	for {
		n.mu.Lock()
		reached, applied := n.index >= index, n.applied
		n.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-applied:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (n *oneNode) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

func (n *oneNode) Leadership() raftnode.Leadership {
	n.mu.Lock()
	defer n.mu.Unlock()
	return raftnode.Leadership{Leader: n.leader, Term: 1, Leading: n.leader == n.id}
}

func (n *oneNode) Status() raftnode.Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	return raftnode.Status{
		ID: n.id, Term: 1, Leader: n.leader, Commit: n.index, Applied: n.index, LastIndex: n.index, Role: raftnode.RoleLeader,
		Position: raftnode.Position{ConfState: &raftpb.ConfState{Voters: n.voters}, Members: n.members},
		Peers:    n.peers,
	}
}

func (n *oneNode) ChangeMembership(_ context.Context, c raftnode.Change) (raftnode.Position, error) {
	return raftnode.Position{}, fmt.Errorf("%w: %v node %d", raftnode.ErrMembershipRefused, c.Kind, c.ID)
}

func (n *oneNode) TransferLeader(_ context.Context, to uint64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.leader != n.id {
		return &raftnode.NotLeaderError{Leader: n.leader, Term: 1}
	}
	n.moved = append(n.moved, to)
	if to != 0 {
		n.leader = to
	}
	return nil
}

// beatLog records heartbeats.
type beatLog struct {
	mu    sync.Mutex
	beats [][2]string
}

func (b *beatLog) Touch(sidecar, service string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.beats = append(b.beats, [2]string{sidecar, service})
}

func (b *beatLog) TouchSidecars(ids []string) {
	for _, id := range ids {
		b.Touch(id, "")
	}
}

func (b *beatLog) count(sidecar, service string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, x := range b.beats {
		if x == [2]string{sidecar, service} {
			n++
		}
	}
	return n
}

// fakeClock is the server's clock of a test.
type fakeClock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.mu.Unlock()
}

// api is one served node and the clients of all its services.
type api struct {
	*Server
	t     *testing.T
	node  *oneNode
	beats *beatLog
	clock *fakeClock
	conn  *grpc.ClientConn

	sidecar    sidecarpb.SidecarCoordinatorClient
	registry   registrypb.ServiceRegistryClient
	admin      adminpb.RouterAdminClient
	checkpoint checkpointpb.CheckpointServiceClient
	commits    clusterpb.CommitsClient
	cluster    clusterpb.ClusterClient
}

func newAPI(t *testing.T, change ...func(*ServerConfig)) *api {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	node := newOneNode(t)
	return serveAPI(t, node, change...)
}

func serveAPI(t *testing.T, node *oneNode, change ...func(*ServerConfig)) *api {
	t.Helper()
	a := &api{t: t, node: node, beats: &beatLog{}, clock: &fakeClock{now: time.UnixMilli(1_800_000_000_000)}}
	cfg := ServerConfig{
		Node: node, State: node.fsm, Submitter: node, Beats: a.beats,
		NodeID: 1, ClusterID: 0xc0ffee, ClusterName: "test", Version: "1.2.3",
		PlacementWait: 10 * time.Second, // a test that waits this long fails otherwise
		DrainTimeout:  10 * time.Second,
		StreamWorkers: 8,
		Now:           a.clock.Now,
	}
	for _, f := range change {
		f(&cfg)
	}
	srv, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	lis := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	conn, err := grpc.NewClient("passthrough:///node",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// Fixed: what a client that does not read makes a node wait at is the same
		// in every run.
		grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(256<<10))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		node.release()
		conn.Close()
		srv.Shutdown(context.Background())
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	a.Server, a.conn = srv, conn
	a.sidecar = sidecarpb.NewSidecarCoordinatorClient(conn)
	a.registry = registrypb.NewServiceRegistryClient(conn)
	a.admin = adminpb.NewRouterAdminClient(conn)
	a.checkpoint = checkpointpb.NewCheckpointServiceClient(conn)
	a.commits = clusterpb.NewCommitsClient(conn)
	a.cluster = clusterpb.NewClusterClient(conn)
	return a
}

// ctx is a context that keeps a hanging test from hanging for ever.
func (a *api) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	a.t.Cleanup(cancel)
	return ctx
}

// with adds metadata to a call.
func (a *api) with(kv ...string) context.Context {
	return metadata.AppendToOutgoingContext(a.ctx(), kv...)
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("code %v, want %v: %v", got, want, err)
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(20 * time.Second)
	defer limit.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("never happened: %s", what)
		}
	}
}

// chain is a valid pipeline source -> transform... -> sink; each stage is named
// as the operator does, and selects the service of the same name.
func chain(id string, services ...string) *adminpb.PipelineConfig {
	cfg := &adminpb.PipelineConfig{Id: id, Name: id, Enabled: true}
	for i, name := range services {
		st := &adminpb.Stage{
			Id: name + "-stage", Name: name, StageType: adminpb.StageType_STAGE_TYPE_TRANSFORM, Parallelism: 1,
			ServiceSelector: &adminpb.ServiceSelector{
				ServiceName: name, LoadBalance: adminpb.LoadBalanceStrategy_LOAD_BALANCE_ROUND_ROBIN,
			},
		}
		switch i {
		case 0:
			st.StageType = adminpb.StageType_STAGE_TYPE_SOURCE
		case len(services) - 1:
			st.StageType = adminpb.StageType_STAGE_TYPE_SINK
		}
		cfg.Stages = append(cfg.Stages, st)
		if i > 0 {
			cfg.Edges = append(cfg.Edges, &adminpb.Edge{FromStage: services[i-1] + "-stage", ToStage: name + "-stage"})
		}
	}
	return cfg
}

// assign records an assignment of all stages of a pipeline to one sidecar, as
// the placement loop would.
func (a *api) assign(sidecar, pipeline string) *commandpb.Result {
	a.t.Helper()
	return a.node.must(a.t, a.assignment(sidecar, pipeline, false))
}

func (a *api) revoke(sidecar, pipeline string) *commandpb.Result {
	a.t.Helper()
	return a.node.must(a.t, a.assignment(sidecar, pipeline, true))
}

func (a *api) assignment(sidecar, pipeline string, revoke bool) *commandpb.Command {
	a.t.Helper()
	return assignmentOf(a.t, a.node.fsm, sidecar, pipeline, revoke)
}

func assignmentOf(t *testing.T, fsm *router.FSM, sidecar, pipeline string, revoke bool) *commandpb.Command {
	t.Helper()
	v := fsm.View()
	defer v.Close()
	sc, err := v.Sidecar(sidecar)
	noError(t, err)
	p, err := v.Pipeline(pipeline)
	noError(t, err)
	if sc == nil || (p == nil && !revoke) {
		t.Fatal(errors.New("no such sidecar or pipeline"))
	}
	ch := &commandpb.AssignmentChange{
		SidecarId: sidecar, PipelineId: pipeline, SidecarGeneration: sc.Generation,
		PipelineVersion: p.GetVersion(), Revoke: revoke,
	}
	if !revoke {
		ch.LocalComplete = true
		for _, st := range p.Spec.Stages {
			ch.Stages = append(ch.Stages, &commandpb.StageAssignment{StageId: st.Id, LocalEndpoint: "127.0.0.1:9000"})
		}
	}
	return &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{
		ApplyAssignments: &commandpb.ApplyAssignments{Changes: []*commandpb.AssignmentChange{ch}},
	}}
}
