package server

import (
	"context"
	"fmt"
	"sync"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/snap"
)

// keepImages is how many images stay on disk: the newest, and the one before
// it, which may be on its way to a peer.
const keepImages = 2

// imageRate bounds, in bytes a second, how fast a node sends images, all of them
// together, and imageBurst how much goes out at once. Without a bound an image takes
// all the processors and the disk there are for a moment, and the writes of clients
// wait for it: their 99th percentile was four times what it is otherwise. With 256 MiB
// three nodes on two processors still had none to spare (docs/performance.md). It begins
// slowly, for imageStart: the receiver has just been started, or has a log to apply.
const (
	imageRate  = 192 << 20
	imageBurst = 1 << 20
	imageStart = 150 * time.Millisecond
)

func newImageLimit() *snap.RateLimit {
	l := snap.NewRateLimit(imageRate, imageBurst)
	l.SlowStart(imageStart)
	return l
}

// No compaction of the state begins for imageCalm after an image of it was made: until
// then it is on its way, if it was made for that, and keeps them back itself. The
// same goes for the time after it was sent, and for installCalm after one was taken
// over, in which the receiver catches up with what was written meanwhile.
const (
	imageCalm   = time.Second
	installCalm = 3 * time.Second
)

// calmMachine is the state machine, which begins no compaction for a while after an
// image of it was made.
type calmMachine struct {
	raftnode.StateMachine
	fsm *router.FSM
}

// Image implements raftnode.StateMachine.
func (m calmMachine) Image(dir string) (raftnode.Position, error) {
	release := m.fsm.HoldCompactions()
	pos, err := m.StateMachine.Image(dir)
	if err != nil {
		release()
		return pos, err
	}
	time.AfterFunc(imageCalm, release)
	return pos, nil
}

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
	watched, held, end, err := t.s.control.transfers.Begin(ctx, node, total)
	if err != nil {
		return watched, held, end, err
	}
	release := t.s.disk.fsm.HoldCompactions()
	return watched, held, func(err error) {
		time.AfterFunc(imageCalm, release)
		end(err)
	}, nil
}
