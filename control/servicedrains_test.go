package control

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// enlist registers a service behind a sidecar.
func (r *replica) enlist(id, name, sidecar, registration string) {
	r.t.Helper()
	r.do(&commandpb.Command{Op: &commandpb.Command_RegisterService{RegisterService: &commandpb.RegisterService{
		Service: &commandpb.Service{ServiceId: id, Name: name, SidecarId: sidecar, RegistrationId: registration, Type: commandpb.ServiceType_SERVICE_TYPE_TRANSFORM},
	}}})
}

func (r *replica) drainService(id string, timeout time.Duration) {
	r.t.Helper()
	r.do(&commandpb.Command{TimeMs: uint64(time.Now().UnixMilli()), Op: &commandpb.Command_DrainService{
		DrainService: &commandpb.DrainService{ServiceId: id, TimeoutMs: uint64(timeout.Milliseconds())},
	}})
}

func (r *replica) service(id string) *commandpb.Service {
	r.t.Helper()
	v := r.fsm.View()
	defer v.Close()
	s, err := v.Service(id)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *replica) isThere(what, id string, want bool) {
	r.t.Helper()
	synctest.Wait()
	if got := r.service(id) != nil; got != want {
		r.t.Fatalf("%s: service %s is there: %v, want %v", what, id, got, want)
	}
}

// beatBoth is beat for sidecars and a few services.
func beatBoth(l *Liveness, d time.Duration, services []string, sidecars ...string) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		for _, s := range services {
			l.Touch("", s)
		}
		beat(l, time.Second, sidecars...)
	}
}

// TestServiceDrains: what a service runs that drains goes to another that can run it,
// and nothing new comes; then it is removed. One whose stage nobody else can run keeps
// it until its time is over, and one that registers again is not removed.
func TestServiceDrains(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("o", "orders:source")
	r.register("k", "lake:sink")
	r.register("a", "clean:transform")
	r.enlist("svc-a", "clean", "a", "1")
	r.putPipeline("p", threeStages)
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "k", "o"}
		r.setLeading(true)
		beatBoth(l, time.Second, []string{"svc-a"}, all...)
		r.expect("at first", "p", "clean", "a")
		r.drainService("svc-a", time.Minute)
		beatBoth(l, 10*time.Second, []string{"svc-a"}, all...)
		r.expect("while nobody else can", "p", "clean", "a")
		r.isThere("while it serves", "svc-a", true)
		r.register("b", "clean:transform")
		beatBoth(l, time.Second, []string{"svc-a"}, all...)
		r.expect("when another can", "p", "clean", "b")
		r.isThere("before its sidecar has let go", "svc-a", true)
		r.applied("a")
		beatBoth(l, time.Second, []string{"svc-a"}, all...)
		r.isThere("when it has nothing left", "svc-a", false)

		r.enlist("svc-b", "clean", "b", "1")
		beatBoth(l, time.Second, []string{"svc-b"}, all...)
		r.do(&commandpb.Command{Op: &commandpb.Command_DeregisterSidecar{DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: "a"}}})
		r.drainService("svc-b", 20*time.Second)
		beatBoth(l, 10*time.Second, []string{"svc-b"}, all...)
		r.enlist("svc-b", "clean", "b", "2")
		beatBoth(l, 20*time.Second, []string{"svc-b"}, all...)
		r.isThere("registered again", "svc-b", true)
		r.drainService("svc-b", 20*time.Second)
		beatBoth(l, 18*time.Second, []string{"svc-b"}, all...)
		r.isThere("before its time is over", "svc-b", true)
		beatBoth(l, 4*time.Second, []string{"svc-b"}, all...)
		r.isThere("after its time", "svc-b", false)
	})
}

// TestServiceDrainOfAGroup: a member that drains is removed once it has left its
// groups, at once when it holds nothing, and when it falls silent.
func TestServiceDrainOfAGroup(t *testing.T) {
	r := newReplica(t, router.Options{})
	for _, id := range []string{"m", "idle", "silent"} {
		r.enlist(id, "filter", "", "1")
	}
	join := func(id string) {
		r.do(&commandpb.Command{Op: &commandpb.Command_JoinGroup{JoinGroup: &commandpb.JoinGroup{ServiceId: id, GroupId: "g", PartitionCount: 2}}})
	}
	join("m")
	join("silent")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beatBoth(l, time.Second, []string{"m", "idle", "silent"})
		for _, id := range []string{"m", "idle", "silent"} {
			r.drainService(id, 10*time.Minute)
		}
		beatBoth(l, time.Second, []string{"m", "silent"})
		r.isThere("it holds nothing", "idle", false)
		beatBoth(l, 30*time.Second, []string{"m"})
		r.isThere("it has partitions", "m", true)
		r.isThere("it has partitions", "silent", true)
		if n := r.placer.Stats().DrainingServices; n != 2 {
			t.Fatalf("%d services drain", n)
		}
		beatBoth(l, 30*time.Second, []string{"m"})
		r.isThere("it is expired", "silent", false)
		r.do(&commandpb.Command{Op: &commandpb.Command_LeaveGroup{LeaveGroup: &commandpb.LeaveGroup{ServiceId: "m", GroupId: "g"}}})
		beatBoth(l, time.Second, []string{"m"})
		r.isThere("it has left", "m", false)
	})
}

