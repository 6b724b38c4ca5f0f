package offline

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
)

var (
	// ErrNotBest: another copy holds entries this one lacks.
	ErrNotBest = errors.New("another copy holds more")
	// ErrPlanChanged: the directory is not what the plan was made from.
	ErrPlanChanged = errors.New("the data directory changed since the plan was made")
)

// Recovered is the outcome of a recovery.
type Recovered struct {
	ClusterID string   `json:"cluster_id"`
	NodeID    uint64   `json:"node_id"`
	Members   []uint64 `json:"members"`
	// The group goes on behind Index, in a term above Term.
	Index    uint64 `json:"index"`
	Term     uint64 `json:"term"`
	Revision uint64 `json:"revision"`
	// Undo is that of Copy, after the log was applied.
	Undo string `json:"undo,omitempty"`
	// Resumed: an interrupted recovery had decided already; only its last moves
	// were made.
	Resumed bool `json:"resumed"`
	// Before is the directory that keeps the old content.
	Before string `json:"before,omitempty"`
}

// Recover makes the directory of o a cluster of the members of o, with
// everything the directory holds in state and log. agreed is the plan that
// somebody agreed to, nil for whatever is found. Until the new content is
// decided by one rename, an error or a crash leaves the directory as it was;
// after it, repeating the call or starting the node finishes the rest.
func Recover(o RecoverOptions, agreed *Plan) (_ *Recovered, err error) {
	o.ensureDefaults()
	d, finished, err := openExclusive(o.Dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if finished {
		return &Recovered{ClusterID: fmt.Sprintf("%016x", d.Identity.ClusterID), NodeID: d.Identity.NodeID, Members: d.Identity.Members,
			Index: d.State.Index, Term: d.State.Term, Resumed: true, Before: filepath.Join(o.Dir, datadir.BeforeName)}, nil
	}
	p, err := plan(d, &o)
	if err != nil {
		return nil, err
	}
	if agreed != nil && (agreed.Index != p.Index || agreed.Term != p.Term || agreed.OldClusterID != p.OldClusterID) {
		return nil, fmt.Errorf("%w: it ended at %d (term %d), now at %d (term %d); nothing was changed, look at the new plan",
			ErrPlanChanged, agreed.Index-1, agreed.Term-1, p.Index-1, p.Term-1)
	}
	if !p.IsBest() && !o.Force {
		best := p.Copies[p.Best]
		return nil, fmt.Errorf("%w: %s ends at entry %d of term %d, %s at entry %d of term %d; nothing was changed: "+
			"recover that one, or force this one and lose the difference",
			ErrNotBest, best.Dir, best.LastIndex, best.LastTerm, o.Dir, p.Chosen().LastIndex, p.Chosen().LastTerm)
	}
	return rebuild(d, p, &o)
}

// rebuild carries p out.
func rebuild(d *Directory, p *Plan, o *RecoverOptions) (res *Recovered, err error) {
	b, err := d.base()
	if err != nil {
		return nil, err
	}
	logBytes, err := datadir.Size(filepath.Join(d.Path, datadir.WALName))
	if err != nil {
		return nil, err
	}
	// Tables are linked, not copied. The log is applied, and with compactions
	// may be written twice; the new log preallocates two segments.
	if err := demandRoom(d.Path, 2*logBytes+2*uint64(o.SegmentBytes)); err != nil {
		return nil, err
	}
	r, err := datadir.BeginReplacement(d.Path, o.Point)
	if err != nil {
		return nil, err
	}
	decided := false
	var made []NewMember
	defer func() {
		if decided {
			return
		}
		err = errors.Join(err, r.Discard())
		// They are of a cluster that will not be.
		for _, m := range made {
			err = errors.Join(err, unmakeMember(m.Dir))
		}
	}()
	o.Point(stepBegin)
	id := d.Identity
	if id.ClusterID, err = newClusterID(d.Identity.ClusterID); err != nil {
		return nil, err
	}
	id.RaftAddr, id.Removed = "", false
	id.Members, id.CreatedAt = p.Members, time.Now().UTC().Truncate(time.Second)

	pos, revision, epoch, err := recoverState(d, b, p, r.Dir(), o)
	if err != nil {
		return nil, err
	}
	undo, err := keepUndo(d, r.Dir(), epoch)
	if err != nil {
		return nil, fmt.Errorf("keep the state before the last restore: %w", err)
	}
	if err := makeRest(r.Dir(), id, pos, &o.Settings); err != nil {
		return nil, err
	}
	for _, m := range o.Also {
		if err := alsoMake(m, id, pos, r.Dir(), &o.Settings); err != nil {
			return nil, fmt.Errorf("make the directory of member %d: %w", m.ID, err)
		}
		made = append(made, m)
	}
	if decided, err = r.Commit(datadir.BackupsName); err != nil {
		return nil, err
	}
	return &Recovered{
		ClusterID: fmt.Sprintf("%016x", id.ClusterID), NodeID: id.NodeID, Members: p.Members,
		Index: pos.Index, Term: pos.Term, Revision: revision, Undo: undo, Before: filepath.Join(d.Path, datadir.BeforeName),
	}, nil
}

// recoverState makes the state in dir: what d holds, and then one entry more,
// the new group.
func recoverState(d *Directory, b base, p *Plan, dir string, o *RecoverOptions) (pos raftnode.Position, revision, epoch uint64, err error) {
	fsm, sm, err := openState(dir, o.Logger)
	if err != nil {
		return pos, 0, 0, err
	}
	defer func() { err = errors.Join(err, fsm.Close()) }()
	if _, err := fsm.Install(b.dir); err != nil {
		return pos, 0, 0, err
	}
	if err := d.replay(b, p.Chosen().LastIndex, sm); err != nil {
		return pos, 0, 0, fmt.Errorf("apply the log: %w", err)
	}
	pos = groupOf(p.Index, p.Term, p.members(sm.Applied().Members))
	if err := sm.ApplyMembership(pos); err != nil {
		return pos, 0, 0, err
	}
	if _, err := sm.Flush(); err != nil {
		return pos, 0, 0, err
	}
	o.Point(stepState)
	return pos, fsm.Revision(), fsm.Epoch(), nil
}

// alsoMake makes the directory of another member from the state in from.
func alsoMake(m NewMember, id datadir.Identity, pos raftnode.Position, from string, s *Settings) error {
	// Its directory gets an id of its own at the first start.
	id.NodeID, id.DiskID = m.ID, 0
	return makeMember(m.Dir, s, func(dir string, rest restMaker) error {
		if err := installInto(dir, filepath.Join(from, datadir.StateName), s); err != nil {
			return err
		}
		return rest(id, pos)
	})
}

// Purge removes what a recovery of the data directory dir kept. removed is
// false when there was nothing.
func Purge(dir string) (removed bool, err error) {
	d, _, err := openExclusive(dir)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.problem(); err != nil {
		return false, fmt.Errorf("the recovered content cannot be read, so the old one is kept: %w", err)
	}
	if removed, err = datadir.Kept(dir); err != nil || !removed {
		return false, err
	}
	return true, datadir.RemoveKept(dir)
}
