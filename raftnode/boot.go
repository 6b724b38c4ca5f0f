package raftnode

import (
	"fmt"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
)

// reconcile brings state machine and log, which a crash may have left apart,
// back together and returns the hard state to start raft from.
//
// The state's position and the log's are written by different files; raft wants
// first-1 <= applied <= commit <= last and one history. What can be found:
//
//   - The state is ahead of the stored commit index. Normal: a commit index
//     alone is not synced. Only committed entries are applied, so commit is
//     raised to applied.
//   - The state is ahead of the log's last entry, or the log holds an entry of
//     another term at the state's position. A crash hit between installing a
//     received image and emptying the log for it. The state is committed, so
//     whatever the log holds instead at that index, and all behind it, was
//     never committed and never will be; that this node may have acknowledged
//     those entries is no loss. The log is emptied and begins behind the state,
//     as the install would have done. (The term is raised to the state's if it
//     is older; a term without a vote in it promises nothing.)
//     But if the log's own commit index covers that entry, two committed
//     histories disagree: ErrDiverged.
//   - The state is behind the log's first entry. Not produced by any crash in
//     here; a state directory was lost or rolled back. If an image on disk
//     fits, it is installed; else ErrStateBehindLog.
func reconcile(cfg *Config, sm StateMachine, log Log, images *snap.Store) (*raftpb.HardState, error) {
	stored, _, err := log.InitialState()
	if err != nil {
		return nil, fmt.Errorf("raftnode: read the log's hard state: %w", err)
	}
	hs := &raftpb.HardState{Term: new(stored.GetTerm()), Vote: new(stored.GetVote()), Commit: new(stored.GetCommit())}
	first, err := log.FirstIndex()
	if err != nil {
		return nil, fmt.Errorf("raftnode: read the log: %w", err)
	}
	last, err := log.LastIndex()
	if err != nil {
		return nil, fmt.Errorf("raftnode: read the log: %w", err)
	}
	pos := sm.Applied()
	if pos.Index+1 < first {
		if pos, err = installLocalImage(cfg, sm, log, images, first, last); err != nil {
			return nil, err
		}
	}
	raiseTerm := func(term uint64) {
		if hs.GetTerm() < term {
			hs.Term, hs.Vote = new(term), new(uint64(0))
		}
	}
	fit, err := JudgeFit(pos, first, last, hs.GetCommit(), log.Term)
	if err != nil {
		return nil, err
	}
	raiseTerm(pos.Term)
	if fit == FitInstalled {
		cfg.Logger.Warn("finishing the installation of an image that a crash interrupted",
			"index", pos.Index, "term", pos.Term, "log_last", last)
		if sm.Durable() < pos.Index {
			if _, err := sm.Flush(); err != nil {
				return nil, fmt.Errorf("raftnode: flush the state: %w", err)
			}
		}
		hs.Commit = new(pos.Index)
		if err := log.InstallSnapshot(pos.Index, pos.Term, cloneConfState(pos.ConfState), proto.CloneOf(hs)); err != nil {
			return nil, fmt.Errorf("raftnode: begin the log behind the state at %d: %w", pos.Index, err)
		}
		last = pos.Index
	}
	if hs.GetCommit() < pos.Index {
		hs.Commit = new(pos.Index)
	}
	// No log holds an entry of a term its node has not been in.
	lastTerm, err := log.Term(last)
	if err != nil {
		return nil, fmt.Errorf("raftnode: read the term of entry %d: %w", last, err)
	}
	raiseTerm(lastTerm)
	return hs, nil
}

// installLocalImage rebuilds a state that is older than the log from the newest
// image that connects to the log.
func installLocalImage(cfg *Config, sm StateMachine, log Log, images *snap.Store, first, last uint64) (Position, error) {
	behind := fmt.Errorf("%w: the state reflects entry %d, the log begins at %d and no image on disk lies between; "+
		"rejoin the node with an empty data directory", ErrStateBehindLog, sm.Applied().Index, first)
	if images == nil {
		return Position{}, behind
	}
	for _, info := range images.List() {
		if info.Index+1 < first || info.Index > last || info.ConfState == nil {
			continue
		}
		if term, err := log.Term(info.Index); err != nil || term != info.Term {
			continue
		}
		if err := images.Verify(info.ID); err != nil {
			cfg.Logger.Warn("an image that could rebuild the state is damaged", "image", info.ID, "err", err)
			continue
		}
		cfg.Logger.Warn("rebuilding the state from an image on disk", "image", info.ID, "index", info.Index)
		pos, err := sm.Install(images.Dir(info.ID))
		if err != nil {
			return Position{}, fmt.Errorf("raftnode: install image %s: %w", info.ID, err)
		}
		if pos.Index != info.Index || pos.Term != info.Term {
			return Position{}, fmt.Errorf("%w: image %s says it holds entry %d (term %d), its content entry %d (term %d)",
				ErrDiverged, info.ID, info.Index, info.Term, pos.Index, pos.Term)
		}
		return pos, nil
	}
	return Position{}, behind
}
