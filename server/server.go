package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/config"
	"conveyor.etl/router/control"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/snap"
)

// Server is one node. Start and Stop may each be called once; the other methods
// are safe for concurrent use after Start has returned.
type Server struct {
	c     config.Config
	o     Options
	log   *slog.Logger
	known addresses

	disk      *storage
	transport *rpc.PeerTransport
	node      *raftnode.Node
	forwarder *rpc.Forwarder
	beats     *rpc.Beats
	guard     *rpc.DiskGuard
	peers     *grpc.Server
	handler   *rpc.PeerServer
	api       *rpc.Server
	control   *controlLoops
	recovery  *recovery.Recovery
	study     *control.Study
	// imageLimit paces what this node sends to members that lack much.
	imageLimit *snap.RateLimit

	debug *http.Server

	clientLis net.Listener
	peerLis   net.Listener

	// stopNode ends raft; nodeDone is closed when it has ended.
	stopNode context.CancelFunc
	nodeDone chan struct{}
	// stopLoops ends everything that only runs beside raft.
	stopLoops context.CancelFunc
	loops     sync.WaitGroup
	serving   sync.WaitGroup

	// gate is shut when the state is not to be relied on; rebuilds is closed
	// when it has to be rebuilt.
	gate        *rpc.StateGate
	isolated    sync.Once
	quarantined sync.Once
	rebuilds    chan struct{}

	leaving   sync.Once
	rejoining sync.Once

	failOnce sync.Once
	failed   chan struct{}
	failure  error
}

// New returns a node that has touched nothing yet. c must come from config.Load
// or be as complete.
func New(c config.Config, o Options) *Server {
	o.ensureDefaults()
	return &Server{
		c: c, o: o, known: newAddresses(&c),
		log:      o.Logger.With("node", c.NodeID),
		gate:     rpc.NewStateGate(),
		rebuilds: make(chan struct{}),
		failed:   make(chan struct{}),
		nodeDone: make(chan struct{}),
	}
}

// Start opens the data directory and starts the node. It returns once clients
// can connect; whether a leader exists is for the health service to say. A node
// whose state is gone, or known to be wrong, first fetches it from a peer, for as
// long as ctx allows.
// After an error nothing is left running or locked.
func (s *Server) Start(ctx context.Context) error {
	if err := s.start(ctx); err != nil {
		s.abort()
		return err
	}
	s.log.Info("serving", "event", "serving", "clients", s.Addr(), "peers", s.RaftAddr(),
		"cluster", s.disk.id.ClusterName, "cluster_id", fmt.Sprintf("%016x", s.disk.id.ClusterID), "data_dir", s.c.DataDir)
	return nil
}

func (s *Server) start(ctx context.Context) error {
	var err error
	if err := s.join(ctx); err != nil {
		return err
	}
	if s.disk, err = openStorage(&s.c, s.log, s.o.Now); err != nil {
		return err
	}
	commands := &commandsUnderWay{
		written: s.disk.fsm.Written, logBytes: s.disk.log.Bytes, maxLogBytes: maxLogBytes(s.c.Raft.TailBytes), now: time.Now,
	}
	s.imageLimit = newImageLimit(commands.busy)
	// Listening comes early, so that an address in use is noticed before
	// anything else happens; accepting comes when there is something to say.
	if err := s.listen(); err != nil {
		return err
	}
	if err := s.checkMember(); err != nil {
		return err
	}
	self := s.identity(s.disk.id.ClusterID, s.disk.id.DiskID)
	if err := s.askBefore(ctx, self); err != nil {
		return err
	}
	s.transport, err = rpc.NewPeerTransport(rpc.TransportOptions{
		Identity: self, Disks: s.disk.disks, OnRefused: s.refused, Logger: s.log.With("part", "peers"),
		Position: s.disk.machine.Applied, Also: s.alsoAt, Transfers: imageTransfers{s},
		ImageLimit: s.imageLimit,
	})
	if err != nil {
		return err
	}
	if err := s.rebuild(ctx, self.At(s.disk.machine.Applied())); err != nil {
		return err
	}
	if err := s.startNode(ctx, self); err != nil {
		return err
	}
	if err := s.startPeers(); err != nil {
		return err
	}
	s.disk.points.Pass("raft:before")
	s.runNode()
	if err := s.startClients(self); err != nil {
		return err
	}
	return s.startDebug()
}

