package server

import (
	"context"
	"fmt"
	"sync"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/snap"
)

// keepImages is how many images stay on disk: the newest, and the one before
// it, which may be on its way to a peer.
const keepImages = 2

// imageRate bounds, in bytes a second, how fast a node sends images, all of them
// together, and imageBurst how much goes out at once. Without a bound an image takes
// all the processors and the disk there are for a moment, and the writes of clients
// wait for it: their 99th percentile was four times what it is otherwise.
const (
	imageRate  = 288 << 20
	imageBurst = 1 << 20
)

func newImageLimit() *snap.RateLimit { return snap.NewRateLimit(imageRate, imageBurst) }

// imageMaker provides images of this node's state to peers that lost theirs.
type imageMaker struct {
	machine raftnode.StateMachine
	images  *snap.Store
	applied func(ctx context.Context, index uint64) error

	// mu is held while an image is made: several peers that ask at once share
	// one.
	mu sync.Mutex
}

// image returns a pinned image of the state at or after minIndex; the caller
// closes it.
func (m *imageMaker) image(ctx context.Context, minIndex uint64) (*snap.Reader, error) {
	if err := m.applied(ctx, minIndex); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, info := range m.images.List() {
		if info.Index < minIndex {
			break // the newest come first
		}
		// One that is removed meanwhile is no longer there to open.
		if r, err := m.images.Open(info.ID); err == nil {
			return r, nil
		}
	}
	info, err := m.images.Create(ctx, func(dir string) (snap.Meta, error) {
		pos, err := m.machine.Image(dir)
		if err != nil {
			return snap.Meta{}, err
		}
		meta := snap.Meta{Index: pos.Index, Term: pos.Term, ConfState: pos.ConfState}
		for _, member := range raftnode.Live(pos.Members) {
			meta.Members = append(meta.Members, snap.Member{ID: member.ID, Addr: member.Addr})
		}
		return meta, nil
	})
	if err != nil {
		return nil, fmt.Errorf("make an image of the state: %w", err)
	}
	r, err := m.images.Open(info.ID)
	if err != nil {
		return nil, fmt.Errorf("open the image just made: %w", err)
	}
	// The reader pins its image; the others go as after any new one.
	if err := m.images.Purge(keepImages); err != nil {
		r.Close()
		return nil, fmt.Errorf("remove old images: %w", err)
	}
	return r, nil
}

// imageTransfers tells of the images this node sends. The transport is made before
// what it needs; nothing is sent earlier, since it has no members then.
type imageTransfers struct{ s *Server }

// Begin implements rpc.ImageTransfers.
func (t imageTransfers) Begin(ctx context.Context, node uint64, total int64) (context.Context, func(int64), func(error), error) {
	return t.s.control.transfers.Begin(ctx, node, total)
}
