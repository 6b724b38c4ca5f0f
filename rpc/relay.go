package rpc

import (
	"context"
	"fmt"
	"strconv"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/raftnode"
)

// metadataRelayed marks a call that another node passed on, with that node's
// id. A marked call is never passed on again: with two nodes that each take the
// other for the leader it would circle.
const metadataRelayed = "conveyor-relayed-by"

// leaderRelay passes calls on to the leader's public address: those few whose
// answer only the leader knows. It keeps one connection, to the leader it was
// asked for last.
type leaderRelay struct {
	nodeID uint64
	node   ServerNode
	addr   func(uint64) string

	mu     sync.Mutex
	target string
	conn   *grpc.ClientConn
	closed bool
}

func newLeaderRelay(cfg ServerConfig) *leaderRelay {
	return &leaderRelay{nodeID: cfg.NodeID, node: cfg.Node, addr: cfg.ClientAddr}
}

// connect returns a connection to the leader and the context to call it with. It
// fails with a *raftnode.NotLeaderError or ErrNoLeader when that is impossible;
// nothing was sent then.
func (r *leaderRelay) connect(ctx context.Context) (*grpc.ClientConn, context.Context, error) {
	if by := metadata.ValueFromIncomingContext(ctx, metadataRelayed); len(by) > 0 {
		return nil, nil, fmt.Errorf("%w: node %s passed this call on to node %d, which does not lead", raftnode.ErrNoLeader, by[0], r.nodeID)
	}
	l := r.node.Leadership()
	if l.Leader == 0 || l.Leader == r.nodeID {
		return nil, nil, raftnode.ErrNoLeader
	}
	addr := r.addr(l.Leader)
	if addr == "" {
		return nil, nil, &raftnode.NotLeaderError{Leader: l.Leader, Term: l.Term}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, nil, raftnode.ErrStopping
	}
	if r.conn == nil || r.target != addr {
		if r.conn != nil {
			r.conn.Close()
		}
		conn, err := grpc.NewClient("passthrough:///"+addr,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(NewCodec())))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %v", ErrUnreachable, err)
		}
		r.conn, r.target = conn, addr
	}
	return r.conn, metadata.AppendToOutgoingContext(ctx, metadataRelayed, strconv.FormatUint(r.nodeID, 10)), nil
}

func (r *leaderRelay) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.conn != nil {
		r.conn.Close()
		r.conn = nil
	}
}
