package rpc

import (
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/peerpb"
)

// peerProtocol is the version of the peer protocol this program speaks.
const peerProtocol = 1

// maxAddrBytes bounds the addresses and the version in a Hello.
const maxAddrBytes = 512

// Identity is what a node says about itself to its peers.
type Identity struct {
	// ClusterID and NodeID are never zero.
	ClusterID uint64
	NodeID    uint64
	// PeerAddr is the host:port at which peers reach this node.
	PeerAddr string
	// ClientAddr is the host:port at which clients reach this node.
	ClientAddr string
	// Version is the version of the program, for people.
	Version string
	// DiskID is the random id of the data directory; zero = not told.
	DiskID uint64
	// ListedAt is the index the node has applied, when the membership there lists
	// it with DiskID; otherwise zero: see Identity.At.
	ListedAt uint64
}

// Validate reports whether the identity can be used in a handshake.
func (id Identity) Validate() error {
	switch {
	case id.ClusterID == 0:
		return fmt.Errorf("rpc: identity: the cluster id is zero")
	case id.NodeID == 0:
		return fmt.Errorf("rpc: identity: the node id is zero, which raft reserves")
	case len(id.PeerAddr) > maxAddrBytes || len(id.ClientAddr) > maxAddrBytes || len(id.Version) > maxAddrBytes:
		return fmt.Errorf("rpc: identity: an address or the version is longer than %d bytes", maxAddrBytes)
	}
	return nil
}

// hello is how id greets node to.
func (id Identity) hello(to uint64) *peerpb.Hello {
	return &peerpb.Hello{
		Protocol:   peerProtocol,
		ClusterId:  id.ClusterID,
		NodeId:     id.NodeID,
		ToNodeId:   to,
		ClientAddr: id.ClientAddr,
		PeerAddr:   id.PeerAddr,
		Version:    id.Version,
		DiskId:     id.DiskID,
		ListedAt:   id.ListedAt,
	}
}

// check verifies the greeting of another node. peer is the id it must have, 0
// when any will do. Both ends check: a node that reached the wrong address, or
// a data directory that was copied, must not exchange one raft message.
func (id Identity) check(h *peerpb.Hello, peer uint64) error {
	refuse := func(format string, args ...any) error {
		return &RefusedError{Peer: h.GetNodeId(), Reason: fmt.Sprintf(format, args...)}
	}
	switch {
	case h == nil:
		return &RefusedError{Peer: peer, Reason: "the first message of the stream is no greeting"}
	case h.GetProtocol() != peerProtocol:
		return refuse("it speaks peer protocol %d, node %d speaks %d: run versions that may be mixed",
			h.GetProtocol(), id.NodeID, peerProtocol)
	case h.GetClusterId() != id.ClusterID:
		return refuse("it belongs to cluster %016x, node %d to cluster %016x: check the peer addresses and the data directories",
			h.GetClusterId(), id.NodeID, id.ClusterID)
	case h.GetNodeId() == 0:
		return refuse("it has no node id")
	case h.GetNodeId() == id.NodeID:
		return refuse("it has the node id of the node it talks to: two nodes share one id, or a node reached itself")
	case peer != 0 && h.GetNodeId() != peer:
		return refuse("node %d was expected at this address: check the peer addresses", peer)
	case h.GetToNodeId() != id.NodeID:
		return refuse("it looked for node %d and reached node %d: check the peer addresses",
			h.GetToNodeId(), id.NodeID)
	case len(h.GetClientAddr()) > maxAddrBytes || len(h.GetPeerAddr()) > maxAddrBytes || len(h.GetVersion()) > maxAddrBytes:
		return refuse("an address or the version in its greeting is longer than %d bytes", maxAddrBytes)
	}
	return nil
}

// fromPeer translates the error of a peer stream. A refusal by the other end
// becomes a *RefusedError; all others stay what they are, as they say only that
// the stream is gone.
func fromPeer(peer uint64, err error) error {
	if s, ok := status.FromError(err); ok && s.Code() == codes.PermissionDenied {
		refused := &RefusedError{Peer: peer, Reason: "node " + fmt.Sprint(peer) + " says: " + s.Message(), Told: true}
		refused.read(s)
		return refused
	}
	return err
}
