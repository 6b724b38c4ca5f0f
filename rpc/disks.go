package rpc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
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

// A node that lags may know an older directory of a member, or that it was
// removed, and not that it was taken in again since. Were it to refuse that member
// it might never learn better: the member may lead, and nobody else who knows may
// be alive. So a greeting says up to which index its sender has applied the log,
// when the membership there lists the sender with this very directory. The log is
// one, so to whoever has applied less of it this is what it is going to apply
// itself: it takes the other's word until it is there, and from then on its own
// state decides. A directory that is new, or that a first member was started on,
// is listed nowhere, and cannot say so.
//
// Two may say so: the directory a member has now, and one it had before, which was
// listed as well and has come back without having heard of the exchange. To a node
// that lags behind both each is right, at its index, and of one log the later index
// is the truth of today. So the latest word of all is kept for as long as it is ahead
// of this node, and a directory that was listed earlier, or not at all, is refused.
// Taking both would have them push each other aside, and the answers to the one go to
// where the other is.
//
// Going by the word of a third node instead would let one that lags speak for a
// directory that was replaced since; asking the leader does not work, for it is
// the leader who is in doubt.

// outranks reports whether h proves that its sender was taken in with the
// directory it comes with after pos.
func outranks(h *peerpb.Hello, pos raftnode.Position) bool {
	return h.GetDiskId() != 0 && h.GetListedAt() > pos.Index
}

// claim is the latest word of a node about itself that is ahead of this node: at an
// index it was listed with a directory.
type claim struct{ disk, listedAt uint64 }

// overruled returns the word that speaks against h: the same node, with another
// directory, was listed later than this node and the sender of h know of.
func (t *PeerTransport) overruled(h *peerpb.Hello, pos raftnode.Position) (claim, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	c, ok := t.claims[h.GetNodeId()]
	return c, ok && c.listedAt > pos.Index && c.disk != h.GetDiskId() && c.listedAt > h.GetListedAt()
}

// claimed keeps the word of a greeting that was accepted, and lets go of a
// connection to another directory of the node: what is sent there is lost on the
// one that counts.
func (t *PeerTransport) claimed(h *peerpb.Hello, pos raftnode.Position) {
	if !outranks(h, pos) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	id := h.GetNodeId()
	before, ok := t.claims[id]
	if ok && before.listedAt >= h.GetListedAt() {
		return
	}
	maps.DeleteFunc(t.claims, func(_ uint64, c claim) bool { return c.listedAt <= pos.Index })
	t.claims[id] = claim{disk: h.GetDiskId(), listedAt: h.GetListedAt()}
	p := t.peers[id]
	if ok && before.disk == h.GetDiskId() || p == nil || t.closed {
		return
	}
	if disk := p.disk.Load(); disk != 0 && disk != h.GetDiskId() {
		t.restartLocked(p, p.addr)
	}
}

// checkDisk refuses a node that has lost its data directory. It comes before the
// first message of the node is accepted: an empty voter that is taken for the one
// it was could make a majority with a node that lags, and what the two elect has
// lost what was acknowledged.
func (t *PeerTransport) checkDisk(h *peerpb.Hello) error {
	node, disk := h.GetNodeId(), h.GetDiskId()
	if t.o.Disks == nil || disk == 0 {
		return nil // a release that does not say
	}
	pos := t.o.Position()
	if c, yes := t.overruled(h, pos); yes {
		return t.refuse(node, Wiped, c.listedAt,
			"node %d was listed with another data directory than %016x later: it has joined again, and this one is of no use", node, disk)
	}
	m, ok := pos.Member(node)
	listed := ok && !m.Removed && m.Disk != 0
	known := listed && m.Disk == disk
	if !listed || known {
		seen, err := t.o.Disks.Check(node, disk)
		if err != nil {
			return fmt.Errorf("%w: the data directory of node %d could not be recorded: %w", ErrClosed, node, err)
		}
		known = known || seen
	}
	if !known && !outranks(h, pos) {
		return t.refuse(node, Wiped, pos.Index,
			"node %d was known with another data directory than %016x: it has lost what it promised, and must join again", node, disk)
	}
	t.claimed(h, pos)
	return nil
}

