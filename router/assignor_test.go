package router

import (
	"fmt"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"conveyor.etl/router/router/commandpb"
)

// checkGroup fails unless the partitions of a group are spread evenly and
// completely. Assignments made by hand may be uneven.
func checkGroup(t testing.TB, g *commandpb.Group) {
	t.Helper()
	seen := make([]bool, g.PartitionCount)
	for i, m := range g.Members {
		if i > 0 && g.Members[i-1].ServiceId >= m.ServiceId {
			t.Fatalf("members out of order: %s", text(g))
		}
		if !slices.IsSorted(m.Partitions) {
			t.Fatalf("partitions out of order: %s", text(g))
		}
		for _, p := range m.Partitions {
			if seen[p] {
				t.Fatalf("partition %d has two owners: %s", p, text(g))
			}
			seen[p] = true
		}
	}
	if slices.Contains(seen, false) {
		t.Fatalf("a partition has no owner: %s", text(g))
	}
}

// fewestMoves tries every balanced assignment and returns the fewest
// partitions that change hands or find a first owner.
func fewestMoves(owner []int, members int) int {
	count := len(owner)
	low := count / members
	load := make([]int, members)
	best := count + 1
	var try func(p, moves int)
	try = func(p, moves int) {
		if moves >= best {
			return
		}
		if p == count {
			larger := 0
			for _, l := range load {
				if l < low || l > low+1 {
					return
				}
				if l == low+1 {
					larger++
				}
			}
			if larger == count%members {
				best = moves
			}
			return
		}
		for m := range members {
			if load[m] > low {
				continue
			}
			load[m]++
			d := 1
			if owner[p] == m {
				d = 0
			}
			try(p+1, moves+d)
			load[m]--
		}
	}
	try(0, 0)
	return best
}

// TestAssignorMovesAsLittleAsPossible compares with every other balanced
// assignment, from any situation before.
func TestAssignorMovesAsLittleAsPossible(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 4).Draw(t, "members")
		count := rapid.IntRange(1, 7).Draw(t, "partitions")
		members := make([]*commandpb.GroupMember, n)
		for i := range members {
			members[i] = &commandpb.GroupMember{
				ServiceId:   fmt.Sprint(i),
				Preferences: rapid.SliceOfNDistinct(rapid.Uint32Range(0, uint32(count-1)), 0, min(count, 3), rapid.ID).Draw(t, "preferences"),
			}
		}
		owner := make([]int, count)
		for p := range owner {
			owner[p] = rapid.IntRange(-1, n-1).Draw(t, "owner")
			if owner[p] >= 0 {
				members[owner[p]].Partitions = append(members[owner[p]].Partitions, uint32(p))
			}
		}
		want := fewestMoves(owner, n)
		assignPartitions(uint32(count), members)
		moves, low, high := 0, count, 0
		seen := map[uint32]bool{}
		for i, m := range members {
			low, high = min(low, len(m.Partitions)), max(high, len(m.Partitions))
			for _, p := range m.Partitions {
				if seen[p] {
					t.Fatalf("partition %d twice: %v", p, members)
				}
				seen[p] = true
				if owner[p] != i {
					moves++
				}
			}
		}
		if len(seen) != count || high-low > 1 {
			t.Fatalf("not complete and even: %v", members)
		}
		if moves != want {
			t.Fatalf("%d moves from %v, %d would do: %v", moves, owner, want, members)
		}
		// Doing it again changes nothing.
		again := make([]*commandpb.GroupMember, n)
		for i := range members {
			again[i] = proto.Clone(members[i]).(*commandpb.GroupMember)
		}
		assignPartitions(uint32(count), again)
		for i := range members {
			if !proto.Equal(again[i], members[i]) {
				t.Fatalf("a second run moved partitions: %v, then %v", members, again)
			}
		}
	})
}

// TestAssignorHonoursFreePreferences: whoever needs partitions anyway gets the
// ones it wants, if they have to move anyway.
func TestAssignorHonoursFreePreferences(t *testing.T) {
	old := &commandpb.GroupMember{ServiceId: "old", Partitions: []uint32{0, 1, 2, 3, 4, 5}, Preferences: []uint32{0, 1}}
	young := &commandpb.GroupMember{ServiceId: "young", Preferences: []uint32{1, 3, 4}}
	assignPartitions(6, []*commandpb.GroupMember{old, young})
	if want := []uint32{3, 4, 5}; !slices.Equal(young.Partitions, want) {
		t.Fatalf("got %v, want %v: its wishes except what the owner wants to keep", young.Partitions, want)
	}
	if want := []uint32{0, 1, 2}; !slices.Equal(old.Partitions, want) {
		t.Fatalf("the owner kept %v, want %v", old.Partitions, want)
	}
}

// Goal: whoever drains keeps exactly what it has, the others share the rest evenly
// and without needless moves, and every partition has an owner; when all drain they
// share as usual.
func TestAssignorLeavesWhoDrains(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		count := rapid.Uint32Range(1, 24).Draw(t, "partitions")
		n := rapid.IntRange(1, 6).Draw(t, "members")
		members := make([]*commandpb.GroupMember, n)
		for i := range members {
			members[i] = &commandpb.GroupMember{ServiceId: fmt.Sprint("m", i), Preferences: rapid.SliceOfNDistinct(rapid.Uint32Range(0, 30), 0, 4, rapid.ID).Draw(t, "preferences")}
		}
		assignPartitions(count, members)
		drains := 0
		for _, m := range members {
			if m.Draining = rapid.Bool().Draw(t, "drains"); m.Draining {
				drains++
			}
		}
		before := make([][]uint32, n)
		for i, m := range members {
			before[i] = slices.Clone(m.Partitions)
		}
		// One of those that take joins or leaves.
		if rapid.Bool().Draw(t, "joins") {
			members = append(members, &commandpb.GroupMember{ServiceId: "n"})
		} else if i := slices.IndexFunc(members, func(m *commandpb.GroupMember) bool { return !m.Draining }); i >= 0 && len(members) > 1 {
			members = slices.Delete(slices.Clone(members), i, i+1)
			before = slices.Delete(before, i, i+1)
		}
		assignPartitions(count, members)
		seen := make([]bool, count)
		least, most, takers := int(count), 0, 0
		for i, m := range members {
			for _, p := range m.Partitions {
				if seen[p] {
					t.Fatalf("partition %d has two owners", p)
				}
				seen[p] = true
			}
			if m.Draining {
				if drains < len(members) && !slices.Equal(m.Partitions, before[i]) {
					t.Fatalf("%s drains and had %v, now %v", m.ServiceId, before[i], m.Partitions)
				}
				continue
			}
			takers++
			least, most = min(least, len(m.Partitions)), max(most, len(m.Partitions))
		}
		if slices.Contains(seen, false) {
			t.Fatal("a partition has no owner")
		}
		if takers > 0 && most-least > 1 {
			t.Fatalf("shares from %d to %d", least, most)
		}
	})
}
