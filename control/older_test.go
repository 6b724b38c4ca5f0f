package control

import (
	"errors"
	"slices"
	"testing"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Goal: a pipeline whose records are to go the other way round is turned in two
// steps: who is told to hand over to a sidecar that may still hand over to it hears so
// once that one has heard. Without the wait A, which beats last, hands records to B,
// and B hands them back.
func TestPipelineIsTurnedRound(t *testing.T) {
	turn := func(t *testing.T, then func(t *testing.T, r *replica, l *Liveness)) {
		r := newReplica(t, router.Options{})
		r.register("a", "here:source", "near:sink")
		r.register("b", "there:source", "far:sink")
		r.putPipeline("p", "here:source -> far:sink")
		r.inBubble(func(t *testing.T, l *Liveness) {
			r.setLeading(true)
			beat(l, 2*time.Minute, "a", "b") // whoever might hold an older table has heard
			r.expect("at first", "p", "here", "a")
			r.putPipeline("p", "there:source -> near:sink")
			beat(l, time.Second, "a", "b")
			r.expect("at once", "p", "near", "a")
			r.expect("until a has heard", "p", "there", "")
			held := r.placer.Held("p")
			if len(held) != 1 || held[0].Later != 1 || !slices.Equal(held[0].Stages, []string{"there"}) || !slices.Equal(held[0].Sidecars, []string{"a"}) {
				t.Fatalf("it does not say that it is not through: %+v", held)
			}
			if by := time.Until(held[0].HeardBy); by > 45*time.Second || by < 40*time.Second || len(r.placer.Held("q")) > 0 {
				t.Fatalf("a must have heard in %v; of another pipeline is held %v", by, r.placer.Held("q"))
			}
			then(t, r, l)
			r.expect("then", "p", "there", "b")
			if held := r.placer.Held(""); len(held) > 0 {
				t.Fatalf("it does not say that it is through: %+v", held)
			}
			before, plans := r.table(), r.planned()
			beat(l, 5*time.Minute, "a", "b")
			if r.table() != before || r.planned() != plans || len(r.handovers()) > 0 {
				t.Fatalf("it does not come to rest: %d plans more\n%s\n%v", r.planned()-plans, r.table(), r.handovers())
			}
		})
	}
	t.Run("confirmed", func(t *testing.T) {
		turn(t, func(t *testing.T, r *replica, l *Liveness) {
			r.applied("a")
			beat(l, time.Second, "a", "b")
		})
	})
	t.Run("in time", func(t *testing.T) {
		turn(t, func(t *testing.T, r *replica, l *Liveness) {
			beat(l, 43*time.Second, "a", "b")
			r.expect("nearly 45 s later", "p", "there", "")
			beat(l, 2*time.Second, "a", "b")
		})
	})
}

// Goal: a sidecar that is given back what it was told to let go of has not confirmed that
// it does not hold the older table any more. a has heard of nothing since it handed over
// to b, and b is not told to hand over to a meanwhile, whatever else is planned.
func TestTurnedRoundTwice(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "here:transform", "near:sink")
	r.register("b", "there:transform", "far:sink")
	r.putPipeline("p", "here:transform -> far:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 2*time.Minute, "a", "b")
		r.putPipeline("p", "there:transform -> near:sink")
		beat(l, time.Second, "a", "b")
		r.putPipeline("p", "there:transform -> here:transform -> near:sink")
		beat(l, time.Second, "a", "b")
		r.register("z", "other:sink")
		beat(l, time.Second, "a", "b", "z")
		r.expect("until a has heard", "p", "there", "")
		if q, _ := r.placer.Scores(); q.Quality.Placed+q.Quality.Pending != 3 || q.Quality.Pending == 0 {
			t.Fatalf("of three stages %d are placed and %d pending", q.Quality.Placed, q.Quality.Pending)
		}
		beat(l, time.Minute, "a", "b", "z")
		r.expect("then", "p", "there", "b")
	})
}

// handingOver runs test where a hands records of p over to b, and everybody has heard of it.
func handingOver(t *testing.T, test func(t *testing.T, r *replica, l *Liveness)) {
	r := newReplica(t, router.Options{})
	r.register("a", "here:source", "near:sink")
	r.register("b", "there:source", "far:sink")
	r.putPipeline("p", "here:source -> far:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 2*time.Minute, "a", "b")
		r.expect("at first", "p", "here", "a")
		test(t, r, l)
	})
}