// checkRemoved refuses a node that was removed, unless it has joined again since.
func (t *PeerTransport) checkRemoved(h *peerpb.Hello) error {
	node := h.GetNodeId()
	pos := t.o.Position()
	m, ok := pos.Member(node)
	removed := m.Removed
	if !ok {
		t.mu.RLock()
		removed = t.removed[node]
		t.mu.RUnlock()
	}
	if !removed || outranks(h, pos) {
		return nil
	}
	return t.refuse(node, Removed, pos.Index, "node %d was removed from the cluster: "+
		"erase its data directory and let it join again with a new id", node)
}

// check refuses a node that was removed or has lost its data directory. Removed
// comes first: a node that was removed does not come back by losing its data
// directory.
func (t *PeerTransport) check(h *peerpb.Hello) error {
	if err := t.checkRemoved(h); err != nil {
		return err
	}
	return t.checkDisk(h)
}

// recheck is check for a node whose greeting was accepted: the membership may have
// moved on since. It costs next to nothing when it has not.
func (t *PeerTransport) recheck(h *peerpb.Hello) error {
	node, disk := h.GetNodeId(), h.GetDiskId()
	t.mu.RLock()
	listed, claimed := t.listed[node], t.claims[node].disk
	same := !t.removed[node] && (disk == 0 || listed == 0 || listed == disk) && (claimed == 0 || claimed == disk)
	t.mu.RUnlock()
	if same {
		return nil
	}
	return t.check(h)
}

// checkAnswer verifies the greeting by which node peer answered one of this
// node's.
func (t *PeerTransport) checkAnswer(h *peerpb.Hello, peer uint64) error {
	if err := t.o.Identity.check(h, peer); err != nil {
		return err
	}
	return t.checkDisk(h)
}

// identity is how this node greets others at this moment.
func (t *PeerTransport) identity() Identity { return t.o.Identity.At(t.o.Position()) }

// At returns id as it is to be told by a node whose state is at pos.
func (id Identity) At(pos raftnode.Position) Identity {
	id.ListedAt = 0
	if m, ok := pos.Member(id.NodeID); ok && !m.Removed && m.Disk != 0 && m.Disk == id.DiskID {
		id.ListedAt = pos.Index
	}
	return id
}

// refuse returns the refusal of node for a reason that it acts on, and that was so
// where this node has applied the log up to.
func (t *PeerTransport) refuse(node uint64, kind Refusal, applied uint64, format string, args ...any) error {
	return &RefusedError{
		Peer: node, Kind: kind, Reason: fmt.Sprintf(format, args...),
		ClientAddr: t.o.Identity.ClientAddr, Applied: applied,
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
		go func() {
			_, err := greet(ctx, d, self, p)
			answers <- err
		}()
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

// ClientAddrs greets the given nodes, all at once, and returns where those that
// answer before ctx is done serve clients, whether they talk to this node or not.
func ClientAddrs(ctx context.Context, self Identity, peers []raftnode.Member) []string {
	d := newPeerDialer(nil, nil, time.Second)
	answers := make([]string, len(peers))
	var wg sync.WaitGroup
	for i, p := range peers {
		if p.ID == self.NodeID || p.Addr == "" {
			continue
		}
		wg.Go(func() {
			addr, err := greet(ctx, d, self, p)
			var r *RefusedError
			if errors.As(err, &r) {
				addr = r.ClientAddr
			}
			answers[i] = addr
		})
	}
	wg.Wait()
	return slices.DeleteFunc(answers, func(addr string) bool { return addr == "" })
}

// greet exchanges greetings with one node and leaves. It returns where the node
// serves clients.
func greet(ctx context.Context, d peerDialer, self Identity, p raftnode.Member) (string, error) {
	conn, err := d.conn(p.Addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	resp, err := peerpb.NewPeerClient(conn).StateHashes(ctx, &peerpb.StateHashesRequest{Hello: self.hello(p.ID)})
	if err != nil {
		return "", fromPeer(p.ID, err)
	}
	if err := self.check(resp.GetHello(), p.ID); err != nil {
		return "", err
	}
	return resp.GetHello().GetClientAddr(), nil
}
