package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// ServerNode is what the public server needs of a raft node.
type ServerNode interface {
	ReadNode
	Status() raftnode.Status
	Leadership() raftnode.Leadership
	TransferLeader(ctx context.Context, to uint64) error
	ChangeMembership(ctx context.Context, c raftnode.Change) (raftnode.Position, error)
}

// BeatSink takes the heartbeats this node receives; they never become
// commands. *Beats is one.
type BeatSink interface {
	// Touch notes that a sidecar, a service, or both were heard of. It does
	// not block.
	Touch(sidecarID, serviceID string)
	// TouchSidecars is Touch for several sidecars. It does not keep ids.
	TouchSidecars(ids []string)
}

var _ BeatSink = (*Beats)(nil)

// ServerConfig is what a Server is made of. EnsureDefaults fills the optional
// fields, Validate reports every missing one.
type ServerConfig struct {
	// Node is the raft node of this process.
	Node ServerNode
	// State is the state that Node applies to.
	State *router.FSM
	// Submitter takes every command, whichever node leads.
	Submitter Submitter
	// Beats takes heartbeats.
	Beats BeatSink
	// Recovery keeps and restores snapshots; optional: without it the calls that
	// need it are refused.
	Recovery *recovery.Recovery

	NodeID      uint64
	ClusterID   uint64
	ClusterName string
	// Version is the version of this program.
	Version string
	// ClientAddr returns where the node with this id serves clients, "" when
	// that is not known (yet). It must not block.
	ClientAddr func(node uint64) string
	// StateBytes is the size of the state on disk; optional.
	StateBytes func() uint64
	// Preflight asks another node what it is, and whether it reaches others;
	// optional: without it members cannot be replaced.
	Preflight func(ctx context.Context, node uint64, reach []raftnode.Member) (*peerpb.PreflightResponse, error)
	// Reachable says whether this node has a connection to another one; optional.
	Reachable func(node uint64) bool
	// Alarms returns conditions an operator should act on; optional.
	Alarms func() []string
	// Metrics returns further numbers for GetMetrics; optional.
	Metrics func() map[string]float64

	// StoredMembers returns the members as they are replicated, where Node.Status
	// may show addresses that only this node was given; optional.
	StoredMembers func() []raftnode.Member
	// Gate refuses reads while the state of this node is in doubt; optional.
	Gate *StateGate
	// CheckState compares the members while this node leads, and fails with a
	// *raftnode.NotLeaderError or ErrNoLeader while it does not; optional.
	CheckState func(ctx context.Context, full bool) (*clusterpb.CheckStateResponse, error)

	// Placement answers questions about where stages run; optional: without it the
	// calls that need it are refused, and why a stage waits is judged by who offers
	// its service.
	Placement PlacementStudy
	// PipelineQuality says how good the place of a pipeline of a view is, false when
	// there is none of that id; optional, like Moved.
	PipelineQuality func(v *router.View, pipeline string) (placement.Quality, bool, error)
	// Moved returns the quality after the newest plan that moved any of a pipeline
	// and the revision it was planned from, false when this node has made none since
	// it leads. Without a pipeline it is about all of them; with one only the counts of
	// moves are filled in.
	Moved func(pipeline string) (q placement.Quality, revision uint64, ok bool)

	// Planned returns the revision of a state about which everything is decided and
	// recorded, while this node leads; it must not block. Optional.
	Planned func() uint64
	// PlannedChanged returns a channel that is closed when Planned changes next.
	// Optional: without it RegisterSidecar waits for assignments alone.
	PlannedChanged func() <-chan struct{}

	// Held returns what placement holds back of a pipeline, or of all when that is empty,
	// by id, while this node leads; HeldExpiries how many sidecars would be expired if not
	// too many had fallen silent at once, until when they are not, and by when the last of
	// them is. Neither may block; both are optional.
	Held         func(pipeline string) []HeldPipeline
	HeldExpiries func() (n int, until, last time.Time)

	// Waiting returns what placement waits for while this node leads; it must not
	// block. Optional.
	Waiting func() (heldMoves, handovers, draining int)

	// HandoverTimeout is how long a pipeline that is made again under the id of a
	// deleted one waits for those who ran its entry stages.
	HandoverTimeout time.Duration
	// SidecarTTL is the silence after which a sidecar's stages move elsewhere;
	// it is told to sidecars, the liveness loop enforces it.
	SidecarTTL time.Duration
	// SuspectAfter is the silence after which a sidecar is suspect. Optional: without it
	// it is not said when one that is counts as gone.
	SuspectAfter time.Duration
	// HeartbeatInterval is how often sidecars are asked to beat.
	HeartbeatInterval time.Duration
	// ServiceTTL is the lease of a registered service that names no interval
	// of its own.
	ServiceTTL time.Duration

	// CallTimeout bounds a unary call whose client set no deadline: existing
	// clients never set one, and would wait for ever.
	CallTimeout time.Duration
	// LongCallTimeout is the same for calls that answer when something long, such
	// as a restore, has ended. What they began goes on when it has passed.
	LongCallTimeout time.Duration
	// PlacementWait bounds how long RegisterSidecar waits for the placement of
	// the sidecar it has just registered. It answers as soon as that has looked at it.
	PlacementWait time.Duration
	// FullSetEvery is how often a sidecar is told everything again.
	FullSetEvery time.Duration
	// SyncEvery is how often an idle watch is sent the revision to resume from.
	SyncEvery time.Duration
	// LeaderGrace is how long health stays SERVING without a leader; an
	// election is shorter.
	LeaderGrace time.Duration
	// TransferIdle is how long the client of an upload or download may stand
	// still before the transfer is ended.
	TransferIdle time.Duration
	// DrainTimeout bounds how long Shutdown waits for calls in progress.
	DrainTimeout time.Duration

	// StreamWorkers is the number of goroutines kept for calls; as many as
	// calls are expected at a time.
	StreamWorkers uint32
	// MaxStreamsPerConn bounds the calls in progress of one connection; more
	// wait on the client's side.
	MaxStreamsPerConn uint32
	// MaxWatches bounds the open watches of this node.
	MaxWatches int64
	// MaxTold bounds the sidecars whose last-told assignments are remembered;
	// a forgotten one is told everything with its next heartbeat.
	MaxTold int
	// MaxInflightBatches and MaxInflightBytes bound what one Commit stream has
	// in flight; beyond it the stream is not read.
	MaxInflightBatches int
	MaxInflightBytes   int

	// Now is the clock commands are stamped with.
	Now    func() time.Time
	Logger *slog.Logger
}

