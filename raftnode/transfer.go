package raftnode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"
)

// TransferLeader hands leadership to voter to, or with zero to the voter that is
// alive and lacks least. It waits until another node leads. ErrTransferFailed
// means this node still leads (or nobody does yet) after Config.TransferTimeout;
// commands proposed meanwhile wait and are not lost.
func (n *Node) TransferLeader(ctx context.Context, to uint64) error {
	lead := n.Leadership()
	if !lead.Leading {
		if to != 0 && lead.Leader == to {
			return nil
		}
		return n.notLeader()
	}
	if to == n.cfg.ID {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.TransferTimeout)
	defer cancel()
	target, err := n.firstTransfer(ctx, to)
	if err != nil {
		return err
	}
	// Raft gives an attempt up after one election timeout, which a slow disk of
	// the target may need to catch up alone.
	retry, stopRetry := n.cfg.Clock.Ticker(time.Duration(n.cfg.ElectionTicks+2) * n.cfg.TickInterval)
	defer stopRetry()
	for {
		changed := n.Changed()
		lead := n.Leadership()
		if lead.Leader != 0 && !lead.Leading {
			if lead.Leader == target || to == 0 {
				return nil
			}
			return fmt.Errorf("%w: node %d leads instead of %d", ErrTransferFailed, lead.Leader, target)
		}
		select {
		case <-changed:
		case <-retry:
			n.inbox.pushControl(nil, func(l *loop) {
				if l.leading() && l.transferTicks == 0 {
					l.startTransfer(target)
				}
			})
		case <-n.stopped:
			return ErrStopping
		case <-ctx.Done():
			return fmt.Errorf("%w: node %d did not take over: %w", ErrTransferFailed, target, ctx.Err())
		}
	}
}

// errNobodyAlive: no other voter has answered within the last election timeout.
// errAlone: there is none.
var (
	errNobodyAlive = fmt.Errorf("%w: no other voter is alive", ErrTransferFailed)
	errAlone       = fmt.Errorf("%w: there is no other voter", ErrTransferFailed)
)

// firstTransfer is requestTransfer of a leader that may have only just taken over:
// then it has no answers yet, and those to its next heartbeats tell it who is alive.
// Were it to give up, it would leave its group to an election. How long they take on
// machines that are busy nobody knows; if nobody is alive it soon leads no more.
func (n *Node) firstTransfer(ctx context.Context, to uint64) (uint64, error) {
	answered, stop := n.cfg.Clock.Ticker(time.Duration(n.cfg.HeartbeatTicks+2) * n.cfg.TickInterval)
	defer stop()
	for {
		target, err := n.requestTransfer(ctx, to)
		if !errors.Is(err, errNobodyAlive) {
			return target, err
		}
		select {
		case <-answered:
		case <-n.stopped:
			return 0, ErrStopping
		case <-ctx.Done():
			return 0, err
		}
	}
}

// requestTransfer begins a transfer and returns its target.
func (n *Node) requestTransfer(ctx context.Context, to uint64) (uint64, error) {
	cl := n.calls.get()
	if !n.inbox.pushControl(cl, func(l *loop) { l.transfer(to, cl) }) {
		return 0, ErrStopping
	}
	res, err := n.calls.await(ctx, cl, ErrTransferFailed)
	return res.Index, err
}

// transfer runs on the loop; it answers with the target's id as the index.
func (l *loop) transfer(to uint64, cl *call) {
	switch {
	case !l.leading():
		cl.ch <- outcome{err: l.notLeaderErr()}
		return
	case to == 0:
		if !slices.ContainsFunc(l.confState.GetVoters(), func(id uint64) bool { return id != l.cfg.ID }) {
			cl.ch <- outcome{err: errAlone}
			return
		}
		if to = l.bestTransferee(); to == 0 {
			cl.ch <- outcome{err: errNobodyAlive}
			return
		}
	case !slices.Contains(l.confState.GetVoters(), to):
		cl.ch <- outcome{err: fmt.Errorf("%w: node %d is not a voter", ErrTransferFailed, to)}
		return
	}
	l.startTransfer(to)
	cl.ch <- outcome{res: Result{Index: to}}
}

// startTransfer asks raft to hand over. Until it has, or has given up (after one
// election timeout), raft drops proposals; they are held back instead.
func (l *loop) startTransfer(to uint64) {
	l.rn.TransferLeader(to)
	l.transferee, l.transferTicks = to, l.cfg.ElectionTicks+1
}

// bestTransferee returns the live voter with the longest log, zero without one.
func (l *loop) bestTransferee() uint64 {
	var best, match uint64
	voters := l.confState.GetVoters()
	l.rn.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		if id == l.cfg.ID || !l.answers(id) || pr.State == tracker.StateSnapshot || !slices.Contains(voters, id) {
			return
		}
		if best == 0 || pr.Match > match {
			best, match = id, pr.Match
		}
	})
	return best
}
