package raftnode

import "fmt"

// Fit says how a state and a log, which a crash may have left apart, belong
// together.
type Fit int

// The ways they can fit. Any other is ErrDiverged.
const (
	// FitOK: the log goes on where the state ends, or holds entries the state
	// has applied already.
	FitOK Fit = iota + 1
	// FitInstalled: the state is an image that was installed, the log was not
	// yet emptied for it. The state is committed, so whatever the log holds
	// instead at that index, and all behind it, was never committed.
	FitInstalled
	// FitBehind: the state ends before the log begins. No crash does that; a
	// state directory was lost or rolled back. An image can close the gap.
	FitBehind
)

// JudgeFit compares a state at pos with a log of the entries first to last that
// knows commit to be committed; term returns the term of an entry from first-1
// on. It is how a node that starts judges (see reconcile); an error matches
// ErrDiverged or is one of term.
func JudgeFit(pos Position, first, last, commit uint64, term func(uint64) (uint64, error)) (Fit, error) {
	if pos.Index+1 < first {
		return FitBehind, nil
	}
	fit := FitInstalled
	if pos.Index <= last {
		t, err := term(pos.Index)
		if err != nil {
			return 0, fmt.Errorf("raftnode: read the term of entry %d: %w", pos.Index, err)
		}
		if t == pos.Term {
			fit = FitOK
		} else if pos.Index <= commit {
			return 0, fmt.Errorf("%w: entry %d has term %d in the log and term %d in the state; "+
				"the data directory mixes files of different nodes or times, rejoin the node with an empty one",
				ErrDiverged, pos.Index, t, pos.Term)
		}
	}
	if fit == FitInstalled {
		last, commit = pos.Index, pos.Index
	}
	if commit > last {
		return 0, fmt.Errorf("%w: the commit index %d lies behind the log's last entry %d", ErrDiverged, commit, last)
	}
	return fit, nil
}