// EnsureDefaults fills every optional field that is zero.
func (c *ServerConfig) EnsureDefaults() {
	setDefault(&c.HandoverTimeout, 45*time.Second)
	setDefault(&c.SidecarTTL, 30*time.Second)
	setDefault(&c.HeartbeatInterval, 10*time.Second)
	setDefault(&c.ServiceTTL, 30*time.Second)
	setDefault(&c.CallTimeout, 5*time.Second)
	setDefault(&c.LongCallTimeout, time.Hour)
	setDefault(&c.PlacementWait, time.Second)
	setDefault(&c.FullSetEvery, 5*time.Minute)
	setDefault(&c.SyncEvery, time.Minute)
	setDefault(&c.LeaderGrace, 3*time.Second)
	setDefault(&c.TransferIdle, time.Minute)
	setDefault(&c.DrainTimeout, 5*time.Second)
	setDefault(&c.StreamWorkers, 1024)
	setDefault(&c.MaxStreamsPerConn, 4096)
	setDefault(&c.MaxWatches, 200_000)
	setDefault(&c.MaxTold, 500_000)
	setDefault(&c.MaxInflightBatches, 1024)
	setDefault(&c.MaxInflightBytes, 8<<20)
	setDefault(&c.Version, "dev")
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.ClientAddr == nil {
		c.ClientAddr = func(uint64) string { return "" }
	}
	if c.StateBytes == nil {
		c.StateBytes = func() uint64 { return 0 }
	}
	if c.Reachable == nil {
		c.Reachable = func(uint64) bool { return false }
	}
	if c.Waiting == nil {
		c.Waiting = func() (int, int, int) { return 0, 0, 0 }
	}
	if c.Moved == nil {
		c.Moved = func(string) (placement.Quality, uint64, bool) { return placement.Quality{}, 0, false }
	}
	if c.Alarms == nil {
		c.Alarms = func() []string { return nil }
	}
	if c.Metrics == nil {
		c.Metrics = func() map[string]float64 { return nil }
	}
}

// Validate reports every fault at once.
func (c *ServerConfig) Validate() error {
	var faults []string
	need := func(ok bool, what string) {
		if !ok {
			faults = append(faults, what)
		}
	}
	need(c.Node != nil, "Node is missing")
	need(c.State != nil, "State is missing")
	need(c.Submitter != nil, "Submitter is missing")
	need(c.Beats != nil, "Beats is missing")
	need(c.NodeID != 0, "NodeID is zero")
	need(c.SidecarTTL > c.HeartbeatInterval, "SidecarTTL must exceed HeartbeatInterval")
	need(c.MaxInflightBatches > 0 && c.MaxInflightBytes >= MaxBatchBytes,
		fmt.Sprintf("MaxInflightBatches must be positive and MaxInflightBytes at least %d", MaxBatchBytes))
	if len(faults) == 0 {
		return nil
	}
	return errors.New("rpc: server configuration: " + strings.Join(faults, "; "))
}

