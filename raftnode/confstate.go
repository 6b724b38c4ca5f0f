package raftnode

import (
	"encoding/json"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3/confchange"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"google.golang.org/protobuf/proto"
)

// changeContext travels in the Context of a configuration change.
type changeContext struct {
	Version int `json:"v"`
	// Members whose address the change sets.
	Members []Member `json:"members,omitempty"`
}

const changeContextVersion = 1

func encodeChangeContext(members []Member) ([]byte, error) {
	return json.Marshal(changeContext{Version: changeContextVersion, Members: members})
}

func decodeChangeContext(b []byte) ([]Member, error) {
	if len(b) == 0 {
		return nil, nil // raft's own change, which leaves a joint configuration
	}
	var c changeContext
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("the context of a membership change cannot be read: %w", err)
	}
	if c.Version != changeContextVersion {
		return nil, fmt.Errorf("membership change format %d is unknown: a newer release wrote it; upgrade this node", c.Version)
	}
	return c.Members, nil
}

// nextConfState returns what cs becomes by cc. An error is the same on every
// node: it depends on cs and cc alone.
//
// The applier computes it from the configuration at its own position, not from
// the RawNode's: that one switches to the configuration of a snapshot as soon as
// the snapshot is received, while older changes are still to be applied.
func nextConfState(cs *raftpb.ConfState, cc *raftpb.ConfChangeV2, index uint64) (*raftpb.ConfState, error) {
	changer := confchange.Changer{Tracker: tracker.MakeProgressTracker(1, 0), LastIndex: index}
	cfg, progress, err := confchange.Restore(changer, cs)
	if err != nil {
		return nil, fmt.Errorf("restore %v: %w", cs, err)
	}
	changer.Tracker.Config, changer.Tracker.Progress = cfg, progress
	if cc.LeaveJoint() {
		cfg, progress, err = changer.LeaveJoint()
	} else if autoLeave, ok := cc.EnterJoint(); ok {
		cfg, progress, err = changer.EnterJoint(autoLeave, cc.GetChanges()...)
	} else {
		cfg, progress, err = changer.Simple(cc.GetChanges()...)
	}
	if err != nil {
		return nil, err
	}
	changer.Tracker.Config, changer.Tracker.Progress = cfg, progress
	return changer.Tracker.ConfState(), nil
}

// inConfState reports whether id takes part in cs in any role.
func inConfState(cs *raftpb.ConfState, id uint64) bool {
	return slices.Contains(cs.GetVoters(), id) || slices.Contains(cs.GetVotersOutgoing(), id) ||
		slices.Contains(cs.GetLearners(), id) || slices.Contains(cs.GetLearnersNext(), id)
}

func isJoint(cs *raftpb.ConfState) bool { return len(cs.GetVotersOutgoing()) > 0 }

// nextMembers sets the addresses in set and forgets those who are out of cs,
// which in a joint configuration still includes those on their way out.
func nextMembers(members, set []Member, cs *raftpb.ConfState) []Member {
	out := make([]Member, 0, len(members)+len(set))
	for _, m := range members {
		if !slices.ContainsFunc(set, func(s Member) bool { return s.ID == m.ID }) {
			out = append(out, m)
		}
	}
	out = append(out, set...)
	out = slices.DeleteFunc(out, func(m Member) bool { return !inConfState(cs, m.ID) })
	slices.SortFunc(out, func(a, b Member) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out
}

func sameConfState(a, b *raftpb.ConfState) bool {
	return raftpb.EnsureConfState(a).Equivalent(raftpb.EnsureConfState(b)) == nil
}

func cloneConfState(cs *raftpb.ConfState) *raftpb.ConfState {
	if cs == nil {
		return &raftpb.ConfState{}
	}
	return proto.CloneOf(cs)
}

func (p Position) clone() Position {
	p.ConfState = cloneConfState(p.ConfState)
	p.Members = slices.Clone(p.Members)
	return p
}
