package control

import (
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"conveyor.etl/router/router"
)

func sumsAt(index, epoch uint64, sums ...uint64) router.Sums {
	return router.Sums{Index: index, Epoch: epoch, Sums: sums}
}

func TestJudge(t *testing.T) {
	three := Electorate{Voters: []uint64{1, 2, 3}}
	type reports = map[uint64][]router.Sums
	for _, c := range []struct {
		name    string
		e       Electorate
		reports reports
		want    Verdict
	}{
		{"nobody says anything", three, reports{}, Verdict{}},
		{"all are equal", three, reports{1: {sumsAt(128, 0, 7, 8)}, 2: {sumsAt(128, 0, 7, 8)}, 3: {sumsAt(128, 0, 7, 8)}},
			Verdict{Agree: []uint64{1, 2, 3}, Index: 128}},
		{"a follower differs", three, reports{1: {sumsAt(128, 0, 7, 8)}, 2: {sumsAt(128, 0, 7, 8)}, 3: {sumsAt(128, 0, 7, 9)}},
			Verdict{Agree: []uint64{1, 2}, Differ: map[uint64]router.Sums{3: sumsAt(128, 0, 7, 8)}, Index: 128}},
		{"one is away, the others are equal", three, reports{1: {sumsAt(128, 0, 7)}, 3: {sumsAt(128, 0, 7)}},
			Verdict{Agree: []uint64{1, 3}, Index: 128}},
		{"one is away, the others differ", three, reports{1: {sumsAt(128, 0, 7)}, 3: {sumsAt(128, 0, 8)}},
			Verdict{Split: true, SplitAt: 128, Sides: []uint64{1, 3}}},
		{"two voters differ", Electorate{Voters: []uint64{1, 2}}, reports{1: {sumsAt(128, 0, 7)}, 2: {sumsAt(128, 0, 8)}},
			Verdict{Split: true, SplitAt: 128, Sides: []uint64{1, 2}}},
		{"all differ", three, reports{1: {sumsAt(128, 0, 7)}, 2: {sumsAt(128, 0, 8)}, 3: {sumsAt(128, 0, 9)}},
			Verdict{Split: true, SplitAt: 128, Sides: []uint64{1, 2, 3}}},
		{"other epochs", three, reports{1: {sumsAt(128, 1, 7)}, 2: {sumsAt(128, 0, 8)}, 3: {sumsAt(128, 0, 8)}},
			Verdict{Agree: []uint64{2, 3}, Index: 128}},
		{"other numbers of tables", three, reports{1: {sumsAt(128, 0, 7, 8)}, 2: {sumsAt(128, 0, 7, 8)}, 3: {sumsAt(128, 0, 7, 8, 9)}},
			Verdict{Agree: []uint64{1, 2}, Index: 128}},
		{"two releases of a half each", Electorate{Voters: []uint64{1, 2}}, reports{1: {sumsAt(128, 0, 7)}, 2: {sumsAt(128, 0, 7, 9)}},
			Verdict{}},
		{"a learner differs", Electorate{Voters: []uint64{1, 2, 3}, Learners: []uint64{4}},
			reports{1: {sumsAt(128, 0, 7)}, 2: {sumsAt(128, 0, 7)}, 4: {sumsAt(128, 0, 8)}},
			Verdict{Agree: []uint64{1, 2}, Differ: map[uint64]router.Sums{4: sumsAt(128, 0, 7)}, Index: 128}},
		{"learners make no majority", Electorate{Voters: []uint64{1, 2, 3}, Learners: []uint64{4, 5}},
			reports{1: {sumsAt(128, 0, 7)}, 4: {sumsAt(128, 0, 8)}, 5: {sumsAt(128, 0, 8)}}, Verdict{}},
		{"a majority of the new voters alone", Electorate{Voters: []uint64{1, 2, 3}, Outgoing: []uint64{3, 4, 5}},
			reports{1: {sumsAt(128, 0, 7)}, 2: {sumsAt(128, 0, 7)}, 3: {sumsAt(128, 0, 8)}},
			Verdict{Split: true, SplitAt: 128, Sides: []uint64{1, 2, 3}}},
		{"a late one is judged where it is", three,
			reports{1: {sumsAt(128, 0, 7), sumsAt(256, 0, 9)}, 2: {sumsAt(128, 0, 7), sumsAt(256, 0, 9)}, 3: {sumsAt(128, 0, 8)}},
			Verdict{Agree: []uint64{1, 2}, Differ: map[uint64]router.Sums{3: sumsAt(128, 0, 7)}, Index: 256}},
		{"a newer majority settles an older difference", three,
			reports{1: {sumsAt(128, 0, 7), sumsAt(256, 0, 9)}, 2: {sumsAt(128, 0, 8), sumsAt(256, 0, 9)}},
			Verdict{Agree: []uint64{1, 2}, Index: 256}},
		{"a newer difference is not settled by an older majority", three,
			reports{1: {sumsAt(128, 0, 7), sumsAt(256, 0, 9)}, 2: {sumsAt(128, 0, 7), sumsAt(256, 0, 10)}, 3: {sumsAt(128, 0, 7)}},
			Verdict{Agree: []uint64{1, 2, 3}, Index: 128, Split: true, SplitAt: 256, Sides: []uint64{1, 2}}},
		{"strangers do not count", Electorate{Voters: []uint64{1, 2}}, reports{1: {sumsAt(128, 0, 7)}, 8: {sumsAt(128, 0, 9)}, 9: {sumsAt(128, 0, 9)}}, Verdict{}},
	} {
		if c.want.Differ == nil {
			c.want.Differ = map[uint64]router.Sums{}
		}
		got := Judge(c.e, c.reports)
		// Where those who agree do so: at the index at which they were judged.
		if at := slices.Sorted(maps.Keys(got.AgreeAt)); !slices.Equal(at, got.Agree) {
			t.Errorf("%s: %v agree, and it is said where of %v", c.name, got.Agree, at)
		}
		for id, at := range got.AgreeAt {
			if !slices.ContainsFunc(c.reports[id], func(s router.Sums) bool { return reflect.DeepEqual(s, at) }) {
				t.Errorf("%s: node %d agrees at %+v, which it did not say", c.name, id, at)
			}
		}
		got.AgreeAt = nil
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.name, got, c.want)
		}
	}
}