// Flow-control windows for what a client sends. Fixed for the reason given at
// peerStreamWindow. The one of a stream bounds what a stream that is not read
// makes a node keep; the one of a connection bounds what is on its way only, for
// gRPC opens it again on receipt. 256 KiB are 25 MB/s over 10 ms; gRPC's own
// measuring would let each stream grow to 16 MiB.
const (
	clientStreamWindow = 256 << 10
	clientConnWindow   = 2 << 20
)

// clientReadBuffer is what each connection keeps for reading; what is larger is
// read past it. gRPC's own 32 KiB are 3 GB for 100,000 sidecars with a connection
// each. The buffer for writing needs no care: a connection has one only while it
// writes.
const clientReadBuffer = 4 << 10

// Server serves the public API of one node. Its methods are safe for concurrent
// use.
type Server struct {
	cfg    ServerConfig
	log    *slog.Logger
	reader *Reader
	grpc   *grpc.Server
	health *healthReporter
	feed   *feed
	told   *toldSidecars
	// handovers reports what sidecars have let go of.
	handovers *handovers
	unheard   *unheard
	rivals    rivals
	push      *pusher
	relay     *leaderRelay
	idle      idle
	// steering is held by whoever looks at the membership to change it.
	steering chan struct{}
	// plannedAsks is held by whoever asks the leader how far the placement is.
	plannedAsks chan struct{}

	calls    sync.Pool                   // of *commitCall
	streams  atomic.Pointer[openStreams] // those that may be open now
	watches  atomic.Int64
	streamed atomic.Int64  // sidecars that beat on streams
	commits  atomic.Uint64 // operations committed over Commit streams
	panics   atomic.Uint64
	run      context.Context // ends when Shutdown is called
	stop     context.CancelFunc
	loops    sync.WaitGroup
	shutdown sync.Once
}

// NewServer returns a server with every service registered. It starts the
// goroutines that follow the state; Shutdown ends them, also when Serve was
// never called.
func NewServer(cfg ServerConfig) (*Server, error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg:       cfg,
		log:       cfg.Logger,
		reader:    NewReader(cfg.Node, cfg.ClusterID, cfg.CallTimeout).WithEpochs(cfg.State),
		feed:      newFeed(cfg.State, cfg.Logger),
		handovers: newHandovers(),
		unheard:   newUnheard(),
		told:      newToldSidecars(cfg.MaxTold, cfg.FullSetEvery, 3*cfg.HeartbeatInterval),
		push:      newPusher(cfg.State),
		relay:     newLeaderRelay(cfg),
		idle:      idle{after: cfg.TransferIdle, timer: realTimer},

		steering:    make(chan struct{}, 1),
		plannedAsks: make(chan struct{}, maxPlannedAsks),
	}
	s.told.now = cfg.Now
	s.reader.gate = cfg.Gate
	s.run, s.stop = context.WithCancel(context.Background())
	s.streams.Store(newOpenStreams(s.run))
	s.grpc = grpc.NewServer(
		grpc.ForceServerCodecV2(NewCodec()),
		grpc.NumStreamWorkers(cfg.StreamWorkers),
		grpc.MaxConcurrentStreams(cfg.MaxStreamsPerConn),
		grpc.MaxRecvMsgSize(MaxRequestBytes),
		grpc.WaitForHandlers(true),
		grpc.StaticStreamWindowSize(clientStreamWindow),
		grpc.StaticConnWindowSize(clientConnWindow),
		grpc.ReadBufferSize(clientReadBuffer),
		serveBuffers(),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		// Finds watchers whose machine vanished without closing the connection.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	s.health = newHealthReporter(cfg.Node, cfg.LeaderGrace, cfg.Gate)
	if err := s.register(); err != nil {
		s.stop()
		return nil, err
	}
	s.feed.onAssignment = s.told.changed
	s.feed.onHandover, s.feed.onLoad = s.handoverChanged, s.loadHandovers
	s.feed.onSidecar = s.told.forget
	s.feed.onExpired = s.told.expired
	s.feed.onReplaced = s.rivals.replaced
	s.feed.onReset = s.told.reset
	revision, err := s.feed.load()
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("rpc: read the state: %w", err)
	}
	s.loops.Go(s.followGate)
	s.push.start(s.run, &s.loops)
	s.loops.Go(func() { s.judgeClaims(s.run) })
	s.loops.Go(func() { s.handovers.report(s.run, cfg.Submitter, cfg.Now, s.log) })
	s.loops.Add(2)
	go func() { defer s.loops.Done(); s.feed.follow(s.run, revision) }()
	go func() { defer s.loops.Done(); s.health.follow(s.run) }()
	return s, nil
}

