package control

import (
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// TestPlacerFollowsServices: a registration that comes, moves to another sidecar
// and goes after the placer has read the state is heard of, as is a sidecar whose
// services were registered before it was.
func TestPlacerFollowsServices(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source", "clean:transform")
	spec := parsePipeline(t, "p", "orders:source -> clean:transform")
	spec.Stages[1].Selector.Labels = map[string]string{"zone": "west"}
	r.do(&commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: spec}}})
	on := func(sidecar, id string) {
		r.do(&commandpb.Command{Op: &commandpb.Command_RegisterService{RegisterService: &commandpb.RegisterService{Service: &commandpb.Service{
			ServiceId: "clean-west", Name: "clean", Type: commandpb.ServiceType_SERVICE_TYPE_TRANSFORM, SidecarId: sidecar,
			RegistrationId: id, Labels: map[string]string{"zone": "west"}, Endpoint: &commandpb.Endpoint{Host: "10.0.0.1", Port: 7},
		}}}})
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		step := func(what, want string) {
			t.Helper()
			pass(time.Second)
			synctest.Wait()
			if got := r.table(); got != want {
				t.Fatalf("%s:\n%swant:\n%s", what, got, want)
			}
		}
		step("without a registration", "nothing is assigned\n")
		on("a", "one")
		step("registered on a", "p a: orders=127.0.0.1:9001 clean=127.0.0.1:9002 (all stages here)\n")
		on("b", "two")
		step("moved to b, which is not known", "nothing is assigned\n")
		r.register("b", "lake:sink")
		step("b has come", "p a: orders=127.0.0.1:9001 clean@b(b:50053)\np b: clean=10.0.0.1:7\n")
		r.do(&commandpb.Command{Op: &commandpb.Command_DeregisterService{DeregisterService: &commandpb.DeregisterService{ServiceId: "clean-west"}}})
		step("deregistered", "nothing is assigned\n")
	})
}

// TestPlacerKeepsItsPlace: a plan of more changes than are kept for subscribers is
// carried out without losing track of them, and what others change meanwhile is
// planned for before anything is waited for.
func TestPlacerKeepsItsPlace(t *testing.T) {
	r := bigFleet(t, router.Options{HistoryBytes: 32 << 10}, 400, 4, 1)
	defer func() {
		if err := r.fsm.Close(); err != nil {
			t.Error(err)
		}
	}()
	w := watching(t, r)
	w.c.ChunkChanges = 20
	w.step(t)
	r.chain(t, "fleet/wide", "", 400, "wide-source", "wide-sink")
	r.before = func() { // the first command of the plan
		r.chain(t, "fleet/late", "", 1, "wide-source", "wide-sink")
	}
	if changes := w.step(t); changes < 401 {
		t.Fatalf("%d changes", changes)
	}
	if others, err := drain(w.m, w.sub, nil); others || err != nil {
		t.Fatalf("the placer lost its place or left something behind: %v", err)
	}
	if runs := w.m.engine.Explain("fleet/late", placement.Query{}); len(runs) != 2 || len(runs[0].Sidecars) != 1 {
		t.Fatalf("what was applied meanwhile was not planned for: %+v", runs)
	}
}
