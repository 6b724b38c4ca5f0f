package fleet

import (
	"fmt"
	"strings"
	"testing"
)

// Goal: the fleet is what Config says: so many watchers, spread over the zones,
// and candidates for every pipeline in more than one zone.
func TestContent(t *testing.T) {
	c := content{sidecars: 900, pipelines: 90, watchers: 300, zones: 3}
	watchers, zones := 0, make(map[int]int)
	candidates := make(map[int]map[int]bool) // zones by pipeline, of pods that keep all edges local
	for i := range c.sidecars {
		if c.watches(i) {
			watchers++
			zones[c.zone(i)]++
		}
		r := c.registration(i, 0)
		if got, ok := sidecarIndex(r.GetSidecarId()); !ok || got != i {
			t.Fatalf("%s is sidecar %d", r.GetSidecarId(), got)
		}
		if c.registration(i, 1).GetSidecarEndpoint() == r.GetSidecarEndpoint() {
			t.Fatalf("%s has the same endpoint after a restart", r.GetSidecarId())
		}
		if got, want := r.GetLabels()["topology.kubernetes.io/zone"], fmt.Sprintf("zone-%d", c.zone(i)); got != want {
			t.Fatalf("%s says that it is in zone %q, and is in %q", r.GetSidecarId(), got, want)
		}
		for _, s := range r.GetLocalServices() {
			if strings.HasPrefix(s.GetServiceName(), "sink-") {
				p := i % c.pipelines
				if candidates[p] == nil {
					candidates[p] = make(map[int]bool)
				}
				candidates[p][c.zone(i)] = true
			}
		}
	}
	if watchers != c.watchers || len(zones) != c.zones {
		t.Errorf("%d watchers in %d zones", watchers, len(zones))
	}
	for p := range c.pipelines {
		if len(candidates[p]) != c.zones {
			t.Errorf("pipeline %d has candidates in the zones %v", p, candidates[p])
		}
	}
	if a, b := c.pipeline(1, 0), c.pipeline(1, 1); a.GetStages()[0].GetId() == b.GetStages()[0].GetId() {
		t.Error("two forms of a pipeline have equal stage ids")
	}
}
