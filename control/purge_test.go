package control

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// TestPurge: services that have been expired for the retention are removed, in batches;
// one that came back meanwhile is not.
func TestPurge(t *testing.T) {
	r := newReplica(t, router.Options{})
	ids := []string{"back"}
	for i := range 2*purgeBatch + 1 {
		id := fmt.Sprint("gone-", i)
		r.enlist(id, "filter", "", "1")
		ids = append(ids, id)
	}
	r.enlist("back", "filter", "", "1")
	expire := func(id string) {
		r.do(&commandpb.Command{TimeMs: uint64(time.Now().UnixMilli()), Op: &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
			ServiceId: id, State: commandpb.ServiceState_SERVICE_STATE_EXPIRED,
		}}})
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		l.c.Retention = time.Hour
		r.setLeading(true)
		synctest.Wait()
		for _, id := range ids[1:] {
			expire(id)
		}
		beatBoth(l, 30*time.Second, []string{"back"})
		expire("back")
		pass(l.c.Retention - 5*time.Minute)
		l.Touch("", "back")
		synctest.Wait()
		r.isThere("before the retention", ids[1], true)
		if n := l.Stats().Purged; n != 0 {
			t.Fatalf("%d were purged too early", n)
		}
		pass(10 * time.Minute)
		synctest.Wait()
		for _, id := range ids[1:] {
			r.isThere("after the retention", id, false)
		}
		r.isThere("it came back", "back", true)
		if n := l.Stats().Purged; n != uint64(len(ids)-1) {
			t.Fatalf("%d were purged, want %d", n, len(ids)-1)
		}
	})
}

// TestPurgeKeepsWhatASidecarReports: that a service is expired keeps its sidecar, which
// reports it for as long as it lives, from being given work for it.
func TestPurgeKeepsWhatASidecarReports(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("o", "orders:source")
	r.register("k", "lake:sink")
	r.register("a", "clean:transform")
	r.enlist("svc-a", "clean", "a", "1")
	r.putPipeline("p", threeStages)
	r.inBubble(func(t *testing.T, l *Liveness) {
		l.c.Retention = 10 * time.Minute
		r.setLeading(true)
		beatBoth(l, 5*time.Second, []string{"svc-a"}, "o", "k", "a")
		r.expect("at first", "p", "clean", "a")
		beat(l, 30*time.Minute, "o", "k", "a")
		r.isThere("while its sidecar reports it", "svc-a", true)
		r.expect("while it is silent", "p", "clean", "")
		r.do(&commandpb.Command{Op: &commandpb.Command_DeregisterSidecar{DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: "a"}}})
		beat(l, 30*time.Minute, "o", "k")
		r.isThere("when its sidecar is gone", "svc-a", false)
	})
}
