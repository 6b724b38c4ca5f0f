package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/internal/crashpoint"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

const (
	// joinAttempt bounds one question to one member, joinRetry is the pause after
	// all of them failed.
	joinAttempt = 15 * time.Second
	joinRetry   = time.Second
	// progressEvery is how often a transfer that goes on says how far it is.
	progressEvery = 5 * time.Second
)

// joiner turns an empty directory into that of a member.
//
// The node asks to be made a learner, gets an image of the state that lists it,
// and begins its log behind the image. Until all is in place, by one rename,
// nothing was promised to anybody, and whatever a crash leaves is begun anew; the
// random id of the directory makes the cluster recognise the node that asks again.
type joiner struct {
	s      *Server
	dir    string
	points *crashpoint.Points
	memory datadir.Joining
}

// join makes the data directory that of a member, unless it is one already or
// the node is to found a cluster. It blocks until the state has been transferred,
// for as long as ctx allows.
func (s *Server) join(ctx context.Context) error {
	memory, joining, err := datadir.ReadJoining(s.c.DataDir)
	if err != nil {
		return err
	}
	if !joining && len(s.c.Join) == 0 {
		return nil
	}
	if id, err := datadir.ReadIdentity(s.c.DataDir); err == nil && !joining {
		if s.c.NodeID == 0 {
			s.became(id.NodeID)
		}
		return nil // it has joined before
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := datadir.Make(s.c.DataDir); err != nil {
		return fmt.Errorf("create the data directory: %w", err)
	}
	lock, err := datadir.Lock(s.c.DataDir)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Release() }() // opening the storage takes it again
	finished, err := datadir.FinishReplacement(s.c.DataDir)
	if err != nil {
		return err
	}
	if finished {
		id, err := datadir.ReadIdentity(s.c.DataDir)
		if err == nil {
			s.became(id.NodeID)
			err = removeReplaced(s.c.DataDir)
		}
		return err
	}
	if err := removeReplaced(s.c.DataDir); err != nil {
		return err
	}
	points, err := crashpoint.New(os.Environ())
	if err != nil {
		return err
	}
	j := &joiner{s: s, dir: s.c.DataDir, points: points, memory: memory}
	if !joining {
		foreign, err := datadir.Foreign(s.c.DataDir)
		if err != nil {
			return err
		}
		if foreign != "" {
			return fmt.Errorf("%w: %s has no %s file but holds %q; a node joins with an empty directory",
				ErrIncomplete, s.c.DataDir, datadir.IdentityName, foreign)
		}
		if j.memory.DiskID, err = datadir.NewDiskID(); err != nil {
			return err
		}
		j.memory.NodeID, j.memory.ReadReplica = s.c.NodeID, s.c.ReadReplica
	}
	if len(s.c.Join) > 0 {
		j.memory.Members = s.c.Join
	}
	if err := j.remember(); err != nil {
		return err
	}
	points.Pass("join:remembered")
	return j.run(ctx)
}

// became tells everything that was made before the node knew its id.
func (s *Server) became(id uint64) {
	s.c.NodeID = id
	s.log = s.o.Logger.With("node", id)
}

func (j *joiner) remember() error { return datadir.WriteJoining(j.dir, j.memory) }

func (j *joiner) run(ctx context.Context) error {
	s := j.s
	if err := s.listen(); err != nil {
		return err
	}
	resp, err := j.ask(ctx)
	if err != nil {
		return err
	}
	j.memory.NodeID = resp.GetNodeId()
	if err := j.remember(); err != nil {
		return err
	}
	s.became(resp.GetNodeId())
	j.points.Pass("join:accepted")
	s.log.Info("accepted as a learner; fetching the state", "event", "joining", "cluster_id", fmt.Sprintf("%016x", resp.GetClusterId()), "index", resp.GetIndex())

	images, err := snap.OpenStore(j.points.FS(vfs.Default), filepath.Join(j.dir, datadir.ImagesName), snap.Options{
		Logger: s.log.With("part", "images"), Now: s.o.Now,
	})
	if err != nil {
		return fmt.Errorf("open the images: %w", err)
	}
	self := s.identity(resp.GetClusterId(), j.memory.DiskID)
	var peers []raftnode.Member
	for _, m := range resp.GetMembers() {
		peers = append(peers, raftnode.Member{ID: m.GetNodeId(), Addr: m.GetPeerAddr()})
	}
	began := s.o.Now()
	image, err := rpc.FetchState(ctx, rpc.FetchOptions{
		Identity: self, Peers: peers, MinIndex: resp.GetIndex(), Store: images, Logger: s.log.With("part", "peers"),
		Progress: progressLog(s.log.With("event", "joining"), s.o.Now, progressEvery),
	})
	if err != nil {
		return fmt.Errorf("fetch the state: %w", err)
	}
	j.points.Pass("join:fetched")
	info, err := j.settle(self, images, image)
	if err != nil {
		return err
	}
	s.log.Info("joined; following the log from here", "event", "joined", "index", info.Index, "bytes", info.Bytes, "took", s.o.Now().Sub(began))
	return nil
}

