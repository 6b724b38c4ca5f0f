package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/peerpb"
)

// Bounds of what a node says about its state: beyond them something is wrong
// with it.
const (
	maxHashes    = 256
	maxSums      = 256
	maxFullBytes = 64
	// maxReason bounds the reason in a Quarantine, in bytes.
	maxReason = 1024
)

// HashedState is a state that knows its hashes. *router.FSM is one.
type HashedState interface {
	// RecentSums returns the sums of the newest indexes, the newest last.
	RecentSums() []router.Sums
	// HashAt hashes everything at exactly index, 0 for now.
	HashAt(ctx context.Context, index uint64) (router.StateHash, error)
}

// StateHashes implements peerpb.PeerServer: it tells the hashes of this node's
// state. Of a state that is known to be wrong it tells none, so that nobody
// counts them.
func (s *PeerServer) StateHashes(ctx context.Context, req *peerpb.StateHashesRequest) (*peerpb.StateHashesResponse, error) {
	done, err := s.greet(req.GetHello(), false)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := s.c.Gate.Final(); err != nil {
		return nil, Status(err).Err()
	}
	if s.c.State == nil {
		return nil, status.Error(codes.Unimplemented, "this node keeps no hashes of its state")
	}
	if req.GetAgreedIndex() > 0 && s.c.Agreed != nil {
		s.c.Agreed(req.GetAgreedIndex(), req.GetAgreedEpoch())
	}
	resp := &peerpb.StateHashesResponse{Hello: s.c.Transport.identity().hello(req.GetHello().GetNodeId())}
	if req.GetFull() {
		h, err := s.c.State.HashAt(ctx, req.GetIndex())
		if err != nil {
			return nil, Status(err).Err()
		}
		resp.Hashes = []*peerpb.StateHash{{Index: h.Index, Epoch: h.Epoch, Full: h.Hash}}
		return resp, nil
	}
	for _, sums := range s.c.State.RecentSums() {
		resp.Hashes = append(resp.Hashes, &peerpb.StateHash{Index: sums.Index, Epoch: sums.Epoch, Sums: sums.Sums})
	}
	return resp, nil
}

// Quarantine implements peerpb.PeerServer. Another node's word is only a reason
// to look: this node compares for itself.
func (s *PeerServer) Quarantine(ctx context.Context, req *peerpb.QuarantineRequest) (*peerpb.QuarantineResponse, error) {
	done, err := s.greet(req.GetHello(), false)
	if err != nil {
		return nil, err
	}
	defer done()
	e := req.GetExpected()
	if len(e.GetSums()) > maxSums || len(req.GetReason()) > maxReason {
		return nil, Status(fmt.Errorf("%w: a quarantine with %d sums and a reason of %d bytes", ErrMalformed, len(e.GetSums()), len(req.GetReason()))).Err()
	}
	if s.c.Suspect == nil {
		return &peerpb.QuarantineResponse{Message: "this node does not compare its state"}, nil
	}
	agreed, message := s.c.Suspect(ctx, req.GetHello().GetNodeId(),
		router.Sums{Index: e.GetIndex(), Epoch: e.GetEpoch(), Sums: e.GetSums()}, req.GetReason())
	return &peerpb.QuarantineResponse{Accepted: agreed, Message: message}, nil
}

// hashClient asks one node over one connection.
type hashClient struct {
	self Identity
	node uint64
	conn *grpc.ClientConn
	// disk refuses a node with another data directory than it had; nil trusts
	// all.
	disk func(*peerpb.Hello) error
}

func (c hashClient) ask(ctx context.Context, req *peerpb.StateHashesRequest) ([]*peerpb.StateHash, error) {
	req.Hello = c.self.hello(c.node)
	resp, err := peerpb.NewPeerClient(c.conn).StateHashes(ctx, req)
	if err != nil {
		return nil, askFailed(c.node, err)
	}
	if err := c.self.check(resp.GetHello(), c.node); err != nil {
		return nil, err
	}
	if c.disk != nil {
		if err := c.disk(resp.GetHello()); err != nil {
			return nil, err
		}
	}
	if len(resp.GetHashes()) > maxHashes {
		return nil, fmt.Errorf("%w: %d hashes of node %d", ErrMalformed, len(resp.GetHashes()), c.node)
	}
	for _, h := range resp.GetHashes() {
		if len(h.GetSums()) > maxSums || len(h.GetFull()) > maxFullBytes {
			return nil, fmt.Errorf("%w: a hash of node %d of %d sums and %d bytes", ErrMalformed, c.node, len(h.GetSums()), len(h.GetFull()))
		}
	}
	return resp.GetHashes(), nil
}

