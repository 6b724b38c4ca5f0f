package rpc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
)

// Refusal says why a node does not talk to another one, where the other has to
// act on it.
type Refusal string

// The refusals that a node acts on.
const (
	// Wiped: the node comes with another data directory than the one it was known
	// with. What it had promised and acknowledged is gone, so its votes and
	// acknowledgements must not count.
	Wiped Refusal = "WIPED"
	// Removed: the node is no member any more.
	Removed Refusal = "REMOVED"
)

// Disks remembers, durably, with which data directory each node was seen first.
// Its methods are safe for concurrent use.
type Disks interface {
	// Check records the disk of a node that is seen for the first time, and
	// reports whether it is the one known. An error means that this could not be
	// recorded; nothing of the node may be accepted then.
	Check(node, disk uint64) (known bool, err error)
}

// checkDisk refuses a node that has lost its data directory. It comes before the
// first message of the node is accepted: an empty voter that is taken for the one
// it was could make a majority with a node that lags, and what the two elect has
// lost what was acknowledged.
func (t *PeerTransport) checkDisk(node, disk uint64) error {
	if t.o.Disks == nil || disk == 0 {
		return nil // a release that does not say
	}
	known, err := t.o.Disks.Check(node, disk)
	if err != nil {
		return fmt.Errorf("%w: the data directory of node %d could not be recorded: %w", ErrClosed, node, err)
	}
	if !known {
		return &RefusedError{Peer: node, Kind: Wiped, ClientAddr: t.o.Identity.ClientAddr, Reason: fmt.Sprintf(
			"node %d was known with another data directory than %016x: it has lost what it promised, and must join again", node, disk)}
	}
	return nil
}

// checkAnswer verifies the greeting by which node peer answered one of this
// node's.
func (t *PeerTransport) checkAnswer(h *peerpb.Hello, peer uint64) error {
	if err := t.o.Identity.check(h, peer); err != nil {
		return err
	}
	return t.checkDisk(peer, h.GetDiskId())
}

// refusalOf reads the refusal out of the status of another node.
func refusalOf(s *status.Status) (kind Refusal, clientAddr string) {
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			return Refusal(info.GetMetadata()["refusal"]), info.GetMetadata()["client_addr"]
		}
	}
	return "", ""
}

// refused tells whoever wants to act on it that another node does not talk to
// this one.
func (t *PeerTransport) refused(err error) {
	var r *RefusedError
	if errors.As(err, &r) && r.Kind != "" && r.Told && t.o.OnRefused != nil {
		t.o.OnRefused(r)
	}
}

// AskRefusal greets the given nodes, all at once, and returns the first refusal
// to act on, nil when none of those that answer before ctx is done refuses.
func AskRefusal(ctx context.Context, self Identity, peers []raftnode.Member) *RefusedError {
	d := newPeerDialer(nil, nil, time.Second)
	answers := make(chan error, len(peers))
	asked := 0
	for _, p := range peers {
		if p.ID == self.NodeID || p.Addr == "" {
			continue
		}
		asked++
		go func() { answers <- greet(ctx, d, self, p) }()
	}
	var found *RefusedError
	for range asked {
		var r *RefusedError
		if err := <-answers; errors.As(err, &r) && r.Kind != "" && r.Told && found == nil {
			found = r
		}
	}
	return found
}

// greet exchanges greetings with one node and leaves.
func greet(ctx context.Context, d peerDialer, self Identity, p raftnode.Member) error {
	conn, err := d.conn(p.Addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := peerpb.NewPeerClient(conn).StateHashes(ctx, &peerpb.StateHashesRequest{Hello: self.hello(p.ID)})
	if err != nil {
		return fromPeer(p.ID, err)
	}
	return self.check(stream.GetHello(), p.ID)
}
