package dev

import (
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

var escapes = regexp.MustCompile("\x1b\\[[0-9;?]*[a-zA-Z]")

// TestPictureFits: whatever the terminal's size, no line is longer than it and
// there are fewer lines than rows, so that the picture never scrolls.
func TestPictureFits(t *testing.T) {
	o := &Options{Nodes: 3, BasePort: 7100, DataDir: "data/dev", Command: "router", Color: true, Respawn: 10 * time.Second}
	ev := newEvents(nil)
	for range 50 {
		ev.add("something with a rather long description that goes on and on until it is longer than any line ought to be")
	}
	p := &picture{o: o, events: ev, observer: &observer{o: o}}
	for i := 1; i <= 3; i++ {
		p.nodes = append(p.nodes, &node{id: i, o: o, pid: 100 + i})
	}
	p.nodes[2].pid, p.nodes[2].back = 0, time.Now().Add(7*time.Second)
	p.sidecars = []*sidecar{{id: "demo/work-0", told: map[string]*sidecarpb.PipelineAssignment{
		"default/orders": {PipelineId: "default/orders", Stages: []*sidecarpb.StageAssignment{{StageId: "clean"}}},
	}}}
	p.observer.now = scene{
		nodes:  map[int]*adminpb.GetClusterStatusResponse{1: {NodeId: 1, Nodes: []*adminpb.NodeStatus{{NodeId: 1, Role: adminpb.NodeRole_NODE_ROLE_LEADER}}}},
		leader: 1, term: 3, seen: true,
		pipelines: []*adminpb.PipelineConfig{{Id: "default/orders", Enabled: true, Stages: []*adminpb.Stage{{Id: "clean"}, {Id: "lake"}}}},
		statuses:  []*adminpb.PipelineStatus{{Placements: []*adminpb.StagePlacement{{StageId: "clean", SidecarIds: []string{"demo/work-0"}}, {StageId: "lake", PendingReason: "nobody"}}}},
		sidecars:  []*clusterpb.SidecarInfo{{SidecarId: "demo/work-0", State: clusterpb.SidecarState_SIDECAR_STATE_SUSPECT}},
	}
	for _, size := range [][2]int{{200, 60}, {80, 24}, {20, 10}, {1, 2}} {
		text := escapes.ReplaceAllString(p.draw(size[0], size[1], time.Now()), "")
		lines := strings.Split(strings.TrimSuffix(text, "\r\n"), "\r\n")
		if len(lines) >= size[1] {
			t.Errorf("%d lines on a terminal of %d rows", len(lines), size[1])
		}
		for _, l := range lines {
			if utf8.RuneCountInString(l) > size[0] {
				t.Errorf("%d columns hold %q", size[0], l)
			}
		}
	}
	full := p.draw(200, 60, time.Now())
	for _, want := range []string{"node 1 leads, term 3", "leader", "down, back in", "suspect", "orders: clean", "lake@-", "kill -9 101", "WHAT HAPPENS"} {
		if !strings.Contains(escapes.ReplaceAllString(full, ""), want) {
			t.Errorf("the picture lacks %q:\n%s", want, full)
		}
	}
	small := escapes.ReplaceAllString(p.draw(80, 24, time.Now()), "")
	for _, want := range []string{"leader", "orders", "something", "kill -9 101", "Ctrl-C"} {
		if !strings.Contains(small, want) {
			t.Errorf("the picture of an ordinary terminal lacks %q:\n%s", want, small)
		}
	}
	o.Color = false
	if regexp.MustCompile("\x1b\\[[0-9]+m").MatchString(p.draw(200, 60, time.Now())) {
		t.Error("colours although they are off")
	}
}
