package router

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// group returns a group, nil when it has no members. The message is shared and
// must not be modified.
func (t *tx) group(id string) *commandpb.Group {
	c := t.cell(t.buf.single(prefixGroup, id))
	if c.val == nil {
		return nil
	}
	if c.obj == nil {
		g := &commandpb.Group{}
		if err := g.UnmarshalVT(c.val); err != nil {
			t.fail(err)
			return nil
		}
		c.obj = g
	}
	return c.obj.(*commandpb.Group)
}

func findMember(g *commandpb.Group, service string) (int, bool) {
	return slices.BinarySearchFunc(g.GetMembers(), service, func(m *commandpb.GroupMember, s string) int {
		return strings.Compare(m.ServiceId, s)
	})
}

func owns(m *commandpb.GroupMember, partition uint32) bool {
	_, ok := slices.BinarySearch(m.Partitions, partition)
	return ok
}

// saveGroup stores a group in place of prev. A group without members is
// removed, but its generation is kept: given out again, it would let a member
// of the old group commit into the new one.
func (t *tx) saveGroup(prev, next *commandpb.Group) {
	id := next.GroupId
	next.ModRevision = t.revision
	k := t.buf.single(prefixGroup, id)
	var before proto.Message
	if prev != nil {
		before = prev
	}
	if len(next.Members) == 0 {
		t.drop(t.cell(k))
		t.store(t.buf.single(prefixGroupPast, id), &commandpb.GroupPast{Generation: next.Generation})
		t.count(countGroups, -1)
		t.emit(TableGroups, id, before, nil)
		return
	}
	if prev == nil {
		next.CreateRevision = t.revision
		t.count(countGroups, 1)
	}
	v, err := next.MarshalVT()
	t.fail(err)
	t.put(t.cell(k), v, next)
	t.emit(TableGroups, id, before, next)
}

// joinGroup makes a service a member and spreads the partitions again. A
// member that joins again gets its assignment as it is.
//
// Rejections: INVALID (ids, no partition count for a new group), LIMIT,
// PRECONDITION (the group serves another stage, the service drains).
func (t *tx) joinGroup(c *commandpb.JoinGroup) *commandpb.Rejection {
	if r := first(checkID("service id", c.ServiceId), checkID("group id", c.GroupId)); r != nil {
		return r
	}
	subject := "group " + c.GroupId
	if c.StageId != "" {
		if r := checkID("stage id", c.StageId); r != nil {
			return r
		}
	}
	if len(c.Preferences) > maxPartitions {
		return limit(subject, "%d preferred partitions, at most %d are allowed", len(c.Preferences), maxPartitions)
	}
	prev := t.group(c.GroupId)
	next := &commandpb.Group{GroupId: c.GroupId, StageId: c.StageId, PartitionCount: c.PartitionCount}
	if prev == nil {
		if c.PartitionCount == 0 || c.PartitionCount > maxPartitions {
			return invalid(subject, "a new group needs 1 to %d partitions, not %d", maxPartitions, c.PartitionCount)
		}
		var past commandpb.GroupPast
		if t.load(t.buf.single(prefixGroupPast, c.GroupId), &past) {
			next.Generation = past.Generation
			t.remove(t.buf.single(prefixGroupPast, c.GroupId))
		}
	} else {
		if c.StageId != "" && prev.StageId != "" && c.StageId != prev.StageId {
			return reject(commandpb.Code_CODE_PRECONDITION, subject, "the group serves stage %q, not %q; use another group id", prev.StageId, c.StageId)
		}
		next = proto.Clone(prev).(*commandpb.Group)
		if next.StageId == "" {
			next.StageId = c.StageId
		}
	}
	prefs := cleanPreferences(c.Preferences, next.PartitionCount)
	i, member := findMember(next, c.ServiceId)
	if member {
		t.res.Existed = true
		m := next.Members[i]
		if !slices.Equal(m.Preferences, prefs) || next.StageId != prev.StageId {
			m.Preferences = prefs
			t.saveGroup(prev, next)
		}
		t.joined(next, i)
		return nil
	}
	if s := t.service(c.ServiceId); s.GetDrainSinceMs() > 0 {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "service %s drains and takes nothing more; register it again to take that back", c.ServiceId)
	}
	if len(next.Members) >= maxMembers {
		return limit(subject, "the group has %d members already", len(next.Members))
	}
	next.Generation++
	next.Members = slices.Insert(next.Members, i, &commandpb.GroupMember{
		ServiceId: c.ServiceId, Preferences: prefs, JoinedGeneration: next.Generation,
	})
	assignPartitions(next.PartitionCount, next.Members)
	t.saveGroup(prev, next)
	t.mark(t.buf.pair(prefixMembership, c.ServiceId, c.GroupId))
	t.joined(next, i)
	return nil
}