// Goal: a sidecar that is expired when a plan comes that it is to confirm leaves nothing
// behind that could be confirmed, and when it is heard of again it has not heard of it.
func TestExpiredConfirmsNothing(t *testing.T) {
	handingOver(t, func(t *testing.T, r *replica, l *Liveness) {
		expire := func() {
			r.do(&commandpb.Command{TimeMs: uint64(time.Now().UnixMilli()), Op: &commandpb.Command_TransitionSidecar{
				TransitionSidecar: &commandpb.TransitionSidecar{SidecarId: "a", State: commandpb.SidecarState_SIDECAR_STATE_EXPIRED, GraceMs: 60_000},
			}})
		}
		expire()
		beat(l, 2*time.Minute, "a", "b") // the next time it keeps what it has for a while
		r.before = expire
		r.putPipeline("p", "there:source -> near:sink")
		beat(l, 30*time.Second, "a", "b")
		r.expect("at once", "p", "near", "a")
		r.expect("until a has heard", "p", "there", "")
		beat(l, 20*time.Second, "a", "b")
		r.expect("then", "p", "there", "b")
	})
}

// Goal: a pipeline that is deleted in the very entry of the log that holds a plan is not
// taken for a part of that plan: who handed over by its tables may still do so, until it
// has confirmed that it was deleted, or must have heard.
func TestDeletedInTheEntryOfAPlan(t *testing.T) {
	for _, confirms := range []bool{true, false} {
		handingOver(t, func(t *testing.T, r *replica, l *Liveness) {
			r.last = []*commandpb.Command{
				{TimeMs: uint64(time.Now().UnixMilli()), Op: &commandpb.Command_DeletePipeline{
					DeletePipeline: &commandpb.DeletePipeline{PipelineId: "p", ReleaseTimeoutMs: 45_000},
				}},
				{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: parsePipeline(t, "p", "there:source -> near:sink")}}},
			}
			r.putPipeline("q", "here:source -> near:sink")
			beat(l, 30*time.Second, "a", "b")
			r.expect("of the plan", "q", "here", "a")
			r.expect("until a has heard", "p", "there", "")
			if confirms {
				r.applied("a")
				beat(l, time.Second, "a", "b")
			} else {
				beat(l, 20*time.Second, "a", "b")
			}
			r.expect("then", "p", "there", "b")
		})
	}
}

// Goal: what a sidecar confirms in the very entry of the log that holds a plan is heard,
// and who waits for it does not wait any longer.
func TestConfirmedInTheEntryOfAPlan(t *testing.T) {
	handingOver(t, func(t *testing.T, r *replica, l *Liveness) {
		r.putPipeline("p", "there:source -> near:sink")
		beat(l, time.Second, "a", "b")
		r.expect("until a has heard", "p", "there", "")
		r.last = []*commandpb.Command{r.confirmation("a", r.fsm.Revision())}
		r.putPipeline("q", "here:source -> near:sink")
		beat(l, time.Second, "a", "b")
		r.expect("of the plan", "q", "here", "a")
		r.expect("then", "p", "there", "b")
	})
}

// Goal: what a state says was replaced counts for as long as is left by the time of that
// state, each for itself; after a restore all tables of the state before count, and those
// that were sent to it last. They are forgotten in the order of their times.
func TestOlderTablesOfBefore(t *testing.T) {
	r := newReplica(t, router.Options{})
	defer func() {
		if err := r.fsm.Close(); err != nil {
			t.Error(err)
		}
	}()
	r.register("a", "s:transform")
	r.register("b", "k:sink")
	r.assign("p", "s:transform -> k:sink")
	v := r.fsm.View()
	m, err := newMirror(v)
	if err := errors.Join(err, v.Close()); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	o := newOlderTables(45 * time.Second)
	m.replaced = []*commandpb.Assignment{{PipelineId: "p", SidecarId: "a", Replaced: []*commandpb.ReplacedHop{
		{SidecarId: "late", UntilMs: 30_000}, {SidecarId: "over", UntilMs: 10_000}, {SidecarId: "soon", UntilMs: 11_000},
	}}}
	holds := func(what string, want ...string) {
		t.Helper()
		var got []string
		for _, x := range o.of(m, "p", "a") {
			for _, s := range x.Stages {
				if s.Remote != "" {
					got = append(got, s.Remote)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s a may hand over to %v, want %v", what, got, want)
		}
	}
	o.load(m, 10_000, now)
	holds("at first", "soon", "late")
	o.restored(m, []*commandpb.AssignmentChange{{PipelineId: "p", SidecarId: "a", Stages: []*commandpb.StageAssignment{{StageId: "k", RemoteSidecarId: "sent"}}}}, now.Add(time.Second))
	o.expire(now.Add(time.Second))
	holds("behind the restore", "late", "b", "sent")
	o.expire(now.Add(45 * time.Second))
	holds("later", "b", "sent")
	o.expire(now.Add(46 * time.Second))
	holds("in the end")
	if len(o.by)+len(o.queue) > 0 {
		t.Fatalf("it remembers %v, %v", o.by, o.queue)
	}
}
