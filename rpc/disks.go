package rpc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
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
	if !known && !t.isConfirmed(node, disk) {
		t.o.Doubt(node, disk)
		return t.refuse(node, Wiped,
			"node %d was known with another data directory than %016x: it has lost what it promised, and must join again", node, disk)
	}
	return nil
}

// checkRemoved refuses a node that was removed, unless others have seen it join
// again with disk.
func (t *PeerTransport) checkRemoved(node, disk uint64) error {
	t.mu.RLock()
	refused := t.removed[node] && (disk == 0 || t.confirmed[node] != disk)
	t.mu.RUnlock()
	if !refused {
		return nil
	}
	if disk != 0 {
		t.o.Doubt(node, disk)
	}
	return t.refuse(node, Removed, "node %d was removed from the cluster: "+
		"erase its data directory and let it join again with a new id", node)
}

// checkAnswer verifies the greeting by which node peer answered one of this
// node's.
func (t *PeerTransport) checkAnswer(h *peerpb.Hello, peer uint64) error {
	if err := t.o.Identity.check(h, peer); err != nil {
		return err
	}
	return t.checkDisk(peer, h.GetDiskId())
}

// refuse returns the refusal of node for a reason that it acts on.
func (t *PeerTransport) refuse(node uint64, kind Refusal, format string, args ...any) error {
	return &RefusedError{
		Peer: node, Kind: kind, Reason: fmt.Sprintf(format, args...),
		ClientAddr: t.o.Identity.ClientAddr, Applied: t.o.Applied(),
	}
}

// metadata puts what the refused node acts on into a status.
func (e *RefusedError) metadata() map[string]string {
	return map[string]string{
		"refusal": string(e.Kind), "client_addr": e.ClientAddr, "applied": strconv.FormatUint(e.Applied, 10),
	}
}

// read is the inverse of metadata.
func (e *RefusedError) read(s *status.Status) {
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			m := info.GetMetadata()
			e.Kind, e.ClientAddr = Refusal(m["refusal"]), m["client_addr"]
			e.Applied, _ = strconv.ParseUint(m["applied"], 10, 64)
			return
		}
	}
}

// Confirm says that the cluster has agreed on node joining with disk, although
// this node has not applied that yet. A node that lags may know an older disk of
// the leader, or that it was removed, and must listen to it to learn better.
func (t *PeerTransport) Confirm(node, disk uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.confirmed[node] = disk
	if p := t.peers[node]; p != nil {
		select {
		case p.kick <- struct{}{}:
		default:
		}
	}
}

// isConfirmed reports whether Confirm was called for node and disk.
func (t *PeerTransport) isConfirmed(node, disk uint64) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return disk != 0 && t.confirmed[node] == disk
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
