package server

import (
	"context"
	"log/slog"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/config"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/snap"
)

const (
	// reportPause is that between two attempts to report this node's address.
	reportPause = time.Second
	// memberCall bounds one question to another node.
	memberCall = 2 * time.Second
)

// addresses knows where this node reaches the others. What its operator
// configured outweighs what the cluster has replicated: the same peer may have
// different addresses from different places, and addresses change while a node
// is down.
type addresses map[uint64]string

func newAddresses(c *config.Config) addresses {
	a := addresses{}
	for _, p := range c.Peers {
		a[p.ID] = p.Addr
	}
	return a
}

// fill returns members with this node's view of their addresses.
func (a addresses) fill(members []raftnode.Member) []raftnode.Member {
	out := make([]raftnode.Member, len(members))
	for i, m := range members {
		if addr := a[m.ID]; addr != "" {
			m.Addr = addr
		}
		out[i] = m
	}
	return out
}

// alsoAt returns where the cluster says a member is, for when the address that
// was configured fails: the member may have moved since.
func (s *Server) alsoAt(id uint64) []string {
	m, ok := s.disk.machine.Applied().Member(id)
	if !ok || m.Addr == "" || m.Addr == s.known[id] {
		return nil
	}
	return []string{m.Addr}
}

// compare logs what the operator should know: members nobody can reach, and
// peers that are no members.
func (a addresses) compare(members []raftnode.Member, log *slog.Logger) {
	ids := map[uint64]bool{}
	for _, m := range members {
		ids[m.ID] = true
		if a[m.ID] == "" && m.Addr == "" {
			log.Warn("no address of a member is known; add it to --peers", "member", m.ID)
		}
	}
	for id, addr := range a {
		if !ids[id] {
			log.Warn("a node of --peers is no member of the cluster of this data directory; --peers makes members at the first start only",
				"node", id, "addr", addr)
		}
	}
}

// addressedTransport tells the transport this node's view of the addresses, and
// sends nobody the image of a wrong state.
type addressedTransport struct {
	*rpc.PeerTransport
	known addresses
	disks *disks
	log   *slog.Logger
	gate  *rpc.StateGate
}

var _ raftnode.Transport = (*addressedTransport)(nil)

// SetMembers implements raftnode.Transport.
func (t *addressedTransport) SetMembers(members []raftnode.Member) {
	if err := t.disks.learn(members); err != nil {
		t.log.Error("what the group agreed on was not written down; the next start makes up for it", "err", err)
	}
	t.PeerTransport.SetMembers(t.known.fill(members))
}

// SendImage implements raftnode.Transport.
func (t *addressedTransport) SendImage(ctx context.Context, m *raftpb.Message, image *snap.Reader) error {
	if err := t.gate.Final(); err != nil {
		return err
	}
	return t.PeerTransport.SendImage(ctx, m, image)
}

// addressedNode shows this node's view of the addresses in its status.
type addressedNode struct {
	*raftnode.Node
	known addresses
}

// Status implements rpc.ServerNode.
func (n *addressedNode) Status() raftnode.Status {
	st := n.Node.Status()
	st.Position.Members = n.known.fill(st.Position.Members)
	return st
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
