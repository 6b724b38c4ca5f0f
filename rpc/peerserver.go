package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/snap"
)

// PeerServerConfig wires a PeerServer; EnsureDefaults fills zero limits.
type PeerServerConfig struct {
	// Node receives messages, images and commands; required.
	Node PeerNode
	// Transport knows who may talk to this node; required.
	Transport *PeerTransport
	// Image returns a pinned image of the state at or after minIndex, made for
	// the occasion or not; required. The server closes it.
	Image func(ctx context.Context, minIndex uint64) (*snap.Reader, error)
	// Guard refuses commands while the disk is nearly full; nil = never.
	Guard *DiskGuard
	// Gate refuses commands and images while the state of this node is in
	// doubt; nil = never.
	Gate *StateGate
	// State is what the hashes are of; nil refuses to tell any.
	State HashedState
	// Agreed is told up to which index, of which epoch, the state of this node was
	// seen to be that of a majority; nil = nobody is told.
	Agreed func(index, epoch uint64)
	// Suspect looks into the word of node from that the state of this node is
	// not that of the majority, which was expected at an index; without sums in
	// expected, that nobody knows whose is right. It says whether this node
	// agrees, and why or why not; nil refuses. It must return when ctx is done.
	Suspect func(ctx context.Context, from uint64, expected router.Sums, reason string) (agreed bool, message string)
	// Beat takes the heartbeats that other nodes received; nil drops them. It
	// must not block.
	Beat func(sidecarID, serviceID string)
	// ImageLimit paces images sent on request; nil = no limit.
	ImageLimit *snap.RateLimit
	// Preflight is what this node tells of itself; what is nil is zero.
	Preflight PreflightInfo
	// Logger receives refusals. Default: discarded.
	Logger *slog.Logger
	// MaxInFlight and MaxInFlightBytes bound the commands of one stream whose
	// results are outstanding; beyond, they are refused as busy. Defaults
	// 65,536 and 64 MiB.
	MaxInFlight      int
	MaxInFlightBytes int64
}

// PeerServer serves what the other nodes ask of this one. Register it with
// peerpb.RegisterPeerServer on a server made with PeerServerOptions.
type PeerServer struct {
	peerpb.UnimplementedPeerServer
	c    PeerServerConfig
	self Identity

	mu sync.Mutex
	// inbound holds the nodes with open Messages streams.
	inbound map[uint64]*inbound
	// outboxes holds those of the open Forward streams.
	outboxes map[*outbox]struct{}

	// answered receives when answers were sent, or a Forward stream ended.
	answered chan struct{}
}

// inbound is where the messages of one node come in. What a dead connection
// left in the buffers of this node is still being read when the next one is up
// already; without care, old messages would come after new ones.
type inbound struct {
	// mu is held to step messages, and exclusively to change session.
	mu      sync.RWMutex
	session uint64
	// streams is guarded by PeerServer.mu.
	streams int
}

// enter admits a stream of session of node id, and ends those of earlier ones.
func (s *PeerServer) enter(id, session uint64) (*inbound, error) {
	s.mu.Lock()
	in := s.inbound[id]
	if in == nil {
		in = &inbound{}
		s.inbound[id] = in
	}
	in.streams++
	s.mu.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	if session < in.session {
		s.leave(id, in)
		return nil, Status(ErrSuperseded).Err()
	}
	in.session = session
	return in, nil
}

// leave forgets a node with its last stream, and with it the last session: the
// next may have a smaller number, if the node's clock was set back.
func (s *PeerServer) leave(id uint64, in *inbound) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.streams--; in.streams == 0 {
		delete(s.inbound, id)
	}
}

// step passes messages on, unless a later session has begun.
func (s *PeerServer) step(ctx context.Context, in *inbound, session uint64, msgs []*raftpb.Message) error {
	in.mu.RLock()
	defer in.mu.RUnlock()
	if in.session != session {
		return Status(ErrSuperseded).Err()
	}
	if err := s.c.Node.Step(ctx, msgs); err != nil {
		return Status(err).Err()
	}
	return nil
}

