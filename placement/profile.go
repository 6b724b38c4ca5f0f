package placement

import (
	"cmp"
	"encoding/binary"
	"maps"
	"math"
	"slices"
)

// profile is what a group of sidecars have in common: what they offer to the
// pipelines there are. Its members differ only by where they are and what they
// run.
type profile struct {
	key  string
	fits []fit // by want
	// members, by zone, node and id, and a tournament over them: keys[i] is how
	// loaded members[i] would be with one stage more, closed when it takes
	// nothing; win[k] is the position of the least loaded below inner node k.
	members []int32
	keys    []uint64
	win     []int32
	// stale: sidecars came or left since keys, win and the positions of the members
	// were right. They are put right when somebody asks, for that costs a look at
	// all members: a fleet that registers in one go would pay it for each sidecar.
	stale bool
	e     *Engine
	// open is the number of members that take stages, capacity theirs together.
	open     int
	capacity int64
	// share is how much load by capacity its members are to have; see shares.
	share uint64
	// room is up to how much of it a member is open to more; see rooms.
	room uint64
}

// fit is how a profile meets a want.
type fit struct {
	want    int32
	standIn int32
	fit     fitness
}

// closed is the key of a member that takes nothing.
const closed = math.MaxUint64

// unit is what one stage on a sidecar of capacity one weighs.
const unit = 1 << 20

// weigh is the load of n stages by capacity.
func weigh(n int32, capacity int64) uint64 { return uint64(n) * unit / uint64(capacity) }

func profileKey(fits []fit) string {
	b := make([]byte, 0, 9*len(fits))
	for _, f := range fits {
		b = binary.LittleEndian.AppendUint32(b, uint32(f.want))
		b = binary.LittleEndian.AppendUint32(b, uint32(f.standIn))
		b = append(b, byte(f.fit))
	}
	return string(b)
}

// find returns how the profile meets want w.
func (p *profile) find(w int32) (fit, bool) {
	fits := p.fits
	for len(fits) > 8 {
		if half := len(fits) / 2; fits[half].want <= w {
			fits = fits[half:]
		} else {
			fits = fits[:half]
		}
	}
	for i := range fits {
		if fits[i].want == w {
			return fits[i], true
		}
	}
	return fit{}, false
}

// rebuild makes the tournament anew after the members changed. The members'
// positions are the caller's matter.
func (p *profile) rebuild(key func(h int32) uint64) {
	n := len(p.members)
	size := 1
	for size < n {
		size *= 2
	}
	if cap(p.keys) < size {
		p.keys = make([]uint64, size)
		p.win = make([]int32, size)
	}
	p.keys, p.win = p.keys[:size], p.win[:size]
	for i := range p.keys {
		if i < n {
			p.keys[i] = key(p.members[i])
		} else {
			p.keys[i] = closed
		}
	}
	for k := size - 1; k > 0; k-- {
		p.win[k] = p.play(k)
	}
}

// winner returns the winner below node k; nodes from len(keys) on are leaves.
func (p *profile) winner(k int) int32 {
	if k >= len(p.keys) {
		return int32(k - len(p.keys))
	}
	return p.win[k]
}

// play decides inner node k: the less loaded wins, the left one of equals.
func (p *profile) play(k int) int32 {
	l, r := p.winner(2*k), p.winner(2*k+1)
	if p.keys[r] < p.keys[l] {
		return r
	}
	return l
}

// set gives the member at position i another key.
func (p *profile) set(i int32, key uint64) {
	if p.stale || p.keys[i] == key {
		return
	}
	p.keys[i] = key
	for k := (int(i) + len(p.keys)) / 2; k > 0; k /= 2 {
		p.win[k] = p.play(k)
	}
}

// least returns the least loaded member that takes stages.
func (p *profile) least() (h int32, key uint64) {
	if len(p.members) == 0 {
		return -1, closed
	}
	p.refresh()
	at := p.winner(1)
	if p.keys[at] == closed {
		return -1, closed
	}
	return p.members[at], p.keys[at]
}

// leastOf is least among the members at positions [lo, hi).
func (p *profile) leastOf(lo, hi int) (h int32, key uint64) {
	p.refresh()
	best, key := int32(-1), uint64(closed)
	take := func(k int) {
		if at := p.winner(k); p.keys[at] < key || (p.keys[at] == key && key != closed && at < best) {
			best, key = at, p.keys[at]
		}
	}
	l, r := lo+len(p.keys), hi+len(p.keys)
	for l < r {
		if l&1 == 1 {
			take(l)
			l++
		}
		if r&1 == 1 {
			r--
			take(r)
		}
		l /= 2
		r /= 2
	}
	if best < 0 {
		return -1, closed
	}
	return p.members[best], key
}

// compareHosts orders the members of a profile.
func (e *Engine) compareHosts(a, b int32) int {
	x, y := &e.hosts[a], &e.hosts[b]
	return cmp.Or(cmp.Compare(x.zone, y.zone), cmp.Compare(x.node, y.node), cmp.Compare(x.s.ID, y.s.ID))
}

// zone returns the positions of the members in a zone.
func (e *Engine) zoneOf(p *profile, zone int32) (lo, hi int) {
	below := func(h, z int32) int { return cmp.Compare(e.hosts[h].zone, z) }
	lo, _ = slices.BinarySearchFunc(p.members, zone, below)
	hi, _ = slices.BinarySearchFunc(p.members[lo:], zone+1, below)
	return lo, lo + hi
}

// hostKey is the key of h in its profile.
func (e *Engine) hostKey(h int32) uint64 {
	x := &e.hosts[h]
	if x.held || x.skipped || !x.takes {
		return closed
	}
	return weigh(x.load+1, x.capacity)
}

