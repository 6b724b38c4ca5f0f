package rpc

import (
	"context"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// maxPlannedAsks bounds how many registrations at a node that does not lead ask the
// leader at once how far the placement is. When a fleet registers at once the others
// wait as if nobody could be asked.
const maxPlannedAsks = 256

// awaitPlanned blocks until the placement, while this node leads, has looked at
// everything up to revision and recorded what came of it, or until ctx is done. It
// fails with raftnode.ErrNoLeader when this node does not lead.
func (s *Server) awaitPlanned(ctx context.Context, revision uint64) error {
	for {
		// Taken before the looks, so that no change is missed.
		planned, lead := s.cfg.PlannedChanged(), s.cfg.Node.Changed()
		if s.cfg.Planned() >= revision {
			return nil
		}
		if !s.cfg.Node.Leadership().Leading {
			return raftnode.ErrNoLeader
		}
		select {
		case <-planned:
		case <-lead:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.run.Done():
			return raftnode.ErrStopping
		}
	}
}

// knowsPlanned says whether this node can tell how far its placement is.
func (s *Server) knowsPlanned() bool { return s.cfg.Planned != nil && s.cfg.PlannedChanged != nil }

// planned returns true once the state of this node holds whatever the placement has
// come to about everything up to revision, and false when nobody can be asked, or ctx
// is done first.
func (a *sidecarAPI) planned(ctx context.Context, revision uint64) bool {
	if !a.knowsPlanned() {
		return false
	}
	if a.cfg.Node.Leadership().Leading {
		return a.awaitPlanned(ctx, revision) == nil
	}
	select {
	case a.plannedAsks <- struct{}{}:
		defer func() { <-a.plannedAsks }()
	default:
		return false
	}
	conn, rctx, err := a.relay.connect(ctx)
	if err != nil {
		return false
	}
	resp, err := clusterpb.NewClusterClient(conn).AwaitPlanned(rctx, &clusterpb.AwaitPlannedRequest{Revision: revision})
	return err == nil && a.reader.waitRevision(ctx, resp.GetRevision()) == nil
}

// AwaitPlanned blocks until the placement has looked at everything up to a revision.
func (a *clusterAPI) AwaitPlanned(ctx context.Context, req *clusterpb.AwaitPlannedRequest) (*clusterpb.AwaitPlannedResponse, error) {
	if !a.cfg.Node.Leadership().Leading {
		conn, rctx, err := a.relay.connect(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := clusterpb.NewClusterClient(conn).AwaitPlanned(rctx, req)
		return resp, relayedErr(err)
	}
	if !a.knowsPlanned() {
		return nil, errNoPlacement()
	}
	if err := a.awaitPlanned(ctx, req.GetRevision()); err != nil {
		return nil, err
	}
	return &clusterpb.AwaitPlannedResponse{Revision: a.cfg.State.Revision()}, nil
}
