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

// A node sends images, all of them together, at imageRate bytes a second at most, imageBurst
// at once, and while commands are under way at besideRate, so that their clients hardly notice:
// with 192 MiB the 99th percentile of their writes was two to three times what it is otherwise,
// where three nodes share two processors and a disk (docs/performance.md). It begins slowly,
// for imageStart: the receiver has just been started, or has a log to apply.
const (
	imageRate  = 384 << 20
	besideRate = 32 << 20
	imageBurst = 1 << 20
	imageStart = 150 * time.Millisecond
	// besideMost is for how long that may last: the sending of an image is given up after
	// some minutes, and who receives it comes to the end first.
	besideMost = 3 * time.Minute
)

// fetchRate is the same of images that other nodes ask for: nothing keeps the log for them,
// and a node that has lost its state serves nobody until it has one.
const fetchRate = 192 << 20

func newFetchLimit() *snap.RateLimit {
	l := snap.NewRateLimit(fetchRate, imageBurst)
	l.SlowStart(imageStart)
	return l
}

func newImageLimit(busy func() bool) *snap.RateLimit {
	l := snap.NewRateLimit(imageRate, imageBurst)
	l.SlowStart(imageStart)
	l.Beside(besideRate, besideMost, busy)
	return l
}

// commandsUnderWay says whether commands are.
type commandsUnderWay struct {
	// written counts what commands write.
	written func() (all, unflushed int64)
	// logBytes is how long the log is, and maxLogBytes how long it may be for commands to
	// count: a log that grows beyond what is kept for a follower makes the image on its way to
	// it useless, so the image comes first then.
	logBytes    func() int64
	maxLogBytes int64
	now         func() time.Time

	mu     sync.Mutex
	before int64
	at     time.Time
}

// maxLogBytes is that of a log that is cut at tailBytes. Beyond that only what came after
// the image is still there, and twice as much is kept for who has installed it
// (raftnode.Config.FollowerTailBytes).
func maxLogBytes(tailBytes int64) int64 { return tailBytes + tailBytes/4 }

// busyFor is how long commands count as being under way after the last one was applied: a
// batch of them spends most of its time on its way to other nodes and back.
const busyFor = 100 * time.Millisecond

func (u *commandsUnderWay) busy() bool {
	if u.logBytes() > u.maxLogBytes {
		return false
	}
	now := u.now()
	all, _ := u.written()
	u.mu.Lock()
	defer u.mu.Unlock()
	if all != u.before {
		u.before, u.at = all, now
	}
	return now.Sub(u.at) < busyFor
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
