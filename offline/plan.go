package offline

import (
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
)

// Copy is what one data directory of a cluster holds.
type Copy struct {
	Dir    string `json:"dir"`
	NodeID uint64 `json:"node_id"`
	// StateIndex is what the state on disk reflects; the log adds entries up to
	// LastIndex, of LastTerm.
	StateIndex uint64 `json:"state_index"`
	FirstIndex uint64 `json:"first_index"`
	LastIndex  uint64 `json:"last_index"`
	LastTerm   uint64 `json:"last_term"`
	// CommitIndex is the newest entry known here to be committed. Newer ones may
	// have been, too.
	CommitIndex uint64 `json:"commit_index"`
	// Term is the newest term the node took part in.
	Term uint64 `json:"term"`
	// FromImage is the image the state has to be rebuilt from, if any.
	FromImage string `json:"from_image,omitempty"`
	// Epoch is how often the state was restored from a backup, before what the log
	// still holds is applied. Undo says what there is of the state before the last
	// time, to which 'backup undo-restore' goes back: kept, lost, or "" when nothing
	// was ever restored.
	Epoch    uint64   `json:"epoch,omitempty"`
	Undo     string   `json:"undo,omitempty"`
	Voters   []uint64 `json:"voters"`
	Learners []uint64 `json:"learners,omitempty"`
	// Damage says where the log is damaged; what lies behind is lost with this
	// copy.
	Damage string `json:"damage,omitempty"`
	// Problem says why nothing can be recovered from this copy.
	Problem string `json:"problem,omitempty"`

	conf *raftpb.ConfState
	err  error
}

// Plan says what a recovery would do and what may be lost by it.
type Plan struct {
	ClusterName  string `json:"cluster_name"`
	OldClusterID string `json:"old_cluster_id"`
	// Copies are the directories compared, the one to recover first. Best is the
	// place of the one that holds the most.
	Copies []Copy `json:"copies"`
	Best   int    `json:"best"`
	// Voters of the configuration in force, and those of them of which no copy
	// was given.
	Voters []uint64 `json:"voters"`
	Lost   []uint64 `json:"lost"`
	// Complete: every acknowledged command is in the best copy, because the
	// voters compared are in every majority there can have been.
	Complete bool `json:"complete"`
	// Uncommitted entries at the end are not known to have been committed. They
	// are kept: some may have been acknowledged.
	Uncommitted uint64 `json:"uncommitted"`
	// Members is the group after the recovery; it goes on behind Index in Term.
	Members []uint64 `json:"members"`
	Index   uint64   `json:"index"`
	Term    uint64   `json:"term"`
	// KeepsBefore: an earlier recovery's old content is still there, and has to
	// be purged first.
	KeepsBefore bool `json:"keeps_before"`
}

// Chosen returns the copy that is recovered.
func (p *Plan) Chosen() *Copy { return &p.Copies[0] }

// IsBest reports whether the chosen copy holds as much as any of the others.
func (p *Plan) IsBest() bool { return p.Best == 0 }

// RecoverOptions say what to recover.
type RecoverOptions struct {
	Settings
	// Dir is the data directory that goes on as a new cluster.
	Dir string
	// Peers are directories of other members, to be compared with it.
	Peers []string
	// Also are further voters of the new cluster: a directory for each is made,
	// which must be empty.
	Also []NewMember
	// Force recovers Dir even when another copy holds more.
	Force bool
	// DamagedLog takes what lies before the damage of a damaged log.
	DamagedLog bool
}

// NewMember is a voter for which a data directory is made.
type NewMember struct {
	ID  uint64
	Dir string
}

// maxCopies bounds the directories compared; a cluster has no more members.
const maxCopies = 16

// PlanRecovery looks at the directories of o and changes nothing. Its errors are
// those of Open for o.Dir, or say which of the other directories is no copy of
// the same cluster.
func PlanRecovery(o RecoverOptions) (*Plan, error) {
	d, err := Open(o.Dir)
	if err != nil {
		return nil, err
	}
	p, err := plan(d, &o)
	return p, errors.Join(err, d.Close())
}

// plan makes the plan for d, which is o.Dir.
func plan(d *Directory, o *RecoverOptions) (*Plan, error) {
	if len(o.Peers) >= maxCopies {
		return nil, fmt.Errorf("at most %d directories can be compared", maxCopies)
	}
	p := &Plan{ClusterName: d.Identity.ClusterName, OldClusterID: fmt.Sprintf("%016x", d.Identity.ClusterID)}
	p.Copies = append(p.Copies, describe(d, o.DamagedLog))
	if err := p.Chosen().err; err != nil {
		return p, fmt.Errorf("nothing can be recovered from %s: %w", o.Dir, err)
	}
	for _, dir := range o.Peers {
		c, err := comparePeer(d, dir, p.Copies, o.DamagedLog)
		if err != nil {
			return nil, err
		}
		p.Copies = append(p.Copies, c)
	}
	p.judge()
	p.Members = []uint64{d.Identity.NodeID}
	for _, m := range o.Also {
		p.Members = append(p.Members, m.ID)
	}
	slices.Sort(p.Members)
	if err := checkMembers(p.Members, d.Identity.NodeID); err != nil {
		return nil, err
	}
	for _, c := range p.Copies {
		p.Term = max(p.Term, c.Term, c.LastTerm)
	}
	p.Term++
	p.Index = p.Chosen().LastIndex + 1
	var err error
	p.KeepsBefore, err = datadir.Kept(o.Dir)
	return p, err
}

