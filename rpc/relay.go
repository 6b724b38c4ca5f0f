package rpc

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
)

// metadataRelayed marks a call that another node passed on, with that node's
// id. A marked call is never passed on again: with two nodes that each take the
// other for the leader it would circle.
const metadataRelayed = "conveyor-relayed-by"

// leaderRelay passes calls on to other nodes' public addresses: to the leader
// those few whose answer only the leader knows, to any other those about what
// lies on it. It keeps one connection to each node it was asked for.
type leaderRelay struct {
	nodeID uint64
	node   ServerNode
	addr   func(uint64) string

	mu     sync.Mutex
	conns  map[uint64]relayConn
	closed bool
}

type relayConn struct {
	target string
	conn   *grpc.ClientConn
}

func newLeaderRelay(cfg ServerConfig) *leaderRelay {
	return &leaderRelay{nodeID: cfg.NodeID, node: cfg.Node, addr: cfg.ClientAddr, conns: map[uint64]relayConn{}}
}

// relayed returns which node passed the call of ctx on, "" when a client made
// it.
func relayed(ctx context.Context) string {
	if by := metadata.ValueFromIncomingContext(ctx, metadataRelayed); len(by) > 0 {
		return by[0]
	}
	return ""
}

// connect returns a connection to the leader and the context to call it with. It
// fails with a *raftnode.NotLeaderError or ErrNoLeader when that is impossible;
// nothing was sent then.
func (r *leaderRelay) connect(ctx context.Context) (*grpc.ClientConn, context.Context, error) {
	if by := relayed(ctx); by != "" {
		return nil, nil, fmt.Errorf("%w: node %s passed this call on to node %d, which does not lead", raftnode.ErrNoLeader, by, r.nodeID)
	}
	l := r.node.Leadership()
	if l.Leader == 0 || l.Leader == r.nodeID {
		return nil, nil, raftnode.ErrNoLeader
	}
	if r.addr(l.Leader) == "" {
		return nil, nil, &raftnode.NotLeaderError{Leader: l.Leader, Term: l.Term}
	}
	return r.to(ctx, l.Leader)
}

// to returns a connection to another node and the context to call it with.
func (r *leaderRelay) to(ctx context.Context, node uint64) (*grpc.ClientConn, context.Context, error) {
	addr := r.addr(node)
	if addr == "" {
		return nil, nil, fmt.Errorf("%w: it is not known where node %d serves clients", ErrUnreachable, node)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, nil, raftnode.ErrStopping
	}
	c := r.conns[node]
	if c.conn == nil || c.target != addr {
		if c.conn != nil {
			c.conn.Close()
		}
		conn, err := grpc.NewClient("passthrough:///"+addr,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(NewCodec())))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %v", ErrUnreachable, err)
		}
		c = relayConn{addr, conn}
		r.conns[node] = c
	}
	return c.conn, metadata.AppendToOutgoingContext(ctx, metadataRelayed, strconv.FormatUint(r.nodeID, 10)), nil
}

// relayedErr is the error of a call that was passed on, as the caller may hear it.
// When the connection to the other node breaks, gRPC says UNAVAILABLE by itself;
// here that means "certainly not done", which nobody knows.
func relayedErr(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok || st.Code() != codes.Unavailable || ReasonOf(st) != "" {
		return err
	}
	if strings.Contains(st.Message(), "Error while dialing") {
		return fmt.Errorf("%w (%s)", ErrUnreachable, st.Message())
	}
	return fmt.Errorf("%w: the node this call was passed on to broke off: %s", raftnode.ErrAmbiguous, st.Message())
}

func (r *leaderRelay) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for id, c := range r.conns {
		c.conn.Close()
		delete(r.conns, id)
	}
}