// settle makes the content of the directory out of an image, and puts it in
// force.
func (j *joiner) settle(self rpc.Identity, images *snap.Store, image string) (snap.Info, error) {
	reader, err := images.Open(image)
	if err != nil {
		return snap.Info{}, err
	}
	defer reader.Close()
	info := reader.Info()
	r, err := datadir.BeginReplacement(j.dir, func(step string) { j.points.Pass("join:" + step) })
	if err != nil {
		return info, err
	}
	c := &j.s.c
	boot, err := rpc.EncodePosition(raftnode.Position{Index: bootstrapIndex, Term: bootstrapTerm, ConfState: &raftpb.ConfState{}})
	if err != nil {
		return info, err
	}
	fsm, err := router.Open(j.points.FS(vfs.Default), filepath.Join(r.Dir(), datadir.StateName), router.Options{
		Bootstrap: boot, Logger: j.s.log.With("part", "state"), MemTableBytes: c.Store.MemTableBytes,
	})
	if err != nil {
		return info, err
	}
	pos, err := fsm.Install(reader.Dir())
	if err = errors.Join(err, fsm.Close()); err != nil {
		return info, fmt.Errorf("install the fetched state: %w", err)
	}
	if pos.Index != info.Index || pos.Term != info.Term {
		return info, fmt.Errorf("%w: image %s says it is of entry %d, its content of %d", snap.ErrCorrupt, image, info.Index, pos.Index)
	}
	log, _, err := wal.Open(filepath.Join(r.Dir(), datadir.WALName), wal.Identity{ClusterID: self.ClusterID, NodeID: self.NodeID},
		wal.Start{Index: info.Index, Term: info.Term, ConfState: info.ConfState},
		wal.Options{Logger: j.s.log.With("part", "wal"), SegmentBytes: c.Raft.SegmentBytes})
	if err == nil {
		err = log.Close()
	}
	if err != nil {
		return info, fmt.Errorf("begin the log: %w", err)
	}
	err = datadir.WriteIdentity(r.Dir(), datadir.Identity{
		FormatVersion: datadir.FormatVersion, ClusterID: self.ClusterID, ClusterName: c.ClusterName, NodeID: self.NodeID,
		CreatedAt: j.s.o.Now().UTC().Truncate(time.Second), DiskID: self.DiskID, Initialized: true,
	})
	if err != nil {
		return info, err
	}
	if _, err := r.Commit(datadir.ImagesName, datadir.BackupsName, disksName); err != nil {
		return info, err
	}
	// What it replaced is the note that this node joins, and of a member that lost
	// its directory the beginning it had made without knowing.
	return info, removeReplaced(j.dir)
}

// removeReplaced removes what a join has put out of force, known by the note in
// it, which goes last. What an interrupted one has left is removed by the next
// start, or no second join could ever begin; what an operator's recovery keeps
// stays.
func removeReplaced(dir string) error {
	kept := filepath.Join(dir, datadir.BeforeName)
	wrap := func(err error) error { return fmt.Errorf("remove what a join has replaced: %w", err) }
	if _, err := os.Stat(filepath.Join(kept, datadir.JoiningName)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return wrap(err)
	}
	entries, err := os.ReadDir(kept)
	if err != nil {
		return wrap(err)
	}
	for _, e := range entries {
		if e.Name() == datadir.JoiningName {
			continue
		}
		if err := os.RemoveAll(filepath.Join(kept, e.Name())); err != nil {
			return wrap(err)
		}
	}
	return datadir.RemoveKept(dir)
}

