package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"

	"conveyor.etl/router/control"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc"
)

const (
	// keptPrefix begins the name of the copy of a state that was wrong, which is
	// kept for a post-mortem: state.diverged-INDEX, the last one only.
	keptPrefix = "state.diverged-"
	// sourceTimeout bounds one question to the others for a right state,
	// sourceRetry is the pause before the next.
	sourceTimeout = 2 * time.Second
	sourceRetry   = time.Second
)

// rebuild replaces a state that is known to be wrong by that of a member which
// is right. The log and what this node promised the others stay: they are not
// made from the state. It blocks until a member is found, for as long as ctx
// allows. Every step may be repeated after a crash; the note that demands them
// goes last.
func (s *Server) rebuild(ctx context.Context, self rpc.Identity) error {
	q := s.disk.quarantine
	if q == nil {
		return nil
	}
	begun := s.o.Now()
	s.log.Error("the state on disk is wrong; it is replaced by another node's before anything is answered", "event", "rebuilding",
		"why", q.Reason, "index", q.Index, "since", q.Since)
	refuse, err := s.refuseAll(q.Reason)
	if err != nil {
		return err
	}
	err = s.replaceState(ctx, self, q)
	if err = errors.Join(err, refuse()); err != nil {
		return err
	}
	s.disk.quarantine = nil
	s.log.Info("the state was rebuilt", "event", "rebuilt", "index", s.disk.machine.Applied().Index, "took", s.o.Now().Sub(begun))
	return nil
}

func (s *Server) replaceState(ctx context.Context, self rpc.Identity, q *datadir.Quarantine) error {
	if err := s.keepState(q); err != nil {
		s.log.Warn("the wrong state could not be kept for a post-mortem", "err", err)
	}
	// Images made here are of the wrong state; nobody may ever get them.
	if err := s.disk.images.Purge(0); err != nil {
		return fmt.Errorf("remove the images of the wrong state: %w", err)
	}
	// Nor what users have made of it, since it was last known to be right.
	if err := s.disk.shelf.Doubt(fmt.Sprintf("the state of node %d turned out to be wrong after it was made (%s)", s.c.NodeID, q.Reason)); err != nil {
		return fmt.Errorf("mark the snapshots of the wrong state: %w", err)
	}
	members := s.known.fill(raftnode.Live(s.disk.machine.Applied().Members))
	sources, err := s.findSources(ctx, self, q, members)
	if err != nil {
		return err
	}
	first, err := s.disk.log.FirstIndex()
	if err != nil {
		return err
	}
	// Not behind what was answered from the old state: a client must not see
	// time go back.
	least := max(first-1, s.disk.machine.Applied().Index)
	id, err := rpc.FetchState(ctx, rpc.FetchOptions{
		Identity: self, Peers: sources, MinIndex: least, Store: s.disk.images, Logger: s.log.With("part", "peers"),
	})
	if err != nil {
		return fmt.Errorf("fetch a right state: %w", err)
	}
	s.disk.points.Pass("rebuild:install")
	if _, err := s.disk.machine.Install(s.disk.images.Dir(id)); err != nil {
		return fmt.Errorf("install the fetched state: %w", err)
	}
	s.disk.points.Pass("rebuild:installed")
	if err := datadir.RemoveQuarantine(s.c.DataDir); err != nil {
		return err
	}
	s.disk.points.Pass("rebuild:done")
	return nil
}

// findSources waits for members whose states are right.
func (s *Server) findSources(ctx context.Context, self rpc.Identity, q *datadir.Quarantine, members []raftnode.Member) ([]raftnode.Member, error) {
	said := ""
	timer := time.NewTimer(sourceRetry)
	defer timer.Stop()
	for {
		ask, cancel := context.WithTimeout(ctx, sourceTimeout)
		reports, failed := rpc.FetchSums(ask, rpc.FetchOptions{Identity: self, Peers: members})
		cancel()
		ids := control.Sources(s.c.NodeID, q.Agreed, reports)
		var sources []raftnode.Member
		for _, m := range members {
			for _, id := range ids {
				if m.ID == id {
					sources = append(sources, m)
				}
			}
		}
		if len(sources) > 0 {
			return sources, nil
		}
		why := "those that answered differ from each other"
		if failed != nil {
			why = failed.Error()
		}
		if why != said {
			said = why
			s.log.Warn("no member whose state is right can be reached; waiting for one", "event", "rebuild_waits", "right", q.Agreed, "why", why)
		}
		timer.Reset(sourceRetry)
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the state of this node is wrong (%s) and no right one was found (%s): %w", q.Reason, why, ctx.Err())
		case <-timer.C:
		}
	}
}

// keepState puts a copy of the state aside. Its tables are links, so it costs
// little until the state moves on.
func (s *Server) keepState(q *datadir.Quarantine) error {
	name := fmt.Sprintf("%s%d", keptPrefix, q.Index)
	entries, err := os.ReadDir(s.c.DataDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == name {
			return nil // by an earlier attempt: the state may be the new one by now
		}
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), keptPrefix) {
			if err := os.RemoveAll(filepath.Join(s.c.DataDir, e.Name())); err != nil {
				return err
			}
		}
	}
	tmp := filepath.Join(s.c.DataDir, keptPrefix+"tmp")
	if _, err := s.disk.machine.Image(tmp); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, filepath.Join(s.c.DataDir, name)); err != nil {
		return err
	}
	return datadir.SyncDir(s.c.DataDir)
}

// refuseAll answers every call of clients and peers that nothing is answered,
// so that nobody waits for a node that may take long. The returned function
// ends that and listens at the same addresses again.
func (s *Server) refuseAll(reason string) (func() error, error) {
	refusal := rpc.Status(fmt.Errorf("%w: %s", rpc.ErrQuarantined, reason)).Err()
	var servers []*grpc.Server
	for i, lis := range []net.Listener{s.clientLis, s.peerLis} {
		o := []grpc.ServerOption{grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return refusal })}
		if i == 1 {
			o = append(o, rpc.PeerServerOptions()...)
		}
		server := grpc.NewServer(o...)
		if i == 0 {
			h := health.NewServer()
			h.Shutdown() // NOT_SERVING, for good
			healthgrpc.RegisterHealthServer(server, h)
		}
		servers = append(servers, server)
		s.serving.Go(func() {
			if err := server.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				s.log.Warn("refusing calls ended", "addr", lis.Addr(), "err", err)
			}
		})
	}
	return func() error {
		for _, server := range servers {
			server.Stop()
		}
		s.serving.Wait()
		var errs [2]error
		s.clientLis, errs[0] = relisten(s.clientLis)
		s.peerLis, errs[1] = relisten(s.peerLis)
		return errors.Join(errs[:]...)
	}, nil
}

// relisten listens where the closed lis did.
func relisten(lis net.Listener) (net.Listener, error) {
	again, err := net.Listen("tcp", lis.Addr().String())
	if err != nil {
		return lis, fmt.Errorf("listen on %s again: %w", lis.Addr(), err)
	}
	return again, nil
}
