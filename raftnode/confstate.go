package raftnode

import (
	"cmp"
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
	// Members are those the change adds, with everything known of them, or
	// those of whom it says something new.
	Members []Member `json:"members,omitempty"`
	// Rejoin lets a member that was removed because its disk was lost come back
	// under its id, with another disk.
	Rejoin bool `json:"rejoin,omitempty"`
}

// changeContextVersion 2 added disks, read replicas and rejoining.
const changeContextVersion = 2

// maxMembers bounds the members a group has ever had, the removed ones included,
// and maxAddrBytes the address of each: together the membership, which is kept in
// memory, read with each position and sent with each image, below 1 MiB. Forgetting
// the oldest instead would let their ids return.
const (
	maxMembers   = 1024
	maxAddrBytes = 512
)

func (c changeContext) encode() ([]byte, error) {
	c.Version = changeContextVersion
	return json.Marshal(c)
}

func decodeChangeContext(b []byte) (changeContext, error) {
	var c changeContext
	if len(b) == 0 {
		return c, nil // raft's own change, which leaves a joint configuration
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("the context of a membership change cannot be read: %w", err)
	}
	if c.Version < 1 || c.Version > changeContextVersion {
		return c, fmt.Errorf("membership change format %d is unknown: a newer release wrote it; upgrade this node", c.Version)
	}
	return c, nil
}

// admit refuses a change that would bring an id or a disk back, or demote a voter
// by adding it again. It depends on the log alone, so every node decides alike.
func admit(members []Member, cc *raftpb.ConfChangeV2, ctx changeContext) error {
	for _, m := range ctx.Members {
		if len(m.Addr) > maxAddrBytes {
			return fmt.Errorf("the address of node %d is %d bytes long, at most %d are allowed", m.ID, len(m.Addr), maxAddrBytes)
		}
	}
	for _, change := range cc.GetChanges() {
		switch change.GetType() {
		case raftpb.ConfChangeAddLearnerNode, raftpb.ConfChangeAddNode:
		default:
			continue
		}
		id := change.GetNodeId()
		i := slices.IndexFunc(members, func(m Member) bool { return m.ID == id })
		adding := change.GetType() == raftpb.ConfChangeAddLearnerNode
		switch {
		case i < 0 && len(members) >= maxMembers:
			return fmt.Errorf("the group has had %d members, more are not remembered: "+
				"back the state up and restore it into a new cluster", len(members))
		case i < 0:
		case members[i].Removed:
			if err := members[i].mayReturn(ctx); err != nil {
				return err
			}
		case adding:
			return fmt.Errorf("node %d is a member already", id)
		}
	}
	return nil
}

// mayReturn says whether ctx brings the removed member m back.
func (m Member) mayReturn(ctx changeContext) error {
	i := slices.IndexFunc(ctx.Members, func(s Member) bool { return s.ID == m.ID })
	switch {
	case !ctx.Rejoin || i < 0:
		return fmt.Errorf("node %d was removed and ids are not reused: let it join with another id, or with none to be given one", m.ID)
	case ctx.Members[i].Disk == 0 || ctx.Members[i].Disk == m.Disk:
		return fmt.Errorf("node %d was removed with this data directory: it can only return with an empty one", m.ID)
	}
	return nil
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

// after returns the position behind the membership change cc of the entry at
// index. A change that is refused moves the position and nothing else.
func (p Position) after(index, term uint64, cc *raftpb.ConfChangeV2, more changeContext) (_ Position, refused error) {
	p = p.clone()
	p.Index, p.Term = index, term
	if err := admit(p.Members, cc, more); err != nil {
		return p, err
	}
	cs, err := nextConfState(p.ConfState, cc, index)
	if err != nil {
		return p, err
	}
	p.ConfState, p.Members = cs, nextMembers(p.Members, more.Members, cs)
	return p, nil
}

// inConfState reports whether id takes part in cs in any role.
func inConfState(cs *raftpb.ConfState, id uint64) bool {
	return slices.Contains(cs.GetVoters(), id) || slices.Contains(cs.GetVotersOutgoing(), id) ||
		slices.Contains(cs.GetLearners(), id) || slices.Contains(cs.GetLearnersNext(), id)
}

func isJoint(cs *raftpb.ConfState) bool { return len(cs.GetVotersOutgoing()) > 0 }

// nextMembers returns what members become by a change that leads to cs. set says
// what is new of some of them. Those who are out of cs, which in a joint
// configuration still includes those on their way out, stay as removed ones.
func nextMembers(members, set []Member, cs *raftpb.ConfState) []Member {
	out := make([]Member, 0, len(members)+len(set))
	for _, m := range members {
		i := slices.IndexFunc(set, func(s Member) bool { return s.ID == m.ID })
		switch in := inConfState(cs, m.ID); {
		case in && i >= 0 && m.Removed:
			m = set[i] // it returned
		case i >= 0 && !m.Removed:
			m = m.update(set[i])
		}
		out = append(out, m)
	}
	for _, s := range set {
		if inConfState(cs, s.ID) && !slices.ContainsFunc(members, func(m Member) bool { return m.ID == s.ID }) {
			out = append(out, s)
		}
	}
	for i, m := range out {
		if !inConfState(cs, m.ID) {
			out[i] = Member{ID: m.ID, Disk: m.Disk, ReadReplica: m.ReadReplica, Removed: true}
		}
		if slices.Contains(cs.GetVoters(), m.ID) {
			out[i].ReadReplica = false
		}
	}
	slices.SortFunc(out, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// update returns m with what s says of it. A disk is said once: a later one would
// be the disk of somebody else.
func (m Member) update(s Member) Member {
	if s.Addr != "" {
		m.Addr = s.Addr
	}
	if m.Disk == 0 {
		m.Disk = s.Disk
	}
	return m
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
