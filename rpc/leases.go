package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"

	"conveyor.etl/router/rpc/peerpb"
)

const (
	// silencesPerFrame bounds those in one frame, about 1 MiB of the longest ids.
	silencesPerFrame = 2048
	// maxSilences bounds the sidecars, and the services, of one digest: the
	// largest cluster that can be, all of it silent.
	maxSilences = maxBeatsPending
)

// ShareLeases brings a digest of the leases, which need not have a greeting, to
// node. It blocks until node has taken it or ctx is done, and fails when node
// refuses it.
func (t *PeerTransport) ShareLeases(ctx context.Context, node uint64, d *peerpb.LeaseDigest) error {
	conn, err := t.connect(node)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := peerpb.NewPeerClient(conn).ShareLeases(ctx)
	if err != nil {
		return fromPeer(node, err)
	}
	frame := &peerpb.LeaseDigest{Hello: t.o.Identity.hello(node), Term: d.GetTerm(), Epoch: d.GetEpoch(), Revision: d.GetRevision()}
	sidecars, services := d.GetSidecars(), d.GetServices()
	for {
		n := min(len(sidecars), silencesPerFrame)
		frame.Sidecars, sidecars = sidecars[:n], sidecars[n:]
		n = min(len(services), silencesPerFrame-n)
		frame.Services, services = services[:n], services[n:]
		if err := stream.Send(frame); err != nil && !errors.Is(err, io.EOF) {
			return fromPeer(node, err)
		} else if err != nil || len(sidecars)+len(services) == 0 {
			break // CloseAndRecv learns why the stream ended
		}
		frame = &peerpb.LeaseDigest{}
	}
	resp, err := stream.CloseAndRecv()
	if err != nil {
		return fromPeer(node, err)
	}
	if err := t.checkAnswer(resp.GetHello(), node); err != nil {
		return err
	}
	if resp.GetRefused() != "" {
		return fmt.Errorf("rpc: node %d did not take a digest of the leases: %s", node, resp.GetRefused())
	}
	return nil
}

// ShareLeases implements peerpb.PeerServer. A digest counts only when it came
// whole: half of one would make the other half seem to be there.
func (s *PeerServer) ShareLeases(stream peerpb.Peer_ShareLeasesServer) error {
	whole, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := whole.GetHello()
	done, err := s.greet(hello, false)
	if err != nil {
		return err
	}
	defer done()
	for {
		if len(whole.GetSidecars()) > maxSilences || len(whole.GetServices()) > maxSilences {
			return InvalidArgument("sidecars", fmt.Sprintf("more than %d silences of one kind", maxSilences)).Err()
		}
		next, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		whole.Sidecars = append(whole.Sidecars, next.GetSidecars()...)
		whole.Services = append(whole.Services, next.GetServices()...)
	}
	resp := &peerpb.LeaseDigestTaken{Hello: s.self.hello(hello.GetNodeId())}
	if s.c.Leases == nil {
		resp.Refused = "this node keeps none"
	} else if err := s.c.Leases(whole); err != nil {
		resp.Refused = err.Error()
	}
	return stream.SendAndClose(resp)
}
