package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc"
)

// The reasons a running node ends for what the others say of it.
var (
	// errRejoin: this node is a member whose data directory was lost; started
	// again, it joins.
	errRejoin = errors.New("server: the data directory of this member was lost; it has to join again")
	// ErrRemoved: this node is no member any more. Its data directory is of no
	// use.
	ErrRemoved = errors.New("server: this node was removed from the cluster")
)

// askTimeout bounds how long a node that founds a cluster listens to the others
// before it goes on: the others may not run yet.
const askTimeout = time.Second

// askBefore asks the others, before a node with a fresh directory becomes a
// voter, whether they know it with another one. Those that are down do not
// count: on a first start nobody is up before the first. What makes this safe is
// not the question but that whoever knew the old directory never accepts a
// message of the new one; asking first only saves a start.
func (s *Server) askBefore(ctx context.Context, self rpc.Identity) error {
	if !s.disk.fresh || len(s.c.Peers) < 2 {
		return nil
	}
	var peers []raftnode.Member
	for _, p := range s.c.Peers {
		peers = append(peers, raftnode.Member{ID: p.ID, Addr: p.Addr})
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	switch r := rpc.AskRefusal(ctx, self, peers); {
	case r == nil:
	default:
		return s.rejoinAs(r)
	}
	return nil
}

// outdated reports whether node, which is at pos, knows better than somebody who
// has applied no more than applied. What a node says of the members was so there:
// a later word of the cluster, which this node has applied itself, outweighs it.
// One that lags may not know yet that this node has joined again.
func outdated(pos raftnode.Position, node, applied uint64) bool {
	m, ok := pos.Member(node)
	return ok && !m.Removed && pos.Index > bootstrapIndex && applied <= pos.Index
}

// refused is told when another node does not talk to this one. It does not
// block.
func (s *Server) refused(r *rpc.RefusedError) {
	pos := s.disk.machine.Applied()
	if outdated(pos, s.c.NodeID, r.Applied) {
		s.log.Debug("a node that lags refuses this one", "peer", r.Peer, "applied_there", r.Applied, "err", r)
		return
	}
	last, err := s.disk.log.LastIndex()
	empty := err == nil && last <= bootstrapIndex && pos.Index <= bootstrapIndex
	switch {
	case r.Kind == rpc.Removed && !empty:
		// Who says so has applied more of the log than this node, and a directory
		// that was removed never comes back: this is final.
		s.leave(r.Error())
	case r.Kind == rpc.Removed || r.Kind == rpc.Wiped:
		if !empty {
			// It holds entries: it is not empty, and whatever the other one
			// remembers, throwing this away could only lose.
			s.log.Error("another node knows this one with another data directory, and this directory is not empty; "+
				"if it was copied or restored, remove the node from the cluster and let it join again", "event", "disk_unknown", "err", r)
			return
		}
		// Several may say so at once, and there is one note to write.
		s.rejoining.Do(func() { s.fail(s.rejoinAs(r)) })
	}
}

// rejoinAs notes that this node, whose directory holds nothing, has to join again,
// for its next start. It does so as well when it was told that it was removed: who
// says that may lag behind its return, or not know that it was taken out only to
// come back, and an empty node has no log to tell by. The leader knows, and says
// for good when it asks to be taken in.
func (s *Server) rejoinAs(r *rpc.RefusedError) error {
	s.log.Warn("the data directory of this member was lost; it does not vote, and joins again as a learner", "event", "wiped", "told_by", r.Peer)
	members := []string{r.ClientAddr}
	if r.ClientAddr == "" {
		members = nil
	}
	s.disk.points.Pass("rejoin:before")
	err := datadir.WriteJoining(s.c.DataDir, datadir.Joining{
		DiskID: s.disk.id.DiskID, NodeID: s.c.NodeID, Rejoin: true, Members: members,
	})
	s.disk.points.Pass("rejoin:after")
	if err != nil {
		// Starting again would only come here again.
		return fmt.Errorf("note that this member has to join again: %w", err)
	}
	return errRejoin
}