func comparePeer(d *Directory, dir string, others []Copy, damaged bool) (c Copy, err error) {
	peer, err := Open(dir)
	if err != nil {
		return c, fmt.Errorf("compare with %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, peer.Close()) }()
	if peer.Identity.ClusterID != d.Identity.ClusterID {
		return c, fmt.Errorf("%w: %s is of cluster %q (%016x), %s of %q (%016x); only copies of one cluster can be compared",
			datadir.ErrForeign, dir, peer.Identity.ClusterName, peer.Identity.ClusterID, d.Path, d.Identity.ClusterName, d.Identity.ClusterID)
	}
	for _, o := range others {
		if o.NodeID == peer.Identity.NodeID {
			return c, fmt.Errorf("%s and %s are both of node %d; give one copy of each member", o.Dir, dir, o.NodeID)
		}
	}
	return describe(peer, damaged), nil
}

// describe says what d holds. What is wrong with it is part of the result; with
// damaged, a damaged log counts up to the damage.
func describe(d *Directory, damaged bool) Copy {
	c := Copy{Dir: d.Path, NodeID: d.Identity.NodeID, StateIndex: d.State.Index}
	fail := func(err error) Copy {
		c.err, c.Problem = err, err.Error()
		return c
	}
	if damaged {
		if err := d.acceptDamage(); err != nil {
			return fail(err)
		}
		if d.Log.Damage != nil {
			c.Damage = d.Log.Damage.Error()
		}
	}
	if d.Log != nil {
		c.FirstIndex, c.Term = d.Log.FirstIndex, d.Log.HardState.GetTerm()
	}
	if d.Wrong != nil {
		return fail(d.Wrong)
	}
	b, err := d.base()
	if err != nil {
		return fail(err)
	}
	if c.FromImage = b.image; b.image != "" {
		c.StateIndex = b.pos.Index
	}
	if c.LastIndex, c.LastTerm, err = d.last(b); err != nil {
		return fail(err)
	}
	c.CommitIndex = min(d.commit(b), c.LastIndex)
	pos, err := d.configuration(b)
	if err != nil {
		return fail(err)
	}
	if c.Epoch, err = epochOf(d.fs, b.dir); err != nil {
		return fail(err)
	}
	c.Undo = d.undo(c.Epoch)
	c.conf = pos.ConfState
	c.Voters, c.Learners = slices.Clone(pos.ConfState.GetVoters()), slices.Clone(pos.ConfState.GetLearners())
	slices.Sort(c.Voters)
	return c
}

// better reports whether a holds more than b, by the rule after which raft
// elects: what was committed is in every log that wins.
func better(a, b *Copy) bool {
	switch {
	case a.err != nil || b.err != nil:
		return b.err != nil && a.err == nil
	case a.LastTerm != b.LastTerm:
		return a.LastTerm > b.LastTerm
	}
	return a.LastIndex > b.LastIndex
}

func (p *Plan) judge() {
	for i := range p.Copies {
		if better(&p.Copies[i], &p.Copies[p.Best]) {
			p.Best = i
		}
	}
	best := &p.Copies[p.Best]
	p.Voters = best.Voters
	holds := func(id uint64, whole bool) bool {
		return slices.ContainsFunc(p.Copies, func(c Copy) bool { return c.NodeID == id && c.err == nil && (c.Damage == "" || !whole) })
	}
	for _, id := range p.Voters {
		if !holds(id, false) {
			p.Lost = append(p.Lost, id)
		}
	}
	// What a damaged log lost was perhaps in no other.
	has := func(id uint64) bool { return holds(id, true) }
	// In a joint configuration an entry needs a majority of either group; one
	// of them being seen by all majorities is enough.
	p.Complete = coversMajorities(best.conf.GetVoters(), has) || coversMajorities(best.conf.GetVotersOutgoing(), has)
	c := p.Chosen()
	p.Uncommitted = c.LastIndex - c.CommitIndex
}

// coversMajorities reports whether every majority of voters contains one that
// was compared.
func coversMajorities(voters []uint64, compared func(uint64) bool) bool {
	missing := 0
	for _, id := range voters {
		if !compared(id) {
			missing++
		}
	}
	return len(voters) > 0 && missing < len(voters)/2+1
}

// members returns the records of the new group. Where the one that stays is
// reached, and which disk it has, stays true; who was removed from the old group
// is nobody to the new one, whose id keeps all old disks out.
func (p *Plan) members(old []raftnode.Member) []raftnode.Member {
	var out []raftnode.Member
	for _, id := range p.Members {
		m := raftnode.Member{ID: id}
		if i := slices.IndexFunc(old, func(o raftnode.Member) bool { return o.ID == id }); i >= 0 && id == p.Chosen().NodeID {
			m.Addr, m.Disk = old[i].Addr, old[i].Disk
		}
		out = append(out, m)
	}
	return out
}