// NewPeerServer returns a server; it starts nothing.
func NewPeerServer(c PeerServerConfig) (*PeerServer, error) {
	if c.Node == nil || c.Transport == nil || c.Image == nil {
		return nil, errors.New("rpc: a peer server needs Node, Transport and Image")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Preflight.ensureDefaults()
	setDefault(&c.MaxInFlight, 1<<16)
	setDefault(&c.MaxInFlightBytes, 64<<20)
	return &PeerServer{
		c: c, self: c.Transport.o.Identity, inbound: map[uint64]*inbound{},
		outboxes: map[*outbox]struct{}{}, answered: make(chan struct{}, 1),
	}, nil
}

// greet checks the greeting h of a stream; answer is that of
// PeerTransport.greeted. The caller calls done when the stream ends.
func (s *PeerServer) greet(h *peerpb.Hello, answer bool) (done func(), err error) {
	if err := s.self.check(h, 0); err != nil {
		s.refused(err)
		return nil, Status(err).Err()
	}
	if done, err = s.c.Transport.greeted(h, answer); err != nil {
		s.refused(err)
		return nil, Status(err).Err()
	}
	return done, nil
}

// refused logs a refusal at a level at which a peer that keeps trying does not
// fill the log: the other end reports it once, with the reason.
func (s *PeerServer) refused(err error) {
	s.c.Logger.Debug("refused a peer", "err", err)
}

// Messages implements peerpb.PeerServer.
func (s *PeerServer) Messages(stream peerpb.Peer_MessagesServer) error {
	var in messagesIn
	if err := stream.RecvMsg(&in); err != nil {
		return err
	}
	hello := in.hello
	from, session := hello.GetNodeId(), hello.GetSession()
	done, err := s.greet(hello, true)
	if err != nil {
		return err
	}
	defer done()
	door, err := s.enter(from, session)
	if err != nil {
		return err
	}
	defer s.leave(from, door)
	if err := stream.Send(s.c.Transport.identity().hello(from)); err != nil {
		return err
	}
	for {
		if len(in.msgs) > 0 {
			// A node that was removed may be the last to hear of it, for nobody
			// sends it anything any more. It hears it in answer to what it sends. So
			// does one whose word was taken until this node knew better.
			if err := s.c.Transport.recheck(hello); err != nil {
				return Status(err).Err()
			}
			for _, m := range in.msgs {
				if err := s.checkMessage(m, from); err != nil {
					s.c.Logger.Error("ending a peer's stream", "peer", from, "err", err)
					return Status(err).Err()
				}
			}
			if err := s.step(stream.Context(), door, session, in.msgs); err != nil {
				return err
			}
		}
		if err := stream.RecvMsg(&in); err != nil {
			return endOfStream(err)
		}
	}
}

// checkMessage refuses what a well-behaved node never sends on the Messages
// stream. Stepping such a message could make raft panic, or act for another
// node.
func (s *PeerServer) checkMessage(m *raftpb.Message, from uint64) error {
	if m.GetTo() != s.self.NodeID || m.GetFrom() != from {
		return fmt.Errorf("%w: a message from node %d to node %d on the stream from node %d to node %d",
			ErrMalformed, m.GetFrom(), m.GetTo(), from, s.self.NodeID)
	}
	switch m.GetType() {
	case raftpb.MsgApp, raftpb.MsgAppResp, raftpb.MsgVote, raftpb.MsgVoteResp,
		raftpb.MsgHeartbeat, raftpb.MsgHeartbeatResp, raftpb.MsgPreVote, raftpb.MsgPreVoteResp,
		raftpb.MsgTransferLeader, raftpb.MsgTimeoutNow, raftpb.MsgReadIndex, raftpb.MsgReadIndexResp:
		return nil
	}
	// Among them MsgProp, which would bypass admission, and MsgSnap, whose
	// image would not be here.
	return fmt.Errorf("%w: a %v message does not travel on this stream", ErrMalformed, m.GetType())
}
