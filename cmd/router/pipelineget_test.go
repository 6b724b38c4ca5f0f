package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// Goal: a stage that runs on hundreds of sidecars takes a line of an ordinary length,
// which says how many there are and how to see them; as a document all are there.
func TestWideStageIsShort(t *testing.T) {
	var ids []string
	for i := range 500 {
		ids = append(ids, fmt.Sprintf("fleet/pod-%06d", i))
	}
	config := &adminpb.PipelineConfig{Id: "p", Enabled: true, Stages: []*adminpb.Stage{{Id: "s"}}}
	st := &adminpb.PipelineStatus{Placements: []*adminpb.StagePlacement{{StageId: "s", SidecarIds: ids, Draining: ids[:100], Releasing: ids[:2]}}}
	shown := func(limit int) string {
		t.Helper()
		var out bytes.Buffer
		if err := printPipeline(&app{stdout: &out}, config, st, nil, nil, limit); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	few := shown(2)
	const where = "fleet/pod-000000,fleet/pod-000001 and 498 more (draining: fleet/pod-000000,fleet/pod-000001 and 98 more) (waits for fleet/pod-000000,fleet/pod-000001)"
	if !strings.Contains(few, where) || !strings.Contains(few, "give a higher --limit, or -o json") {
		t.Error(few)
	}
	if all := shown(500); !strings.Contains(all, ids[499]) || strings.Contains(all, "more") || strings.Contains(all, "--limit") {
		t.Error(all)
	}
	var out bytes.Buffer
	format := output.Table
	if err := format.Set("json"); err != nil {
		t.Fatal(err)
	}
	if err := output.Document(&out, format, shownPipeline{config, statusOf(st, nil, []string{"1 move waits"})}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{ids[499], `"stage_id": "s"`, `"held_back": [`, "1 move waits"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is not in the document", want)
		}
	}
}

// Goal: of silent sidecars that are held back it is said from when on they are given up,
// and when the last one is; while that is under way, since when.
func TestHeldExpiriesSayWhen(t *testing.T) {
	now := time.Unix(1000, 0)
	at := func(s int64) *timestamppb.Timestamp { return timestamppb.New(now.Add(time.Duration(s) * time.Second)) }
	for _, c := range []struct {
		held *clusterpb.GetPlacementHoldsResponse
		want string
	}{
		{&clusterpb.GetPlacementHoldsResponse{}, ""},
		{&clusterpb.GetPlacementHoldsResponse{ExpiriesHeld: 1, ExpiriesHeldUntil: at(60), ExpiriesHeldLast: at(70)},
			"1 silent sidecar is not given up before 1970-01-01T00:17:40Z, since too many fell silent at once; sooner if most come back"},
		{&clusterpb.GetPlacementHoldsResponse{ExpiriesHeld: 3, ExpiriesHeldUntil: at(60), ExpiriesHeldLast: at(70)},
			"3 silent sidecars are not given up before 1970-01-01T00:17:40Z, then one after another, the last by 1970-01-01T00:17:50Z, since too many fell silent at once; sooner if most come back"},
		{&clusterpb.GetPlacementHoldsResponse{ExpiriesHeld: 3, ExpiriesHeldUntil: at(60)}, // of an older node
			"3 silent sidecars are not given up before 1970-01-01T00:17:40Z, since too many fell silent at once; sooner if most come back"},
		{&clusterpb.GetPlacementHoldsResponse{ExpiriesHeld: 2, ExpiriesHeldUntil: at(-60), ExpiriesHeldLast: at(70)},
			"2 silent sidecars are given up one after another since 1970-01-01T00:15:40Z, the last by 1970-01-01T00:17:50Z: too many fell silent at once"},
	} {
		if got := strings.Join(heldLines(c.held, true, now), "|"); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
		if got := heldLines(c.held, false, now); len(got) != 0 {
			t.Errorf("of a pipeline that none of them runs: %q", got)
		}
	}
}

// Goal: what is left out of a list is counted in grammar.
func TestListedCounts(t *testing.T) {
	for total, want := range map[int]string{0: "", 1: "  1 more edge is not shown; give a higher --limit\n", 2: "  2 more edges are not shown; give a higher --limit\n"} {
		var out bytes.Buffer
		if err := listed(&out, &output.Grid{}, total, "edge", "edges"); err != nil || out.String() != want {
			t.Errorf("%q, want %q (%v)", &out, want, err)
		}
	}
}
