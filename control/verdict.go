package control

import (
	"cmp"
	"maps"
	"slices"

	"conveyor.etl/router/router"
)

// Electorate is whose states count: a majority of Voters and, while the group
// changes its members in two steps, also one of Outgoing. Learners are judged
// and do not count.
type Electorate struct {
	Voters, Outgoing, Learners []uint64
}

// all returns the ids of everybody, ascending, each once.
func (e Electorate) all() []uint64 {
	ids := slices.Concat(e.Voters, e.Outgoing, e.Learners)
	slices.Sort(ids)
	return slices.Compact(ids)
}

func (e Electorate) votes(id uint64) bool {
	return slices.Contains(e.Voters, id) || slices.Contains(e.Outgoing, id)
}

// majority reports whether nodes hold a majority.
func (e Electorate) majority(nodes []uint64) bool {
	more := func(of []uint64) bool {
		n := 0
		for _, id := range of {
			if slices.Contains(nodes, id) {
				n++
			}
		}
		return n > len(of)/2
	}
	return len(e.Voters) > 0 && more(e.Voters) && (len(e.Outgoing) == 0 || more(e.Outgoing))
}

// Verdict is what the sums of the members say about their states.
type Verdict struct {
	// Agree are the nodes whose sums are those of a majority at the newest index
	// at which that can be said, ascending, and AgreeAt says which sums these are;
	// Differ are those whose are not, with the sums that were expected of them.
	Agree   []uint64
	AgreeAt map[uint64]router.Sums
	Differ  map[uint64]router.Sums
	// Index is the newest index at which a majority agrees, 0 when there is none.
	Index uint64
	// Split: voters differ and there is no majority to say who is right, at
	// SplitAt, which is newer than Index.
	Split   bool
	SplitAt uint64
	// Sides are the nodes that differ at SplitAt, ascending.
	Sides []uint64
}

// point is where sums can be compared: at one index of one epoch.
type point struct{ index, epoch uint64 }

// Judge compares what the members report of themselves. It is a pure function
// of its arguments. Sums of different epochs, or of different numbers of tables
// as two releases may keep, say nothing about each other and are never
// compared. Reports of nodes that are no members are ignored.
func Judge(e Electorate, reports map[uint64][]router.Sums) Verdict {
	at := map[point]map[uint64]router.Sums{}
	for _, id := range e.all() {
		for _, s := range reports[id] {
			p := point{s.Index, s.Epoch}
			if at[p] == nil {
				at[p] = map[uint64]router.Sums{}
			}
			at[p][id] = s
		}
	}
	points := slices.SortedFunc(maps.Keys(at), func(a, b point) int {
		return -cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(a.epoch, b.epoch))
	})
	for _, sums := range at {
		align(sums)
	}
	v := Verdict{AgreeAt: map[uint64]router.Sums{}, Differ: map[uint64]router.Sums{}}
	judged := map[uint64]bool{}
	for _, p := range points {
		members := slices.Sorted(maps.Keys(at[p]))
		reference, found := reference(e, members, at[p])
		if !found {
			if sides := sidesOf(e, members, at[p]); !v.Split && len(sides) > 0 {
				v.Split, v.SplitAt, v.Sides = true, p.index, sides
			}
			continue
		}
		v.Index = max(v.Index, p.index)
		for _, id := range members {
			if judged[id] || len(at[p][id].Sums) != len(reference.Sums) {
				continue
			}
			judged[id] = true
			if slices.Equal(at[p][id].Sums, reference.Sums) {
				v.Agree = append(v.Agree, id)
				v.AgreeAt[id] = reference
			} else {
				v.Differ[id] = reference
			}
		}
	}
	if v.Split && v.SplitAt <= v.Index {
		v.Split, v.SplitAt, v.Sides = false, 0, nil // a majority has settled it
	}
	slices.Sort(v.Agree)
	return v
}

// align leaves out of the sums of one point what not all of them know. Left to
// each pair, "equal as far as both know" would not be transitive, and a majority
// a matter of the order in which it is looked for.
func align(sums map[uint64]router.Sums) {
	for _, s := range sums {
		if !s.KnowsCheckpoints() {
			for id, other := range sums {
				sums[id] = other.WithoutCheckpoints()
			}
			return
		}
	}
}

// equalSums compares the sums of two nodes at one point; ok is false when they
// cannot be compared.
func equalSums(a, b router.Sums) (equal, ok bool) {
	if a.Index != b.Index || a.Epoch != b.Epoch || len(a.Sums) != len(b.Sums) {
		return false, false
	}
	if !a.KnowsCheckpoints() || !b.KnowsCheckpoints() {
		a, b = a.WithoutCheckpoints(), b.WithoutCheckpoints()
	}
	return slices.Equal(a.Sums, b.Sums), true
}

// reference returns the sums that a majority has.
func reference(e Electorate, members []uint64, sums map[uint64]router.Sums) (router.Sums, bool) {
	for _, id := range members {
		var same []uint64
		for _, other := range members {
			if slices.Equal(sums[id].Sums, sums[other].Sums) {
				same = append(same, other)
			}
		}
		if e.majority(same) {
			return sums[id], true
		}
	}
	return router.Sums{}, false
}

// sidesOf returns the voters that differ from another one, none when all that
// can be compared are equal.
func sidesOf(e Electorate, members []uint64, sums map[uint64]router.Sums) []uint64 {
	return slices.DeleteFunc(slices.Clone(members), func(id uint64) bool {
		return !e.votes(id) || !slices.ContainsFunc(members, func(other uint64) bool {
			return e.votes(other) && len(sums[id].Sums) == len(sums[other].Sums) && !slices.Equal(sums[id].Sums, sums[other].Sums)
		})
	})
}

// Sources returns the nodes from which a node may take its state, ascending:
// those of agreed (all when it is empty: the operator decided that this node is
// the wrong one) that have answered, in reports, and contradict none of the
// others that may be taken from. self never counts.
func Sources(self uint64, agreed []uint64, reports map[uint64][]router.Sums) []uint64 {
	var ids []uint64
	for id := range reports {
		if id != self && (len(agreed) == 0 || slices.Contains(agreed, id)) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for i, a := range ids {
		for _, b := range ids[i+1:] {
			if contradict(reports[a], reports[b]) {
				return nil // one of them is wrong, and nobody here knows which
			}
		}
	}
	return ids
}

// contradict reports whether two nodes differ where they can be compared last.
func contradict(a, b []router.Sums) bool {
	newest, differ := uint64(0), false
	for _, x := range a {
		for _, y := range b {
			if equal, ok := equalSums(x, y); ok && x.Index >= newest {
				newest, differ = x.Index, !equal
			}
		}
	}
	return differ
}