// Goal: whoever has the state of a majority is never found to differ, whatever
// is missing from the reports; a node that differs, with a majority to say so, is
// found. Method: random groups in which each node has the right state, or a wrong
// one of its own from some index on, tells of random indexes, and some tell
// nothing, of another epoch, or of another number of tables.
func TestJudgeAtRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 9))
	found := 0
	for range 5000 {
		e := Electorate{}
		n := 1 + rng.IntN(7)
		for id := range uint64(n) {
			if id > 0 && rng.IntN(5) == 0 {
				e.Learners = append(e.Learners, id+1)
			} else {
				e.Voters = append(e.Voters, id+1)
			}
		}
		wrongFrom := map[uint64]uint64{} // by node: the index of its divergence
		for _, id := range e.all() {
			if rng.IntN(4) == 0 {
				wrongFrom[id] = 128 * uint64(1+rng.IntN(6))
			}
		}
		right := func(index uint64) []uint64 { return []uint64{index, index * 3} }
		reports := map[uint64][]router.Sums{}
		for _, id := range e.all() {
			if rng.IntN(6) == 0 {
				continue
			}
			epoch := uint64(0)
			if rng.IntN(10) == 0 {
				epoch = 1
			}
			for i := range uint64(8) {
				index := 128 * (i + 1)
				if rng.IntN(4) == 0 {
					continue
				}
				s := router.Sums{Index: index, Epoch: epoch, Sums: right(index)}
				if from, wrong := wrongFrom[id]; wrong && index >= from {
					s.Sums = []uint64{index, index*3 + id}
				}
				if epoch == 1 { // nothing there is as it was
					s.Sums[0]++
				}
				if rng.IntN(20) == 0 {
					s.Sums = append(s.Sums, 0)
				}
				reports[id] = append(reports[id], s)
			}
		}
		v := Judge(e, reports)
		found += len(v.Differ)
		rightVoters := 0
		for _, id := range e.Voters {
			if _, wrong := wrongFrom[id]; !wrong {
				rightVoters++
			}
		}
		for id, expected := range v.Differ {
			// A single voter is a majority, right or wrong.
			if _, wrong := wrongFrom[id]; !wrong && len(e.Voters) > 1 {
				t.Fatalf("node %d is right and was found to differ: %+v\n%v\n%+v", id, e, wrongFrom, v)
			}
			own := slices.IndexFunc(reports[id], func(s router.Sums) bool { return s.Index == expected.Index && s.Epoch == expected.Epoch })
			if own < 0 || slices.Equal(reports[id][own].Sums, expected.Sums) || len(reports[id][own].Sums) != len(expected.Sums) {
				t.Fatalf("node %d reported no other sums at %d than expected: %+v", id, expected.Index, v)
			}
		}
		for _, id := range v.Agree {
			if _, both := v.Differ[id]; both {
				t.Fatalf("node %d agrees and differs", id)
			}
		}
		if v.Split && (len(v.Sides) < 2 || v.SplitAt <= v.Index) {
			t.Fatalf("a split without two sides, or settled: %+v", v)
		}
		if v.Split && len(wrongFrom) == 0 {
			t.Fatalf("a split of equal nodes: %+v", v)
		}
		// The order of what is reported does not matter.
		shuffled := map[uint64][]router.Sums{}
		for id, list := range reports {
			list = slices.Clone(list)
			rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			shuffled[id] = list
		}
		e2 := Electorate{Voters: slices.Clone(e.Voters), Learners: slices.Clone(e.Learners)}
		slices.Reverse(e2.Voters)
		if again := Judge(e2, shuffled); !reflect.DeepEqual(v, again) {
			t.Fatalf("another order, another verdict:\n%+v\n%+v", v, again)
		}
		// Everybody reports the same points: a wrong one is found.
		full := map[uint64][]router.Sums{}
		for _, id := range e.all() {
			s := sumsAt(1024, 0, right(1024)...)
			if _, wrong := wrongFrom[id]; wrong {
				s.Sums = []uint64{1024, 3*1024 + id}
			}
			full[id] = []router.Sums{s}
		}
		if rightVoters > len(e.Voters)/2 {
			got := slices.Sorted(maps.Keys(Judge(e, full).Differ))
			want := slices.Sorted(maps.Keys(wrongFrom))
			if !slices.Equal(got, want) {
				t.Fatalf("found to differ: %v, do differ: %v of %+v", got, want, e)
			}
		}
	}
	if found == 0 {
		t.Error("nobody was ever found to differ: the test tests nothing")
	}
}

