package server

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	// doubtPause is the least time between two questions about the same disk.
	doubtPause = 500 * time.Millisecond
	// maxDoubts bounds the disks that are remembered as asked about.
	maxDoubts = 1024
	// reportPause is that between two attempts to report this node's address.
	reportPause = time.Second
	// memberCall bounds one question to another node.
	memberCall = 2 * time.Second
)

// doubt is a node that came with a disk other than the one known here.
type doubt struct{ node, disk uint64 }

// doubted notes a doubt. It does not block.
func (s *Server) doubted(node, disk uint64) {
	select {
	case s.doubts <- doubt{node, disk}:
	default: // it will come again
	}
}

// followDoubts asks other members about disks that are not the known ones, until
// ctx is done: this node may lag behind the change that brought them in, and not
// hear of it from a leader it does not listen to.
func (s *Server) followDoubts(ctx context.Context) {
	asked := map[doubt]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-s.doubts:
			now := s.o.Now()
			if now.Sub(asked[d]) < doubtPause {
				continue
			}
			if len(asked) >= maxDoubts {
				clear(asked)
			}
			asked[d] = now
			s.askAbout(ctx, d)
		}
	}
}

// askAbout asks the others what the cluster has agreed on. The word of the node
// itself is what is in doubt, so it does not count.
func (s *Server) askAbout(ctx context.Context, d doubt) {
	cluster, disk := fmt.Sprintf("%016x", s.disk.id.ClusterID), fmt.Sprintf("%016x", d.disk)
	s.eachPeer(ctx, func(ctx context.Context, peer uint64, c clusterpb.ClusterClient) bool {
		if peer == d.node {
			return false
		}
		resp, err := c.ListMembers(ctx, &clusterpb.ListMembersRequest{})
		if err != nil || resp.GetClusterId() != cluster {
			return false
		}
		for _, m := range resp.GetMembers() {
			if m.GetNodeId() == d.node && m.GetDiskId() == disk {
				s.log.Info("a member has joined again while this node lagged; listening to it", "member", d.node, "said_by", peer)
				s.transport.Confirm(d.node, d.disk)
				return true
			}
		}
		return false
	})
}

// eachPeer calls f with the client API of one node after the other, as far as
// they have said where that is, until it returns true.
func (s *Server) eachPeer(ctx context.Context, f func(ctx context.Context, peer uint64, c clusterpb.ClusterClient) bool) bool {
	for _, p := range s.transport.Stats() {
		if p.ClientAddr == "" || ctx.Err() != nil {
			continue
		}
		conn, err := grpc.NewClient("passthrough:///"+p.ClientAddr, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rpc.NewCodec())))
		if err != nil {
			continue
		}
		bound, cancel := context.WithTimeout(ctx, memberCall)
		done := f(bound, p.ID, clusterpb.NewClusterClient(conn))
		cancel()
		conn.Close()
		if done {
			return true
		}
	}
	return false
}

// reportAddress tells the cluster where this node is reached when that is not
// what it was told before, until that has been done or ctx is done.
func (s *Server) reportAddress(ctx context.Context, addr string) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		m, ok := s.disk.machine.Applied().Member(s.c.NodeID)
		told := m.Addr
		if told == "" {
			told = s.disk.id.RaftAddr
		}
		if !ok || m.Removed || told == "" || told == addr {
			return
		}
		// Any member will do: the leader may not reach this node before it knows.
		if s.eachPeer(ctx, func(ctx context.Context, _ uint64, c clusterpb.ClusterClient) bool {
			_, err := c.UpdateMember(ctx, &clusterpb.UpdateMemberRequest{NodeId: s.c.NodeID, PeerAddr: addr})
			return err == nil
		}) {
			s.log.Info("the cluster was told the new address of this node", "event", "address_reported", "addr", addr, "was", told)
			return
		}
		timer.Reset(reportPause)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
	}
}
