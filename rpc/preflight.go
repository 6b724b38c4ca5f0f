package rpc

import (
	"context"
	"fmt"
	"sync"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
)

const (
	// maxReach bounds the nodes one Preflight asks to be reached.
	maxReach = 64
	// reachTimeout bounds the attempt to reach one.
	reachTimeout = time.Second
)

// PreflightInfo is what a node tells of itself before it takes a place in the
// cluster. Its functions must not block.
type PreflightInfo struct {
	// Applied returns the index applied here.
	Applied func() uint64
	// FreeBytes and StateBytes describe the disk of the data directory.
	FreeBytes, StateBytes func() uint64
	// Now is the clock.
	Now func() time.Time
}

func (p *PreflightInfo) ensureDefaults() {
	zero := func() uint64 { return 0 }
	for _, f := range []*func() uint64{&p.Applied, &p.FreeBytes, &p.StateBytes} {
		if *f == nil {
			*f = zero
		}
	}
	if p.Now == nil {
		p.Now = time.Now
	}
}

// Preflight implements peerpb.PeerServer.
func (s *PeerServer) Preflight(ctx context.Context, req *peerpb.PreflightRequest) (*peerpb.PreflightResponse, error) {
	done, err := s.greet(req.GetHello(), false)
	if err != nil {
		return nil, err
	}
	defer done()
	if len(req.GetReach()) > maxReach {
		return nil, InvalidArgument("reach", fmt.Sprintf("holds %d nodes, at most %d are allowed", len(req.GetReach()), maxReach)).Err()
	}
	resp := &peerpb.PreflightResponse{
		Hello: s.c.Transport.identity().hello(req.GetHello().GetNodeId()), Version: s.self.Version,
		Applied: s.c.Preflight.Applied(), FreeBytes: s.c.Preflight.FreeBytes(), StateBytes: s.c.Preflight.StateBytes(),
		TimeUnixMs: s.c.Preflight.Now().UnixMilli(),
	}
	t := s.c.Transport
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, other := range req.GetReach() {
		if other.GetNodeId() == s.self.NodeID {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, reachTimeout)
			defer cancel()
			addr := other.GetAddr()
			if known := t.peerAddr(other.GetNodeId()); known != "" {
				addr = known // the asker may know it by another
			}
			if _, err := t.ask(ctx, other.GetNodeId(), addr, nil); err != nil {
				mu.Lock()
				resp.Unreachable = append(resp.Unreachable, other)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return resp, nil
}

// Preflight asks node id what it is, and to reach other nodes. It blocks until
// the node has answered or ctx is done.
func (t *PeerTransport) Preflight(ctx context.Context, id uint64, reach []raftnode.Member) (*peerpb.PreflightResponse, error) {
	addr := t.peerAddr(id)
	if addr == "" {
		return nil, fmt.Errorf("%w: the address of node %d is not known here", ErrUnreachable, id)
	}
	return t.ask(ctx, id, addr, reach)
}

func (t *PeerTransport) ask(ctx context.Context, id uint64, addr string, reach []raftnode.Member) (*peerpb.PreflightResponse, error) {
	conn, err := t.dialer.conn(addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	req := &peerpb.PreflightRequest{Hello: t.identity().hello(id)}
	for _, m := range reach {
		req.Reach = append(req.Reach, &peerpb.PeerAddr{NodeId: m.ID, Addr: m.Addr})
	}
	resp, err := peerpb.NewPeerClient(conn).Preflight(ctx, req)
	if err != nil {
		return nil, fromPeer(id, err)
	}
	return resp, t.checkAnswer(resp.GetHello(), id)
}