// startNode puts raft together. A node whose state is older than its log gets
// the state from a peer first: nobody else can rebuild it.
func (s *Server) startNode(ctx context.Context, self rpc.Identity) error {
	transport := &addressedTransport{s.transport, s.known, s.disk.disks, s.log, s.gate}
	for attempt := 0; ; attempt++ {
		var err error
		s.node, err = raftnode.New(s.raftConfig(), s.disk.machine, s.disk.points.Log(s.disk.log), s.disk.recovered, s.disk.images, transport)
		if err == nil {
			break
		}
		if !errors.Is(err, raftnode.ErrStateBehindLog) || attempt > 0 {
			return err
		}
		s.log.Warn("the state on disk is older than the log; fetching it from a peer", "event", "fetch_state", "err", err)
		if err := s.fetchState(ctx, self); err != nil {
			return err
		}
	}
	s.known.compare(raftnode.Live(s.disk.machine.Applied().Members), s.log)
	s.transport.Attach(s.node)
	return nil
}

func (s *Server) fetchState(ctx context.Context, self rpc.Identity) error {
	first, err := s.disk.log.FirstIndex()
	if err != nil {
		return err
	}
	var peers []raftnode.Member
	for _, p := range s.c.Peers {
		peers = append(peers, raftnode.Member{ID: p.ID, Addr: p.Addr})
	}
	id, err := rpc.FetchState(ctx, rpc.FetchOptions{
		Identity: self, Peers: peers, MinIndex: first - 1, Store: s.disk.images, Logger: s.log.With("part", "peers"),
	})
	if err != nil {
		return fmt.Errorf("the state of this node is gone and could not be fetched from a peer: %w", err)
	}
	pos, err := s.disk.machine.Install(s.disk.images.Dir(id))
	if err != nil {
		return fmt.Errorf("install the fetched state: %w", err)
	}
	s.log.Info("the state was fetched from a peer", "event", "state_fetched", "index", pos.Index)
	return nil
}

func (s *Server) raftConfig() raftnode.Config {
	ticks := func(d time.Duration) int { return int((d + s.c.Raft.TickInterval - 1) / s.c.Raft.TickInterval) }
	return raftnode.Config{
		ID:             s.c.NodeID,
		TickInterval:   s.c.Raft.TickInterval,
		ElectionTicks:  ticks(s.c.Raft.ElectionTimeout),
		HeartbeatTicks: ticks(s.c.Raft.HeartbeatInterval),
		MaxSizePerMsg:  s.c.Raft.MaxAppendBytes,
		TailBytes:      s.c.Raft.TailBytes,
		KeepImages:     keepImages,
		Logger:         s.log.With("part", "raft"),
		Events:         s.eventListener(),
	}
}

// startPeers makes what moves commands between nodes, and serves the peers.
func (s *Server) startPeers() error {
	var err error
	s.guard, err = rpc.NewDiskGuard(rpc.DiskGuardOptions{Dir: s.c.DataDir, Logger: s.log})
	if err != nil {
		return err
	}
	s.forwarder, err = rpc.NewForwarder(rpc.ForwarderConfig{
		Node: s.node, Transport: s.transport, Guard: s.guard, Gate: s.gate, Logger: s.log.With("part", "forward"),
	})
	if err != nil {
		return err
	}
	s.control, err = newControlLoops(s)
	if err != nil {
		return err
	}
	if err := s.startRecovery(); err != nil {
		return err
	}
	s.beats = rpc.NewBeats(rpc.BeatsConfig{Node: s.node, Forwarder: s.forwarder, Sink: s.control.liveness.Touch,
		// A batch delays what it carries by little of a heartbeat's interval.
		Interval: min(200*time.Millisecond, s.c.Liveness.HeartbeatInterval/20)})
	maker := &imageMaker{machine: s.disk.machine, images: s.disk.images, applied: s.node.WaitApplied}
	s.handler, err = rpc.NewPeerServer(rpc.PeerServerConfig{
		Node: s.node, Transport: s.transport, Image: maker.image, Guard: s.guard,
		Gate: s.gate, State: s.disk.fsm, Agreed: s.agreed, Suspect: s.suspect,
		Beats: s.control.liveness.TouchAll, Leases: s.takeLeases, Logger: s.log.With("part", "peers"), Transfers: imageTransfers{s},
		ImageLimit: newFetchLimit(),
		Preflight:  rpc.PreflightInfo{Applied: s.node.Applied, FreeBytes: s.guard.FreeBytes, StateBytes: s.stateBytes, Now: s.o.Now},
	})
	if err != nil {
		return err
	}
	s.peers = grpc.NewServer(rpc.PeerServerOptions()...)
	peerpb.RegisterPeerServer(s.peers, s.handler)
	s.serving.Go(func() {
		if err := s.peers.Serve(s.peerLis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			s.fail(fmt.Errorf("serve peers on %s: %w", s.peerLis.Addr(), err))
		}
	})
	return nil
}