// askFailed gives the refusals a caller acts on their sentinel back.
func askFailed(node uint64, err error) error {
	st, _ := status.FromError(err)
	switch st.Code() {
	case codes.FailedPrecondition:
		return fmt.Errorf("%w: node %d says: %s", router.ErrIndexPassed, node, st.Message())
	case codes.ResourceExhausted:
		return fmt.Errorf("%w: node %d says: %s", router.ErrHashBusy, node, st.Message())
	case codes.Unavailable, codes.Unimplemented:
		return fmt.Errorf("%w: node %d: %s", ErrUnreachable, node, st.Message())
	}
	return fromPeer(node, err)
}

func (c hashClient) sums(ctx context.Context, req *peerpb.StateHashesRequest) ([]router.Sums, error) {
	hashes, err := c.ask(ctx, req)
	if err != nil {
		return nil, err
	}
	out := make([]router.Sums, len(hashes))
	for i, h := range hashes {
		out[i] = router.Sums{Index: h.GetIndex(), Epoch: h.GetEpoch(), Sums: h.GetSums()}
	}
	return out, nil
}

// Sums returns what node tells of its state, and tells it up to which index, of
// which epoch, that was seen to be a majority's; an index of zero tells nothing. It
// blocks until ctx is done at most.
func (t *PeerTransport) Sums(ctx context.Context, node, agreedIndex, agreedEpoch uint64) ([]router.Sums, error) {
	conn, err := t.connect(node)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return hashClient{t.identity(), node, conn, t.checkDisk}.sums(ctx,
		&peerpb.StateHashesRequest{AgreedIndex: agreedIndex, AgreedEpoch: agreedEpoch})
}

// HashAt lets node read all of its state at exactly index, 0 for now. It fails
// with router.ErrIndexPassed when node is past it, router.ErrHashBusy when it
// does so for somebody else.
func (t *PeerTransport) HashAt(ctx context.Context, node, index uint64) (router.StateHash, error) {
	conn, err := t.connect(node)
	if err != nil {
		return router.StateHash{}, err
	}
	defer conn.Close()
	hashes, err := hashClient{t.identity(), node, conn, t.checkDisk}.ask(ctx, &peerpb.StateHashesRequest{Full: true, Index: index})
	if err != nil {
		return router.StateHash{}, err
	}
	if len(hashes) != 1 || index != 0 && hashes[0].GetIndex() != index {
		return router.StateHash{}, fmt.Errorf("%w: node %d answered a question about index %d with %d hashes", ErrMalformed, node, index, len(hashes))
	}
	h := hashes[0]
	return router.StateHash{Index: h.GetIndex(), Epoch: h.GetEpoch(), Hash: h.GetFull()}, nil
}

// Quarantine tells node that its state is not the expected one, or, without sums
// in expected, that nobody knows whether it is. It returns whether node agrees,
// and its reason. Deciding takes node as long as asking the others.
func (t *PeerTransport) Quarantine(ctx context.Context, node uint64, expected router.Sums, reason string) (bool, string, error) {
	conn, err := t.connect(node)
	if err != nil {
		return false, "", err
	}
	defer conn.Close()
	resp, err := peerpb.NewPeerClient(conn).Quarantine(ctx, &peerpb.QuarantineRequest{
		Hello:    t.identity().hello(node),
		Expected: &peerpb.StateHash{Index: expected.Index, Epoch: expected.Epoch, Sums: expected.Sums},
		Reason:   reason[:min(len(reason), maxReason)],
	})
	if err != nil {
		return false, "", askFailed(node, err)
	}
	return resp.GetAccepted(), resp.GetMessage(), nil
}

// FetchSums asks the peers of o, except this node, for the sums of their states,
// each once and all at a time, and returns those that answered before ctx was
// done, with the reasons of the others. It is for a node that has no raft
// running.
func FetchSums(ctx context.Context, o FetchOptions) (map[uint64][]router.Sums, error) {
	o.ensureDefaults()
	d := newPeerDialer(o.Dial, o.Credentials, o.DialTimeout)
	type answer struct {
		node uint64
		sums []router.Sums
		err  error
	}
	peers := slices.DeleteFunc(slices.Clone(o.Peers), func(p raftnode.Member) bool {
		return p.ID == o.Identity.NodeID || p.Addr == ""
	})
	answers := make(chan answer, len(peers))
	for _, p := range peers {
		go func() {
			conn, err := d.conn(p.Addr)
			if err != nil {
				answers <- answer{p.ID, nil, err}
				return
			}
			defer conn.Close()
			sums, err := hashClient{o.Identity, p.ID, conn, nil}.sums(ctx, &peerpb.StateHashesRequest{})
			answers <- answer{p.ID, sums, err}
		}()
	}
	out := map[uint64][]router.Sums{}
	var errs []error
	for range peers {
		a := <-answers
		if a.err != nil {
			errs = append(errs, fmt.Errorf("node %d: %w", a.node, a.err))
			continue
		}
		out[a.node] = a.sums
	}
	return out, errors.Join(errs...)
}
