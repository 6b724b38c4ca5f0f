package raftnode

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/snap"
)

// imageSend is one image on its way to a peer.
type imageSend struct {
	msg   *raftpb.Message
	id    string
	index uint64
}

// snapshots builds, sends and clears away images of the state. The loop only
// asks for them; all work on disk and network happens in step functions that
// background goroutines run, or a test.
type snapshots struct {
	cfg    *Config
	sm     StateMachine
	images *snap.Store
	tr     Transport
	in     *inbox

	// wake receives when step has something to do, sendWake when a send waits.
	wake     chan struct{}
	sendWake chan struct{}

	mu        sync.Mutex
	wantBuild bool
	wantPurge bool
	building  bool
	// buildFrom pins the log while an image is being built at or after it.
	buildFrom uint64
	// retryAt: a failed build is not repeated before.
	retryAt time.Time
	// fresh pins the newest image until freshUntil, so that the log is not
	// truncated past it before raft gets round to sending it.
	fresh      uint64
	freshUntil time.Time
	queue      []*imageSend
	// sending counts the queued and running sends per index.
	sending map[uint64]int
	// stepped holds the images of snapshots raft has accepted, by index.
	stepped map[uint64]*snap.Reader
	discard []string
}

func newSnapshots(cfg *Config, sm StateMachine, images *snap.Store, tr Transport, in *inbox) *snapshots {
	return &snapshots{
		cfg: cfg, sm: sm, images: images, tr: tr, in: in,
		wake: make(chan struct{}, 1), sendWake: make(chan struct{}, cfg.MaxImageSenders),
		sending: map[uint64]int{}, stepped: map[uint64]*snap.Reader{},
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// newest returns the newest image a peer can continue from: not older than the
// entry before the log's first, and made under the present configuration, since
// raft ignores a snapshot whose configuration does not list the receiver.
// Without one it asks for one to be built. It runs on the loop and does no IO.
func (s *snapshots) newest(first uint64, cs *raftpb.ConfState, now time.Time) *raftpb.Snapshot {
	for _, info := range s.images.List() {
		if info.Index+1 < first || info.ConfState == nil || !sameConfState(info.ConfState, cs) {
			continue
		}
		s.mu.Lock()
		s.fresh, s.freshUntil = info.Index, now.Add(s.cfg.ImageRetry)
		s.mu.Unlock()
		return &raftpb.Snapshot{
			Data: []byte(info.ID),
			Metadata: &raftpb.SnapshotMetadata{
				ConfState: cloneConfState(info.ConfState), Index: new(info.Index), Term: new(info.Term),
			},
		}
	}
	s.mu.Lock()
	ask := !s.wantBuild && !s.building && !now.Before(s.retryAt)
	if ask {
		s.wantBuild = true
		s.buildFrom = s.sm.Applied().Index
	}
	s.mu.Unlock()
	if ask {
		signal(s.wake)
	}
	return nil
}

// send queues the image m names for its target.
func (s *snapshots) send(m *raftpb.Message) {
	job := &imageSend{msg: m, id: string(m.GetSnapshot().GetData()), index: m.GetSnapshot().GetMetadata().GetIndex()}
	s.mu.Lock()
	s.queue = append(s.queue, job)
	s.sending[job.index]++
	s.mu.Unlock()
	signal(s.sendWake)
}

// pinned returns the lowest index an image may still be needed from, false when
// none is.
func (s *snapshots) pinned(now time.Time) (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	low, ok := uint64(0), false
	pin := func(i uint64) {
		if !ok || i < low {
			low, ok = i, true
		}
	}
	for i := range s.sending {
		pin(i)
	}
	if s.wantBuild || s.building {
		pin(s.buildFrom)
	}
	if now.Before(s.freshUntil) {
		pin(s.fresh)
	}
	return low, ok
}

// sendStep sends one queued image; false when none waits.
func (s *snapshots) sendStep(ctx context.Context) bool {
	s.mu.Lock()
	if len(s.queue) == 0 {
		s.mu.Unlock()
		return false
	}
	job := s.queue[0]
	s.queue = s.queue[1:]
	more := len(s.queue) > 0
	s.mu.Unlock()
	if more {
		signal(s.sendWake)
	}

	start := s.cfg.Clock.Now()
	size, err := s.sendImage(ctx, job)
	s.mu.Lock()
	if s.sending[job.index]--; s.sending[job.index] <= 0 {
		delete(s.sending, job.index)
	}
	s.mu.Unlock()
	to := job.msg.GetTo()
	status := raft.SnapshotFinish
	if err != nil {
		status = raft.SnapshotFailure
	}
	// One that is held is asked for again with every heartbeat.
	if !errors.Is(err, ErrImageHeld) {
		if err != nil {
			s.cfg.Logger.Warn("sending an image failed; raft will ask again", "peer", to, "image", job.id, "err", err)
		}
		s.cfg.Events.ImageSent(to, s.cfg.Clock.Now().Sub(start), size, err)
	}
	// Only now: to remove the files of an old image takes some time of a processor,
	// and when one was just made its receiver and the clients need that.
	s.requestPurge()
	// Without a report the peer would stay in raft's snapshot state for ever.
	s.in.pushControl(nil, func(l *loop) { l.rn.ReportSnapshot(to, status) })
	return true
}

func (s *snapshots) sendImage(ctx context.Context, job *imageSend) (int64, error) {
	image, err := s.images.Open(job.id)
	if err != nil {
		return 0, err
	}
	defer image.Close()
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ImageTimeout)
	defer cancel()
	return image.Size(), s.tr.SendImage(ctx, job.msg, image)
}

// step builds an image or clears some away; false when there is nothing to do.
func (s *snapshots) step(ctx context.Context) bool {
	s.mu.Lock()
	build, purge, discard := s.wantBuild, s.wantPurge, s.discard
	s.wantBuild, s.wantPurge, s.discard = false, false, nil
	s.building = build
	s.mu.Unlock()
	for _, id := range discard {
		if err := s.images.Delete(id); err != nil && !errors.Is(err, snap.ErrNotFound) {
			s.cfg.Logger.Warn("cannot remove an image nobody needs", "image", id, "err", err)
		}
	}
	if build {
		s.build(ctx)
	}
	if purge {
		if err := s.images.Purge(s.cfg.KeepImages); err != nil {
			s.cfg.Logger.Warn("cannot remove old images", "err", err)
		}
	}
	return build || purge || len(discard) > 0
}

func (s *snapshots) build(ctx context.Context) {
	// What was made and never sent is not purged by whoever sends; with the one to
	// come there are as many as are kept.
	if err := s.images.Purge(max(1, s.cfg.KeepImages-1)); err != nil {
		s.cfg.Logger.Warn("cannot remove old images", "err", err)
	}
	start := s.cfg.Clock.Now()
	info, err := s.images.Create(ctx, func(dir string) (snap.Meta, error) {
		pos, err := s.sm.Image(dir)
		if err != nil {
			return snap.Meta{}, err
		}
		return imageMeta(pos), nil
	})
	now := s.cfg.Clock.Now()
	s.mu.Lock()
	s.building = false
	if err != nil {
		s.retryAt = now.Add(s.cfg.ImageRetry)
	} else {
		s.fresh, s.freshUntil = info.Index, now.Add(s.cfg.ImageRetry)
	}
	s.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		s.cfg.Logger.Error("cannot build an image of the state; followers that need one must wait", "err", err)
	}
	s.cfg.Events.ImageBuilt(now.Sub(start), info.Index, info.Size, err)
}

