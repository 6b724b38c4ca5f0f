package router

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"conveyor.etl/router/router/commandpb"
)

// Goal: of a sidecar with too many revocations the oldest is forgotten with each new one,
// unless somebody waits for it, also when one command makes many and gives some back.
func TestOldestRevocationIsForgotten(t *testing.T) {
	r := randomness(t)
	s := openMem(t)
	const pipelines = maxRevokedPerSidecar + 100
	pipe := func(i int) string { return fmt.Sprintf("p%03d", i) }
	for i := range pipelines {
		do(t, s, fmt.Sprintf(`put_pipeline { spec { id: %q enabled: true stages { id: "in" type: STAGE_TYPE_SOURCE parallelism: 1000 } } }`, pipe(i)))
	}
	for i := range 2 {
		do(t, s, fmt.Sprintf(`register_sidecar { sidecar { sidecar_id: "s%d" endpoint: "a:1" } }`, i))
	}
	type held struct {
		revoked    bool
		generation uint64
	}
	model := map[string]map[string]*held{"s0": {}, "s1": {}} // by sidecar and pipeline
	waits := map[string]bool{}
	forgotten := 0
	revoke := func(sidecar, pipeline string, revision uint64) {
		a := model[sidecar][pipeline]
		if a == nil || a.revoked {
			return
		}
		a.revoked, a.generation = true, max(a.generation+1, revision)
		oldest, n := "", 0
		for _, p := range slices.Sorted(maps.Keys(model[sidecar])) {
			if h := model[sidecar][p]; h.revoked {
				if n++; oldest == "" || h.generation < model[sidecar][oldest].generation {
					oldest = p
				}
			}
		}
		if n > maxRevokedPerSidecar && !waits[HandoverKey(oldest, sidecar)] {
			delete(model[sidecar], oldest)
			forgotten++
		}
	}
	check := func() {
		t.Helper()
		v := s.View()
		defer v.Close()
		got := map[string]map[string]*held{"s0": {}, "s1": {}}
		noError(t, v.AllAssignments(func(a *commandpb.Assignment) bool {
			got[a.SidecarId][a.PipelineId] = &held{a.Revoked, a.Generation}
			return true
		}))
		for sc := range got {
			if w, g := model[sc], got[sc]; !maps.EqualFunc(w, g, func(a, b *held) bool { return *a == *b }) {
				t.Fatalf("%s has %d, want %d", sc, len(g), len(w))
			}
		}
		checkCounts(t, s)
	}
	for round := range 40 {
		a := &commandpb.ApplyAssignments{}
		most := round%4 > 1 // of the changes revoke
		revision := s.Applied().Index + 1
		for range 1 + r.Intn(400) {
			c := &commandpb.AssignmentChange{
				SidecarId: fmt.Sprint("s", r.Intn(2)), PipelineId: pipe(r.Intn(pipelines)), SidecarGeneration: 1, PipelineVersion: 1, Revoke: (r.Intn(10) > 0) == most,
			}
			was, k := model[c.SidecarId][c.PipelineId], HandoverKey(c.PipelineId, c.SidecarId)
			if c.Revoke {
				wait := was != nil && !was.revoked && r.Intn(200) == 0
				if wait {
					c.Releases, c.ReleaseTimeoutMs = []string{"in"}, 1000
				}
				waits[k] = waits[k] || wait
				revoke(c.SidecarId, c.PipelineId, revision)
			} else {
				c.Stages = []*commandpb.StageAssignment{{StageId: "in"}}
				switch {
				case was == nil:
					model[c.SidecarId][c.PipelineId] = &held{false, revision}
				case was.revoked:
					was.revoked, was.generation = false, max(was.generation+1, revision)
				}
				delete(waits, k)
			}
			a.Changes = append(a.Changes, c)
		}
		if res := apply(t, s, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: a}})[0]; res.Rejection != nil || res.Stale > 0 {
			t.Fatal(text(res))
		}
		check()
	}
	if forgotten < 100 {
		t.Fatalf("only %d were forgotten", forgotten)
	}
	sound(t, s)
	revision := s.Applied().Index + 1
	for _, p := range slices.Sorted(maps.Keys(model["s0"])) {
		if model["s0"][p] != nil {
			revoke("s0", p, revision)
		}
	}
	do(t, s, `deregister_sidecar { sidecar_id: "s0" }`)
	check()
	fields := (&commandpb.Assignment{}).ProtoReflect().Descriptor().Fields()
	if f, g := fields.ByNumber(assignmentRevokedField), fields.ByNumber(assignmentGenerationField); f.Name() != "revoked" || g.Name() != "generation" {
		t.Errorf("the fields are %v and %v", f, g)
	}
}

// BenchmarkDeregisterMany removes a sidecar that runs n pipelines, as a replica applies
// it: all but 64 of the revocations are forgotten at once.
func BenchmarkDeregisterMany(b *testing.B) {
	for _, n := range []int{1000, 2000, 10_000} {
		b.Run(fmt.Sprint("pipelines=", n), func(b *testing.B) {
			s := benchFSM(b)
			a := &commandpb.ApplyAssignments{}
			for i := range n {
				id := fmt.Sprintf("p%05d", i)
				do(b, s, fmt.Sprintf(`put_pipeline { spec { id: %q enabled: true stages { id: "in" type: STAGE_TYPE_SOURCE parallelism: 1 } } }`, id))
				a.Changes = append(a.Changes, &commandpb.AssignmentChange{
					SidecarId: "s", PipelineId: id, SidecarGeneration: 1, PipelineVersion: 1, Stages: []*commandpb.StageAssignment{{StageId: "in"}},
				})
			}
			for b.Loop() {
				b.StopTimer()
				do(b, s, `register_sidecar { sidecar { sidecar_id: "s" endpoint: "a:1" } }`)
				if res := apply(b, s, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: a}})[0]; res.Rejection != nil || res.Stale > 0 {
					b.Fatal(text(res))
				}
				b.StartTimer()
				do(b, s, `deregister_sidecar { sidecar_id: "s" }`)
			}
		})
	}
}