func TestSources(t *testing.T) {
	a, b := sumsAt(128, 0, 7), sumsAt(128, 0, 8)
	for _, c := range []struct {
		name    string
		agreed  []uint64
		reports map[uint64][]router.Sums
		want    []uint64
	}{
		{"both that agreed", []uint64{1, 2}, map[uint64][]router.Sums{1: {a}, 2: {a}, 3: {b}}, []uint64{1, 2}},
		{"one of them is away", []uint64{1, 2}, map[uint64][]router.Sums{2: {a}, 3: {b}}, []uint64{2}},
		{"one of them is wrong now", []uint64{1, 2}, map[uint64][]router.Sums{1: {a}, 2: {b}}, nil},
		{"only one that was not asked", []uint64{1, 2}, map[uint64][]router.Sums{4: {a}}, nil},
		{"the operator decided", nil, map[uint64][]router.Sums{1: {a}, 3: {b}}, []uint64{1}},
		{"the operator decided, the others differ", nil, map[uint64][]router.Sums{1: {a}, 2: {b}}, nil},
		{"they differed once", []uint64{1, 2}, map[uint64][]router.Sums{
			1: {a, sumsAt(256, 0, 9)}, 2: {b, sumsAt(256, 0, 9)}}, []uint64{1, 2}},
		{"not comparable", []uint64{1, 2}, map[uint64][]router.Sums{1: {a}, 2: {sumsAt(128, 1, 9)}}, []uint64{1, 2}},
	} {
		if got := Sources(3, c.agreed, c.reports); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// One comparison of five members, each of which remembers all it can.
func BenchmarkJudge(b *testing.B) {
	e := Electorate{Voters: []uint64{1, 2, 3, 4, 5}}
	reports := map[uint64][]router.Sums{}
	for _, id := range e.Voters {
		for i := range uint64(65) {
			s := router.Sums{Index: 128 * i, Sums: make([]uint64, len(router.SumTables()))}
			for j := range s.Sums {
				s.Sums[j] = i * uint64(j+1)
			}
			reports[id] = append(reports[id], s)
		}
	}
	for b.Loop() {
		if v := Judge(e, reports); len(v.Agree) != 5 {
			b.Fatal(v)
		}
	}
}