func imageMeta(pos Position) snap.Meta {
	meta := snap.Meta{Index: pos.Index, Term: pos.Term, ConfState: cloneConfState(pos.ConfState)}
	for _, m := range Live(pos.Members) {
		meta.Members = append(meta.Members, snap.Member{ID: m.ID, Addr: m.Addr})
	}
	return meta
}

// check pins the image a received MsgSnap names, so that raft is only told of
// snapshots that can be installed: once stepped, there is no way back.
func (s *snapshots) check(m *raftpb.Message) (*snap.Reader, error) {
	id := string(m.GetSnapshot().GetData())
	image, err := s.images.Open(id)
	if err != nil {
		return nil, err
	}
	meta, info := m.GetSnapshot().GetMetadata(), image.Info()
	if info.Index != meta.GetIndex() || info.Term != meta.GetTerm() || !sameConfState(info.ConfState, meta.GetConfState()) {
		image.Close()
		return nil, fmt.Errorf("raftnode: image %s is of entry %d (term %d), the message says %d (term %d)",
			id, info.Index, info.Term, meta.GetIndex(), meta.GetTerm())
	}
	return image, nil
}

// accept keeps the image of a snapshot raft has taken up until it is installed.
func (s *snapshots) accept(index uint64, image *snap.Reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.stepped[index]; old != nil {
		old.Close()
	}
	s.stepped[index] = image
}

// unaccept lets go of the image of a snapshot raft had no use for.
func (s *snapshots) unaccept(index uint64) {
	s.mu.Lock()
	image := s.stepped[index]
	delete(s.stepped, index)
	s.mu.Unlock()
	if image != nil {
		s.reject(image)
	}
}

// accepted returns the image of an accepted snapshot; the caller closes it.
func (s *snapshots) accepted(sn *raftpb.Snapshot) (*snap.Reader, error) {
	index := sn.GetMetadata().GetIndex()
	s.mu.Lock()
	image := s.stepped[index]
	delete(s.stepped, index)
	s.mu.Unlock()
	if image != nil && image.Info().ID == string(sn.GetData()) {
		return image, nil
	}
	if image != nil {
		image.Close()
	}
	return s.images.Open(string(sn.GetData()))
}

// reject lets go of an image raft had no use for: the log already had it all.
func (s *snapshots) reject(image *snap.Reader) {
	id := image.Info().ID
	image.Close()
	s.mu.Lock()
	s.discard = append(s.discard, id)
	s.mu.Unlock()
	signal(s.wake)
}

func (s *snapshots) requestPurge() {
	s.mu.Lock()
	s.wantPurge = true
	s.mu.Unlock()
	signal(s.wake)
}

// close unpins what no one will install any more.
func (s *snapshots) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, image := range s.stepped {
		image.Close()
	}
	clear(s.stepped)
}