// register puts every service on the server under both package names.
func (s *Server) register() error {
	services := []service{
		{&sidecarpb.SidecarCoordinator_ServiceDesc, &sidecarAPI{Server: s}},
		{&registrypb.ServiceRegistry_ServiceDesc, &registryAPI{Server: s}},
		{&adminpb.RouterAdmin_ServiceDesc, &adminAPI{Server: s}},
		{&checkpointpb.CheckpointService_ServiceDesc, &checkpointAPI{Server: s}},
		{&clusterpb.Commits_ServiceDesc, &commitsAPI{Server: s}},
		{&clusterpb.Cluster_ServiceDesc, &clusterAPI{Server: s}},
		{&backuppb.BackupService_ServiceDesc, &backupAPI{Server: s}},
	}
	return registerAll(s.grpc, s.health, services)
}

// Serve accepts connections on lis until Shutdown; it returns nil then. Several
// listeners may be served at once.
func (s *Server) Serve(lis net.Listener) error {
	if err := s.grpc.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("rpc: serve %s: %w", lis.Addr(), err)
	}
	return nil
}

// Shutdown stops the server: health says NOT_SERVING, open streams are ended
// with UNAVAILABLE once their answers are out, calls in progress may finish
// until ctx is done or the drain timeout has passed, then connections are
// closed. It blocks until every handler has returned.
func (s *Server) Shutdown(ctx context.Context) {
	s.shutdown.Do(func() {
		s.health.stop()
		s.stop()
		ctx, cancel := context.WithTimeout(ctx, s.cfg.DrainTimeout)
		defer cancel()
		done := make(chan struct{})
		go func() { s.grpc.GracefulStop(); close(done) }()
		select {
		case <-done:
		case <-ctx.Done():
			s.grpc.Stop()
			<-done
		}
		s.loops.Wait()
		s.relay.close()
	})
}

// requestID returns the request id of a mutation, "" when the caller gave none.
func requestID(ctx context.Context) (string, error) {
	vals := metadata.ValueFromIncomingContext(ctx, MetadataRequestID)
	switch len(vals) {
	case 0:
		return "", nil
	case 1:
		return vals[0], checkRequestID(vals[0])
	}
	return "", invalid(MetadataRequestID, "given %d times, give it once", len(vals))
}

// submit stamps cmd with the time and the caller's request id, replicates it
// and puts the revision into the reply's headers. The epoch the caller names
// fences it, unless cmd has one already. A refusal of the state machine is in the
// result, except one because of the epoch, which is the error.
func (s *Server) submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error) {
	id, err := requestID(ctx)
	if err != nil {
		return nil, err
	}
	if cmd.ExpectedEpoch == nil {
		if cmd.ExpectedEpoch, err = requestEpoch(ctx); err != nil {
			return nil, err
		}
	}
	cmd.RequestId = id
	cmd.TimeMs = uint64(s.cfg.Now().UnixMilli())
	res, err := s.cfg.Submitter.Submit(ctx, cmd)
	if err != nil {
		return nil, err
	}
	s.reader.SetHeader(ctx, res.GetRevision(), res.GetEpoch())
	if res.GetRejection().GetCode() == commandpb.Code_CODE_EPOCH {
		// Not in a reply, where it would be one refusal of many: everything the
		// caller knows is of another state.
		return nil, &EpochError{Known: cmd.GetExpectedEpoch(), Current: res.GetEpoch(), Revision: res.GetRevision()}
	}
	return res, nil
}

// view returns a view of one revision at the consistency the request asks for.
// The caller closes it.
func (s *Server) view(ctx context.Context) (*router.View, error) {
	if err := s.reader.Wait(ctx); err != nil {
		return nil, err
	}
	v := s.cfg.State.View()
	s.reader.SetHeader(ctx, v.Revision(), v.Epoch())
	return v, nil
}

// latest is view for reading a single record: it takes no snapshot of the state.
func (s *Server) latest(ctx context.Context) (*router.View, error) {
	if err := s.reader.Wait(ctx); err != nil {
		return nil, err
	}
	v := s.cfg.State.Latest()
	s.reader.SetHeader(ctx, v.Revision(), v.Epoch())
	return v, nil
}

// errStoppingStream ends a stream because the node is about to stop.
func errStoppingStream() error {
	return fmt.Errorf("%w: this stream ends; connect to another node and resume", raftnode.ErrStopping)
}

// openWatch counts a watch in; the caller calls the returned function at its
// end.
func (s *Server) openWatch() (func(), error) {
	if s.watches.Add(1) > s.cfg.MaxWatches {
		s.watches.Add(-1)
		return nil, retryAfter{
			fmt.Errorf("%w: this node already serves %d watches; connect to another node", raftnode.ErrBusy, s.cfg.MaxWatches),
			reconnectAfter(s.cfg.MaxWatches),
		}
	}
	return func() { s.watches.Add(-1) }, nil
}
