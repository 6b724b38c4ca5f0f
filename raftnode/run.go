package raftnode

import (
	"context"
	"errors"
	"slices"
	"sync"

	"go.etcd.io/raft/v3/raftpb"
)

// errStopped ends a storage goroutine that waited for another when the node
// stopped; it is no failure.
var errStopped = errors.New("raftnode: stopped")

// Run runs the node until ctx is done (nil) or it can no longer keep its promises
// (the reason). It may be called once. When it returns, every waiting caller has
// an answer and no goroutine of the node is left, with one exception: after
// ErrDiskStalled the goroutine inside the hanging write cannot be ended, and the
// process should be.
//
// To stop without an interruption for clients, call TransferLeader before.
func (n *Node) Run(ctx context.Context) error {
	if !n.started.CompareAndSwap(false, true) {
		return errors.New("raftnode: Run was called before")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := ctx.Done()
	n.threaded(stop)

	var (
		wg       sync.WaitGroup
		once     sync.Once
		failure  error
		failed   = make(chan struct{})
		loopDone = make(chan struct{})
	)
	start := func(f func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := f(); err != nil && !errors.Is(err, errStopped) {
				once.Do(func() {
					failure = err
					close(failed)
				})
			}
		}()
	}
	if voters := n.applier.pos.ConfState.GetVoters(); len(voters) == 1 && slices.Contains(voters, n.cfg.ID) {
		// Nobody to wait for.
		n.inbox.pushControl(nil, func(l *loop) { _ = l.rn.Campaign() })
	}
	start(func() error {
		defer close(loopDone)
		return n.loop.run(stop)
	})
	start(func() error { return work(stop, n.appendQ.wake, n.appender.step) })
	start(func() error { return work(stop, n.applyQ.wake, n.applier.step) })
	start(func() error {
		return work(stop, n.truncator.wake, func() (bool, error) { return n.truncator.step(n.cfg.Clock.Now()) })
	})
	start(func() error {
		return work(stop, n.snaps.wake, func() (bool, error) { return n.snaps.step(ctx), nil })
	})
	for range n.cfg.MaxImageSenders {
		start(func() error {
			return work(stop, n.snaps.sendWake, func() (bool, error) { return n.snaps.sendStep(ctx), nil })
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()

	select {
	case <-stop:
	case <-failed:
	}
	cancel()
	<-loopDone // it never waits for anything
	n.resolve()
	stuck := n.appendQ.age(n.cfg.Clock.Now()) >= n.cfg.StallTransfer
	if stuck {
		// A clean stop would wait for a disk that may never answer.
		ticks, stopTicks := n.cfg.Clock.Ticker(n.cfg.StallTransfer)
		defer stopTicks()
		select {
		case <-done:
		case <-ticks:
		}
	} else {
		<-done
	}
	select {
	case <-failed:
		return failure
	default:
		return nil
	}
}

// work calls step until it has nothing left to do, each time wake receives.
func work(stop <-chan struct{}, wake <-chan struct{}, step func() (bool, error)) error {
	for {
		select {
		case <-stop:
			return nil
		case <-wake:
		}
		for {
			more, err := step()
			if err != nil {
				return err
			}
			if !more {
				break
			}
			select {
			case <-stop:
				return nil
			default:
			}
		}
	}
}

// resolve answers everyone who still waits.
func (n *Node) resolve() {
	waiting, reads := n.inbox.close()
	close(n.stopped)
	n.mu.Lock()
	n.lead.Store(&Leadership{Term: n.lead.Load().Term})
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
	for _, b := range waiting {
		b.fail(ErrStopping)
	}
	resolveCalls(reads, outcome{err: ErrStopping})
	n.loop.stop()
	n.props.stop()
	n.waits.stop()
	n.snaps.close()
}

// threaded wires the storage goroutines to each other. The applier may wait for
// the loop, the appender for the applier, the loop for nobody: no cycle.
func (n *Node) threaded(stop <-chan struct{}) {
	n.applier.confChange = func(index uint64, cc *raftpb.ConfChangeV2) (*raftpb.ConfState, error) {
		reply := make(chan *raftpb.ConfState, 1)
		if !n.inbox.pushControl(nil, func(l *loop) { reply <- l.applyConfChange(index, cc) }) {
			return nil, errStopped
		}
		select {
		case cs := <-reply:
			return cs, nil
		case <-stop:
			return nil, errStopped
		}
	}
	n.appender.install = func(s *raftpb.Snapshot) error {
		done := make(chan error, 1)
		n.applyQ.push(applyItem{install: s, done: done})
		select {
		case err := <-done:
			return err
		case <-stop:
			return errStopped
		}
	}
}