// ask asks the members in turn until one accepts the node. A definite refusal
// ends it.
func (j *joiner) ask(ctx context.Context) (*clusterpb.JoinMemberResponse, error) {
	s := j.s
	said := ""
	for {
		if said != "" || len(j.memory.Members) == 0 {
			j.findMembers(ctx)
		}
		var last error
		for _, addr := range j.memory.Members {
			resp, err := j.askOne(ctx, addr)
			if err == nil {
				return resp, nil
			}
			last = fmt.Errorf("%s: %w", addr, err)
			switch status.Code(err) {
			case codes.InvalidArgument:
				return nil, fmt.Errorf("the cluster does not take this node: %w", last)
			case codes.FailedPrecondition:
				reason := rpc.ReasonOf(status.Convert(err))
				if reason == rpc.ReasonMemberRemoved {
					return nil, fmt.Errorf("%w (%w)", j.markRemoved(), last)
				}
				if j.memory.Rejoin || reason == "MEMBERSHIP_PENDING" {
					// A member has to come back: the others may take a moment to
					// notice that its old self is gone, or be too few just now.
					continue
				}
				if j.memory.NodeID == 0 || reason != rpc.ReasonOtherDisk {
					return nil, fmt.Errorf("the cluster does not take this node: %w", last)
				}
				// The node was told its id, and this directory is empty: it is the
				// member whose directory was lost. From here on it asks as that,
				// also after a crash, for its old self may be gone by then.
				s.log.Warn("this node is a member whose data directory was lost; it comes back as a learner", "event", "rejoining", "err", err)
				j.memory.Rejoin = true
				if err := j.remember(); err != nil {
					return nil, err
				}
			}
		}
		if last == nil {
			return nil, errors.New("no member to ask is known; give one with --join")
		}
		if text := last.Error(); text != said {
			said = text
			s.log.Warn("no member has accepted this node yet; asking again", "event", "join_waits", "err", last)
		}
		timer := time.NewTimer(joinRetry)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the node has not joined: %w (last: %w)", ctx.Err(), last)
		}
	}
}

// findMembers asks the nodes of --peers where they serve clients: a member that was
// started on an empty directory knows one of them, who may be gone by now.
func (j *joiner) findMembers(ctx context.Context) {
	c := &j.s.c
	if !j.memory.Rejoin || len(c.Peers) == 0 {
		return
	}
	var peers []raftnode.Member
	for _, p := range c.Peers {
		peers = append(peers, raftnode.Member{ID: p.ID, Addr: p.Addr})
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	self := j.s.identity(datadir.ClusterID(c.ClusterName, c.Members()), j.memory.DiskID)
	for _, addr := range rpc.ClientAddrs(ctx, self, peers) {
		if !slices.Contains(j.memory.Members, addr) {
			j.memory.Members = append(j.memory.Members, addr)
		}
	}
}

// markRemoved makes the directory one that is never started again, as far as there
// is anything in it, and returns the error that says so.
func (j *joiner) markRemoved() error {
	gone := removedError(j.memory.NodeID, j.dir)
	id, err := datadir.ReadIdentity(j.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return gone // it asks again at the next start, and hears the same
	}
	if err == nil {
		id.Removed = true
		err = datadir.WriteIdentity(j.dir, id)
	}
	if err == nil {
		err = datadir.RemoveJoining(j.dir)
	}
	if err != nil {
		return fmt.Errorf("%w; this could not be noted for the next start: %w", gone, err)
	}
	return gone
}

func (j *joiner) askOne(ctx context.Context, addr string) (*clusterpb.JoinMemberResponse, error) {
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, joinAttempt)
	defer cancel()
	s := j.s
	return clusterpb.NewClusterClient(conn).JoinMember(ctx, &clusterpb.JoinMemberRequest{
		NodeId: j.memory.NodeID, PeerAddr: actual(s.c.AdvertiseRaftAddr, s.peerLis), ClientAddr: actual(s.c.AdvertiseAddr, s.clientLis),
		DiskId: j.memory.DiskID, ClusterName: s.c.ClusterName, Version: ReadBuild().Version,
		ReadReplica: j.memory.ReadReplica, Rejoin: j.memory.Rejoin,
	})
}

// listen opens the listeners, unless they are open.
func (s *Server) listen() error {
	var err error
	if s.peerLis == nil {
		if s.peerLis, err = net.Listen("tcp", s.c.RaftAddr); err != nil {
			return fmt.Errorf("listen for peers (--raft-addr): %w", err)
		}
	}
	if s.clientLis == nil {
		if s.clientLis, err = net.Listen("tcp", s.c.ListenAddr); err != nil {
			return fmt.Errorf("listen for clients (--listen-addr): %w", err)
		}
	}
	return nil
}

// identity is how this node greets others.
func (s *Server) identity(cluster, disk uint64) rpc.Identity {
	return rpc.Identity{
		ClusterID: cluster, NodeID: s.c.NodeID, PeerAddr: actual(s.c.AdvertiseRaftAddr, s.peerLis),
		ClientAddr: actual(s.c.AdvertiseAddr, s.clientLis), Version: ReadBuild().Version, DiskID: disk,
	}
}