// TestServiceDrainSurvivesTheLeader: the next leaders forget neither the drain nor how
// much of its time is left, whatever their time of day.
func TestServiceDrainSurvivesTheLeader(t *testing.T) {
	for _, jump := range []time.Duration{0, -30 * time.Minute, 30 * time.Minute} {
		t.Run(jump.String(), func(t *testing.T) {
			r := newReplica(t, router.Options{})
			r.jump = jump
			r.enlist("m", "filter", "", "1")
			r.do(&commandpb.Command{Op: &commandpb.Command_JoinGroup{JoinGroup: &commandpb.JoinGroup{ServiceId: "m", GroupId: "g", PartitionCount: 2}}})
			r.inBubble(func(t *testing.T, l *Liveness) {
				r.drainService("m", time.Minute)
				r.setLeading(true)
				beatBoth(l, 20*time.Second, []string{"m"})
				r.setLeading(false)
				pass(time.Second)
				r.setLeading(true)
				beatBoth(l, 20*time.Second, []string{"m"})
				r.isThere("under the next leader", "m", true)
				beatBoth(l, 45*time.Second, []string{"m"})
				r.isThere("after its time", "m", false)
			})
		})
	}
}

// TestDrainedServiceGetsNothingBack: a service that has drained and is removed is given
// nothing of what it has let go of, though its sidecar has reported it and there is
// nobody else to run the second instance. Once the sidecar registers again, it is.
func TestDrainedServiceGetsNothingBack(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("o", "orders:source")
	r.register("k", "lake:sink")
	r.register("a", "clean:transform")
	r.register("b", "clean:transform")
	r.enlist("svc-a", "clean", "a", "1")
	r.putPipeline("p", threeStages)
	v := r.fsm.View()
	p, err := v.Pipeline("p")
	if err := errors.Join(err, v.Close()); err != nil {
		t.Fatal(err)
	}
	for _, s := range p.Spec.Stages {
		if s.Id == "clean" {
			s.Parallelism = 2
		}
	}
	r.do(&commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: p.Spec}}})
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "k", "o"}
		r.setLeading(true)
		beatBoth(l, time.Second, []string{"svc-a"}, all...)
		r.expect("at first", "p", "clean", "a b")
		r.drainService("svc-a", time.Minute)
		beatBoth(l, time.Second, []string{"svc-a"}, all...)
		r.applied("a")
		beatBoth(l, 5*time.Second, []string{"svc-a"}, all...)
		r.isThere("when it has nothing left", "svc-a", false)
		r.expect("when it is removed", "p", "clean", "b")
		r.register("a", "clean:transform")
		beatBoth(l, 5*time.Second, nil, all...)
		r.expect("when its sidecar has registered again", "p", "clean", "a b")
	})
}

// TestManyDrainedServicesHoldUpNothing: a pipeline that comes while a thousand services
// go is placed before they are all gone.
func TestManyDrainedServicesHoldUpNothing(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("o", "orders:source")
	r.register("k", "lake:sink")
	r.register("a", "clean:transform")
	ids := make([]string, 1000)
	for i := range ids {
		ids[i] = fmt.Sprintf("m%04d", i)
		r.enlist(ids[i], "filter", "", "1")
	}
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, time.Second, "o", "k", "a")
		for _, id := range ids {
			r.drainService(id, 10*time.Minute)
		}
		r.putPipeline("p", threeStages)
		for r.runs("p", "clean") == "" {
			pass(time.Millisecond)
		}
		if r.service(ids[len(ids)-1]) == nil {
			t.Fatal("all that go are removed before the pipeline is placed")
		}
		beat(l, time.Minute, "o", "k", "a")
		for _, id := range ids {
			r.isThere("in the end", id, false)
		}
	})
}
