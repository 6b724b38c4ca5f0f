package server

import (
	"testing"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/config"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// TestLeasesOutliveTheirLeader: the other nodes hold what the leader knows of the
// leases while it leads and when it hands over, and the next one goes on from
// there.
func TestLeasesOutliveTheirLeader(t *testing.T) {
	_, nodes := startCluster(t, 3, func(c *config.Config) { steady(c); c.Liveness.HeartbeatInterval = 200 * time.Millisecond })
	lead := leader(t, nodes...)
	reply, err := sidecarpb.NewSidecarCoordinatorClient(dial(t, lead.Addr())).RegisterSidecar(within(t), &sidecarpb.RegisterSidecarRequest{
		SidecarId: "ns/one", PodName: "one", Namespace: "ns", SidecarEndpoint: "10.0.0.1:50053",
	}, grpc.WaitForReady(true))
	if err != nil || !reply.GetSuccess() {
		t.Fatal(reply, err)
	}
	var rest []*Server
	for _, s := range nodes {
		if s != lead {
			rest = append(rest, s)
		}
	}
	ctx := within(t)
	until := func(what string, ok func() bool) {
		t.Helper()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for !ok() {
			select {
			case <-ctx.Done():
				t.Fatalf("still waiting: %s", what)
			case <-tick.C:
			}
		}
	}
	for _, s := range rest {
		until("a digest", func() bool { return s.metrics()["leases_digests_taken_total"] > 0 })
	}
	stop(t, lead)
	next := leader(t, rest...)
	until("the next leader goes on", func() bool {
		m := next.metrics()
		return m["leases_digests_used_total"] == 1 && m["leases_sidecars_present"] == 1
	})
	for _, s := range rest {
		stop(t, s)
	}
}