// joined fills the result for the member at i. A member that was expired is alive
// again in the same step: the leases of the expired are not watched, and nobody
// would notice when a member dies that has never come back.
func (t *tx) joined(g *commandpb.Group, i int) {
	if prev := t.service(g.Members[i].ServiceId); prev != nil && prev.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED {
		t.reviveService(prev)
	}
	t.res.Generation, t.res.PartitionCount = t.fenced(g.Generation), g.PartitionCount
	t.res.Partitions = slices.Clone(g.Members[i].Partitions)
}

// cleanPreferences drops repeated and impossible partitions, keeping the order.
func cleanPreferences(in []uint32, count uint32) []uint32 {
	var out []uint32
	seen := make(map[uint32]bool, len(in))
	for _, p := range in {
		if p < count && !seen[p] {
			seen[p] = true
			out = append(out, p)
		}
	}
	return out
}

// leaveGroup takes a service out of a group. If it is no member nothing
// changes and existed stays unset.
//
// Rejections: INVALID (ids).
func (t *tx) leaveGroup(c *commandpb.LeaveGroup) *commandpb.Rejection {
	if r := first(checkID("service id", c.ServiceId), checkID("group id", c.GroupId)); r != nil {
		return r
	}
	t.leave(c.GroupId, c.ServiceId)
	return nil
}

func (t *tx) leave(group, service string) {
	prev := t.group(group)
	if prev == nil {
		return
	}
	i, ok := findMember(prev, service)
	if !ok {
		t.res.Generation = t.fenced(prev.Generation)
		return
	}
	next := proto.Clone(prev).(*commandpb.Group)
	next.Members = slices.Delete(next.Members, i, i+1)
	next.Generation++
	assignPartitions(next.PartitionCount, next.Members)
	t.saveGroup(prev, next)
	t.unmark(t.buf.pair(prefixMembership, service, group))
	t.res.Existed, t.res.Generation = true, t.fenced(next.Generation)
}

// leaveAll takes a service out of every group, so that the partitions of a
// service that is gone get another owner in the same step.
func (t *tx) leaveAll(service string) {
	generation := t.res.Generation
	for _, g := range t.groupsOf(service) {
		t.leave(g, service)
	}
	t.res.Generation = generation
}

// assignPartitions overrides the assignor with a complete assignment. Members
// that are not named own nothing until the next change.
//
// Rejections: INVALID (ids, partitions out of range, twice or missing),
// NOT_FOUND, FENCED (generation of another epoch), CONFLICT (generation), PRECONDITION (not a member).
func (t *tx) assignPartitions(c *commandpb.AssignPartitions) *commandpb.Rejection {
	if r := checkID("group id", c.GroupId); r != nil {
		return r
	}
	prev := t.group(c.GroupId)
	if prev == nil {
		return notFound("group", c.GroupId)
	}
	subject := "group " + c.GroupId
	if r := t.otherEpoch(subject, c.ExpectedGeneration, prev.Generation); r != nil {
		return r
	}
	t.res.Generation = t.fenced(prev.Generation)
	if c.ExpectedGeneration != t.res.Generation {
		return conflict(subject, t.res.Generation, "generation %d was expected, the group is at %d; read it again and redo the assignment", c.ExpectedGeneration, t.res.Generation)
	}
	next := proto.Clone(prev).(*commandpb.Group)
	for _, m := range next.Members {
		m.Partitions = nil
	}
	owned := make([]bool, next.PartitionCount)
	named := make(map[string]bool, len(c.Members))
	total := 0
	for _, m := range c.Members {
		i, ok := findMember(next, m.GetServiceId())
		if !ok {
			return reject(commandpb.Code_CODE_PRECONDITION, subject, "service %q is no member of the group", m.GetServiceId())
		}
		if named[m.ServiceId] {
			return invalid(subject, "service %q is named twice", m.ServiceId)
		}
		named[m.ServiceId] = true
		for _, p := range m.Partitions {
			if p >= next.PartitionCount {
				return invalid(subject, "partition %d does not exist, the group has %d", p, next.PartitionCount)
			}
			if owned[p] {
				return invalid(subject, "partition %d is given twice", p)
			}
			owned[p] = true
			total++
		}
		next.Members[i].Partitions = slices.Sorted(slices.Values(m.Partitions))
	}
	if total != len(owned) {
		return invalid(subject, "partition %d has no owner; an assignment has to be complete", slices.Index(owned, false))
	}
	same := true
	for i, m := range next.Members {
		same = same && slices.Equal(m.Partitions, prev.Members[i].Partitions)
	}
	if same {
		return nil
	}
	next.Generation++
	t.saveGroup(prev, next)
	t.res.Generation = t.fenced(next.Generation)
	return nil
}