// TestRevocationIsKeptForItsHandover: of many revocations in one command none is
// forgotten that a sidecar has yet to let go by, whatever order they come in: a node that
// has never spoken to the sidecar could not tell it, and would give the stage to another
// one at the deadline, while it goes on.
func TestRevocationIsKeptForItsHandover(t *testing.T) {
	for name, order := range map[string]func(i, n int) int{
		"ascending": func(i, _ int) int { return i }, "descending": func(i, n int) int { return n - 1 - i },
	} {
		t.Run(name, func(t *testing.T) {
			s := openMem(t)
			const n = maxRevokedPerSidecar + 3
			do(t, s, `register_sidecar { sidecar { sidecar_id: "s" endpoint: "a:1" } }`)
			give, take := &commandpb.ApplyAssignments{Handovers: true}, &commandpb.ApplyAssignments{Handovers: true}
			for i := range n {
				id := fmt.Sprintf("p%03d", order(i, n))
				do(t, s, fmt.Sprintf(`put_pipeline { spec { id: %q enabled: true stages { id: "in" type: STAGE_TYPE_SOURCE parallelism: 1 } } }`, id))
				change := func() *commandpb.AssignmentChange {
					return &commandpb.AssignmentChange{SidecarId: "s", PipelineId: id, SidecarGeneration: 1, PipelineVersion: 1}
				}
				a, b := change(), change()
				a.Stages = []*commandpb.StageAssignment{{StageId: "in"}}
				b.Revoke, b.Releases, b.ReleaseTimeoutMs = true, []string{"in"}, 60_000
				give.Changes, take.Changes = append(give.Changes, a), append(take.Changes, b)
			}
			for _, c := range []*commandpb.ApplyAssignments{give, take} {
				if res := apply(t, s, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: c}})[0]; res.Rejection != nil || res.Stale > 0 {
					t.Fatal(text(res))
				}
			}
			v := s.View()
			defer v.Close()
			revoked := 0
			noError(t, v.AllAssignments(func(a *commandpb.Assignment) bool {
				h, err := v.Handover(a.PipelineId, "s")
				noError(t, err)
				if a.Revoked && h != nil {
					revoked++
				}
				return true
			}))
			if revoked != n {
				t.Errorf("of %d stages to let go of the state still tells of %d", n, revoked)
			}
		})
	}
}

// TestDrainHastensWhatWasToldBefore: a drain is over by its deadline, also what the
// sidecar was told to let go of before with more time; a later one changes nothing.
func TestDrainHastensWhatWasToldBefore(t *testing.T) {
	s := openMem(t)
	do(t, s, `register_sidecar { sidecar { sidecar_id: "s" endpoint: "a:1" } }`)
	for _, id := range []string{"p", "q"} {
		do(t, s, fmt.Sprintf(`put_pipeline { spec { id: %q enabled: true stages { id: "in" type: STAGE_TYPE_SOURCE parallelism: 1 } } }`, id))
		do(t, s, fmt.Sprintf(`apply_assignments { handovers: true changes { sidecar_id: "s" pipeline_id: %q sidecar_generation: 1 pipeline_version: 1 stages { stage_id: "in" } } }`, id))
	}
	do(t, s, `time_ms: 1000 apply_assignments { handovers: true changes { sidecar_id: "s" pipeline_id: "p" sidecar_generation: 1 revoke: true releases: "in" release_timeout_ms: 60000 } }`)
	do(t, s, `time_ms: 1000 apply_assignments { handovers: true changes { sidecar_id: "s" pipeline_id: "q" sidecar_generation: 1 revoke: true releases: "in" release_timeout_ms: 2000 } }`)
	deadlines := func(p, q uint64) {
		t.Helper()
		v := s.View()
		defer v.Close()
		for id, want := range map[string]uint64{"p": p, "q": q} {
			h, err := v.Handover(id, "s")
			noError(t, err)
			if got := h.GetReleases()[0].DeadlineMs; got != want {
				t.Errorf("%s is let go of by %d, want %d", id, got, want)
			}
		}
	}
	deadlines(61_000, 3_000)
	do(t, s, `time_ms: 2000 drain_sidecar { sidecar_id: "s" }`)
	deadlines(61_000, 3_000)
	do(t, s, `time_ms: 2000 drain_sidecar { sidecar_id: "s" timeout_ms: 5000 }`)
	deadlines(7_000, 3_000)
	do(t, s, `time_ms: 2500 drain_sidecar { sidecar_id: "s" timeout_ms: 50000 }`)
	deadlines(7_000, 3_000)
	do(t, s, `time_ms: 2500 drain_sidecar { sidecar_id: "s" timeout_ms: 100 }`)
	deadlines(2_600, 2_600)
	checkCounts(t, s)
}
