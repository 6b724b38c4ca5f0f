package router

import (
	"cmp"
	"slices"

	"conveyor.etl/router/router/commandpb"
)

// assignPartitions spreads count partitions over members, in place, as spread does.
// Those that drain keep what they have and get no more, unless all of them drain: a
// partition must have an owner.
func assignPartitions(count uint32, members []*commandpb.GroupMember) {
	var takers []*commandpb.GroupMember
	owned := make([]bool, count)
	for _, m := range members {
		if !m.Draining {
			takers = append(takers, m)
		}
	}
	if len(takers) == 0 || len(takers) == len(members) {
		spread(count, members)
		return
	}
	for _, m := range members {
		if !m.Draining {
			continue
		}
		m.Partitions = slices.DeleteFunc(slices.Clone(m.Partitions), func(p uint32) bool {
			gone := p >= count || owned[p]
			if !gone {
				owned[p] = true
			}
			return gone
		})
	}
	// The others share what is left, numbered anew in the same order.
	var left []uint32
	number := make(map[uint32]uint32)
	for p := range count {
		if !owned[p] {
			number[p] = uint32(len(left))
			left = append(left, p)
		}
	}
	renumber := func(in []uint32) (out []uint32) {
		for _, p := range in {
			if n, ok := number[p]; ok {
				out = append(out, n)
			}
		}
		return out
	}
	short := make([]*commandpb.GroupMember, len(takers))
	for i, m := range takers {
		short[i] = &commandpb.GroupMember{ServiceId: m.ServiceId, Partitions: renumber(m.Partitions), Preferences: renumber(m.Preferences)}
	}
	spread(uint32(len(left)), short)
	for i, m := range takers {
		m.Partitions = nil
		for _, p := range short[i].Partitions {
			m.Partitions = append(m.Partitions, left[p])
		}
	}
}

// spread spreads count partitions over members, in place.
//
// The result is balanced: no member has two partitions more than another. No
// partition moves that could stay: only those without an owner and those above
// an owner's share move, and the shares that are one larger go to the members
// that hold most already. Among the answers that move equally little,
// preferences decide. Members must be sorted by service id, their partitions
// ascending; the outcome depends on nothing else.
func spread(count uint32, members []*commandpb.GroupMember) {
	if len(members) == 0 {
		return
	}
	n := len(members)
	owner := make([]int, count)
	for p := range owner {
		owner[p] = -1
	}
	load := make([]int, n)
	for i, m := range members {
		for _, p := range m.Partitions {
			// Beyond the count or owned twice cannot be, except by a bug; then
			// the first owner wins.
			if p < count && owner[p] < 0 {
				owner[p] = i
				load[i]++
			}
		}
	}
	wants := make([]map[uint32]bool, n)
	for i, m := range members {
		wants[i] = make(map[uint32]bool, len(m.Preferences))
		for _, p := range m.Preferences {
			wants[i][p] = true
		}
	}

	// Shares: the larger ones to who holds more, then to who wants more that
	// is not its own yet, then by id.
	share := make([]int, n)
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	low, larger := int(count)/n, int(count)%n
	slices.SortFunc(order, func(a, b int) int {
		// Above the larger share all are equal: each of them keeps one more.
		return cmp.Or(
			cmp.Compare(min(load[b], low+1), min(load[a], low+1)),
			cmp.Compare(len(wants[b]), len(wants[a])),
			cmp.Compare(a, b))
	})
	for i, m := range order {
		share[m] = low
		if i < larger {
			share[m]++
		}
	}

	// Release what is above the share: first what somebody with room wants and
	// the owner does not, last what the owner wants itself.
	room := make([]int, n)
	wanted := map[uint32]bool{}
	for i, m := range members {
		if room[i] = share[i] - load[i]; room[i] > 0 {
			for _, p := range m.Preferences {
				wanted[p] = true
			}
		}
	}
	var free []uint32
	for p := range owner {
		if owner[p] < 0 {
			free = append(free, uint32(p))
		}
	}
	for i := range members {
		if room[i] >= 0 {
			continue
		}
		var mine []uint32
		for _, p := range members[i].Partitions {
			if p < count && owner[p] == i && !slices.Contains(mine[max(0, len(mine)-1):], p) {
				mine = append(mine, p)
			}
		}
		rank := func(p uint32) int {
			r := 0
			if wants[i][p] {
				r = 2
			}
			if !wanted[p] {
				r++
			}
			return r
		}
		slices.SortFunc(mine, func(a, b uint32) int {
			return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(b, a))
		})
		for _, p := range mine[:-room[i]] {
			owner[p] = -1
			free = append(free, p)
		}
	}
	slices.Sort(free)

	// Give: preferences first, one per member and turn, so that no member
	// takes all that several want.
	next := make([]int, n)
	for again := true; again; {
		again = false
		for i, m := range members {
			for room[i] > 0 && next[i] < len(m.Preferences) {
				p := m.Preferences[next[i]]
				next[i]++
				if p < count && owner[p] < 0 {
					owner[p] = i
					room[i]--
					again = true
					break
				}
			}
		}
	}
	i := 0
	for _, p := range free {
		if owner[p] >= 0 {
			continue
		}
		for room[i] <= 0 {
			i++
		}
		owner[p] = i
		room[i]--
	}

	for _, m := range members {
		m.Partitions = nil
	}
	for p, o := range owner {
		members[o].Partitions = append(members[o].Partitions, uint32(p))
	}
}