// runNode starts raft and what runs beside it.
func (s *Server) runNode() {
	var node, loops context.Context
	node, s.stopNode = context.WithCancel(context.Background())
	loops, s.stopLoops = context.WithCancel(context.Background())
	go func() {
		defer close(s.nodeDone)
		if err := s.node.Run(node); err != nil {
			s.fail(err)
		}
	}()
	s.loops.Go(func() { s.guard.Run(loops) })
	s.loops.Go(func() { s.beats.Run(loops) })
	s.loops.Go(func() { s.recovery.Run(loops) })
	warmer := &warmer{images: s.disk.images, root: s.disk.fsm.Dir(), log: s.log}
	s.loops.Go(func() { warmer.run(loops) })
	early := &earlyFlusher{s.disk.fsm}
	s.loops.Go(func() { early.run(loops) })
	s.loops.Go(func() { s.reportAddress(loops, actual(s.c.AdvertiseRaftAddr, s.peerLis)) })
	s.control.start(loops, &s.loops)
}

func (s *Server) startClients(self rpc.Identity) error {
	var err error
	s.study = newStudy(s)
	s.api, err = rpc.NewServer(rpc.ServerConfig{
		Node: &addressedNode{s.node, s.known}, State: s.disk.fsm, Submitter: s.forwarder, Beats: s.beats,
		NodeID: s.c.NodeID, ClusterID: self.ClusterID, ClusterName: s.disk.id.ClusterName, Version: self.Version,
		StateBytes: s.stateBytes, Preflight: s.transport.Preflight,
		Waiting: s.waiting, HandoverTimeout: s.handoverTimeout(),
		ClientAddr: s.transport.ClientAddr, Reachable: s.reachable, Placement: s.study,
		PipelineQuality: control.PipelineQuality, Moved: s.moved,
		Planned: s.control.planned.get, PlannedChanged: s.control.planned.next, Held: s.held, HeldExpiries: s.control.liveness.HeldExpiries,
		Alarms: s.alarms, Metrics: s.metrics, Recovery: s.recovery,
		StoredMembers: func() []raftnode.Member { return s.disk.machine.Applied().Members }, Gate: s.gate, CheckState: s.checkState,
		SidecarTTL: s.c.Liveness.ExpireAfter, SuspectAfter: s.c.Liveness.SuspectAfter, HeartbeatInterval: s.c.Liveness.HeartbeatInterval,
		ServiceTTL: s.c.Liveness.SuspectAfter, Now: s.o.Now, Logger: s.log.With("part", "api"),
	})
	if err != nil {
		return err
	}
	s.serving.Go(func() {
		if err := s.api.Serve(s.clientLis); err != nil {
			s.fail(err)
		}
	})
	return nil
}

// fail records why the node cannot go on and wakes whoever waits for Failed.
func (s *Server) fail(err error) {
	s.failOnce.Do(func() {
		s.failure = err
		s.log.Error("the node cannot go on", "event", "failed", "err", err)
		close(s.failed)
	})
}

// Failed returns a channel that is closed when the node cannot keep its
// promises any longer. Nothing is served then; call Stop and end the process.
func (s *Server) Failed() <-chan struct{} { return s.failed }

// Err returns why the node failed, nil while it has not.
func (s *Server) Err() error {
	select {
	case <-s.failed:
		return s.failure
	default:
		return nil
	}
}

// Addr returns the address clients are served on.
func (s *Server) Addr() string { return s.clientLis.Addr().String() }

// RaftAddr returns the address peers are served on.
func (s *Server) RaftAddr() string { return s.peerLis.Addr().String() }

// Node returns the raft node, for tests and demos that look inside.
func (s *Server) Node() *raftnode.Node { return s.node }

// actual puts the port that was chosen by the system into an address that left
// the choice to it.
func actual(advertised string, lis net.Listener) string {
	host, port, err := net.SplitHostPort(advertised)
	if err != nil || port != "0" {
		return advertised
	}
	_, port, err = net.SplitHostPort(lis.Addr().String())
	if err != nil {
		return advertised
	}
	return net.JoinHostPort(host, port)
}