// fitsOf computes what s offers to the wants there are.
func (e *Engine) fitsOf(h int32) []fit {
	fits := e.fits[:0]
	s := e.hosts[h].s
	add := func(id int32, o *Offer, named bool) {
		if o == nil {
			return
		}
		w := &e.wants[id]
		f := fit{want: id, fit: o.fitness(w)}
		if f.fit == unfit {
			return
		}
		if !named {
			if n := e.nameID[o.Name]; n != 0 && e.names[n].stages > 0 {
				f.standIn = n
			}
		}
		fits = append(fits, f)
	}
	for _, n := range e.hosts[h].names {
		for _, id := range e.names[n].wants {
			add(id, s.offer(&e.wants[id]), true)
		}
	}
	for _, id := range e.typed {
		add(id, s.only(&e.wants[id]), false)
	}
	slices.SortFunc(fits, func(a, b fit) int { return cmp.Compare(a.want, b.want) })
	e.fits = fits
	return fits
}

// profileOf returns the profile with fits, made if need be.
func (e *Engine) profileOf(fits []fit) int32 {
	key := profileKey(fits)
	if id, ok := e.profileID[key]; ok {
		return id
	}
	var id int32
	if n := len(e.freeProfiles); n > 0 {
		id, e.freeProfiles = e.freeProfiles[n-1], e.freeProfiles[:n-1]
	} else {
		id = int32(len(e.profiles))
		e.profiles = append(e.profiles, profile{})
	}
	p := &e.profiles[id]
	*p = profile{e: e, key: key, fits: slices.Clone(fits), members: p.members[:0], keys: p.keys[:0], win: p.win[:0]}
	e.profileID[key] = id
	for _, f := range fits {
		w := &e.wants[f.want]
		w.in = append(w.in, place{id, f.fit, f.standIn})
		// What its members are to carry is not known yet: as much as their
		// like, until shares are counted again.
		for _, other := range w.in {
			p.share = max(p.share, e.profiles[other.profile].share)
			p.room = max(p.room, e.profiles[other.profile].room)
		}
	}
	return id
}

// enter puts h, which is in no profile, where it belongs.
func (e *Engine) enter(h int32) {
	id := e.profileOf(e.fitsOf(h))
	p := &e.profiles[id]
	e.setProfile(h, id)
	e.countOpen(h, +1)
	if e.building {
		p.members = append(p.members, h)
		return
	}
	at, _ := slices.BinarySearchFunc(p.members, h, e.compareHosts)
	p.members = slices.Insert(p.members, at, h)
	p.stale = true
}

// few is up to how many sidecars change their profile one by one; each of them
// costs as much as all of them together.
const few = 4

// match puts sidecars into the profiles they belong to now.
func (e *Engine) match(hosts []int32) {
	var moved []int32
	for _, h := range hosts {
		if x := &e.hosts[h]; x.profile < 0 || e.profiles[x.profile].key != profileKey(e.fitsOf(h)) {
			moved = append(moved, h)
		}
	}
	if len(moved) <= few {
		for _, h := range moved {
			if e.hosts[h].profile >= 0 {
				e.leave(h)
			}
			e.enter(h)
		}
		return
	}
	touched := make(map[int32]bool) // true: some came, not only left
	for _, h := range moved {
		x := &e.hosts[h]
		if x.profile >= 0 {
			touched[x.profile] = false
			e.countOpen(h, -1)
			e.setProfile(h, -1)
		}
	}
	e.building = true
	for _, h := range moved {
		e.enter(h)
		touched[e.hosts[h].profile] = true
	}
	e.building = false
	for _, id := range slices.Sorted(maps.Keys(touched)) {
		p := &e.profiles[id]
		p.members = slices.DeleteFunc(p.members, func(h int32) bool { return e.hosts[h].profile != id })
		if len(p.members) == 0 {
			e.dropProfile(id)
			continue
		}
		if touched[id] {
			slices.SortFunc(p.members, e.compareHosts)
		}
		p.stale = true
	}
}

// leave takes h out of its profile.
func (e *Engine) leave(h int32) {
	x := &e.hosts[h]
	p := &e.profiles[x.profile]
	e.countOpen(h, -1)
	at := int(x.pos)
	if p.stale {
		at, _ = slices.BinarySearchFunc(p.members, h, e.compareHosts)
	}
	p.members = slices.Delete(p.members, at, at+1)
	p.stale = true
	if len(p.members) == 0 {
		e.dropProfile(x.profile)
	}
	e.setProfile(h, -1)
}

// refresh puts right what is stale.
func (p *profile) refresh() {
	if !p.stale {
		return
	}
	p.stale = false
	for i, h := range p.members {
		p.e.hosts[h].pos = int32(i)
	}
	p.rebuild(p.e.hostKey)
}

// dropProfile forgets a profile without members.
func (e *Engine) dropProfile(id int32) {
	p := &e.profiles[id]
	for _, f := range p.fits {
		w := &e.wants[f.want]
		i := slices.IndexFunc(w.in, func(pl place) bool { return pl.profile == id })
		w.in = slices.Delete(w.in, i, i+1)
	}
	delete(e.profileID, p.key)
	p.key, p.fits, p.share, p.room = "", nil, 0, 0
	e.freeProfiles = append(e.freeProfiles, id)
}

// countOpen counts h among those of its profile that take stages.
func (e *Engine) countOpen(h int32, by int) {
	x := &e.hosts[h]
	if !x.takes {
		return
	}
	p := &e.profiles[x.profile]
	p.open += by
	p.capacity += int64(by) * x.capacity
	e.drift += x.capacity
}

// refresh brings the key of h up to date.
func (e *Engine) refresh(h int32) {
	if x := &e.hosts[h]; x.profile >= 0 {
		e.profiles[x.profile].set(x.pos, e.hostKey(h))
	}
}
