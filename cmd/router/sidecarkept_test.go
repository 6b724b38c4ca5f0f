package main

import (
	"testing"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// TestKeptBecause: what a drain says of a stage is of the sidecar that drains, and
// nothing when the stage has moved since.
func TestKeptBecause(t *testing.T) {
	drains := []*clusterpb.VerdictCount{{Verdict: "it drains", Count: 1}}
	for name, c := range map[string]struct {
		stage *clusterpb.ExplainedStage
		want  string
	}{
		"nobody else":   {&clusterpb.ExplainedStage{AsksFor: "x", Offering: 1, SidecarIds: []string{"a"}}, "nobody else offers x"},
		"others drain":  {&clusterpb.ExplainedStage{AsksFor: "x", Offering: 2, SidecarIds: []string{"a"}, Verdicts: drains}, "none of the others that offer x can take it: 1 because it drains"},
		"has moved":     {&clusterpb.ExplainedStage{AsksFor: "x", Offering: 2, SidecarIds: []string{"b"}, Verdicts: drains}, ""},
		"is waited for": {&clusterpb.ExplainedStage{AsksFor: "x", Offering: 2, Verdicts: drains}, ""},
	} {
		if got := keptBecause("a", c.stage); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
